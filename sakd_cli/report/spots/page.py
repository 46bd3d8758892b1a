"""`sakd inspect-spots --html`: the document of a run's routing on one page: the answer first, then why it is so"""

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from sakd_cli.config.routers import selects
from sakd_cli.documents.spots import ClassDeviation, ExtremeImage, Measured, SpotsDocument
from sakd_cli.report.render.charts import Bars, Lines, Row, zoom
from sakd_cli.report.render.format import WHAT, deviation, fixed, fraction, named, whole
from sakd_cli.report.render.html import Answer, Block, Gallery, Opening, Picture, Section, Tile, facts_of, page, png
from sakd_cli.report.spots import charts
from sakd_cli.report.spots.log import History
from sakd_cli.report.spots.tables import spot_tables, survey_tables

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Images = dict[int, NDArray[Any]]

OPENING = 6  # images at each end that stand beside the answer
ALIKE = 0.01  # classes whose fractions differ by less are treated alike
# What is said of a router by how much of the variance of its decisions the image explains, at the spot with the most.
CHOICE = ((0.5, "It chooses"), (0.1, "It chooses in part"), (0.01, "Little more than coins"), (0.0, "It tosses coins"))
CONTROLS = (
    "Not known from this run alone. Train what a claim needs: sakd distill ... --with-control, then sakd compare."
)
NOT_ROUTED = "Nothing was routed: this router does not decide by the image."
QUESTIONS = {
    "In training": "At which spots was the student distilled, and how did that change with the epochs?",
    "The trained router": "What does the router want at the end, and how much do its wishes differ between images?",
    "By class": "Which classes are distilled more often than others, and where?",
    "Class by epoch": "When in training did the classes part?",
    "By difficulty": "Are hard images distilled more often, or easy ones?",
    "By agreement": "Is it distilled where the networks agree, or where the student can still learn?",
    "Paths": "Which ways through both networks are frequent, and which images take them? S, T: the networks' answers.",
    "One image": "What happened to a single image, epoch by epoch?",
    "Extremes": "Which images are distilled most, and which least? S, T: the answers of student and teacher.",
    "Reliability": "How far can the answers' confidence be trusted?",
    "The routed network": "How good is the network that is made of both?",
}


class Seen(NamedTuple):
    """What a page shows beside the document.

    images   pixels [3, H, W] of images by index, as far as they are known
    history  the record by epoch; None: not at hand
    helped   what comparisons with runs beside it say of the routing, in sentences
    """

    images: "Images"
    history: History | None = None
    helped: Sequence[str] = ()


def spot_page(report: SpotsDocument, seen: Seen) -> str:
    """The page of a document of `inspect-spots`."""
    facts = facts_of(report, ("teacher", "student", "dataset", "method", "router"))
    facts += [("Epochs", f"{report.epochs}{'' if report.finished else ' so far'}"), ("Run", named(report.run))]
    return page("Where knowledge flowed", facts, spot_sections(report, seen), spot_opening(report, seen))


def spot_opening(report: SpotsDocument, seen: Seen) -> Opening:
    """The answer: sentences, how often each spot was used, the images at both ends of the spot that differs most."""
    answers = [
        Answer("Which spot was used most?", [_most_used(report)]),
        Answer("For which classes?", [_which_classes(report)]),
        Answer("Does it choose, or toss coins?", [_more_than_coins(report)]),
        Answer("Did routing help?", seen.helped or [CONTROLS if selects(report.router or "") else NOT_ROUTED]),
    ]
    rows: list[Row] = [(named(spot.name), charts.percent([spot.fraction]), []) for spot in report.overall]
    note = f"All {whole(report.epochs)} epochs."
    blocks: list[Block] = [Bars("How often each spot was used", "training samples distilled, %", ["all"], rows, note)]
    measured, (place, _) = report.measured, _widest(report)
    if measured and measured.extremes and seen.images:
        ends = measured.extremes[place]
        names = ("least often", "most often") if measured.complement else ("most often", "least often")
        for end, images in zip(names, (ends.highest[:OPENING], ends.lowest[:OPENING]), strict=True):
            blocks.append(Gallery(f"Distilled {end} at {named(ends.spot)}", _tiles(images, seen.images, short=True)))
    return Opening(answers, blocks)


def _widest(report: SpotsDocument) -> tuple[int, list[tuple[float, str]]]:
    """The spot at which classes differ most, and there (deviation, class) from the highest to the lowest."""
    measured = report.measured.classes if report.measured and not report.measured.complement else None
    rows: Sequence[ClassDeviation] = measured.rows if measured else report.by_class
    known = [row for row in rows if None not in row.deviation]
    if not known:
        return 0, []
    of_spots = [[float(row.deviation[k] or 0) for row in known] for k in range(len(report.overall))]
    place, values = max(enumerate(of_spots), key=lambda one: max(one[1]) - min(one[1]))
    names = [named(row.name) for row in known]
    return place, sorted(zip(values, names, strict=True), key=lambda one: -one[0])


def _most_used(report: SpotsDocument) -> str:
    ranked = sorted(report.overall, key=lambda spot: -(spot.fraction or 0))
    (first, share), *others = [(named(spot.name), f"{fraction(spot.fraction)} %") for spot in ranked]
    if not others:
        return f"There is one: {share} of the training samples were distilled at {first}."
    if (ranked[0].fraction or 0) - (ranked[-1].fraction or 0) < ALIKE:
        return f"None: all alike, {share} of the training samples at each."
    rest = ", ".join(f"{name} {less}" for name, less in others)
    return f"{first}: {share} of the training samples were distilled there; then {rest}."


def _which_classes(report: SpotsDocument) -> str:
    place, ranked = _widest(report)
    if report.saturated:
        return "For all alike."
    if len(ranked) < 2:
        return "This run has no record by class."
    when = "by the trained router" if report.measured and report.measured.value == "probability" else "in training"
    if ranked[0][0] - ranked[-1][0] < ALIKE:
        return f"For all alike, {when}: at no spot do two classes differ by a point."
    shown = min(2, len(ranked) // 2)
    most, least = ([f"{name} ({deviation(value)})" for value, name in part[:shown]] for part in (ranked, ranked[::-1]))
    said = f"most often {', '.join(most)}, least often {', '.join(least)}; points from the mean, {when}"
    return f"They differ most at {named(report.overall[place].name)}: {said}."


def _more_than_coins(report: SpotsDocument) -> str:
    measured = report.measured
    if report.saturated:
        return report.saturated
    if not measured or measured.value != "probability":
        if report.overall[0].probability is not None:
            return "Not known: the run has no survey of the trained router. sakd inspect-spots --live makes one."
        return f"The {named(report.router)} router has no probabilities by image: it does not choose by what it sees."
    known = [(spot.by_image, named(spot.name)) for spot in measured.spots if spot.by_image is not None]
    if not known:
        return "Neither: it decides the same for every image."
    most = max(share for share, _ in known)
    verdict = next(words for least, words in CHOICE if most >= least)
    shares = ", ".join(f"{fixed(100 * share, 1)} % at {name}" for share, name in known)
    scale = "coins: 0 %; every image decided: 100 %"
    return f"{verdict}: of the variance of its decisions, knowing the image explains {shares} ({scale})."


def spot_sections(report: SpotsDocument, seen: Seen) -> list[Section]:
    """What a page says of the routing in detail."""
    measured, history = report.measured, seen.history
    overall, *by_epoch = spot_tables(report, top=None)
    by_epoch, by_class = by_epoch[:1], by_epoch[1:]
    found, plotted = defaultdict[str, list[Block]](list), defaultdict[str, list[Block]](list)
    for name in () if report.saturated else charts.panels_of(report):
        for chart in charts.PANELS[name](report):
            plotted[name] += zoom(chart) if isinstance(chart, Lines) else [chart]
    if measured:
        found.update((name, list(sheets)) for name, sheets in survey_tables(measured, top=None, extremes=None).items())
    tracked = history.epochs[-1].tracked if history else []
    blocks: dict[str, Sequence[Block]] = {
        "In training": [*plotted["epochs"], overall, *by_epoch],
        "The trained router": found["spots"],
        "By class": [*plotted["classes"], *found["classes"], *by_class],
        "Class by epoch": charts.history_charts(report, history)
        if history and report.by_class and not report.saturated
        else [],
        "By difficulty": [*plotted["difficulty"], *found["difficulty"]],
        "By agreement": [charts.agreement_chart(measured)] if measured and found["difficulty"] else [],
        "Paths": [*plotted["paths"], *_path_galleries(measured, seen.images), *found["paths"]],
        "One image": _routes(report, history, seen.images) if history and tracked and not report.saturated else [],
        "Extremes": [*_extremes(measured, seen.images), *found["extremes"]],
        "Reliability": [charts.reliability_chart(measured.routed)]
        if measured and measured.routed and measured.routed.student_reliability
        else [],
        "The routed network": found["routed"],
    }
    return [Section(title, content, QUESTIONS[title]) for title, content in blocks.items() if content]


def _extremes(measured: Measured | None, images: "Images") -> list[Block]:
    galleries = list[Block]()
    if measured and images:
        # Extremes are by probability even where everything else is a sample.
        what = WHAT["rate" if measured.value == "rate" else "probability"]
        for ends in measured.extremes:
            for end, rows in (("Highest", ends.highest), ("Lowest", ends.lowest)):
                galleries.append(Gallery(f"{end} at {named(ends.spot)} ({what})", _tiles(rows, images)))
    return galleries


def _path_galleries(measured: Measured | None, images: "Images") -> list[Block]:
    found = list[Block]()
    for path in measured.path_examples if measured else ():
        if tiles := _tiles(path.examples, images):
            title = f"{path.path}: the most probable path of {whole(path.images)} images; the clearest of them"
            found.append(Gallery(title, tiles))
    return found


def _routes(report: SpotsDocument, history: History, images: "Images") -> list[Block]:
    """A tile for each tracked image: the picture, and its spots by epoch."""
    tiles = []
    for image in history.epochs[-1].tracked:
        name = history.labels.get(image.index)
        pixels = images.get(image.index) if name else None
        picture = None if pixels is None else Picture(png(pixels), f"image {image.index}: {name}")
        tiles.append(Tile(picture, [f"image {image.index}"], charts.route_chart(report, history, image.index)))
    return [Gallery("Evenly spaced training images, spots by epoch. Dark: distilled; pale: not", tiles)]


def _tiles(rows: Sequence[ExtremeImage], images: "Images", *, short: bool = False) -> list[Tile]:
    tiles = []
    for row in rows:
        if row.index in images:
            names = [named(row.label), f"S: {named(row.student_prediction)}", f"T: {named(row.teacher_prediction)}"]
            lines = [f"{fraction(row.value)} %", *names, f"loss {fixed(row.student_loss, 2)}"]
            lines += [] if row.file is None else [named(row.file)]
            lines = [f"{names[0]}", f"{fraction(row.value)} %"] if short else lines
            tiles.append(Tile(Picture(png(images[row.index]), f"image {row.index}: {names[0]}"), lines))
    return tiles
