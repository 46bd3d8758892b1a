"""`sakd inspect-spots --html`: the document of a run's routing on one page, with plots and the extreme images"""

from collections import defaultdict
from typing import TYPE_CHECKING, Any

from sakd_cli.documents.spots import ExtremeImage, SpotsDocument
from sakd_cli.report.render import plots
from sakd_cli.report.render.format import WHAT, fixed, fraction, named
from sakd_cli.report.render.html import Block, Gallery, Picture, Section, Tile, facts_of, page, png
from sakd_cli.report.spots.tables import spot_tables, survey_tables

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Images = dict[int, NDArray[Any]]

ALT = {
    "epochs": "Lines: fraction of the samples distilled at every spot, by epoch",
    "classes": "Heat map: classes by spots, difference from the spot's mean",
    "difficulty": "Lines: mean at every spot by deciles of difficulty",
    "paths": "Bars: the most frequent paths",
}


def spot_page(report: SpotsDocument, images: "Images", *, drawn: bool) -> str:
    """The page of a document of `inspect-spots`; see `spot_sections`."""
    facts = facts_of(report, ("teacher", "student", "dataset", "method", "router"))
    facts += [("Epochs", f"{report.epochs}{'' if report.finished else ' so far'}"), ("Run", named(report.run))]
    return page("Where knowledge flowed", facts, spot_sections(report, images, drawn=drawn))


def spot_sections(report: SpotsDocument, images: "Images", *, drawn: bool) -> list[Section]:
    """What a page says of the routing.

    images  pixels of the extreme images, by index
    drawn   with plots, which need matplotlib
    """
    measured = report.measured
    overall, *by_epoch = spot_tables(report, top=None)
    by_epoch, by_class = by_epoch[:1], by_epoch[1:]
    plotted, found, galleries = defaultdict[str, list[Block]](list), defaultdict[str, list[Block]](list), list[Block]()
    for name in plots.panels_of(report) if drawn else ():
        plotted[name] = [Picture(plots.rendered(plots.spot_figure(report, name), "svg"), "svg+xml", ALT[name])]
    if measured:
        found.update((name, list(sheets)) for name, sheets in survey_tables(measured, top=None, extremes=None).items())
    if measured and images:
        # Extremes are by probability even where everything else is a sample.
        what = WHAT["rate" if measured.value == "rate" else "probability"]
        for ends in measured.extremes:
            for end, rows in (("Highest", ends.highest), ("Lowest", ends.lowest)):
                galleries.append(Gallery(f"{end} at {named(ends.spot)} ({what})", _tiles(rows, images)))
    blocks = {
        "In training": [overall, *plotted["epochs"], *by_epoch],
        "The trained router": found["spots"],
        "By class": [*plotted["classes"], *found["classes"], *by_class],
        "By difficulty": [*plotted["difficulty"], *found["difficulty"]],
        "Paths": [*plotted["paths"], *found["paths"]],
        "Extremes": [*galleries, *found["extremes"]],
        "The routed network": found["routed"],
    }
    return [Section(title, content) for title, content in blocks.items() if content]


def _tiles(rows: list[ExtremeImage], images: "Images") -> list[Tile]:
    tiles = []
    for row in rows:
        if row.index in images:
            names = [named(row.label), f"S: {named(row.student_prediction)}", f"T: {named(row.teacher_prediction)}"]
            lines = [f"{fraction(row.value)} %", *names, f"loss {fixed(row.student_loss, 2)}"]
            lines += [] if row.file is None else [named(row.file)]
            tiles.append(Tile(Picture(png(images[row.index]), "png", f"image {row.index}: {names[0]}"), lines))
    return tiles
