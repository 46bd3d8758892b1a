"""`sakd inspect-spots`: where knowledge flowed, as tables, plots, an HTML file, JSON or CSV."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from sakd_cli import api
from sakd_cli.cli.console import ConsoleReporter, emit, show
from sakd_cli.cli.options import Values, with_options
from sakd_cli.report.render.format import csv_text
from sakd_cli.report.spots.log import CSV_HEADER, csv_rows
from sakd_cli.report.spots.tables import spot_tables, survey_tables

Run = Annotated[Path | None, typer.Argument(metavar="RUN", help="Run directory. Default: the newest distillation.")]


@with_options("inspect-spots")
def inspect_spots(options: Values, json: bool, run: Run = None) -> None:
    """Show where knowledge flowed: by spot, epoch, class, difficulty and path, with the extreme images.

    A finished run has stored all of it for its training images; --live and every option about data or device run the
    networks again.

    Examples:

        sakd inspect-spots --html spots.html

        sakd inspect-spots runs/20261121-120000-distill-... --split test --json | jq '.measured.routed'
    """
    report = api.inspect_spots(run, reporter=ConsoleReporter(quiet=options["quiet"]), **options)
    if json:
        emit(report)
    elif options["csv"]:
        rows = [dict(zip(CSV_HEADER, row, strict=True)) for row in csv_rows(report)]
        sys.stdout.write(csv_text(CSV_HEADER, rows))
    elif not (options["plot"] or options["html"] or options["samples"]):
        top, measured = options["top"], report.measured
        sections = survey_tables(measured, top=top, extremes=options["extremes"]).values() if measured else ()
        show(*spot_tables(report, top=top), *(sheet for sheets in sections for sheet in sheets))
