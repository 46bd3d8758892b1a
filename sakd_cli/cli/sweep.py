"""`sakd sweep`: a grid of runs, on this machine or on a cluster, and its table"""

import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Annotated

import typer
from rich.console import Group, RenderableType
from rich.live import Live

from sakd_cli.cli.console import ConsoleReporter, emit, show
from sakd_cli.cli.options import Values, with_options
from sakd_cli.documents.sweep import SweepPlan
from sakd_cli.report.render.format import duration, fixed, named, number
from sakd_cli.report.render.sheet import Sheet
from sakd_cli.report.sweep.tables import plan_tables, sweep_csv, sweep_tables
from sakd_cli.rundir import RunDir
from sakd_cli.sweep.carry_out import carry_out
from sakd_cli.sweep.scheduler import ScheduledRun, Scheduler, State
from sakd_cli.torchrun import require_single_process

SHOWN = 8  # runs that ended last, below those that run
INTERVAL = 2.0  # seconds between two looks at the logs of what runs

FileOrPreset = Annotated[str, typer.Argument(metavar="FILE", help="A sweep's settings, or the name of such a preset.")]


@with_options("sweep")
def sweep(options: Values, json: bool, quiet: bool, csv: bool, file: FileOrPreset) -> None:
    """Train a grid of methods x pairs x routers x seeds: finished runs are skipped, unfinished ones resumed.

    Examples:

        sakd sweep table-same-family --methods fitnet,sp --pairs resnet56:resnet20 --budget 0.1 --seeds 3 --dry-run

        sakd sweep mine.yaml --jobs 2 --markdown table.md
    """
    require_single_process("sakd sweep")
    reporter, again = ConsoleReporter(quiet=quiet), shlex.join(["sakd", *sys.argv[1:]])
    with redirect_stdout(sys.stderr):  # a library of the executor's may print; stdout is for the data
        document, scheduler = carry_out(
            file, options, reporter, again, lambda part: ProgressTable(part, reporter).shown()
        )
    if json:
        emit(document)
    elif isinstance(document, SweepPlan):
        show(*plan_tables(document))
    elif csv:
        sys.stdout.write(sweep_csv(document))
    else:
        show(*sweep_tables(document))
    if scheduler is not None:
        scheduler.check(f"--retry-failed tries them again; their messages: {scheduler.folder / 'jobs'}")


class ProgressTable:
    """Follows a scheduler."""

    def __init__(self, scheduler: Scheduler, reporter: ConsoleReporter) -> None:
        self.scheduler, self.reporter = scheduler, reporter
        self.terminal = reporter.console.is_terminal and not reporter.quiet
        self.ended: list[ScheduledRun] = []
        self._live: Live | None = None
        self._looked = 0.0
        self._begun: dict[str, tuple[int, float]] = {}  # epoch and time at which it was first seen
        scheduler.changed = self._changed

    @contextmanager
    def shown(self) -> Iterator[Callable[[], None]]:
        """Keep the table on the terminal meanwhile; gives what brings it up to date."""
        if not self.terminal:
            yield self.refresh
            return
        with Live(self._table(), console=self.reporter.console, auto_refresh=False, transient=True) as self._live:
            try:
                yield self.refresh
            finally:
                self._live = None

    def refresh(self) -> None:
        """Show how far the runs are; does nothing between two looks."""
        if self._live is not None and time.monotonic() - self._looked >= INTERVAL:
            self._looked = time.monotonic()
            self._live.update(self._table(), refresh=True)

    def _changed(self, entry: ScheduledRun) -> None:
        if entry.state is not State.running and entry.state is not State.waiting:
            self.ended.append(entry)
        if self._live is None:
            counts = self.scheduler.counts()
            over = sum(counts[state] for state in (State.done, State.failed, State.blocked))
            done = f"[{over}/{len(self.scheduler.entries)}]"
            self.reporter.say(f"{done} {_state(entry)}  {entry.member.key}{_detail(entry)}")

    def _table(self) -> RenderableType:
        names = ("Run", "State", "Epoch", "Step", "Validation top-1 %", "Left")
        rows = [self._row(entry) for entry in [*self.scheduler.locate(), *reversed(self.ended[-SHOWN:])]]
        counts = ", ".join(f"{count} {state}" for state, count in self.scheduler.counts().items() if count)
        notes = [f"{counts}. Ctrl-C saves every run; the same command resumes them."]
        return Group(Sheet("", names, rows, notes, text=2))

    def _row(self, entry: ScheduledRun) -> list[str]:
        epoch, step, top1 = progress(entry.run)
        epochs = entry.member.config.train.epochs
        left = None
        if entry.state is State.running and epoch is not None:
            first, since = self._begun.setdefault(entry.member.key, (epoch, time.monotonic()))
            if epoch > first:
                left = (time.monotonic() - since) / (epoch - first) * (epochs - epoch)
        shown, remaining = "" if epoch is None else f"{epoch}/{epochs}", "" if left is None else duration(left)
        return [entry.member.key, _state(entry), shown, named(step), fixed(top1, 2), remaining]


def progress(run: RunDir | None) -> tuple[int | None, int | None, float | None]:
    """Epoch and step of a run's last line of metrics, and the last top-1 on the images that select."""
    epoch, step, top1 = None, None, None
    for line in run.lines("metrics.jsonl") if run is not None else ():
        if isinstance(line, dict) and (known := number(line.get("epoch"))) is not None:
            epoch = int(known)
            step = int(number(line.get("step")) or step or 0)
            top1 = number(line.get("top1")) if line.get("kind") == "eval" else top1
    return epoch, step, top1


def _state(entry: ScheduledRun) -> str:
    return "resumed" if entry.state is State.running and entry.resumed else entry.state.value


def _detail(entry: ScheduledRun) -> str:
    if entry.error:
        return f": {entry.error}"
    if entry.state is not State.done or entry.run is None:
        return ""
    summary = entry.run.summary
    return f"  top-1 {fixed(summary.last.top1, 2)} %, {duration(summary.seconds)}"
