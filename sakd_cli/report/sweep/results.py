"""What a sweep has found: every cell over its seeds, gains paired by seed, the published figures beside them

The document is `SweepDocument`. A cell is a method under a router for a pair; its figures are of the last epoch on the
test images. A gain is a cell less that of another router of the same method and pair, over the seeds that both have.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from sakd_cli.config.routers import CLASSICAL, AdaptiveConfig
from sakd_cli.report.render.format import number, plain
from sakd_cli.report.runs.statistics import LEVEL, paired, spread, verdict_of
from sakd_cli.report.sweep import published
from sakd_cli.rundir import RunDir

SCHEMA = "sakd.sweep/1"
LEARNED = AdaptiveConfig().name


@dataclass(frozen=True)
class SweepEntry:
    """One run as the sweep knows it; `whole`: on the whole data set, so that published figures may stand beside it."""

    key: str
    role: str
    teacher: str | None
    student: str
    method: str | None
    router: str | None
    seed: int
    epochs: int
    dataset: str
    whole: bool
    state: str
    resumed: bool
    before: bool
    error: str | None
    run: RunDir | None


class _Place(NamedTuple):
    teacher: str
    student: str

    @property
    def label(self) -> str:
        return f"{self.teacher}:{self.student}"


def sweep_document(name: str, entries: Sequence[SweepEntry], skipped: Iterable[tuple[str, str]] = ()) -> dict[str, Any]:
    """See above."""
    runs = [_row(entry) for entry in entries]
    places = list(dict.fromkeys(_Place(e.teacher, e.student) for e in entries if e.role == "student" and e.teacher))
    comparable = {e.dataset if e.whole else None for e in entries if e.role == "student"}
    dataset = comparable.pop() if len(comparable) == 1 else None
    cells = [cell for k, place in enumerate(places) for cell in _cells(k, place, runs, dataset)]
    gains = [gain for k, place in enumerate(places) for gain in _gains(k, place, runs, cells)]
    beside = any(published.pair_figures(dataset, place.label) for place in places)
    states = [entry.state for entry in entries]
    return {
        "schema": SCHEMA,
        "name": plain(name),
        "level": LEVEL,
        "counts": {state: states.count(state) for state in ("done", "running", "waiting", "failed", "blocked")},
        "pairs": [_pair(place, runs, dataset) for place in places],
        "cells": cells,
        "gains": gains,
        "overall": list(_overall(gains)),
        "skipped": [{"what": what, "reason": plain(reason)} for what, reason in skipped],
        "published": published.about() if beside else None,
        "runs": runs,
    }


def _row(entry: SweepEntry) -> dict[str, Any]:
    summary = entry.run.summary.plain() if entry.run is not None and entry.run.finished else {}
    headline, best, teacher = (summary.get(key) or {} for key in ("last", "best", "teacher"))
    names = ("key", "role", "teacher", "student", "method", "router", "seed", "epochs", "state", "before", "resumed")
    return {name: getattr(entry, name) for name in names} | {
        "error": entry.error,
        "run": None if entry.run is None else plain(entry.run.path),
        "top1": number(headline.get("top1")),
        "best_top1": number(best.get("top1")),
        "loss": number(headline.get("loss")),
        "seconds": number(summary.get("seconds")),
        "teacher_top1": number(teacher.get("top1")),
    }


def _by_seed(runs: list[dict[str, Any]], wanted: dict[str, Any], figure: str = "top1") -> dict[int, float]:
    same = [run for run in runs if all(run[key] == value for key, value in wanted.items())]
    return {run["seed"]: run[figure] for run in same if run[figure] is not None}


def _pair(place: _Place, runs: list[dict[str, Any]], dataset: str | None) -> dict[str, Any]:
    alone = _by_seed(runs, {"role": "alone", "student": place.student})
    trained = _by_seed(runs, {"role": "teacher", "student": place.teacher}).values()
    # A teacher that was there before is known from its students' summaries.
    seen = _by_seed(runs, {"role": "student", "teacher": place.teacher}, "teacher_top1").values()
    told = published.pair_figures(dataset, place.label)
    return place._asdict() | {
        "teacher_top1": next(iter([*trained, *seen]), None),
        "alone_seeds": list(alone),
        "alone": spread(list(alone.values())),
        "published": None if told is None else {key: number(told.get(key)) for key in ("teacher", "alone")},
    }


def _cells(k: int, place: _Place, runs: list[dict[str, Any]], dataset: str | None) -> Iterator[dict[str, Any]]:
    own = [run for run in runs if run["role"] == "student" and (run["teacher"], run["student"]) == place]
    for method, router in dict.fromkeys((run["method"], run["router"]) for run in own):
        wanted = {"method": method, "router": router}
        top1 = _by_seed(own, wanted)
        yield (
            {"pair": k}
            | wanted
            | {
                "seeds": list(top1),
                "top1": spread(list(top1.values())),
                "best": spread(list(_by_seed(own, wanted, "best_top1").values())),
                "published": published.cell(dataset, place.label, method, router),
            }
        )


def _gains(k: int, place: _Place, runs: list[dict[str, Any]], cells: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Every router over the classical one, and the learned one over every other."""
    here = {(cell["method"], cell["router"]): cell for cell in cells if cell["pair"] == k}
    for method, router in here:
        others = [other for name, other in here if name == method and other != router]
        for against in others:
            if against != CLASSICAL and (router != LEARNED or CLASSICAL not in others):
                continue
            where = {"role": "student", "teacher": place.teacher, "student": place.student, "method": method}
            ours, theirs = (_by_seed(runs, where | {"router": name}) for name in (router, against))
            seeds = [seed for seed in ours if seed in theirs]
            found = paired([ours[seed] - theirs[seed] for seed in seeds])
            printed = [here[method, name]["published"] for name in (router, against)]
            yield {
                "pair": k,
                "method": method,
                "router": router,
                "against": against,
                "seeds": seeds,
                "difference": found["mean"],
                "low": found["low"],
                "high": found["high"],
                "p": found["p"],
                "verdict": verdict_of(found),
                "published": None if None in printed else round(printed[0] - printed[1], 2),
            }


def _overall(gains: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for router, against in dict.fromkeys((gain["router"], gain["against"]) for gain in gains):
        same = [g["difference"] for g in gains if (g["router"], g["against"]) == (router, against)]
        known = [difference for difference in same if difference is not None]
        if known:
            yield {
                "router": router,
                "against": against,
                "cells": len(known),
                "above": sum(difference > 0 for difference in known),
                "below": sum(difference < 0 for difference in known),
                "mean": sum(known) / len(known),
            }
