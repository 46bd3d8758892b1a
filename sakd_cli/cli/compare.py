"""`sakd compare`: runs against each other, from their directories"""

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from sakd_cli.cli.console import emit, show
from sakd_cli.cli.options import Values, with_options
from sakd_cli.errors import UsageError
from sakd_cli.rundir import RunDir

Runs = Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run directories.")]
Csv = Annotated[
    bool, typer.Option("--csv", help="Every epoch and the final figures as CSV on stdout.", rich_help_panel="Output")
]


Plot = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Curves as .png or .svg (the extra plots).", rich_help_panel="Output"),
]


@with_options("compare")
def compare(options: Values, json: bool, runs: Runs, plot: Plot = None, csv: Csv = False) -> None:
    """Compare runs: words that differ, curves, final figures, seeds, and whether a difference is more than noise.

    Examples:

        sakd compare runs/A runs/B runs/C

        sakd compare runs/A runs/B --plot curves.png --csv > curves.csv
    """
    if csv and json:
        raise UsageError("--csv and --json are two documents; choose one")
    if plot:
        from sakd_cli.report.render import plots

        plots.checked(plot)
    compared([RunDir(run) for run in runs], json=json, csv=csv, plot=plot)


def compared(runs: Iterable[RunDir], *, json: bool, csv: bool = False, plot: Path | None = None) -> None:
    """Print how these runs stand against each other."""
    from sakd_cli.report.runs.compare import compare as judged
    from sakd_cli.report.runs.compare_tables import comparison_csv, comparison_tables

    document = judged(runs)
    if plot:
        from sakd_cli.report.render import plots
        from sakd_cli.report.runs.curves import curve_figure

        plots.write(curve_figure(document), plot)
    if json:
        emit(document)
    elif csv:
        sys.stdout.write(comparison_csv(document))
    else:
        show(*comparison_tables(document))
