"""`sakd compare`: runs against each other, from their directories"""

import sys
from pathlib import Path
from typing import Annotated

import typer

from sakd_cli import api
from sakd_cli.cli.console import ConsoleReporter, emit, show
from sakd_cli.cli.options import Values, with_options
from sakd_cli.documents.table import Comparison
from sakd_cli.report.runs.compare_tables import comparison_csv, comparison_tables

Runs = Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run directories, as `sakd runs` lists them.")]


@with_options("compare")
def compare(options: Values, json: bool, csv: bool, plot: Path | None, baseline: str | None, runs: Runs) -> None:
    """Compare runs: settings that differ, curves, final figures, seeds, and what the differences show.

    Examples:

        sakd compare runs/A runs/B runs/C --baseline always

        sakd compare runs/A runs/B --plot curves.png --csv > curves.csv
    """
    print_comparison(api.compare(*runs, baseline=baseline, plot=plot), json=json, csv=csv)
    if plot:
        ConsoleReporter(quiet=False).say(f"written: {plot}")


def print_comparison(document: Comparison, *, json: bool, csv: bool = False) -> None:
    if json:
        emit(document)
    elif csv:
        sys.stdout.write(comparison_csv(document))
    else:
        show(*comparison_tables(document))
