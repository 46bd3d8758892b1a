"""What the process of a command needs around it: open streams, signals, enough memory for torch, an end at once."""

import atexit
import importlib
import io
import logging
import multiprocessing
import os
import re
import signal
import sys
from contextlib import suppress
from importlib.abc import MetaPathFinder
from typing import Any, TextIO, cast

from sakd_cli.cli.child import bound_to_launcher
from sakd_cli.cli.console import complain
from sakd_cli.errors import MemoryLimitError
from sakd_cli.torchrun import requested_world_size

ENOUGH = 8 * 2**30  # bytes of address space in which PyTorch of any kind can be imported
WIDEST = 1000  # columns; rich and typer take any number


class Terminated(BaseException):
    """SIGTERM, as an exception that no `except Exception` swallows."""


def _terminate(signum: int, frame: object) -> None:
    raise Terminated


def prepare() -> None:
    """To be called first: SIGTERM is an exception from here on, and there are streams to write to."""
    signal.signal(signal.SIGTERM, _terminate)
    bound_to_launcher()
    _three_streams()
    for name in {"COLUMNS", "LINES", "TERMINAL_WIDTH"} & os.environ.keys():
        size = os.environ[name]
        os.environ[name] = str(min(int(size), WIDEST) or "") if re.fullmatch("[0-9]{1,9}", size) else ""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a path may hold what the terminal's encoding has not
            stream.reconfigure(errors="backslashreplace")
    sys.stderr = cast("TextIO", Forgiving(sys.stderr))
    if requested_world_size() > 1:  # each would advise on DistributedDataParallel's settings
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # that it keeps its cache elsewhere is nobody's news
    sys.meta_path.insert(0, AbortingTorch())


class Forgiving:
    """A stream for messages: what cannot be written (a full disk, a terminal that is gone) ends no work."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with suppress(OSError, ValueError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            self._stream.flush()

    def close(self) -> None:
        """Stays open: errors are still to be told."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def somewhere() -> bool:
    """Whether there is a folder for sakd's presets, and a current one; without it torch's libraries abort."""
    try:
        os.stat(os.getcwd())
    except OSError:
        complain("the current folder is no longer there, or its path is too long", "cd into another")
        return False
    if not (found := os.path.isdir(os.path.dirname(__file__))):
        complain("sakd cannot be used from within a zip file", "pip install it")
    return found


def _three_streams() -> None:
    """Open what was closed: the next file would take its number, and all that is printed would go there."""
    for handle in range(3):
        try:
            os.fstat(handle)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    for handle, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(handle, "w" if handle else "r", closefd=False))


class AbortingTorch(MetaPathFinder):
    """Sees whether torch can be imported within a limit of the address space (`ulimit -v`): it may abort the process.

    Then MemoryLimitError, where nobody could be told any more. A child tries it where the limit is small enough.
    """

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> None:
        if fullname != "torch" or self not in sys.meta_path:
            return
        sys.meta_path.remove(self)
        if sys.platform == "win32":
            return
        import resource

        most = resource.getrlimit(resource.RLIMIT_AS)[0]
        if not 0 <= most < ENOUGH:
            return
        if (child := os.fork()) == 0:
            with suppress(BaseException):
                resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
                os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
                importlib.import_module("torch")
                importlib.import_module("torchvision")
                os._exit(0)
            os._exit(1)
        if os.waitpid(child, 0)[1]:
            raise MemoryLimitError(
                f"PyTorch does not fit into {most / 1e9:.1f} GB of address space", "a larger limit: ulimit -v"
            )


def leave(code: int) -> None:
    """End at once: Python's own end waits for processes that read images and frees torch, seconds on a busy machine."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch would say of each that it was killed
    for child in multiprocessing.active_children():
        child.kill()
    atexit._run_exitfuncs()
    os._exit(code)
