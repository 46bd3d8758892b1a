"""`sakd eval`: how good a trained network is."""

from pathlib import Path
from typing import Annotated

import typer

from sakd_cli import api
from sakd_cli.cli.console import ConsoleReporter, emit, show
from sakd_cli.cli.options import Values, with_options
from sakd_cli.documents.evaluation import Evaluations
from sakd_cli.report.evaluation import score_tables

Targets = Annotated[
    list[Path] | None,
    typer.Argument(
        metavar="RUN", help="Run directories, folders with a model.safetensors, or such files. Default: newest run."
    ),
]


@with_options("eval")
def evaluate(options: Values, json: bool, quiet: bool, targets: Targets = None) -> None:
    """Evaluate trained networks on the test images: accuracy, calibration, classes, speed, their teacher.

    --split takes other images of the run. --data-root with any folder of labelled pictures scores all of it, unless it
    holds the test images of the run itself.

    A student with residual students is evaluated as an ensemble, with its early exits.

    Examples:

        sakd eval runs/20261121-120000-distill-... runs/20261121-130000-distill-... --json

        sakd eval runs/20261121-130000-distill-...-residual --early-exit --curve --plot curve.png
    """
    document = api.evaluate(*targets or (), reporter=ConsoleReporter(quiet=quiet), **options)
    if json:
        emit(document)
    else:
        show(*score_tables(document.evaluations if isinstance(document, Evaluations) else [document]))
