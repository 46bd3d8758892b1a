"""`sakd compare`: runs against each other, from their directories"""

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from sakd_cli.cli import options as o
from sakd_cli.cli.console import emit, show
from sakd_cli.errors import UsageError
from sakd_cli.rundir import RunDir

Runs = Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run directories.")]
Csv = Annotated[
    bool, typer.Option("--csv", help="Every epoch and the final figures as CSV on stdout.", rich_help_panel="Output")
]


def compare(runs: Runs, csv: Csv = False, json: o.Json = False) -> None:
    """Compare runs: words that differ, curves, final figures, seeds, and whether a difference is more than noise.

    Examples:

        sakd compare runs/*-distill-*

        sakd compare runs/*-distill-* --csv > curves.csv
    """
    if csv and json:
        raise UsageError("--csv and --json are two documents; choose one")
    compared([RunDir(run) for run in runs], json=json, csv=csv)


def compared(runs: Iterable[RunDir], *, json: bool, csv: bool = False) -> None:
    """Print how these runs stand against each other."""
    from sakd_cli.report.compare import compare as judged
    from sakd_cli.report.comparison import comparison_csv, comparison_tables

    document = judged(runs)
    if json:
        emit(document)
    elif csv:
        sys.stdout.write(comparison_csv(document))
    else:
        show(*comparison_tables(document))
