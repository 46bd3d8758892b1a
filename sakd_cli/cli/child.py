"""The command `sakd` as a child process that saves its state and ends when its parent is gone"""

import ctypes
import os
import signal
import sys

from sakd_cli.cli.app import main

SET_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of prctl(2)


def bound_to_parent() -> None:
    """Have the kernel send SIGTERM when the parent dies, however it dies; on Linux only."""
    if sys.platform != "linux":
        return
    parent = os.getppid()
    ctypes.CDLL(None).prctl(SET_DEATH_SIGNAL, signal.SIGTERM)
    if os.getppid() != parent:  # it died in between
        sys.exit(128 + signal.SIGTERM)


if __name__ == "__main__":
    bound_to_parent()
    main()
