"""`sakd eval`, `predict`, `compare`, `inspect-spots`, `report`, `data check`, `bench`: what is found is printed."""

import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated

import typer

from sakd_cli import api
from sakd_cli.cli.console import ConsoleReporter, emit, show
from sakd_cli.cli.options import RunOrNewest, Values, with_options
from sakd_cli.documents.evaluation import Evaluations
from sakd_cli.documents.table import Comparison
from sakd_cli.errors import DataError
from sakd_cli.report.bench import bench_tables
from sakd_cli.report.data_check import data_tables
from sakd_cli.report.evaluation import predictions_csv, predictions_text, score_tables
from sakd_cli.report.render.format import csv_text
from sakd_cli.report.runs.compare_tables import comparison_csv, comparison_tables
from sakd_cli.report.spots.log import CSV_HEADER, csv_rows
from sakd_cli.report.spots.tables import spot_tables, survey_tables

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

    A student with residual students is evaluated as an ensemble, with exits and the cost/accuracy curve.

    Examples:

        sakd eval runs/20261121-120000-distill-... runs/20261121-130000-distill-... --json

        sakd eval runs/20261121-130000-distill-...-residual --early-exit --curve --plot curve.png
    """
    document = api.evaluate(*targets or (), reporter=ConsoleReporter(quiet=quiet), **options)
    if json:
        emit(document)
    else:
        show(*score_tables(document.evaluations if isinstance(document, Evaluations) else [document]))


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


Runs = Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run directories, as `sakd runs` lists them.")]


@with_options("compare")
def compare(options: Values, json: bool, csv: bool, plot: Path | None, baseline: str | None, runs: Runs) -> None:
    """Compare runs: settings that differ, curves, final figures, seeds, and what the differences show.

    Examples:

        sakd compare runs/A runs/B runs/C --baseline always

        sakd compare runs/A runs/B --plot curves.png --csv > curves.csv
    """
    print_comparison(api.compare(*runs, baseline=baseline, plot=plot), json=json, csv=csv)


def print_comparison(document: Comparison, *, json: bool, csv: bool = False) -> None:
    if json:
        emit(document)
    elif csv:
        sys.stdout.write(comparison_csv(document))
    else:
        show(*comparison_tables(document))


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


@with_options("report")
def report(options: Values, json: bool, quiet: bool, page: Path | None, run: RunOrNewest = None) -> None:
    """Write a whole run as one self-contained HTML file, and its plots as PNG files beside it.

    Examples:

        sakd report

        sakd report runs/20261121-120000-distill-... --out result.html
    """
    written = api.report(run, page, runs_dir=options["runs_dir"], reporter=ConsoleReporter(quiet=quiet))
    emit(written) if json else show(*(f"written: {name}" for name in written.written))


What = Annotated[
    str,
    typer.Argument(metavar="DIR|FILE.csv|NAME", help="A folder of pictures, a list of them, or a data set by name."),
]


@with_options("data-check")
def check_data(options: Values, json: bool, quiet: bool, what: What) -> None:
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


@with_options("bench")
def bench(options: Values, json: bool, quiet: bool) -> None:
    """Time a training step: student alone, plain distillation, the method with and without routing, as published.

    Networks have random weights, so --teacher is the name of an architecture here.

    Examples:

        sakd bench --teacher wrn40_2 --student wrn16_2 --method fitnet

        sakd bench --scaling batch --json > result.json
    """
    with redirect_stdout(sys.stderr):  # a peer may print
        found = api.bench(reporter=ConsoleReporter(quiet=quiet), **options)
    emit(found) if json else show(*bench_tables(found))
