"""`sakd inspect-spots`: where knowledge flowed, as tables, pictures, a page, JSON or CSV."""

import csv as csv_files
import json as json_files
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from sakd_cli.api import looked_at, run_to_look_at
from sakd_cli.cli.console import ConsoleReporter, emit, show
from sakd_cli.cli.options import Values, with_options
from sakd_cli.errors import DiskError, UsageError


class Part(StrEnum):
    """A split of the data set."""

    TRAIN = "train"
    VALIDATION = "validation"
    TEST = "test"


class Panel(StrEnum):
    """One kind of picture."""

    EPOCHS = "epochs"
    CLASSES = "classes"
    DIFFICULTY = "difficulty"
    PATHS = "paths"


RunArgument = Annotated[Path | None, typer.Argument(help="Run directory. Default: the newest distillation.")]
Live = Annotated[
    bool,
    typer.Option("--live", help="Measure now, with the networks of the last checkpoint.", rich_help_panel="Images"),
]
SplitOption = Annotated[
    Part,
    typer.Option(help="Which images (train). Others than the run's own are measured now.", rich_help_panel="Images"),
]
Sample = Annotated[
    bool, typer.Option("--sample", help="Draw once instead of using probabilities.", rich_help_panel="Images")
]
DrawSeed = Annotated[int, typer.Option(metavar="N", help="Of the draws.", min=0, rich_help_panel="Images")]
Top = Annotated[int, typer.Option(help="Classes to show at each end.", min=1, rich_help_panel="Output")]
Ends = Annotated[
    int, typer.Option("--extremes", help="Images to show at each end of each spot.", min=0, rich_help_panel="Output")
]
Plot = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Pictures in one file, .png or .svg.", rich_help_panel="Output")
]
PanelOption = Annotated[Panel | None, typer.Option(help="Only this picture of --plot.", rich_help_panel="Output")]
Html = Annotated[Path | None, typer.Option(metavar="FILE", help="Everything on one page.", rich_help_panel="Output")]
Samples = Annotated[
    Path | None, typer.Option(metavar="FILE", help="One record per image, .jsonl or .csv.", rich_help_panel="Output")
]
Csv = Annotated[bool, typer.Option("--csv", help="One long table of all figures on stdout.", rich_help_panel="Output")]


@with_options("inspect-spots")
def inspect_spots(
    options: Values,
    json: bool,
    quiet: bool,
    run: RunArgument = None,
    live: Live = False,
    split: SplitOption = Part.TRAIN,
    sample: Sample = False,
    seed: DrawSeed = 0,
    top: Top = 10,
    extremes: Ends = 3,
    plot: Plot = None,
    panel: PanelOption = None,
    html: Html = None,
    samples: Samples = None,
    csv: Csv = False,
) -> None:
    """Show where knowledge flowed: by spot, epoch, class, difficulty and path, with the extreme images.

    A finished run has kept all of it for its training images; --live and every word about data or device runs the
    networks again.

    Examples:

        sakd inspect-spots --html spots.html

        sakd inspect-spots runs/20261121-120000-distill-... --split test --json | jq '.measured.routed'
    """
    from sakd_cli.report.render import plots
    from sakd_cli.report.spots import measure

    _check(options)
    talk = ConsoleReporter(quiet=quiet)
    words = {name: value for name, value in options.items() if name != "seed"}
    where = run_to_look_at(run, words)
    kept = max(extremes, measure.KEPT)
    survey = looked_at(where, words, split.value, talk, seed=seed, kept=kept)
    report = measure.spot_document(where, survey, sample=sample, seed=seed, extremes=kept)
    if plot:
        plots.write(plots.spot_figure(report, panel and panel.value), plot)
    if html:
        _write_page(report, survey.images if survey else {}, html, talk)
    if samples:
        _write_records(measure.records(survey, report["overall"]) if survey else [], samples)
    for path in filter(None, (plot, html, samples)):
        talk.say(f"written: {path}")
    _say(report, json=json, csv=csv, tables=not (plot or html or samples), top=top, extremes=extremes)


def _check(words: Values) -> None:
    """What can be told before anything is read. Raises UsageError."""
    if words["json"] and words["csv"]:
        raise UsageError("--json and --csv both write to stdout; choose one")
    if words["panel"] and not words["plot"]:
        raise UsageError("--panel needs --plot FILE")
    if (records := words["samples"]) and records.suffix not in (".jsonl", ".csv"):
        raise UsageError(f"--samples {records}: the name ends in .jsonl or .csv")
    if words["plot"]:
        from sakd_cli.report.render import plots

        plots.checked(words["plot"])


def _write_page(report: dict[str, Any], images: dict[int, Any], path: Path, talk: ConsoleReporter) -> None:
    from sakd_cli.report.render import html, plots
    from sakd_cli.report.spots.page import spot_page

    html.write(spot_page(report, images, drawn=plots.available(talk.warn)), path)


def _write_records(records: list[dict[str, Any]], path: Path) -> None:
    if not records:
        raise UsageError("--samples: this run has kept no record by image", hint="--live measures it")
    try:
        with path.open("w", encoding="utf-8", newline="") as file:
            if path.suffix == ".csv":
                writer = csv_files.DictWriter(file, list(records[0]))
                writer.writeheader()
                writer.writerows(records)
            else:
                file.writelines(json_files.dumps(record) + "\n" for record in records)
    except OSError as error:
        raise DiskError(f"{path}: cannot be written: {error.strerror}") from None


def _say(report: dict[str, Any], *, json: bool, csv: bool, tables: bool, top: int, extremes: int) -> None:
    if json:
        emit(report)
        return
    if csv:
        from sakd_cli.documents.spots import CSV_HEADER, csv_rows

        csv_files.writer(sys.stdout, lineterminator="\n").writerows([CSV_HEADER, *csv_rows(report)])
        return
    if not tables:
        return
    from sakd_cli.report.spots.log_tables import spot_tables
    from sakd_cli.report.spots.measured_tables import survey_tables

    measured = report["measured"]
    sections = survey_tables(measured, top=top, extremes=extremes).values() if measured else []
    show(*spot_tables(report, top=top), *(sheet for sheets in sections for sheet in sheets))
