"""Where a run distilled: `spots.jsonl` over epochs and classes, and its survey by image, as one document or as CSV."""

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from statistics import fmean
from typing import Any, NamedTuple

from sakd_cli.config.effective import SATURATED
from sakd_cli.documents import spots as doc
from sakd_cli.documents.base import Number, Part
from sakd_cli.documents.training import Mixtures
from sakd_cli.errors import DamagedError, UsageError
from sakd_cli.files import card_settings, read_about, read_document
from sakd_cli.report.render.format import plain
from sakd_cli.report.spots.survey import Survey, by_peak, less_base, measure
from sakd_cli.rundir import RunDir, look_up

RECORD, CARD, WEIGHTS = "spots.jsonl", "student/config.json", "student/model.safetensors"
SETTLED = 0.02  # of the samples: how far a spot's fraction may still move
MIXTURES, MIXTURES_PLOT = "dfa.json", "dfa.png"


def spots_document(
    run: RunDir, survey: Survey | None = None, *, sample: bool = False, seed: int = 0, extremes: int = doc.EXTREMES
) -> doc.SpotsDocument:
    """The fraction distilled at every spot: overall, by epoch and class; by image where there is a survey.

    sample, seed, extremes: as for `measure`. Raises UsageError if the run has recorded nothing.
    """
    config = run.config
    run.require_own_settings()
    if (task := config.get("task")) != "distill":
        raise UsageError(
            f"{plain(run.path)}: has no record of spots: it is a {plain(task)!r} run",
            hint="give the directory of a `sakd distill` run",
        )
    epochs = epoch_records(run)
    overall = [_total(epochs, index) for index in range(len(epochs[0].spots))]
    keys = {"method": "method.name", "router": "router.name", "teacher": "teacher.source"}
    keys |= {"student": "student", "dataset": "data.name"}
    found = {name: look_up(config, key) for name, key in keys.items()}
    names: dict[str, Any] = {name: None if value is None else plain(value) for name, value in found.items()}
    saturated = _saturated(epochs, config)
    measured = measure(survey, overall, sample=sample, seed=seed, extremes=extremes) if survey else None
    if saturated and measured:
        nothing = dict.fromkeys(("classes", "difficulty", "paths")) | {"extremes": [], "path_examples": []}
        measured = measured.model_copy(update=nothing | {"spots": [], "notes": [*measured.notes, saturated]})
    return doc.SpotsDocument(
        run=str(run.path),
        **names,
        saturated=saturated,
        balance=look_up(config, "method.balance") or 0.0,
        finished=run.finished,
        epochs=len(epochs),
        samples=sum(epoch.samples for epoch in epochs),
        overall=overall,
        by_epoch=[_fractions(epoch) for epoch in epochs],
        by_class=_by_class(epochs, [spot.fraction for spot in overall], _class_names(run)),
        mixtures=read_mixtures(run),
        measured=measured,
    )


def _saturated(epochs: list[doc.EpochRecord], config: Mapping[str, Any]) -> str | None:
    """A sentence with the cure where every p is within 0.5 points of 0 or 1: at every spot, in every epoch."""
    spots = [spot for epoch in epochs for spot in epoch.spots]
    if not all(p is not None and (p >= SATURATED or p <= 1 - SATURATED) for p in (spot.probability for spot in spots)):
        return None
    where = " or ".join(sorted({f"{100 * round(spot.probability or 0.0)} %" for spot in spots}))
    shares = {round(spot.fraction) for spot in spots if spot.fraction is not None}
    same = "router always" if shares == {1} else "router never" if shares == {0} else "one fixed weight per spot"
    keys = [f"router.{key}" for key in ("teacher_bias", "lr") if look_up(config, f"router.{key}") is not None]
    cure = "a smaller --set router.lr lets it decide"
    if keys or look_up(config, "router.recipe") == "published":
        cure = "--set router.recipe=auto lets it decide" + f" (without {' and '.join(keys)})" * bool(keys)
    return (
        f"The router is saturated: its teacher-routing probability is within 0.5 points of {where} at every spot in "
        f"every epoch. It decided nothing and did what {same} does, at almost twice the cost; {cure}."
    )


class History(NamedTuple):
    """The record by epoch: with the names of the classes by label, and the class of each tracked image by its index."""

    epochs: list[doc.EpochRecord]
    classes: list[str]
    labels: dict[int, str]


def history(run: RunDir, survey: Survey | None) -> History:
    """What a page shows of every epoch, with the classes by the run's own survey; raises as `spots_document`."""
    epochs, classes = epoch_records(run), _class_names(run)
    if not classes:
        classes = [f"class {label}" for label in range(max(len(spot.by_class) for spot in epochs[-1].spots))]
    found = dict[int, int]()
    if survey and survey.source == "survey":  # a live one may be of other images with the same numbers
        found = dict(zip(survey.index.tolist(), survey.answers["label"].tolist(), strict=True))
    tracked = [image.index for image in epochs[-1].tracked]
    labels = {index: classes[found[index]] for index in tracked if found.get(index, len(classes)) < len(classes)}
    return History(epochs, classes, labels)


def _fractions(epoch: doc.EpochRecord) -> doc.EpochFractions:
    steps = epoch.model_dump(include=set(doc.EpochSteps.model_fields))
    keys = ("fraction", "probability", "gradient_ratio")
    means: dict[str, Any] = {key: [getattr(spot, key) for spot in epoch.spots] for key in keys}
    return doc.EpochFractions(**steps, **means)


def epoch_records(run: RunDir) -> list[doc.EpochRecord]:
    """The lines of `spots.jsonl` in order. Raises UsageError where one is damaged, or there is none.

    An epoch that is on record twice (a run that was stopped and resumed) counts once, as it was recorded last.
    """
    found: dict[int, doc.EpochRecord] = {}
    where = plain(run.path / RECORD)
    try:
        for line, record in enumerate(run.lines(RECORD), start=1):
            try:
                epoch = doc.EpochRecord.model_validate(record, strict=True)
            except ValueError:
                raise DamagedError(f"{where}: line {line} is no record of an epoch") from None
            found[epoch.epoch] = epoch
    except OSError:
        raise DamagedError(f"{where}: cannot be read") from None
    if not found:
        raise UsageError(
            f"{plain(run.path)}: has no record of spots yet: no epoch is finished",
            hint="wait for the end of the first epoch, or --resume the run where it was stopped",
        )
    epochs = [found[epoch] for epoch in sorted(found)]
    if sorted(found) != list(range(1, len(found) + 1)):
        raise DamagedError(f"{where}: has no line for an epoch before epoch {max(found)}")
    for epoch in epochs:
        if [(spot.name, spot.kind) for spot in epoch.spots] != [(spot.name, spot.kind) for spot in epochs[0].spots]:
            raise DamagedError(f"{where}: epoch {epoch.epoch} has other spots than epoch {epochs[0].epoch}")
    if len({len(spot.by_class) for epoch in epochs for spot in epoch.spots if spot.by_class}) > 1:
        raise DamagedError(f"{where}: not every epoch and spot has the same number of classes")
    return epochs


def settled_epoch(epochs: list[doc.EpochRecord], index: int) -> int | None:
    """The epoch from which on a spot's fraction stays within `SETTLED` of its last value; None where it is unknown."""
    last, found = epochs[-1].spots[index].fraction, None
    for epoch in reversed(epochs):
        fraction = epoch.spots[index].fraction
        if fraction is None or last is None or abs(fraction - last) > SETTLED:
            break
        found = epoch.epoch
    return found


def read_mixtures(run: RunDir) -> Mixtures | None:
    """The mixtures of a run's teacher; None where there are none. Raises UsageError where they are damaged."""
    for _ in run.lines(MIXTURES):
        pass  # at its end it is known to be what the run wrote
    path = run.path / MIXTURES
    return read_document(path, Mixtures) if path.is_file() else None


def _mean(weighted: Iterable[tuple[Number, float]]) -> Number:
    """Mean of what is known; None if nothing is."""
    known = [(value, weight) for value, weight in weighted if value is not None]
    total = sum(weight for _, weight in known)
    return sum(value * weight for value, weight in known) / total if total else None


def _total(epochs: list[doc.EpochRecord], index: int) -> doc.SpotTotal:
    fractions = [epoch.spots[index].fraction for epoch in epochs]
    known = [fraction for fraction in fractions if fraction is not None]
    ratios = [ratio for epoch in epochs if (ratio := epoch.spots[index].gradient_ratio)]
    last = epochs[-1].spots[index]
    return doc.SpotTotal(
        name=plain(last.name),
        kind=plain(last.kind),
        fraction=_mean((epoch.spots[index].fraction, epoch.samples) for epoch in epochs),
        first=fractions[0],
        last=fractions[-1],
        min=min(known, default=None),
        max=max(known, default=None),
        probability=last.probability,
        gradient_ratio=math.exp(fmean(map(math.log, ratios))) if ratios else None,
    )


def _class_names(run: RunDir) -> list[str]:
    """Names of the classes; none for a run that goes on or was killed before it had saved its student with a card."""
    run.require_files(CARD)
    if not (run.path / CARD).exists() and not (run.finished and (run.path / WEIGHTS).exists()):
        return []
    names = read_about(run.path / "student").get("classes")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise DamagedError(f"{plain(run.path / CARD)}: names no classes")
    with suppress(OSError, ValueError, KeyError, TypeError):  # whoever uses the weights says what is wrong with them
        if card_settings(run.path / WEIGHTS)["classes"] != names:
            raise DamagedError(f"{plain(run.path / CARD)}: names other classes than {WEIGHTS}")
    return [plain(name) for name in names]


def _by_class(epochs: list[doc.EpochRecord], overall: list[Number], names: list[str]) -> list[doc.ClassFractions]:
    classes = max(len(spot.by_class) for epoch in epochs for spot in epoch.spots)
    rows = []
    for label in range(classes):
        fractions = [
            _mean((seen[label], 1) for epoch in epochs if len(seen := epoch.spots[spot].by_class) > label)
            for spot in range(len(overall))
        ]
        name = (names[label] if label < len(names) else "") or f"class {label}"
        rows.append(doc.ClassFractions(name=name, fraction=fractions, deviation=less_base(fractions, overall)))
    return sorted(rows, key=by_peak)  # stable: classes that deviate alike stay in the order of their labels


CSV_HEADER = ("table", "item", "spot", "measure", "value")
Row = tuple[str, str, str, str, Any]
PER_SPOT = {"mean", "fraction", "deviation", "probability", "empty_selection", "gradient_ratio", "error"}
PER_SPOT |= {"correlation", "correlation_p"}


def csv_rows(document: doc.SpotsDocument) -> Iterator[Row]:
    """The document as one long table with the columns of `CSV_HEADER`; one number a row, empty where it is null.

    table    overall, epoch, class_distilled, spot, class, student_loss, teacher_confidence, correctness, agreement,
             path, highest, lowest, routed: the lists of the document in that order
    item     which epoch, class, decile (from 1), path, image (its index), network; empty for tables by spot
    spot     name of the spot; empty where the number belongs to none
    measure  key of the number in the document
    """
    names = [spot.name for spot in document.overall]
    rows: list[tuple[str, object, str, Part]] = [("overall", "", spot.name, spot) for spot in document.overall]
    rows += [("epoch", epoch.epoch, "", epoch) for epoch in document.by_epoch]
    rows += [("class_distilled", one.name, "", one) for one in document.by_class]
    if measured := document.measured:
        rows += [("spot", "", spot.name, spot) for spot in measured.spots]
        if classes := measured.classes:
            rows += [("class", "", "", classes), *(("class", one.name, "", one) for one in classes.rows)]
        if by := measured.difficulty:
            rows += [("student_loss", number, "", one) for number, one in enumerate(by.by_student_loss, start=1)]
            rows += [("teacher_confidence", n, "", one) for n, one in enumerate(by.by_teacher_confidence, start=1)]
            rows += [("correctness", cell.name, "", cell) for cell in by.by_correctness]
            rows += [("agreement", group.name, "", group) for group in by.by_agreement]
        rows += [("path", path.path, "", path) for path in measured.paths or ()]
        for ends in measured.extremes:
            rows += [("highest", image.index, ends.spot, image) for image in ends.highest]
            rows += [("lowest", image.index, ends.spot, image) for image in ends.lowest]
        rows += [("routed", name, "", score) for name, score in measured.routed or () if isinstance(score, doc.Score)]
    for kind, item, spot_name, part in rows:
        for key, value in part:
            if isinstance(value, list) and key in PER_SPOT:
                for name, number in zip(names, value, strict=False):
                    yield kind, str(item), name, key, number
            elif isinstance(value, int | float) and not isinstance(value, bool) and key not in ("epoch", "index"):
                yield kind, str(item), spot_name, key.removesuffix("_"), value
