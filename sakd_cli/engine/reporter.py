"""How the engine reports what it does, and how it is asked to stop. No torch."""

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

from sakd_cli.errors import Stopped


@runtime_checkable
class Reporter(Protocol):
    """Receives what a run reports; the command line draws progress bars or prints lines, a program may ignore it."""

    def begin(self, title: str, steps: int, done: int = 0) -> None:
        """A run of `steps` training steps starts; `done` of them were done before."""
        return

    def plan(self, epochs: int, images: int) -> None:
        """The training that began has so many epochs in all, and so many images in a step."""
        return

    def spots(self, fractions: Sequence[float | None]) -> None:
        """Fractions of the samples that were distilled in the epoch that has ended, by spot."""
        return

    def advance(self, step: int) -> None:
        """Step `step` (counted from 1) is done."""
        return

    def record(self, record: dict[str, Any]) -> None:
        """A line that also went to `metrics.jsonl`."""
        return

    def end(self) -> None:
        """The run has ended, well or not."""
        return

    def say(self, text: str) -> None:
        """A message, one line."""
        return

    def warn(self, text: str) -> None:
        """A warning: something went wrong that the run survives."""
        return

    def stop(self) -> int:
        """Number of the signal that asked the run to save its state and to end; 0: none did."""
        return 0


class NullReporter(Reporter):
    """A reporter that ignores everything."""


@contextmanager
def reporting(reporter: Reporter, title: str, steps: int) -> Iterator[None]:
    """Inside, work of `steps` steps goes on; the reporter hears of its begin and of its end."""
    reporter.begin(title, steps)
    try:
        yield
    finally:
        reporter.end()


def raise_if_stopped(reporter: Reporter) -> None:
    if number := reporter.stop():
        raise Stopped(number)


@contextmanager
def stop_signals_to(handler: Callable[[int, object], None]) -> Iterator[None]:
    """Inside, `handler` gets Ctrl-C and SIGTERM (number, frame), which do nothing else.

    Where a program calls from a thread of its own, its main thread goes on receiving them.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
