"""`sakd data check`: every fault of a data set, before a run meets it"""

from typing import Annotated

import typer

from sakd_cli.cli import options as o
from sakd_cli.cli.console import ConsoleReporter, emit, show
from sakd_cli.config.datasets import DATASETS, ImageFolderConfig
from sakd_cli.config.resolve import ConfigSource, nested, resolve, set_layers
from sakd_cli.errors import DataError

What = Annotated[str, typer.Argument(metavar="DIR|NAME", help="A folder of pictures, or a data set by name.")]


def check(
    what: What, data_root: o.DataRoot = None, set_: o.Set = None, json: o.Json = False, quiet: o.Quiet = False
) -> None:
    """Name every file that cannot be read, empty classes, class lists that differ; exit code 3 if anything is wrong.

    Every picture is decoded as a whole, by several processes. Nothing is changed or downloaded.

    Examples:

        sakd data check photos

        sakd data check tiny-imagenet --data-root DIR --json
    """
    named = what in DATASETS
    words = {"data.name": what if named else ImageFolderConfig().name, "data.root": data_root if named else what}
    config = resolve("eval", [ConfigSource("the command line", nested(words)), *set_layers(set_ or [])]).config.data
    from sakd_cli.data.check import check as checked
    from sakd_cli.report.data_check import data_tables

    talk = ConsoleReporter(quiet=quiet)
    try:
        document = checked(config, lambda count: talk.begin(f"reading {count} files", count), talk.advance)
    finally:
        talk.end()
    if json:
        emit(document)
    else:
        show(*data_tables(document))
    if document["findings"]:
        raise typer.Exit(DataError.exit_code)
