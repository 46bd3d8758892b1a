"""`sakd predict`: what a trained network answers for pictures."""

from pathlib import Path
from typing import Annotated

import typer

from sakd_cli import api
from sakd_cli.cli.console import ConsoleReporter, emit, show
from sakd_cli.cli.options import Values, with_options
from sakd_cli.errors import DataError
from sakd_cli.report.evaluation import predictions_csv, predictions_text

Network = Annotated[Path, typer.Argument(metavar="NETWORK", help="Run directory, folder of a network, or its file.")]
Pictures = Annotated[
    list[str],
    typer.Argument(metavar="PATH...", help="Pictures, folders or quoted patterns; - reads a list from stdin."),
]


@with_options("predict")
def predict(options: Values, json: bool, csv: bool, quiet: bool, target: Network, paths: Pictures) -> None:
    """Predict the classes of pictures: files, whole folders, patterns, or a list on stdin.

    Pictures are shown to the network as its card says. One that cannot be read costs one line and an exit code of 3 at
    the end; the others are answered.

    Examples:

        sakd predict runs/A holiday.jpg --top 3

        find photos -name '*.png' | sakd predict runs/A - --csv
    """
    reporter = ConsoleReporter(quiet=quiet)
    document = api.predict(target, *paths, reporter=reporter, **options)
    if json:
        emit(document)
    elif csv:
        print(predictions_csv(document), end="")
    else:
        show(predictions_text(document))
    word = "picture" if document.images == 1 else "pictures"
    if (speed := document.images_per_second) is not None:
        reporter.say(f"{document.images} {word} in {document.seconds:.2f} s, {speed:,.4g} a second")
    if document.failed:
        others = "" if document.failed == document.images else "; the others are answered"
        raise DataError(f"{document.failed} of {document.images} {word} could not be read{others}")
