"""How many processes torchrun has started to train one network together, which one this is, its CPUs. No torch."""

import hashlib
import os

from sakd_cli.errors import UsageError

VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # some schedulers set a few of them for other purposes


def cpu_count() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def requested_world_size() -> int:
    """How many processes were started together; 1 where this one was started alone."""
    numbers = (os.environ.get("RANK", ""), os.environ.get("WORLD_SIZE", ""))
    together = all(os.environ.get(name) for name in VARIABLES) and all(number.isdecimal() for number in numbers)
    return int(numbers[1]) if together else 1


def has_launcher() -> bool:
    """Whether torchrun, or what says as much, has started this process; some schedulers set `VARIABLES` as well."""
    return "LOCAL_RANK" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ


def local_rank() -> int:
    """Which of the processes of this machine this one is, from 0."""
    number = os.environ.get("LOCAL_RANK", "")
    return int(number) if number.isdecimal() else 0


def is_console_process() -> bool:
    """Whether this process writes to the console: of several, only the first one does."""
    return requested_world_size() == 1 or not has_launcher() or int(os.environ["RANK"]) == 0


def tells(message: str, *, common: bool) -> bool:
    """Whether this process prints an error; under torchrun, of all on a machine that have the same, the first does.

    common  the others have it as well: what the first one says where there is no torchrun
    """
    place = os.environ.get("TORCHELASTIC_ERROR_FILE")  # FOLDER/LOCAL_RANK/error.json
    if requested_world_size() == 1 or not place:
        return is_console_process() or not common
    told = os.path.join(os.path.dirname(os.path.dirname(place)), hashlib.sha256(message.encode()).hexdigest())
    try:
        os.close(os.open(told, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except OSError as error:
        return not isinstance(error, FileExistsError)
    return True


def require_launcher() -> None:
    """Raise UsageError where this process is to train with others, and what started it does not say how."""
    count = requested_world_size()
    if count > 1 and not has_launcher():
        hint = "start it with torchrun, or unset WORLD_SIZE to train in this process alone"
        raise UsageError(f"WORLD_SIZE={count} is set, but torchrun has not started this process", hint)
    port = os.environ.get("MASTER_PORT", "")
    if count > 1 and not (int(os.environ["RANK"]) < count and port.isdecimal() and 0 < int(port) < 2**16):
        raise UsageError(f"RANK={os.environ['RANK']}, WORLD_SIZE={count}, MASTER_PORT={port}: torchrun sets no such")


def require_single_process(what: str) -> None:
    """Raise UsageError where several processes were started for something that one does."""
    if requested_world_size() > 1:
        raise UsageError(
            f"{what} works in one process only, {requested_world_size()} were started", hint="start it without torchrun"
        )
