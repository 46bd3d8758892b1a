"""`sakd inspect-spots`: where knowledge flowed, as tables, plots, an HTML file, JSON or CSV."""

import json as json_files
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from sakd_cli.api import inspect_run
from sakd_cli.cli.console import ConsoleReporter, emit, show
from sakd_cli.cli.options import Values, with_options
from sakd_cli.documents.spots import EXTREMES
from sakd_cli.errors import DiskError, UsageError
from sakd_cli.files import write_aside
from sakd_cli.rundir import RunDir

Run = Annotated[Path | None, typer.Argument(metavar="RUN", help="Run directory. Default: the newest distillation.")]


@with_options("inspect-spots")
def inspect_spots(options: Values, json: bool, html: Path | None, samples: Path | None, run: Run = None) -> None:
    """Show where knowledge flowed: by spot, epoch, class, difficulty and path, with the extreme images.

    A finished run has stored all of it for its training images; --live and every option about data or device run the
    networks again.

    Examples:

        sakd inspect-spots --html spots.html

        sakd inspect-spots runs/20261121-120000-distill-... --split test --json | jq '.measured.routed'
    """
    from sakd_cli.report.render import plots
    from sakd_cli.report.runs.beside import helped
    from sakd_cli.report.spots.charts import spot_figure
    from sakd_cli.report.spots.log import history
    from sakd_cli.report.spots.page import Seen, spot_page
    from sakd_cli.report.spots.survey import records

    reporter, plot = ConsoleReporter(quiet=options["quiet"]), options["plot"]
    if options["panel"] and not plot:
        raise UsageError("--panel needs --plot FILE")
    if samples and samples.suffix not in (".jsonl", ".csv"):
        raise UsageError(f"--samples {samples}: the name ends in .jsonl or .csv")
    if plot:
        plots.checked(plot)
    most, seed = max(options["extremes"], EXTREMES), options["sample_seed"]
    report, survey = inspect_run(
        run, options, options["split"], reporter, sample=options["sample"], seed=seed, extremes=most
    )
    if plot:
        plots.write(spot_figure(report, options["panel"]), plot)
    if html:
        inspected = RunDir(Path(report.run))
        seen = Seen(survey.images if survey else {}, history(inspected, survey), *helped(inspected))
        write_aside(html, spot_page(report, seen).encode())
    if samples:
        _write_records(records(survey, report.overall) if survey else [], samples)
    for path in filter(None, (plot, html, samples)):
        reporter.say(f"written: {path}")
    if json:
        emit(report)
    elif options["csv"]:
        from sakd_cli.report.render.format import csv_text
        from sakd_cli.report.spots.log import CSV_HEADER, csv_rows

        rows = [dict(zip(CSV_HEADER, row, strict=True)) for row in csv_rows(report)]
        sys.stdout.write(csv_text(CSV_HEADER, rows))
    elif not (plot or html or samples):
        from sakd_cli.report.spots.tables import spot_tables, survey_tables

        top, measured = options["top"], report.measured
        sections = survey_tables(measured, top=top, extremes=options["extremes"]).values() if measured else ()
        show(*spot_tables(report, top=top), *(sheet for sheets in sections for sheet in sheets))


def _write_records(records: list[dict[str, Any]], path: Path) -> None:
    if not records:
        raise UsageError("--samples: this run has no record by image", hint="--live measures it")
    from sakd_cli.report.render.format import csv_text

    try:
        with path.open("w", encoding="utf-8", newline="") as file:
            if path.suffix == ".csv":
                file.write(csv_text(list(records[0]), records))
            else:
                file.writelines(json_files.dumps(record) + "\n" for record in records)
    except OSError as error:
        raise DiskError(f"{path}: cannot be written: {error.strerror}") from None
