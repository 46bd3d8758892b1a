"""The command `sakd` as a child process that saves its state and ends when its parent is gone

`python -m sakd_cli.cli.child PID WORDS`, where PID is the parent's.
"""

import ctypes
import os
import signal
import sys
import threading
import time

PATIENCE = 8  # seconds in which a step is finished and saved
SET_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of prctl(2)


def bound_to(parent: int) -> None:
    """Have the kernel send SIGTERM when the parent dies, however it dies; on Linux only."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(SET_DEATH_SIGNAL, signal.SIGTERM)
    if os.getppid() != parent:  # it died before
        sys.exit(128 + signal.SIGTERM)


def bound_to_launcher() -> None:
    """Under torchrun, as `bound_to`; a process that waits for another one meanwhile ends after `PATIENCE` seconds."""
    if "TORCHELASTIC_RUN_ID" not in os.environ or sys.platform != "linux":
        return
    parent = os.getppid()
    bound_to(parent)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        time.sleep(PATIENCE)
        os._exit(128 + signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    bound_to(int(sys.argv.pop(1)))
    # By these Slurm tells all processes of a job that its time is up; submitit has it queued again, with a SIGTERM.
    for name in ("SIGUSR1", "SIGUSR2"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    from sakd_cli.cli.app import main

    main()
