"""Where a run distilled: `spots.jsonl` summed up over epochs and classes. Plain data; `tables.py` draws it.

`spot_report` returns, as plain JSON (`sakd inspect-spots --json`):

    schema      "sakd.spots/1"
    run         path of the run directory, as given
    method, router, teacher, student, dataset
                names from the run's config; teacher is its source (an architecture or a path); null where not stated
    finished    whether the run came to its end
    epochs      number of epochs on record
    samples     samples seen in them, an image counted once per epoch
    overall     one object per spot, in the order of the forward pass:
        name, kind   "stage2", "map"
        share        share of all samples that were distilled here: the epochs' shares weighted by their samples
        first, last  share in the first and in the last epoch on record
        min, max     over the epochs
        probability  mean of the router's teacher probability in the last epoch; null for routers without a policy
    by_epoch    one object per epoch, in order. Lists have one entry per spot, in the order of `overall`:
        epoch, samples, share [...], probability [...]
        gamma_raised, gamma_lowered, count_active
                     share of steps at which the router's loss was multiplied by gamma, divided by it, and at which
                     the count term was active; null for routers without a routed pass
        routed_ce, student_ce
                     mean cross-entropy of the routed network and of the student alone; null likewise
        empty [...]  share of steps at which nobody was selected
    by_class    one object per class, the largest absolute deviation first, classes without any sample last:
        name
        share [...]      mean of the epochs' shares (epochs without a sample of the class are left out), or null
        deviation [...]  that less the spot's overall share, or null

    mixtures    what `dfa.json` of the run holds; null for methods that mix no blocks of the teacher

Shares and probabilities lie in [0, 1]. An epoch that is on record twice (a run that was stopped and resumed) counts
once, as it was recorded last.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from sakd_cli.errors import UsageError
from sakd_cli.report.render.format import number, plain
from sakd_cli.report.spots.mixtures import read_mixtures
from sakd_cli.rundir import RunDir

SCHEMA = "sakd.spots/1"
RECORD = "spots.jsonl"
STEP_MEANS = ("gamma_raised", "gamma_lowered", "count_active", "routed_ce", "student_ce")

Share = float | None


@dataclass(frozen=True)
class _Spot:
    name: str
    kind: str
    share: Share
    probability: Share
    by_class: list[Share]


@dataclass(frozen=True)
class _Epoch:
    epoch: int
    samples: int
    spots: list[_Spot]
    steps: dict[str, Share]
    empty: list[Share]


def spot_report(run: RunDir) -> dict[str, Any]:
    """Use of every spot: overall, by epoch and by class. Raises UsageError if the run has recorded none."""
    config = run.config
    task = config.get("task")
    if task != "distill":
        raise UsageError(
            f"{plain(run.path)}: has no record of spots: it is a {plain(task)!r} run",
            hint="give the directory of a `sakd distill` run",
        )
    epochs = _epochs(run)
    if not epochs:
        raise UsageError(
            f"{plain(run.path)}: has no record of spots yet: no epoch is finished",
            hint="wait for the end of the first epoch",
        )
    overall = [_overall(epochs, index) for index in range(len(epochs[0].spots))]
    return {
        "schema": SCHEMA,
        "run": str(run.path),
        "method": _name(config, "method", "name"),
        "router": _name(config, "router", "name"),
        "teacher": _name(config, "teacher", "source"),
        "student": _name(config, "student"),
        "dataset": _name(config, "data", "name"),
        "finished": run.finished,
        "epochs": len(epochs),
        "samples": sum(epoch.samples for epoch in epochs),
        "overall": overall,
        "by_epoch": [_row(epoch) for epoch in epochs],
        "by_class": _by_class(epochs, [spot["share"] for spot in overall], _class_names(run)),
        "mixtures": read_mixtures(run),
    }


def _name(config: dict[str, Any], *path: str) -> str | None:
    value: Any = config
    for part in path:
        value = value.get(part) if isinstance(value, dict) else None
    return None if value is None else plain(value)


def _epochs(run: RunDir) -> list[_Epoch]:
    found: dict[int, _Epoch] = {}
    where = f"{plain(run.path / RECORD)}"
    try:
        for line, record in enumerate(run.lines(RECORD), start=1):
            try:
                epoch = _read(record)
            except (KeyError, TypeError, ValueError, OverflowError, AttributeError):
                raise UsageError(f"{where}: line {line} is no record of an epoch") from None
            found[epoch.epoch] = epoch
    except (OSError, UnicodeDecodeError):
        raise UsageError(f"{where}: cannot be read") from None
    epochs = [found[epoch] for epoch in sorted(found)]
    for epoch in epochs:
        if [(spot.name, spot.kind) for spot in epoch.spots] != [(spot.name, spot.kind) for spot in epochs[0].spots]:
            raise UsageError(f"{where}: epoch {epoch.epoch} has other spots than epoch {epochs[0].epoch}")
    return epochs


def _read(record: Any) -> _Epoch:
    spots = [
        _Spot(
            name=plain(spot["name"]),
            kind=plain(spot["kind"]),
            share=number(spot["share"]),
            probability=number(spot.get("probability")),
            by_class=[number(value) for value in spot.get("by_class") or []],
        )
        for spot in record["spots"]
    ]
    empty = [number(value) for value in record["empty"]]
    samples = int(record["samples"])
    if not spots or len(empty) != len(spots) or samples < 0:
        raise ValueError
    steps = {key: number(record.get(key)) for key in STEP_MEANS}
    return _Epoch(int(record["epoch"]), samples, spots, steps, empty)


def _mean(weighted: Iterable[tuple[Share, float]]) -> Share:
    """Mean of what is known; None if nothing is."""
    known = [(value, weight) for value, weight in weighted if value is not None]
    total = sum(weight for _, weight in known)
    return sum(value * weight for value, weight in known) / total if total else None


def _overall(epochs: list[_Epoch], index: int) -> dict[str, Any]:
    shares = [epoch.spots[index].share for epoch in epochs]
    known = [share for share in shares if share is not None]
    last = epochs[-1].spots[index]
    return {
        "name": last.name,
        "kind": last.kind,
        "share": _mean((epoch.spots[index].share, epoch.samples) for epoch in epochs),
        "first": shares[0],
        "last": shares[-1],
        "min": min(known, default=None),
        "max": max(known, default=None),
        "probability": last.probability,
    }


def _row(epoch: _Epoch) -> dict[str, Any]:
    return {
        "epoch": epoch.epoch,
        "samples": epoch.samples,
        "share": [spot.share for spot in epoch.spots],
        "probability": [spot.probability for spot in epoch.spots],
        **epoch.steps,
        "empty": epoch.empty,
    }


def _class_names(run: RunDir) -> list[str]:
    """Names of the classes; none for a run that has not delivered its student yet."""
    try:
        names = run.read_json("student/config.json").get("classes")
    except UsageError:
        return []
    return [plain(name) for name in names] if isinstance(names, list) else []


def _by_class(epochs: list[_Epoch], overall: list[Share], names: list[str]) -> list[dict[str, Any]]:
    spots = range(len(overall))
    number_of_classes = max(len(epoch.spots[spot].by_class) for epoch in epochs for spot in spots)
    rows = []
    for label in range(number_of_classes):
        shares = [
            _mean((seen[label], 1) for epoch in epochs if len(seen := epoch.spots[spot].by_class) > label)
            for spot in spots
        ]
        deviations = [
            None if share is None or base is None else share - base for share, base in zip(shares, overall, strict=True)
        ]
        name = names[label] if label < len(names) and names[label] else f"class {label}"
        rows.append({"name": name, "share": shares, "deviation": deviations})
    # The sort is stable: classes that deviate alike stay in the order of their labels.
    return sorted(rows, key=lambda row: -max((abs(d) for d in row["deviation"] if d is not None), default=-1.0))
