"""What a run's routing is read from: its own record, or its networks once more; without torch where the record does."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sakd_cli.config.base import own_name
from sakd_cli.config.datasets import DATASETS
from sakd_cli.config.resolve import config_sources
from sakd_cli.documents.spots import EXTREMES, SpotsDocument
from sakd_cli.engine.reporter import Reporter
from sakd_cli.errors import UsageError
from sakd_cli.report.render import plots
from sakd_cli.report.spots.charts import spot_figure
from sakd_cli.report.spots.log import spots_document
from sakd_cli.report.spots.page import context_of, spot_page
from sakd_cli.report.spots.survey import Survey, notes_on_missing, read_survey, records, write_records
from sakd_cli.rundir import RunDir, look_up
from sakd_cli.runs.locate import run_or_newest
from sakd_cli.runs.own import trust_own
from sakd_cli.writing import write_aside

# Options about images or the machine, which only mean something when the networks are run.
OF_LIVE = ("live", "data_root", "device", "config", "set_", "settings")


def inspect_run(named: Path | None, params: Mapping[str, Any], reporter: Reporter) -> SpotsDocument:
    """The document of a run's routing, with the files that the options of the command ask for.

    named  None: the newest distillation. Raises UsageError where there is none.
    """
    plot, html, samples = (params[name] for name in ("plot", "html", "samples"))
    if params["panel"] and not plot:
        raise UsageError("--panel needs --plot FILE")
    if samples and samples.suffix not in (".jsonl", ".csv"):
        raise UsageError(f"--samples {samples}: the name ends in .jsonl or .csv")
    if html and html.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"--html {html}: the name of an HTML file ends in .html")
    if plot:
        plots.require_plot(plot)
    document, survey = _read(named, params, reporter)
    if plot:
        plots.write(spot_figure(document, params["panel"]), plot)
    if html:
        write_aside(html, spot_page(document, context_of(RunDir(Path(document.run)), survey)).encode())
    if samples:
        write_records(records(survey, document.overall) if survey else [], samples)
    for path in filter(None, (plot, html, samples)):
        reporter.say(f"written: {path}")
    return document


def _read(named: Path | None, params: Mapping[str, Any], reporter: Reporter) -> tuple[SpotsDocument, Survey | None]:
    """The document, and the survey: the run's own, or a new one where the options ask for that."""
    name, split, seed = params["dataset"], params["split"], params["sample_seed"]
    extremes = max(params["extremes"], EXTREMES)
    dataset = name and (own_name(name, DATASETS) or name)
    wanted = {"task": "distill"} | ({"data.name": dataset} if dataset else {})
    run, measured = run_or_newest(named, params["runs_dir"], wanted, "distillation"), None
    trust_own(run)
    another = dataset not in (None, look_up(run.config, "data.name"))
    if another or split != "train" or any(params.get(name) for name in OF_LIVE):
        spots_document(run)  # whatever is wrong with the record of the run is reported before
        from sakd_cli.runs.survey import live

        measured = live(run, config_sources(params), split, reporter, seed=seed, extremes=extremes)
    survey = read_survey(run, measured)
    for text in notes_on_missing(run) if measured is None else ():
        reporter.warn(text)
    document = spots_document(run, survey, sample=bool(params["sample"]), seed=seed, extremes=extremes)
    if params["probe"]:
        from sakd_cli.runs.probe import probe

        document = document.model_copy(update={"probe": probe(run, config_sources(params), reporter, seed=seed)})
    return document, survey
