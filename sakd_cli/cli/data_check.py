"""`sakd data check`: every fault of a data set, before a run meets it"""

from typing import Annotated

import typer

from sakd_cli import api
from sakd_cli.cli.console import ConsoleReporter, emit, show
from sakd_cli.cli.options import Values, with_options
from sakd_cli.errors import DataError
from sakd_cli.report.data_check import data_tables

What = Annotated[
    str,
    typer.Argument(metavar="DIR|FILE.csv|NAME", help="A folder of pictures, a list of them, or a data set by name."),
]


@with_options("data-check")
def check(options: Values, json: bool, quiet: bool, what: What) -> None:
    """Name what is wrong with a data set: unreadable files, empty classes, pictures in two places; exit code 3 if any.

    Every picture is decoded as a whole, by several processes. Nothing is changed or downloaded.

    Examples:

        sakd data check photos

        sakd data check photos.csv

        sakd data check tiny-imagenet --data-root DIR --json
    """
    document = api.check_data(what, reporter=ConsoleReporter(quiet=quiet), **options)
    emit(document) if json else show(*data_tables(document))
    if document.findings:
        raise typer.Exit(DataError.exit_code)
