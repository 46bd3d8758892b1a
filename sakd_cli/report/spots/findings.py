"""What a document of `sakd inspect-spots` says, in one sentence for each question of its page"""

from collections.abc import Callable, Sequence
from statistics import NormalDist

from sakd_cli.documents.base import Number
from sakd_cli.documents.spots import ClassFractions, EpochRecord, Measured, SpotsDocument
from sakd_cli.report.render.format import SURE, deviation, difference, fixed, fraction, named, whole
from sakd_cli.report.render.sheet import Sheet
from sakd_cli.report.runs.statistics import LEVEL
from sakd_cli.report.spots.tables import WEAK

ALIKE = 0.01  # shares that differ by less are alike
# What is said of a router by how much of the variance of its decisions the image explains, at the spot with the most.
CHOICE = ((0.5, "It chooses"), (0.1, "It chooses in part"), (0.01, "Little more than coins"), (0.0, "It tosses coins"))
SPOT = "A spot is a place in the network where the student copies the teacher; an image can use several."


def weak(report: SpotsDocument, k: int) -> bool:
    """Whether the loss at a spot hardly acts, so that it matters little what is chosen there."""
    ratio = report.overall[k].gradient_ratio
    return not report.balance and ratio is not None and ratio < WEAK


def ends_of(report: SpotsDocument) -> list[tuple[float, int, list[tuple[float, ClassFractions]]]]:
    """(range of its classes, spot, (deviation, class) from the highest) of every spot.

    The widest range first, but spots whose loss hardly acts last.
    """
    known = [row for row in report.by_class if None not in row.deviation]
    found = []
    for k in range(len(report.overall) if known else 0):
        ranked = sorted(((row.deviation[k] or 0.0, row) for row in known), key=lambda one: -one[0])
        found.append((ranked[0][0] - ranked[-1][0], k, ranked))
    return sorted(found, key=lambda one: (weak(report, one[1]), -one[0]))


def _by_coins(p: Number, samples: int, classes: int, tests: int) -> float:
    """How far a class may lie from a spot's mean `p` by chance, were every image decided by one coin.

    No class of all `tests` (at all spots, in all epochs) does with a probability of `LEVEL`.
    """
    error = ((p or 0.0) * (1 - (p or 0.0)) * classes / max(samples, 1)) ** 0.5
    return NormalDist().inv_cdf(1 - (1 - LEVEL) / 2 / max(tests, 1)) * error


def most_used(report: SpotsDocument) -> str:
    spots = [(spot.fraction or 0.0, named(spot.name), weak(report, k)) for k, spot in enumerate(report.overall)]
    (most, first, idle), *others = sorted(spots, reverse=True)
    of = f"{fraction(most)} % of the training samples"
    if others and most - others[-1][0] < ALIKE:
        weakly = [name for _, name, hardly in spots if hardly]
        where = "any" if len(weakly) == len(spots) else ", ".join(weakly)
        return f"None: all alike, {of} at each{f'; the loss hardly acts at {where}' * bool(weakly)}."
    aside = " (its loss hardly acts)"
    if not others:
        return f"There is one: {first}, for {of}{aside * idle}."
    rest = ", ".join(f"{name} {fraction(less)} %{aside * hardly}" for less, name, hardly in others)
    return f"{first}, for {of}{aside * idle}; then {rest}."


def _why_no_class(report: SpotsDocument) -> str:
    """Why no class can be named that is distilled more often than others; empty where some can."""
    ends = ends_of(report)
    if report.saturated:
        return "For all alike."
    if not ends or len(ends[0][2]) < 2:
        return "There is one class." if ends else "This run has no record by class."
    if ends[0][0] < ALIKE:
        return "For all alike: at no spot do two classes differ by a point."
    classes, spots = len(report.by_class), [spot.fraction for spot in report.overall]
    by_coins = [_by_coins(p, report.samples, classes, classes * len(spots)) for p in spots]
    if all(max(rows[0][0], -rows[-1][0]) <= by_coins[k] for _, k, rows in ends):
        chance = max(by_coins)
        return f"For no class is it shown: coins of one rate would differ as much, by {fixed(100 * chance, 1)} points."
    return ""


def which_classes(report: SpotsDocument) -> str:
    """Both ends where they differ most, and at the spot that was used most, unless coins would differ as much."""
    if why := _why_no_class(report):
        return why
    ends = ends_of(report)
    used = max(range(len(report.overall)), key=lambda k: report.overall[k].fraction or 0.0)

    def both(k: int, ranked: list[tuple[float, ClassFractions]]) -> str:
        said = (f"{end} often {_class(ranked[n], k)}" for end, n in (("most", 0), ("least", -1)))
        return f"{named(report.overall[k].name)}: {', '.join(said)}"

    more = [f" At {both(k, ranked)}." for _, k, ranked in ends[1:] if k == used]
    acting = "Where the loss acts, they" if max(width for width, *_ in ends) > ends[0][0] else "They"
    return f"{acting} differ most at {both(*ends[0][1:])}; points from the spot's mean.{''.join(more)}"


def at_the_end(report: SpotsDocument) -> list[str]:
    """The same of the trained router, at the spot whose images stand beside it; nothing where it is not known."""
    measured, ends = report.measured, ends_of(report)
    known = measured.classes.rows if measured and measured.classes and measured.value == "probability" else []
    if measured is None or measured.complement or report.saturated or not ends or len(known) < 2:
        return []
    k = ends[0][1]
    ranked = sorted((one for one in known if one.images), key=lambda one: one.mean[k] or 0.0)
    most, least = (f"{named(one.name)} {fraction(one.mean[k])} %" for one in (ranked[-1], ranked[0]))
    name = named(report.overall[k].name)
    if (same := fraction(ranked[0].mean[k])) == fraction(ranked[-1].mean[k]):
        return [f"At the end of training the router's probability at {name} is {same} % for every class."]
    return [f"At the end of training the router's probability at {name} is highest for {most}, lowest for {least}."]


def _class(ranked: tuple[float, ClassFractions], k: int) -> str:
    less, row = ranked
    return f"{named(row.name)} {fraction(row.fraction[k])} % ({deviation(less, row.fraction[k])})"


def class_table(report: SpotsDocument) -> Sheet | None:
    """The classes at both ends of every spot."""
    ends = sorted(ends_of(report), key=lambda one: one[1])
    if _why_no_class(report):
        return None
    rows = [[named(report.overall[k].name), *(_class(ranked[n], k) for n in (0, -1))] for _, k, ranked in ends]
    notes = ["Share of the class's samples (points from the spot's mean)."]
    return Sheet("Classes at both ends", ["Spot", "Most often", "Least often"], rows, notes, text=3)


def more_than_coins(report: SpotsDocument) -> str:
    measured = report.measured
    if report.saturated:
        return report.saturated
    if not measured or measured.value != "probability":
        if report.overall[0].probability is not None:
            cure = "`sakd inspect-spots --live` makes one where there is one teacher"
            return f"Not known: the run has no survey of the trained router. {cure}."
        return f"The {named(report.router)} router has no probabilities by image: it does not choose by what it sees."
    known = [(spot.by_image, named(spot.name)) for spot in measured.spots if spot.by_image is not None]
    if not known:
        return "Neither: it decides the same for every image."
    most = max(share for share, _ in known)
    verdict = next(words for least, words in CHOICE if most >= least)
    shares = ", ".join(f"{fixed(100 * share, 1)} % at {name}" for share, name in known)
    scale = "0 %: coins; 100 %: the image alone decides"
    return f"{verdict}: which image it is explains {shares} of the variance of its decisions ({scale})."


def _widest(report: SpotsDocument, of: Callable[[int], float]) -> tuple[int, str]:
    """The spot where a figure is largest in size, and its name."""
    place = max(range(len(report.overall)), key=lambda k: abs(of(k)))
    return place, named(report.overall[place].name)


def in_training(report: SpotsDocument) -> str:
    changes = [(spot.last or 0) - (spot.first or 0) for spot in report.overall]
    k, name = _widest(report, changes.__getitem__)
    if abs(changes[k]) < ALIKE:
        return "From the first epoch to the last no spot changed by a point."
    first, last = fraction(report.overall[k].first), fraction(report.overall[k].last)
    return f"{name} changed most: {first} % of the samples in the first epoch, {last} % in the last."


def trained_router(report: SpotsDocument, measured: Measured) -> str:
    k, name = _widest(report, lambda k: measured.spots[k].p95 - measured.spots[k].p05)
    spot = measured.spots[k]
    low, high = fraction(spot.p05), fraction(spot.p95)
    if low == high:
        return f"Single images hardly differ at any spot: at {name} nine in ten are at {low} %."
    return f"Single images differ most at {name}: nine in ten lie between {low} % and {high} %."


def by_epoch(epochs: Sequence[EpochRecord]) -> str:
    known = [(e, spot, [x for x in spot.by_class if x is not None]) for e in epochs for spot in e.spots]
    if not (known := [one for one in known if one[2]]):
        return ""
    tests, shown = sum(len(values) for *_, values in known), list[EpochRecord]()
    for e, spot, values in known:
        chance = _by_coins(spot.fraction, e.samples, len(values), tests)
        shown += [e] * any(abs(x - (spot.fraction or 0.0)) > chance for x in values)
    if not shown:
        return "In no epoch is it shown that they part: coins of one rate would differ as much."
    e, spot, values = max(known, key=lambda one: max(one[2]) - min(one[2]))
    wide = f"{fixed(100 * (max(values) - min(values)), 1)} points"
    first = f"From epoch {shown[0].epoch} on some class differs by more than coins of one rate would. "
    return first + f"They lay furthest apart in epoch {e.epoch} of {len(epochs)}, at {named(spot.name)}: by {wide}."


def by_difficulty(report: SpotsDocument, measured: Measured) -> str:
    if not measured.difficulty or len(rows := measured.difficulty.by_student_loss) < 2:
        return ""
    more = [(last or 0) - (first or 0) for first, last in zip(rows[0].mean, rows[-1].mean, strict=True)]
    k, name = _widest(report, more.__getitem__)
    than = f"{fixed(abs(100 * more[k]), 1)} points {'more' if (more[k] > 0) != measured.complement else 'less'} often"
    return f"At {name}, where the ends differ most, the hardest tenth is distilled {than} than the easiest."


def by_agreement(report: SpotsDocument, measured: Measured) -> str:
    groups = [one for one in (measured.difficulty.by_agreement if measured.difficulty else []) if one.images]
    if len(groups) < 2:
        return ""
    columns = [[one.mean[k] or 0.0 for one in groups] for k in range(len(report.overall))]
    k, name = _widest(report, lambda k: max(columns[k]) - min(columns[k]))
    ends = (groups[columns[k].index(end(columns[k]))] for end in (max, min))
    most, least = (f"{one.name} ({fraction(one.mean[k])} ± {fraction(SURE * (one.error[k] or 0))} %)" for one in ends)
    return f"The groups differ most at {name}. Highest: {most}; lowest: {least}."


def paths(measured: Measured) -> str:
    if not measured.paths:
        return ""
    first, images = measured.paths[0], {one.path: one.images for one in measured.path_examples}
    said = f"{first.path} is the most frequent, with a mean probability of {fraction(first.fraction)} %"
    count = f"; for {whole(images[first.path])} of {whole(measured.images)} images no path is more probable"
    return f"{said}{count if first.path in images else ''}."


def one_image(epochs: Sequence[EpochRecord]) -> str:
    seen = [image for image in epochs[-1].tracked if image.visits and image.distilled] if epochs else []
    shares = [(sum(image.distilled) / (image.visits * len(image.distilled)), image.index) for image in seen]
    (most, first), (least, last) = max(shares, default=(0.0, 0)), min(shares, default=(0.0, 0))
    said = f"image {first} was distilled most often, at {fraction(most)} %, image {last} least, at {fraction(least)} %."
    return f"Of all chances, over epochs and spots, {said}" if len(shares) > 1 else ""


def extremes(measured: Measured) -> str:
    wide = max(measured.extremes, key=lambda ends: ends.spread, default=None)
    if wide is None or not wide.spread:
        return ""
    ends = wide.highest[0], wide.lowest[0]
    said = (f"{one.label or f'image {one.index}'} at {fraction(one.value)} %" for one in ends)
    return f"The ends lie furthest apart at {named(wide.spot)}: {' and '.join(said)}."


def reliability(measured: Measured) -> str:
    said = []
    for name in ("student", "teacher"):
        bins = getattr(measured.routed, f"{name}_reliability", ())
        known = [(one.images, one.confidence, one.correct or 0) for one in bins if one.confidence is not None]
        if total := sum(n for n, *_ in known):
            off = 100 * sum(n * (sure - right) for n, sure, right in known) / total
            said.append(f"the {name} is {fixed(abs(off), 1)} points {'too sure' if off > 0 else 'too unsure'}")
    return f"On average {' and '.join(said)}." if said else ""


def routed_network(measured: Measured) -> str:
    if not (routed := measured.routed) or not routed.sampled:
        return ""
    sampled, student = routed.sampled.top1, routed.student.top1
    less = difference(sampled - student, sampled, student)
    return (
        f"Top-1 {fixed(routed.sampled.top1, 2)} % where the part of one network or the other is drawn at every spot: "
        f"{less} points against the student of this run alone, on the same {whole(routed.images)} test images."
    )


def findings(report: SpotsDocument, epochs: Sequence[EpochRecord]) -> dict[str, str]:
    """The sentences by the sections of the page; none where the data are missing."""
    found = {"Class by epoch": by_epoch(epochs), "One image": one_image(epochs)}
    if not report.saturated:
        found |= {"In training": in_training(report), "By class": which_classes(report)}
    if measured := report.measured:
        found |= {"Extremes": extremes(measured), "Reliability": reliability(measured)}
        found |= {"The routed network": routed_network(measured), "Paths": paths(measured)}
        found |= {"By difficulty": by_difficulty(report, measured), "By agreement": by_agreement(report, measured)}
        found |= {"The trained router": trained_router(report, measured)} if measured.spots else {}
    return found
