"""The document of `sakd inspect-spots` as charts"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sakd_cli.documents import spots as doc
from sakd_cli.documents.base import Number
from sakd_cli.documents.training import Mixtures
from sakd_cli.errors import UsageError
from sakd_cli.report.render import plots
from sakd_cli.report.render.charts import WIDTH, Bars, Chart, Heat, Lines, Row, Series
from sakd_cli.report.render.format import SPLITS, SURE, WHAT, above, fixed, named, plain, whole
from sakd_cli.report.render.sheet import thinned
from sakd_cli.report.spots.log import MIXTURES_PLOT, History, read_mixtures
from sakd_cli.report.spots.tables import LETTERS
from sakd_cli.rundir import RunDir

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CLASSES_SHOWN = 12  # at each end of the heat map; all where there are no more than three times as many
PATHS_SHOWN = 12
EPOCHS_SHOWN, ENDS_SHOWN = 24, 8  # columns, and classes at each end, of the maps of every class by epoch
BLOCKS_NUMBERED = 12  # beside each other that have room for a number


def epoch_chart(report: doc.SpotsDocument) -> Lines:
    """Fraction distilled at each spot by epoch; dotted: mean teacher-routing probability, where there is one."""
    epochs, series = [row.epoch for row in report.by_epoch], list[Series]()
    for k, spot in enumerate(report.overall):
        distilled, routed = ([getattr(row, key)[k] for row in report.by_epoch] for key in ("fraction", "probability"))
        series.append(Series(plain(spot.name), epochs, percent(distilled), k))
        series += [Series(None, epochs, percent(routed), k, "dotted")] if any(p is not None for p in routed) else []
    note = "Training images, one round of coins per step."
    if any(one.kind == "dotted" for one in series):
        note = "Training images. Solid: samples distilled. Dotted: mean teacher-routing probability."
    title, unit = "Samples distilled at each spot, by epoch", "training samples distilled, %"
    return Lines(title, "epoch", unit, series, note=note)


def class_chart(report: doc.SpotsDocument) -> Heat:
    """Classes by spots: the difference from the spot's mean in points; in training, or by a survey made just now."""
    shown, classes = _classes_shown(report, CLASSES_SHOWN)
    measured = report.measured if _live(report) else None
    shares = [row.mean if isinstance(row, doc.ClassGroup) else row.fraction for row in shown]
    cells = [list(map(above, row.deviation, own)) for row, own in zip(shown, shares, strict=True)]
    means = [spot.mean for spot in measured.spots] if measured else [spot.fraction for spot in report.overall]
    heads = [plain(spot.name) for spot in report.overall]
    below = [fixed(100 * (mean or 0), 0, " %") for mean in means]
    what = f"{WHAT[measured.value]} of {SPLITS[measured.split]}" if measured else "training samples distilled, %"
    note = f"Points above or below the spot's mean, which stands below its name. {what[0].upper()}{what[1:]}."
    note += "" if len(shown) == classes else f" {CLASSES_SHOWN} classes at each end of {classes}."
    most = max([1.0, *(abs(cell or 0) for row in cells for cell in row)])
    ends = ("less often than the mean", "more often than the mean")
    names = [plain(row.name) for row in shown]
    wide = max(WIDTH, int(0.36 * WIDTH) + 45 * len(heads))
    return Heat("Classes by spot", names, heads, cells, most, ends, signed=True, note=note, width=wide, means=below)


def _live(report: doc.SpotsDocument) -> doc.Classes | None:
    """The classes of a survey that was just made, of other images than the record of the training has perhaps."""
    return report.measured.classes if report.measured and report.measured.source == "live" else None


def _classes_shown(report: doc.SpotsDocument, most: int) -> tuple[Sequence[doc.ClassGroup | doc.ClassFractions], int]:
    """The highest deviation first, `most` at each end where there are more than three times as many; and how many."""
    rows: Sequence[doc.ClassGroup | doc.ClassFractions] = live.rows if (live := _live(report)) else report.by_class
    known = [row for row in rows if None not in row.deviation]
    ranked = sorted(known, key=lambda row: -(row.peak or 0))
    return ranked if len(ranked) <= 3 * most else ranked[:most] + ranked[-most:], len(ranked)


def difficulty_charts(report: doc.SpotsDocument) -> list[Chart]:
    """Mean value by deciles of the images: of the student's loss and of the teacher's confidence."""
    if not ((measured := report.measured) and (by := measured.difficulty)):
        return []
    charts: list[Chart] = []
    for measure, deciles in (
        ("student's loss", by.by_student_loss),
        ("teacher's confidence", by.by_teacher_confidence),
    ):
        places = range(1, len(deciles) + 1)
        series = [
            Series(plain(spot.name), places, percent(row.mean[k] for row in deciles), k)
            for k, spot in enumerate(measured.spots)
        ]
        x, note = "tenth of the images, low to high", f"{whole(measured.images)} {SPLITS[measured.split]}."
        charts.append(Lines(f"By the {measure}", x, WHAT[measured.value], series, note=note))
    return charts


def path_chart(report: doc.SpotsDocument, counts: Mapping[str, int] | None = None) -> Bars:
    """Expected fractions of the most frequent paths, or of those in `counts` (most probable for so many images)."""
    measured = report.measured
    paths = (measured.paths if measured else None) or []
    shown = [row for row in paths if row.path in counts] if counts else paths[:PATHS_SHOWN]
    names = ", ".join(plain(spot.name) for spot in measured.spots) if measured else ""
    note = f"{LETTERS} ({names}). The probability is the mean over all images."
    note += "" if len(shown) == len(paths) else f" {len(shown)} of {len(paths)} paths."
    rows: list[Row] = [(row.path, percent([row.fraction]), []) for row in shown]
    what = f"mean probability, {SPLITS[measured.split] if measured else 'images'}, %"
    told = [f"most probable for {whole(counts[row.path])}" for row in shown] if counts else []
    return Bars("The most frequent paths", what, ["images"], rows, note, told)


PANELS: dict[str, Callable[[doc.SpotsDocument], list[Chart]]] = {
    "epochs": lambda report: [epoch_chart(report)],
    "classes": lambda report: [class_chart(report)],
    "difficulty": difficulty_charts,
    "paths": lambda report: [path_chart(report)],
}


def panels_of(report: doc.SpotsDocument) -> list[str]:
    """Names of the panels that a report has the data for."""
    found = report.measured
    there = {
        "classes": any(row.peak for row in (*report.by_class, *(found.classes.rows if found and found.classes else ())))
        and not report.saturated,
        "difficulty": bool(found and found.difficulty),
        "paths": bool(found and found.paths),
    }
    return [name for name in PANELS if there.get(name, True)]


def spot_figure(report: doc.SpotsDocument, panel: str | None) -> "Figure":
    """One panel, or (None) all that there are in one figure. UsageError where the report lacks the data."""
    there = panels_of(report)
    if panel is not None and panel not in there:
        raise UsageError(f"--panel {panel}: this run has nothing to draw it from", "--live measures it")
    return plots.figure_of([chart for name in ([panel] if panel else there) for chart in PANELS[name](report)])


def history_charts(report: doc.SpotsDocument, history: History) -> list[Chart]:
    """Of each spot a map of classes by epochs: the fraction of the class's samples that were distilled there."""
    shown, classes = _classes_shown(report, ENDS_SHOWN)
    labels = {name: label for label, name in enumerate(history.classes)}
    rows = [(plain(row.name), labels[row.name]) for row in shown if row.name in labels]
    epochs = thinned(history.epochs, EPOCHS_SHOWN)
    columns, maps = [whole(epoch.epoch) for epoch in epochs], dict[str, list[list[Number]]]()
    note = "One scale for all spots. " * (len(report.overall) > 1)
    note += f"{len(rows)} of {classes} classes: those most above and below the mean. " if len(rows) < classes else ""
    note += f"{len(epochs)} of {len(history.epochs)} epochs." if len(epochs) < len(history.epochs) else ""
    for k, spot in enumerate(report.overall if rows else ()):
        seen = [epoch.spots[k].by_class for epoch in epochs]
        maps[spot.name] = [percent(row[label] if label < len(row) else None for row in seen) for _, label in rows]
    values = [value for cells in maps.values() for row in cells for value in row if value is not None] or [0.0]
    names, ends = [name for name, _ in rows], ("least", "% of the class's samples distilled")
    scale: dict[str, Any] = {"most": max(values), "least": min(values), "ends": ends, "numbers": False, "note": note}
    return [Heat(f"{named(spot)}: classes by epoch", names, columns, cells, **scale) for spot, cells in maps.items()]


def route_chart(report: doc.SpotsDocument, history: History, index: int) -> Heat:
    """One training image: at which spots it was distilled, in the epochs that are shown."""
    found = [(epoch, image) for epoch in history.epochs for image in epoch.tracked if image.index == index]
    none = doc.TrackedImage(index=index, visits=0, distilled=[0.0] * len(report.overall))
    steps = [(epoch, old, now) for (epoch, now), (_, old) in zip(found, [(None, none), *found], strict=False)]
    shown = thinned(steps, EPOCHS_SHOWN)
    cells: list[list[Number]] = [
        [
            100 * (now.distilled[k] - old.distilled[k]) / n if (n := now.visits - old.visits) else None
            for _, old, now in shown
        ]
        for k in range(len(report.overall))
    ]
    title = history.labels.get(index, f"image {index}")
    rows, columns = [named(spot.name) for spot in report.overall], [whole(epoch.epoch) for epoch, *_ in shown]
    return Heat(title, rows, columns, cells, 100.0, ("not distilled", "distilled"), numbers=False, width=230)


def agreement_chart(measured: doc.Measured) -> Bars:
    """The router's mean value by whether both networks give one answer, and who is right."""
    groups = [group for group in (measured.difficulty.by_agreement if measured.difficulty else []) if group.images]
    rows = [
        (
            f"{group.name} ({whole(group.images)})",
            percent(group.mean),
            percent(None if e is None else SURE * e for e in group.error),
        )
        for group in groups
    ]
    note = f"{whole(measured.images)} {SPLITS[measured.split]}; alike: with one answer. "
    note += "Line: 95 % interval of the mean."
    names = [plain(spot.name) for spot in measured.spots]
    return Bars("By the answers of student and teacher (number of images)", WHAT[measured.value], names, rows, note)


def reliability_chart(routed: doc.RoutedNetwork) -> Lines:
    """How often each network is right where it is so sure, with the 95 % interval of every point."""
    series = [Series("perfectly calibrated: as often right as it is sure", [0, 100], [0, 100], 3, "dotted")]
    networks = ("student", routed.student_reliability), ("teacher", routed.teacher_reliability)
    for k, (name, bins) in enumerate(networks):
        known = [(one.confidence, one.correct, one.images) for one in bins if one.confidence is not None]
        x, y = [100 * sure for sure, *_ in known], [100 * (right or 0) for _, right, _ in known]
        series.append(Series(name, x, y, k, band=[_wilson(right or 0.0, n) for _, right, n in known]))
    note = f"{whole(routed.images)} test images. Below the dotted line a network is surer than it is right. "
    note += "Band: 95 % interval of the fraction right."
    return Lines(
        "How often right, by how sure", "confidence (largest probability), %", "right answers, %", series, note=note
    )


def _wilson(fraction: float, count: int) -> tuple[float, float]:
    """The 95 % interval of a fraction of `count`, in percent (Wilson, JASA 1927)."""
    square = SURE**2 / count
    middle, reach = fraction + square / 2, SURE * ((fraction * (1 - fraction) + square / 4) / count) ** 0.5
    return 100 * (middle - reach) / (1 + square), 100 * (middle + reach) / (1 + square)


def mixture_chart(record: Mixtures) -> Heat:
    """Weights of a run's mixtures (`dfa.json`): groups by blocks."""
    most = max(len(group.alpha) for group in record.groups)
    cells = [[*(100 * value for value in group.alpha), *[None] * (most - len(group.alpha))] for group in record.groups]
    highest = max(value or 0.0 for row in cells for value in row)
    names, blocks = [named(group.name) for group in record.groups], [str(1 + k) for k in range(most)]
    note, ends = f"{named(record.teacher)} on {named(record.dataset)}.", ("0 %", "largest weight, %")
    title = "Weight of each block of the teacher, %"
    return Heat(title, names, blocks, cells, highest, ends, numbers=most <= BLOCKS_NUMBERED, note=note)


def percent(fractions: Iterable[Number]) -> list[Number]:
    """Fractions as percentages."""
    return [None if value is None else 100.0 * value for value in fractions]


def draw_mixtures(run: RunDir, say: Callable[[str], None]) -> None:
    """Draw the mixtures of the teacher's blocks that a run found into its directory, if it has any."""
    if (record := read_mixtures(run)) is None:
        return
    if plots.available(lambda reason: say(f"no {MIXTURES_PLOT}: {reason}")):
        plots.write(plots.figure_of([mixture_chart(record)]), run.path / MIXTURES_PLOT)
