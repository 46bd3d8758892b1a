"""`sakd report`: the whole of a run on one page, from its directory alone

PARTS is what the page is made of. A training procedure that leaves something of its own in the run directory adds a
function there, which gives no section for runs that have nothing of the kind.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Group

from sakd_cli.config.resolve import flat
from sakd_cli.errors import UsageError
from sakd_cli.files import write_aside
from sakd_cli.report.evaluation.ensemble import curve_table, ensemble_summary
from sakd_cli.report.render import plots
from sakd_cli.report.render.format import fixed, word
from sakd_cli.report.render.html import Block, Picture, Section, page
from sakd_cli.report.render.sheet import Column, Sheet
from sakd_cli.report.runs.compare import compare
from sakd_cli.report.runs.curves import curve_figure
from sakd_cli.report.runs.tables import summary_table
from sakd_cli.report.spots.log import RECORD
from sakd_cli.report.spots.measure import spot_document
from sakd_cli.report.spots.mixtures import mixture_table, read_mixtures
from sakd_cli.report.spots.page import spot_sections
from sakd_cli.report.spots.survey import survey_of
from sakd_cli.rundir import RunDir


class Part(NamedTuple):
    """Sections of the page, and figures that are also files beside it: name -> PNG."""

    sections: list[Section]
    pictures: dict[str, bytes]


def run_page(run: RunDir, *, drawn: bool) -> tuple[str, dict[str, bytes], list[str]]:
    """The page, the pictures by name and the titles of its sections; `drawn`: with charts, which need matplotlib."""
    row = compare([run])["runs"][0]
    parts = [part(run, drawn) for part in PARTS]
    keys = ("network", "dataset", "method", "router", "seed", "epochs")
    facts = [(key.capitalize(), word(row[key])) for key in keys if row[key] is not None]
    facts += [("State", "finished" if run.finished else "not finished"), ("Run", word(run.path))]
    sections = [section for part in parts for section in part.sections]
    pictures = {name: content for part in parts for name, content in part.pictures.items()}
    return page(f"{word(row['task'])}: {word(run.path.name)}", facts, sections), pictures, [s.title for s in sections]


def save_pictures(pictures: dict[str, bytes], out: Path) -> list[Path]:
    """Write each as `<page>-<name>.png` beside the page."""
    paths = []
    for name, content in pictures.items():
        paths.append(out.with_name(f"{out.stem}-{name}.png"))
        write_aside(paths[-1], content)
    return paths


def _result(run: RunDir, drawn: bool) -> Part:
    if not run.finished:
        return Part([], {})
    table: Any = summary_table(run.summary)
    blocks: list[Any] = list(table.renderables) if isinstance(table, Group) else [table]
    return Part([Section("Result", blocks)], {})


def _curves(run: RunDir, drawn: bool) -> Part:
    document = compare([run])
    curve = document["runs"][0]["curve"]
    if not curve:
        return Part([], {})
    heads = ("Epoch", "Top-1 %", "Loss", "Training top-1 %", "Training loss")
    keys = (("top1", 2), ("loss", 3), ("train_top1", 2), ("train_loss", 3))
    rows = [[str(point["epoch"]), *(fixed(point[key], digits) for key, digits in keys)] for point in curve]
    selected = next((point["selected_on"] for point in curve if point["selected_on"]), None)
    note = f"Top-1 and loss on the images that choose the best epoch ({word(selected)})."
    blocks: list[Block] = [Sheet("By epoch", [Column(head) for head in heads], rows, [note])]
    if not drawn:
        return Part([Section("Curves", blocks)], {})
    return _charted("Curves", curve_figure(document), "Lines: accuracy and loss by epoch", "curves", blocks)


def _spots(run: RunDir, drawn: bool) -> Part:
    if not (run.path / RECORD).is_file():
        return Part([], {})
    try:
        survey = survey_of(run, None)
        report = spot_document(run, survey)
    except UsageError:  # no epoch is finished, or the record is damaged: `inspect-spots` says which
        return Part([], {})
    images = survey.images if survey else {}
    pictures = {"spots": plots.rendered(plots.spot_figure(report, None), "png")} if drawn else {}
    return Part(spot_sections(report, images, drawn=drawn), pictures)


def _mixtures(run: RunDir, drawn: bool) -> Part:
    try:
        record = read_mixtures(run)
    except UsageError:  # damaged: `inspect-spots` says how
        record = None
    if record is None:
        return Part([], {})
    table, title = mixture_table(record), "Mixtures of the teacher's blocks"
    if not drawn:
        return Part([Section(title, [table])], {})
    return _charted(title, plots.mixture_map(record), "Heat map: share of every block", "mixtures", [table])


def _residual(run: RunDir, drawn: bool) -> Part:
    found = run.summary.ensemble if run.finished else None
    if not found:
        return Part([], {})
    tables: list[Any] = [ensemble_summary(found), curve_table(found.curve)]
    if not drawn:
        return Part([Section("Residual students", tables)], {})
    figure = plots.exit_curve(found.curve, found.early, found.early.top1, "thresholds in use")
    return _charted("Residual students", figure, "Curve: accuracy by mean cost", "exits", tables)


def _charted(title: str, figure: Any, alt: str, name: str, tables: list[Any]) -> Part:
    """A section of tables below a chart, which is also a PNG beside the page."""
    chart = Picture(plots.rendered(figure, "svg"), "svg+xml", alt)
    return Part([Section(title, [chart, *tables])], {name: plots.rendered(figure, "png")})


def _environment(run: RunDir, drawn: bool) -> Part:
    try:
        found = run.read_json("env.json")
    except UsageError:
        return Part([], {})
    return Part([Section("Environment", [_pairs("Where and how it ran", found)])], {})


def _words(run: RunDir, drawn: bool) -> Part:
    return Part([Section("Settings", [_pairs("config.yaml", flat(run.config))])], {})


def _pairs(title: str, found: dict[str, Any]) -> Sheet:
    rows = [[word(key), word(value)] for key, value in found.items()]
    return Sheet(title, [Column("Word", text=True), Column("Value", text=True)], rows)


PARTS: tuple[Callable[[RunDir, bool], Part], ...] = (
    _result,
    _curves,
    _spots,
    _mixtures,
    _residual,
    _environment,
    _words,
)
