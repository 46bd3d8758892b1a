"""Output: data to stdout, log messages to stderr; colours and progress bars only on a terminal."""

import multiprocessing
import os
import re
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console, RenderableType
from rich.markup import escape

from sakd_cli.cli.progress import Bars
from sakd_cli.documents.base import Document
from sakd_cli.engine.reporter import stop_signals_to
from sakd_cli.report.render.format import plain, printable
from sakd_cli.torchrun import is_console_process

SILENCE = 60  # seconds after which a run prints its progress, where there is no bar
LONGEST, LONGEST_HINT = 192, 400  # characters of a message; commands in a hint must be whole to be of use


def out() -> Console:
    """Console of the data; rich obeys NO_COLOR and TERM=dumb. 100 columns where there is no terminal."""
    console = Console(highlight=False, emoji=False)
    return console if console.is_terminal else Console(highlight=False, emoji=False, width=max(console.width, 100))


def err() -> Console:
    """Console of log messages."""
    return Console(stderr=True, highlight=False, emoji=False, soft_wrap=True)


def show(*renderables: RenderableType) -> None:
    """Print tables and text to stdout."""
    if not is_console_process():
        return
    console = out()
    for renderable in renderables:
        if isinstance(renderable, str):
            renderable = "\n".join(printable(line) for line in renderable.split("\n"))
        console.print(renderable, markup=False, soft_wrap=isinstance(renderable, str))


def emit(document: Document) -> None:
    """Print the one JSON document of `--json`."""
    if is_console_process():
        print(document.text)


def clean(text: str, most: int = LONGEST) -> str:
    """One printable line, where it is too long without the words of its middle: names from files may hold anything."""
    line = plain(" ".join(text.split()))
    head, tail = re.sub(r" \S{1,30}$", "", line[: most // 2]), re.sub(r"^\S{1,30} ", "", line[5 - most // 2 :])
    return line if len(line) <= most else f"{head} ... {tail}"


def complain(message: str, hint: str | None = None) -> None:
    """One line for what is wrong, at most one for what to do."""
    console = err()
    console.print(f"[bold red]error:[/] {escape(clean(message))}")
    if hint:
        console.print(f"[dim]hint:[/] {escape(clean(hint, LONGEST_HINT))}")


class ConsoleReporter:
    """Reports a run on stderr: a bar on a terminal, one line per interval elsewhere, nothing when quiet."""

    def __init__(self, *, quiet: bool) -> None:
        self.quiet = quiet or not is_console_process()
        self.console = err()
        self.steps = 0
        self._bars: Bars | None = None
        self._signal = 0
        self._last = time.monotonic()

    @contextmanager
    def heeding_signals(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM ask the run to save and to end; a second one ends the process at once."""

        def note(signum: int, frame: object) -> None:
            if self._signal:
                os._exit(128 + signum)
            self._signal = signum
            if sys.platform != "win32":
                for child in multiprocessing.active_children():  # one that is stopped would keep the step from its end
                    os.kill(child.pid or os.getpid(), signal.SIGCONT)
            self.say("stopping: the step is finished and the state saved; once more to exit at once")

        with stop_signals_to(note):
            yield

    def stop(self) -> int:
        return self._signal

    def say(self, text: str) -> None:
        """Print one log message."""
        self._last = time.monotonic()
        if not self.quiet:
            self.console.print(escape(plain(text)))

    def warn(self, text: str) -> None:
        """Print one line, also where log messages are off."""
        if not is_console_process():
            return
        self.console.print(f"[bold yellow]warning:[/] {escape(clean(text, LONGEST_HINT))}")

    def begin(self, title: str, steps: int, done: int = 0) -> None:
        self.steps = steps
        self.say(f"{title}, from step {done}" if done else title)
        if self.console.is_terminal and not self.quiet:
            self._bars = Bars(self.console, steps, done)
            self._bars.start()

    def plan(self, epochs: int, images: int) -> None:
        if self._bars is not None and self._bars.epochs == 0:
            self._bars.plan(epochs, images)

    def spots(self, fractions: Sequence[float | None]) -> None:
        if self._bars is not None:
            self._bars.spots(fractions)

    def advance(self, step: int) -> None:
        if self._bars is not None:
            self._bars.advance(step)
        elif time.monotonic() - self._last > SILENCE:
            self.say(f"step {step}/{self.steps}")

    def record(self, record: dict[str, Any]) -> None:
        if self._bars is not None and record["kind"] != "eval-trained":
            self._bars.record(record)
        if record["kind"].startswith("eval"):
            which = "  as trained" * (record["kind"] != "eval")
            scores = f"top-1 {record['top1']:.2f} %  loss {record['loss']:.4f}"
            self.say(f"epoch {record['epoch']}  {record['split']}{which}  {scores}")
            return
        text = f"epoch {record['epoch']}  loss {record['loss']:.4f}"
        if "top1" in record:
            text += f"  training top-1 {record['top1']:.1f} %"
        if self._bars is None:
            self.say(f"step {record['step']}/{self.steps}  {text}")

    def end(self) -> None:
        if self._bars is not None:
            self._bars.stop()
            self._bars = None
