"""`sakd data check`: every fault of a data set, before a run meets it"""

from pathlib import Path
from typing import Annotated

import typer

from sakd_cli.cli.console import ConsoleReporter, emit, show
from sakd_cli.cli.options import Values, with_options
from sakd_cli.config.base import own_row
from sakd_cli.config.datasets import DATASETS, ImageFolderConfig
from sakd_cli.config.resolve import ConfigSource, nested, resolve, set_sources
from sakd_cli.errors import DataError

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
    row = what if what in DATASETS else None if Path(what).exists() else own_row(what, DATASETS)
    name = what if row and row.endswith("/NAME") else row
    settings = {"data.name": name or ImageFolderConfig().name, "data.root": options["data_root"]}
    if not name:
        settings["data.manifest" if what.lower().endswith(".csv") else "data.root"] = what
    config = resolve(
        "eval", [ConfigSource("the command line", nested(settings)), *set_sources(options["set_"] or [])]
    ).config.data
    from sakd_cli.data.check import check as checked
    from sakd_cli.report.data_check import data_tables

    reporter = ConsoleReporter(quiet=quiet)
    try:
        document = checked(config, lambda count: reporter.begin(f"reading {count} files", count), reporter.advance)
    finally:
        reporter.end()
    emit(document) if json else show(*data_tables(document))
    if document.findings:
        raise typer.Exit(DataError.exit_code)
