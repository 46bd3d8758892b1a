"""The commands about what is there: networks evaluated, used and carried elsewhere, runs, data, the cost of a step."""

import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated

import typer

from sakd_cli import api
from sakd_cli.cli.console import ConsoleReporter, emit, show
from sakd_cli.cli.options import RunOrNewest, Values, with_options
from sakd_cli.config.resolve import parse_assignment
from sakd_cli.documents.evaluation import Evaluations
from sakd_cli.documents.listing import RunEntries
from sakd_cli.documents.table import Comparison
from sakd_cli.errors import DataError, UsageError
from sakd_cli.report.bench import bench_tables
from sakd_cli.report.data_check import data_tables
from sakd_cli.report.evaluation import predictions_csv, predictions_text, score_tables
from sakd_cli.report.render.format import csv_text
from sakd_cli.report.runs.compare_tables import comparison_csv, comparison_tables
from sakd_cli.report.runs.entries import entry_tables, remains, remove, why_kept
from sakd_cli.report.spots.log import CSV_HEADER, csv_rows
from sakd_cli.report.spots.tables import spot_tables, survey_tables
from sakd_cli.rundir import RunDir, look_up

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


Target = Annotated[
    Path | None,
    typer.Argument(metavar="RUN", help="Run directory, folder of a network, or its file. Default: newest run."),
]


@with_options("export")
def export(options: Values, json: bool, quiet: bool, target: Target = None) -> None:
    """Export a network for other programs, check its outputs, and explain how to load it there.

    Of a run that is not finished, the network of its last checkpoint is exported.

    Examples:

        sakd export --format onnx --int8

        sakd export runs/20261121-120000-distill-... --format pt2 --out classifier
    """
    document = api.export(target, reporter=ConsoleReporter(quiet=quiet), **options)
    if json:
        emit(document)
        return
    check, accuracy, latency = document.check, document.accuracy, document.latency
    show(
        f"{document.network} as {document.format}, {document.precision}: {document.bytes / 1e6:.2f} MB (in PyTorch "
        f"{document.network_bytes / 1e6:.2f}), logits within {check.difference:.1g} on {check.images} images"
        f"{'' if check.real else ' of noise'}"
    )
    if accuracy is not None:
        show(f"top-1 on {accuracy.images} images: {accuracy.after:.2f} %, in PyTorch {accuracy.before:.2f} %")
    if latency is not None:
        file, network = latency.file.median, latency.network.median
        show(f"one image on this CPU: {file:.2f} ms, in PyTorch {network:.2f} ms")
        many, own = latency.file_throughput, latency.network_throughput
        show(f"in batches of {many.batch}: {many.median:.0f} images a second, in PyTorch {own.median:.0f}")
    show(f"folder: {document.folder} (README.md says how to load it)")


File = Annotated[Path, typer.Argument(metavar="FILE", help="PyTorch (.pth, .pt) or .safetensors file of a state dict.")]


@with_options("import-weights")
def import_weights(options: Values, json: bool, quiet: bool, file: File) -> None:
    """Convert weights of another program (RepDistiller, mdistiller) to a folder for --teacher, and evaluate them.

    The file is read as plain tensors only; every tensor of the network is filled exactly once. The weights are found
    wherever the trainer has put them; what is left in the file is told.

    Examples:

        sakd import-weights save/models/resnet32x4_vanilla/ckpt_epoch_240.pth

        sakd import-weights model_best.pth.tar --model timm/resnet18 --key state_dict_ema --classes order.txt

        sakd distill --teacher resnet32x4-cifar100 --student resnet8x4
    """
    result = api.import_weights(file, reporter=ConsoleReporter(quiet=quiet), **options)
    if json:
        emit(result)
        return
    scored = "not scored" if result.top1 is None else f"top-1 {result.top1:.2f} % on {result.images} test images"
    show(f"{result.network} for the {result.classes} classes of {result.dataset}: {scored}")
    show(f"folder: {result.folder}")


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


Distillation = Annotated[
    Path | None, typer.Argument(metavar="RUN", help="Run directory. Default: the newest distillation.")
]


@with_options("inspect-spots")
def inspect_spots(options: Values, json: bool, run: Distillation = None) -> None:
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


ActionAndRuns = Annotated[
    list[str] | None, typer.Argument(metavar="[show|rm] [RUN...]", help="Show, or remove, these runs.")
]
SHOW, REMOVE = "show", "rm"


@with_options("runs")
def runs(options: Values, json: bool, yes: bool, words: ActionAndRuns = None) -> None:
    """List runs, show some of them with their settings, or remove them.

    Examples:

        sakd runs --where method.name=fitnet --sort -top1

        sakd runs show runs/A

        sakd runs rm runs/A runs/B
    """
    action, *named = words or [""]
    if action not in ("", SHOW, REMOVE) or (action and not named):
        wrong = "which runs?" if action in (SHOW, REMOVE) else "is neither `show RUN...` nor `rm RUN...`"
        raise UsageError(f"sakd runs {action}: {wrong}", "sakd runs --help")
    if action == REMOVE:
        document = RunEntries(rows=[], removed=_remove([RunDir(Path(name)) for name in named], yes=yes))
    else:
        where = dict(parse_assignment("--where", text, "method.name=fitnet") for text in options["where"] or [])
        document = api.runs(*named, runs_dir=options["runs_dir"], where=where, sort=options["sort"])
        if options["runs_dir"] and not Path(options["runs_dir"]).is_dir():
            ConsoleReporter(quiet=False).warn(f"{options['runs_dir']}: no such folder")
    emit(document) if json else show(*entry_tables(document))


def _remove(chosen: list[RunDir], *, yes: bool) -> list[str]:
    """Remove these runs, all or none. UsageError where one is needed, or nobody says yes."""
    for run in chosen:
        if not run.path.exists() and remains(run):
            continue
        look_up(run.config, "task")  # it is a run, or this says that it is none
        if (kept := why_kept(run, {one.path.resolve() for one in chosen})) is not None:
            raise UsageError(f"{run.path}: is not removed, {kept}")
    if not yes:
        if not sys.stdin.isatty():
            raise UsageError(f"runs would be removed for ever: {len(chosen)}", "--yes removes them without a question")
        typer.confirm(f"Remove {', '.join(str(run.path) for run in chosen)} for ever?", abort=True)
    for run in chosen:
        remove(run)
    return [str(run.path) for run in chosen]


DataSet = Annotated[
    str,
    typer.Argument(metavar="DIR|FILE.csv|NAME", help="A folder of pictures, a list of them, or a data set by name."),
]


@with_options("data-check")
def check_data(options: Values, json: bool, quiet: bool, what: DataSet) -> None:
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
