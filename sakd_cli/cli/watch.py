"""`sakd watch`: a run as it goes on, from another terminal; nothing is written"""

import time
from collections.abc import Callable
from contextlib import suppress

from rich.console import Group, RenderableType
from rich.live import Live

from sakd_cli.cli.console import out, show
from sakd_cli.cli.options import RunOrNewest, Values, with_options
from sakd_cli.errors import DamagedError, UsageError
from sakd_cli.report.render.format import fixed, named
from sakd_cli.report.render.sheet import thinned
from sakd_cli.report.runs.compare import run_curve
from sakd_cli.report.runs.compare_tables import epoch_table
from sakd_cli.report.runs.page import summary_table
from sakd_cli.report.spots.log import spots_document
from sakd_cli.report.spots.tables import spot_tables
from sakd_cli.rundir import RunDir, look_up
from sakd_cli.runs.locate import run_or_newest

INTERVAL = 2.0  # seconds between two looks
EPOCHS = 6  # rows while the run goes on
LOGS = ("metrics.jsonl", "spots.jsonl")


@with_options("watch")
def watch(options: Values, run: RunOrNewest = None) -> None:
    """Follow a run from another terminal, to its end: losses, accuracies, and where it distils. The run is left alone.

    Examples:

        sakd watch

        sakd watch runs/A
    """
    followed, console = run_or_newest(run, options["runs_dir"], {}), out()
    look_up(followed.config, "task")  # it is a run, or this says that it is none
    followed.require_own_settings()
    if followed.in_use and console.is_terminal:
        with Live(console=console, auto_refresh=False, transient=True) as live:
            _follow(followed, lambda: live.update(Group(*_view(followed, EPOCHS)), refresh=True))
    elif followed.in_use:
        told = set[int]()
        _follow(followed, lambda: _tell(followed, told))
    show(*_view(followed, None))


def _follow(run: RunDir, look: Callable[[], None]) -> None:
    """Look whenever a log has grown, until no process works on the run."""
    seen: list[int] = []
    while run.in_use:
        sizes = [path.stat().st_size for name in LOGS if (path := run.path / name).is_file()]
        if sizes != seen:
            with suppress(DamagedError):  # a log that is cut back just now, as when a run is resumed
                look()
                seen = sizes
        time.sleep(INTERVAL)


def _tell(run: RunDir, told: set[int]) -> None:
    """A line for each epoch that is new, where there is no terminal."""
    for point in run_curve(run):
        if point.top1 is not None and point.epoch not in told:
            told.add(point.epoch)
            loss, top1 = fixed(point.train_loss, 4), fixed(point.top1, 2)
            show(f"epoch {point.epoch}  training loss {loss}  {named(point.selected_on)} top-1 {top1} %")


def _view(run: RunDir, most: int | None) -> list[RenderableType]:
    """The run as it is now; `most` epochs, None: all, and the result where there is one."""
    curve, epochs = run_curve(run), named(look_up(run.config, "train.epochs"))
    state = "running" if run.in_use else "finished" if run.finished else "stopped; --resume RUN resumes it"
    done = sum(point.top1 is not None for point in curve)
    title, shown = f"{run.path.name}: {done} of {epochs} epochs, {state}", curve[-most:] if most else thinned(curve, 20)
    tables: list[RenderableType] = [epoch_table(title, shown, [] if curve else ["Nothing is logged yet."])]
    try:
        tables += spot_tables(spots_document(run), top=0)[: None if most is None else 1]
    except UsageError as error:  # no epoch is finished, or nothing is distilled
        if isinstance(error, DamagedError):
            raise
    return [*tables, summary_table(run.summary)] if run.finished and most is None else tables
