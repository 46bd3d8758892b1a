"""`sakd inspect-spots --html`: the document of a run's routing on one page: the answer first, then why it is so"""

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from sakd_cli.config.routers import selects
from sakd_cli.documents.spots import ExtremeImage, Measured, SpotsDocument
from sakd_cli.report.render import html
from sakd_cli.report.render.charts import Bars, Lines, Row, zoom
from sakd_cli.report.render.format import WHAT, fixed, fraction, named, whole
from sakd_cli.report.render.sheet import Sheet
from sakd_cli.report.runs.beside import helped
from sakd_cli.report.spots import charts
from sakd_cli.report.spots import findings as found
from sakd_cli.report.spots.log import History, history
from sakd_cli.report.spots.survey import Survey
from sakd_cli.report.spots.tables import WEAK, spot_tables, survey_tables
from sakd_cli.rundir import RunDir

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Images = dict[int, NDArray[Any]]

OPENING = 6  # images at each end that stand beside the answer
CONTROLS = (
    "Not known from this run alone. Train what a claim needs: `sakd distill ... --with-control`, then `sakd compare`."
)
NOT_ROUTED = "Nothing was routed: this router does not decide by the image."
QUESTIONS = {
    "In training": "At which spots was the student distilled, and how did that change with the epochs?",
    "The trained router": "What does the router want at the end, and how much do its wishes differ between images?",
    "By class": "Which classes are distilled more often than others, and where?",
    "Class by epoch": "When in training did the classes part?",
    "By difficulty": "Are hard images distilled more often, or easy ones?",
    "By agreement": "Is it distilled where the networks agree, or where the student can still learn?",
    "Paths": "Which ways through both networks are frequent, and which images take them?",
    "One image": "What happened to a single image, epoch by epoch?",
    "Extremes": "Which images are distilled most, and which least?",
    "Reliability": "How far can the answers' confidence be trusted?",
    "The routed network": "How good is the network that is made of both, in which the router learns?",
}


class PageContext(NamedTuple):
    """What a page shows beside the document.

    images   pixels [3, H, W] of images by index, as far as they are known
    history  the record by epoch; None: not at hand
    helped   what comparisons with runs beside it say of the routing; controls: a row for each of them
    """

    images: "Images"
    history: History | None = None
    helped: str = ""
    controls: Sheet | None = None


def context_of(run: RunDir, survey: Survey | None) -> PageContext:
    """That of a run's page, with what its survey has and the runs beside it say."""
    return PageContext(survey.images if survey else {}, history(run, survey), *helped(run))


def spot_page(report: SpotsDocument, context: PageContext) -> str:
    """The page of a document of `inspect-spots`."""
    facts = html.facts_of(report, ("teacher", "student", "dataset", "method", "router"))
    facts += [("Classes", whole(len(report.by_class)))] * bool(report.by_class)
    facts += [("Training images", whole(report.samples // max(report.epochs, 1)))]
    facts += [("Epochs", f"{report.epochs}{'' if report.finished else ' so far'}"), ("Run", named(report.run))]
    return html.page("Where knowledge flowed", facts, spot_sections(report, context), spot_opening(report, context))


def spot_opening(report: SpotsDocument, context: PageContext) -> html.Opening:
    """The answer: sentences beside the images at both ends of the spot where classes differ most; below, the figures.

    What is said and shown of the training is the share of its samples; the images are the trained router's.
    """
    said = context.helped or (CONTROLS if selects(report.router or "") else NOT_ROUTED)
    answers = [
        html.Answer("Which spot was used most?", [found.most_used(report), found.SPOT]),
        html.Answer("For which classes?", [found.which_classes(report), *found.at_the_end(report)]),
        html.Answer("Did routing help?", [said]),
        html.Answer("Does it choose, or toss coins?", [found.more_than_coins(report)]),
    ]
    measured, ends, galleries = report.measured, found.ends_of(report), list[html.Block]()
    if measured and any(one.spread for one in measured.extremes) and context.images:
        shown = measured.extremes[ends[0][1] if ends else 0]
        names = ("least often", "most often") if measured.complement else ("most often", "least often")
        how = "in training" if measured.value == "rate" else "trained router"
        for end, images in zip(names, (shown.highest[:OPENING], shown.lowest[:OPENING]), strict=True):
            tiles = _tiles(images, context.images, short=True)
            galleries.append(html.Gallery(f"Images distilled {end} at {named(shown.spot)} ({how})", tiles))
    told = [
        f"{named(spot.name)} hardly acts: ratio {spot.gradient_ratio:.2g}" if found.weak(report, k) else ""
        for k, spot in enumerate(report.overall)
    ]
    rows: list[Row] = [(named(spot.name), charts.percent([spot.fraction]), []) for spot in report.overall]
    note = f"{whole(report.epochs)} epoch{'s' * (report.epochs != 1)}{' so far' * (not report.finished)}."
    note += " An image can use several spots: together more than 100 %." * (len(rows) > 1)
    note += f" Ratio: of the distillation loss's gradient to the task's; below {WEAK:g} it hardly acts." * any(told)
    bars = Bars("How often each spot was used", "training samples distilled, %", ["all"], rows, note, told)
    controls, classes = ([sheet] if sheet else [] for sheet in (context.controls, found.class_table(report)))
    return html.Opening(answers, [[*galleries, bars, *classes], controls])


def spot_sections(report: SpotsDocument, context: PageContext) -> list[html.Section]:
    """What a page says of the routing in detail."""
    measured, record = report.measured, context.history
    overall, *others = spot_tables(report, top=None)
    by_epoch, by_class = others[:1], others[1:]
    tables, plotted = defaultdict[str, list[Sheet]](list), defaultdict[str, list[html.Block]](list)
    for name in () if report.saturated else charts.panels_of(report):
        for chart in charts.PANELS[name](report):
            plotted[name] += zoom(chart) if isinstance(chart, Lines) else [chart]
    if measured and measured.paths and measured.path_examples:  # those that have images
        counts = {one.path: one.images for one in measured.path_examples}
        plotted["paths"] = [charts.path_chart(report, counts)]
    if measured:
        tables.update(survey_tables(measured, top=None, extremes=None))
    tracked = record.epochs[-1].tracked if record else []
    blocks: dict[str, Sequence[html.Block]] = {
        "In training": [*plotted["epochs"], overall, *_folded(by_epoch)],
        "The trained router": tables["spots"],
        "By class": [*plotted["classes"], *_folded([*by_class, *tables["classes"]])],
        "Class by epoch": charts.history_charts(report, record)
        if record and any(row.peak for row in report.by_class) and not report.saturated
        else [],
        "By difficulty": [*plotted["difficulty"], *_folded(tables["difficulty"])],
        "By agreement": [charts.agreement_chart(measured)] if measured and tables["difficulty"] else [],
        "Paths": [*plotted["paths"], *_path_galleries(measured, context.images), *_folded(tables["paths"])],
        "One image": _routes(report, record, context.images) if record and tracked and not report.saturated else [],
        "Extremes": [*_extremes(measured, context.images), *_folded(tables["extremes"])],
        "Reliability": [charts.reliability_chart(measured.routed)]
        if measured and measured.routed and measured.routed.student_reliability
        else [],
        "The routed network": tables["routed"],
    }
    said = found.findings(report, record.epochs if record else [])
    parts = [(title, shown) for title, shown in blocks.items() if shown]
    return [html.Section(title, shown, QUESTIONS[title], said.get(title, "")) for title, shown in parts]


def _folded(blocks: Sequence[html.Block], title: str = "In numbers", first: int = 0) -> list[html.Block]:
    """The first so many blocks, and the others behind a title."""
    return [*blocks[:first], *([html.Folded(title, blocks[first:])] if len(blocks) > first else [])]


def _extremes(measured: Measured | None, images: "Images") -> list[html.Block]:
    galleries = list[html.Block]()
    if measured and images:
        # Extremes are by probability even where everything else is a sample.
        what = WHAT["rate" if measured.value == "rate" else "probability"]
        for ends in sorted((one for one in measured.extremes if one.spread), key=lambda one: -one.spread):
            for end, rows in (("Highest", ends.highest), ("Lowest", ends.lowest)):
                galleries.append(html.Gallery(f"{end} at {named(ends.spot)} ({what})", _tiles(rows, images)))
    return _folded(galleries, "At the other spots", 2)


def _path_galleries(measured: Measured | None, images: "Images") -> list[html.Block]:
    galleries = list[html.Block]()
    for path in measured.path_examples if measured else ():
        if tiles := _tiles(path.examples, images):
            title = f"{path.path} (most probable for {whole(path.images)}): the clearest images, with its probability"
            galleries.append(html.Gallery(title, tiles))
    return _folded(galleries, "Images of the other paths", 1)


def _routes(report: SpotsDocument, history: History, images: "Images") -> list[html.Block]:
    """A tile for each tracked image: the picture, and its spots by epoch."""
    tiles = []
    for image in history.epochs[-1].tracked:
        name = history.labels.get(image.index)
        pixels = images.get(image.index) if name else None
        picture, said = None if pixels is None else html.png(pixels), f"image {image.index}"
        chart = charts.route_chart(report, history, image.index)
        tiles.append(html.Tile(picture, f"{said}: {name}", [said], chart))
    return [html.Gallery("Evenly spaced training images, spots by epoch. Strong colour: distilled; weak: not", tiles)]


def _tiles(rows: Sequence[ExtremeImage], images: "Images", *, short: bool = False) -> list[html.Tile]:
    """Class and value, what the networks say instead of the class, and all that is known as the tile's title."""
    tiles = []
    for row in rows:
        if row.index in images:
            said = {"student": row.student_prediction, "teacher": row.teacher_prediction}
            lines = [named(row.label), f"{fraction(row.value)} %"]
            known = [f"image {row.index}", *([] if row.file is None else [row.file])]
            known += [f"{who} says {named(answer)}" for who, answer in said.items()]
            known.append(f"student's loss {fixed(row.student_loss, 2)} nats")
            lines += [f"{who}: {named(answer)}" for who, answer in said.items() if answer != row.label and not short]
            alt = f"image {row.index}: {lines[0]}"
            tiles.append(html.Tile(html.png(images[row.index]), alt, lines, title=", ".join(known)))
    return tiles
