"""`sakd compare`: runs against each other, from their directories"""

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from sakd_cli.cli.console import emit, show
from sakd_cli.cli.options import Values, with_options
from sakd_cli.rundir import RunDir

Runs = Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run directories.")]


@with_options("compare")
def compare(options: Values, json: bool, csv: bool, plot: Path | None, baseline: str | None, runs: Runs) -> None:
    """Compare runs: settings that differ, curves, final figures, seeds, and what the differences show.

    Examples:

        sakd compare runs/A runs/B runs/C --baseline always

        sakd compare runs/A runs/B --plot curves.png --csv > curves.csv
    """
    if plot:
        from sakd_cli.report.render import plots

        plots.checked(plot)
    print_comparison([RunDir(run) for run in runs], json=json, csv=csv, plot=plot, baseline=baseline)


def print_comparison(
    runs: Iterable[RunDir], *, json: bool, csv: bool = False, plot: Path | None = None, baseline: str | None = None
) -> None:
    """Compare these runs."""
    from sakd_cli.report.runs.compare import compare as compare_runs
    from sakd_cli.report.runs.compare_tables import comparison_csv, comparison_tables, curve_charts

    document = compare_runs(runs, baseline)
    if plot:
        from sakd_cli.report.render import plots

        plots.write(plots.figure_of(curve_charts(document)), plot)
    if json:
        emit(document)
    elif csv:
        sys.stdout.write(comparison_csv(document))
    else:
        show(*comparison_tables(document))
