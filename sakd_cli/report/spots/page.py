"""`sakd inspect-spots --html`: the whole of a run's routing on one page, with pictures and the extreme images."""

from typing import TYPE_CHECKING, Any

from sakd_cli.report.render import plots
from sakd_cli.report.render.format import WHAT, fixed, fraction, word
from sakd_cli.report.render.html import Block, Gallery, Picture, Section, Tile, page, png
from sakd_cli.report.spots.log_tables import spot_tables
from sakd_cli.report.spots.measured_tables import survey_tables

if TYPE_CHECKING:
    from numpy.typing import NDArray

ALT = {
    "epochs": "Lines: share of the samples that were taught at every spot, by epoch",
    "classes": "Heat map: classes by spots, difference from the spot's mean",
    "difficulty": "Lines: mean at every spot by tenths of difficulty",
    "paths": "Bars: the most frequent paths",
}


def spot_page(report: dict[str, Any], images: "dict[int, NDArray[Any]]", *, drawn: bool) -> str:
    """The page of a document of `inspect-spots`; see `spot_sections`."""
    facts = [(key.capitalize(), word(report[key])) for key in ("teacher", "student", "dataset", "method", "router")]
    facts += [("Epochs", f"{report['epochs']}{'' if report['finished'] else ' so far'}"), ("Run", word(report["run"]))]
    return page("Where knowledge flowed", facts, spot_sections(report, images, drawn=drawn))


def spot_sections(report: dict[str, Any], images: "dict[int, NDArray[Any]]", *, drawn: bool) -> list[Section]:
    """What a page says of the routing.

    images  pictures of the extreme images, by index
    drawn   with charts, which need matplotlib
    """
    measured = report["measured"]
    found = survey_tables(measured, top=None, extremes=None) if measured else {}
    overall, by_epoch, *by_class = spot_tables(report, top=None)
    charts = {name: _chart(report, name) for name in plots.panels_of(report)} if drawn else {}

    def chart(name: str) -> list[Block]:
        return [charts[name]] if name in charts else []

    galleries: list[Block] = [
        Gallery(f"{end.capitalize()} at {word(spot['spot'])} ({WHAT[_known(measured)]})", _tiles(spot[end], images))
        for spot in (measured["extremes"] if measured and images else [])
        for end in ("highest", "lowest")
    ]
    sections = [
        Section("In training", [overall, *chart("epochs"), by_epoch]),
        Section("The trained router", found.get("spots", [])),
        Section("By class", [*chart("classes"), *found.get("classes", []), *by_class]),
        Section("By difficulty", [*chart("difficulty"), *found.get("difficulty", [])]),
        Section("Paths", [*chart("paths"), *found.get("paths", [])]),
        Section("Extremes", [*galleries, *found.get("extremes", [])]),
        Section("The routed network", found.get("routed", [])),
    ]
    return [section for section in sections if section.blocks]


def _known(measured: dict[str, Any]) -> str:
    """Extremes are by probability even where everything else is a draw."""
    return "rate" if measured["value"] == "rate" else "probability"


def _chart(report: dict[str, Any], name: str) -> Picture:
    return Picture(plots.rendered(plots.spot_figure(report, name), "svg"), "svg+xml", ALT[name])


def _tiles(rows: list[dict[str, Any]], images: "dict[int, NDArray[Any]]") -> list[Tile]:
    tiles = []
    for row in rows:
        if (pixels := images.get(row["index"])) is None:
            continue
        lines = [f"{fraction(row['value'])} %", word(row["label"])]
        lines += [f"S: {word(row['student_prediction'])}", f"T: {word(row['teacher_prediction'])}"]
        lines += [f"loss {fixed(row['student_loss'], 2)}"]
        tiles.append(Tile(Picture(png(pixels), "png", f"image {row['index']}: {word(row['label'])}"), lines))
    return tiles
