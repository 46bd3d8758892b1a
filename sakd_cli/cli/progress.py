"""How far a run is, on a terminal: a bar for the epoch, one for the run, and a line of figures below."""

import time
from collections.abc import Sequence
from typing import Any

from rich import progress
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from sakd_cli.report.render.format import fixed, fraction, number, whole

NARROW = 80  # columns below which a bar has no count of steps


class Throughput(progress.ProgressColumn):
    """Steps a second."""

    def render(self, task: progress.Task) -> Text:
        return Text(f"{task.speed:,.4g}/s" if task.speed else "")


class Bars:
    """Shown from `start` to `stop`; figures are those of the last log point, nothing is measured for them."""

    def __init__(self, console: Console, steps: int, done: int) -> None:
        count = [progress.MofNCompleteColumn(), Throughput()] if console.width >= NARROW else []
        columns = progress.TextColumn("{task.description}"), progress.BarColumn(None), *count
        self.progress = progress.Progress(*columns, progress.TimeRemainingColumn(), console=console)
        self.steps, self.step, self.epochs, self.images = steps, done, 0, 0
        self.figures = dict[str, str]()
        self._run = self.progress.add_task("", total=steps, completed=done)
        self._epoch: progress.TaskID | None = None
        self._since = done, time.monotonic()
        self._live = Live(get_renderable=self.renderable, console=console, transient=True, refresh_per_second=4)

    def start(self) -> None:
        self._live.start()

    def stop(self) -> None:
        self._live.stop()

    def plan(self, epochs: int, images: int) -> None:
        """So many epochs, and images in a step."""
        self.epochs, self.images, self._since = epochs, images, (self.step, time.monotonic())
        self.progress.update(self._run, description="run")
        self._epoch = self.progress.add_task("", total=self.steps // epochs)
        self.advance(self.step)

    def advance(self, step: int) -> None:
        """Step `step` of the run is done."""
        self.step = step
        self.progress.update(self._run, completed=step)
        if self._epoch is not None:
            of_epoch = self.steps // self.epochs
            epoch = min(step // of_epoch, self.epochs - 1)
            if (description := f"epoch {epoch + 1}/{self.epochs}") != self.progress.tasks[-1].description:
                self.progress.reset(self._epoch, description=description)
            self.progress.update(self._epoch, completed=step - epoch * of_epoch)

    def record(self, record: dict[str, Any]) -> None:
        """Figures of a line of `metrics.jsonl`."""
        if record["kind"] == "eval":
            self.figures[f"{record['split']} top-1"] = fixed(record["top1"], 2, " %")
            return
        (step, then), now = self._since, time.monotonic()
        if self.images and self.step > step:
            self.figures["images/s"] = whole((self.step - step) * self.images / max(now - then, 1e-9))
            self._since = self.step, now
        if (rate := number(record.get("lr"))) is not None:
            self.figures["lr"] = f"{rate:.4g}"
        self.figures["loss"] = fixed(record["loss"], 4)
        if "top1" in record:
            self.figures["training top-1"] = fixed(record["top1"], 1, " %")

    def spots(self, fractions: Sequence[float | None]) -> None:
        """Fractions of an epoch's samples that were distilled, by spot."""
        self.figures["distilled, by spot"] = " ".join(map(fraction, fractions)) + " %"

    def renderable(self) -> Group:
        """What is shown: figures are whole, however narrow it is."""
        lines, width = [""], self.progress.console.width
        for text in (f"{name} {value}" for name, value in self.figures.items()):
            wider = f"{lines[-1]}   {text}" if lines[-1] else text
            lines = [*lines[:-1], wider] if len(wider) <= width else [*lines, text]
        return Group(self.progress, *(Text(line, style="dim", overflow="fold") for line in lines if line))
