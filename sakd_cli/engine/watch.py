"""How the engine tells what it does, whoever listens."""

from typing import Any, Protocol


class Watcher(Protocol):
    """Listens to a run; the command line draws bars or prints lines, a program may do nothing."""

    def begin(self, title: str, steps: int) -> None:
        """A run of `steps` training steps starts."""

    def advance(self, step: int) -> None:
        """Step `step` (counted from 1) is done."""

    def record(self, record: dict[str, Any]) -> None:
        """A line that also went to `metrics.jsonl`."""

    def end(self) -> None:
        """The run has ended, well or not."""


class Silent:
    """A watcher that does nothing."""

    def begin(self, title: str, steps: int) -> None:
        return

    def advance(self, step: int) -> None:
        return

    def record(self, record: dict[str, Any]) -> None:
        return

    def end(self) -> None:
        return
