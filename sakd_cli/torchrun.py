"""How many processes torchrun has started to train one network together, and which one this is. No torch."""

import os

from sakd_cli.errors import UsageError

VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # some schedulers set a few of them for other purposes


def requested_world_size() -> int:
    """How many processes were started together; 1 where this one was started alone."""
    numbers = (os.environ.get("RANK", ""), os.environ.get("WORLD_SIZE", ""))
    together = all(os.environ.get(name) for name in VARIABLES) and all(number.isdecimal() for number in numbers)
    return int(numbers[1]) if together else 1


def local_rank() -> int:
    """Which of the processes of this machine this one is, from 0."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def is_console_process() -> bool:
    """Whether this process writes to the console: of several, only the first one does."""
    return requested_world_size() == 1 or int(os.environ["RANK"]) == 0


def require_single_process(what: str) -> None:
    """Raise UsageError where several processes were started for something that one does."""
    if requested_world_size() > 1:
        raise UsageError(
            f"{what} works in one process only, {requested_world_size()} were started", hint="start it without torchrun"
        )
