"""Every error a user can cause. Each is one line (what, where), one hint (what to do) and one exit code."""

import difflib
import errno
import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path


class SakdError(Exception):
    """Message, hint (what to do) and exit code; raised directly it is an internal error."""

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        if hint:
            self.add_note(f"hint: {hint}")  # a traceback shows it


class UsageError(SakdError):
    """A wrong argument, setting or input file; nothing was written."""

    exit_code = 2


class DamagedError(UsageError):
    """A file that a run left is missing, or is not what was written."""

    exit_code = 4


class DataError(SakdError):
    """A data set that cannot be used."""

    exit_code = 3


class CheckpointError(SakdError):
    """A checkpoint of a run that cannot be used."""

    exit_code = 4


class DiskError(SakdError):
    """The disk is full or not writable."""

    exit_code = 5


class MemoryLimitError(SakdError):
    """The device has too little memory."""

    exit_code = 6


class NonFiniteError(SakdError):
    """A number that must be finite is not."""

    exit_code = 7


class RunInUseError(SakdError):
    """Two processes in one run directory."""

    exit_code = 8


class LostProcessError(SakdError):
    """A process of a distributed training has ended; the others cannot continue."""

    exit_code = 9


class SeriesError(SakdError):
    """Some of several runs failed; the others are finished."""

    def __init__(self, message: str, hint: str | None, exit_code: int) -> None:
        super().__init__(message, hint)
        self.exit_code = exit_code


class Stopped(BaseException):
    """A signal asked the run to end; no `except Exception` swallows it. `saved` says what can be resumed."""

    def __init__(self, signal: int, saved: str = "nothing to save yet", hint: str | None = None) -> None:
        super().__init__(saved)
        self.signal, self.saved, self.hint = signal, saved, hint

    @property
    def exit_code(self) -> int:
        """What a shell calls the end by this signal: 130 for Ctrl-C, 143 for SIGTERM."""
        return 128 + self.signal


# What torch and CUDA's libraries say where memory is short, beside an error of their own class or Python's.
OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device or the machine had too little memory; without torch, whose error is known by its name."""
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or (isinstance(error, RuntimeError) and any(sign in str(error) for sign in OUT_OF_MEMORY))


def not_deterministic(error: BaseException) -> UsageError | None:
    """What torch says where `--deterministic` cannot be, as our error; None for all else."""
    said = str(error)
    if isinstance(error, RuntimeError) and " does not have a deterministic implementation" in said:
        name = said.partition(" does not have")[0].rpartition(" ")[2]
        return UsageError(f"--deterministic: {name} has no deterministic form here", "leave it out, or another network")
    if isinstance(error, RuntimeError) and "CUBLAS_WORKSPACE_CONFIG" in said:
        hint = "set it to :4096:8 before the process begins"
        return UsageError("--deterministic: CUBLAS_WORKSPACE_CONFIG was not set at this process's first product", hint)
    return None


def first_line(error: BaseException) -> str:
    """What an error of another library or program says, as far as it fits into a line."""
    try:
        return str(error).strip().partition("\n")[0][:90] or type(error).__name__
    except Exception:  # its own __str__ fails
        return type(error).__name__


def one_line(error: Exception, most: int = 100) -> str:
    """All that an error of another library says, on one line, as far as so many characters go."""
    return " ".join(str(error).split())[:most]


def download_error(text: str, error: Exception) -> SakdError:
    """The error of a download: code 5 where its cache is to blame. What a hub says stands on several lines."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
        reason = f"{error.filename or 'its cache'}: {error.strerror}"
        return DiskError(f"{text} ({reason})", hint="HF_HOME and TORCH_HOME say where it is kept")
    hint = "try again, without a damaged copy in the library's cache, or give a file that holds them"
    return UsageError(f"{text} ({one_line(error)})", hint)


def unreadable(error: OSError) -> str:
    """Why the system has not let a file be read."""
    return (error.strerror or "cannot be read").lower()


# What of a file is such a thing, and the lines by which it is known.
OF_FILE = {"router": ("class", r"^class (\w+)\(.*Router\b"), "method": ("class", r"^class (\w+)\(.*Distiller\b")}


# What stands for several of a kind: composed, or one after the other.
SEVERAL = {"method": "{0}", "router": "--routers {1}"}
# Names of another program or paper, in small letters, and what they are here.
# fmt: off
_CALLED = {
    "method": {
        "hint hints fitnets": "fitnet", "attention": "at", "similarity": "sp", "correlation": "cc", "abound": "ab",
        "factor": "ft", "soft_target soft logits kl hinton vanilla_kd": "kd", "review": "reviewkd",
        "none off vanilla scratch ce": "sakd pretrain-teacher, without a teacher",
        "all": "sakd sweep, for one after the other",
    },
    "router": {
        "learned policy gumbel sakd spot spotadaptive spot-adaptive true": "adaptive",
        "off no false": "always", "none": "never or always", "all": "--routers all", "uncertainty": "teacher-entropy",
    },
}
# fmt: on
CALLED = {
    kind: {name: ours for names, ours in table.items() for name in names.split()} for kind, table in _CALLED.items()
}


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """`unknown method 'atx'; did you mean 'at'?`, or the whole list where nothing is near; of a file, what is in it."""
    if name.endswith(".py"):
        what, pattern = OF_FILE.get(kind, ("function", r"^def (\w+)"))
        found = list[str]()
        with suppress(OSError, ValueError):
            if Path(name).is_file():  # no pipe
                found = re.findall(pattern, Path(name).read_text(encoding="utf-8"), re.MULTILINE)
        return f"{name}: name a {what} in it: {name}:{found[0] if found else 'NAME'}"
    if name.startswith("python:"):
        return f"{kind} {name} was an object of another process; in a file it is found: FILE.py:{name[7:]}"
    names = sorted(known)
    small = {one.lower(): one for one in names}
    near = [small[one] for one in difflib.get_close_matches(name.lower(), small, n=1, cutoff=0.6)]
    parts = re.split(r"[,+/&| ]+", name.lower())
    if kind in SEVERAL and parts[1:] and set(parts) <= set(names):
        near = [SEVERAL[kind].format("+".join(parts), ",".join(parts))]
    tail = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(names)}"
    if called := CALLED.get(kind, {}).get(name.lower()):
        tail = f"here it is {called!r}" if called in names else f"here: {called}"
    return f"unknown {kind} {name!r}; {tail}"
