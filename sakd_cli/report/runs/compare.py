"""Runs against each other, from their directories alone: words, curves, final figures, seeds, and a plain verdict

The document is described by `Comparison` in `documents.py`. Runs that differ in nothing but the seed (and in words that
change no result) form a group; a seed counts once in it, since the same seed gives the same bits. A group is compared,
seed by seed, with plain training of the same network (router never, or a pretraining) and with the classical
distillation that differs from it in the router only; where there is neither, with the first group.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from sakd_cli.config.resolve import flat
from sakd_cli.config.routers import CLASSICAL, PLAIN
from sakd_cli.config.training import LOCATIONS
from sakd_cli.errors import UsageError
from sakd_cli.report.render.format import fixed, number, plain, points
from sakd_cli.report.runs.statistics import LEVEL, paired, spread, verdict_of
from sakd_cli.rundir import RunDir

SCHEMA = "sakd.compare/1"
# Where something lies; the teacher itself is known by its SHA-256, the matched run is another one for every seed.
PLACES = LOCATIONS | {"router.run"}
LEARNING = ("task", "method", "router", "teacher", "student", "model", "stage_map", "residual")
DISTILLATION = (*LEARNING, "init_from", "init_from_branches", "friendly")


@dataclass(frozen=True)
class _Run:
    path: str
    words: dict[str, Any]
    finished: bool
    summary: dict[str, Any]
    curve: list[dict[str, Any]]

    def word(self, key: str) -> Any:
        return self.words.get(key)

    @property
    def network(self) -> Any:
        return self.word("student") or self.word("model")

    @property
    def identity(self) -> str:
        """What all runs of a group share."""
        return json.dumps(
            {key: value for key, value in self.words.items() if key not in PLACES | {"seed"}}, default=str
        )

    @property
    def control(self) -> bool:
        """Whether nothing was distilled."""
        return self.word("router.name") in (None, PLAIN)

    def figure(self, key: str) -> float | None:
        return number((self.summary.get("last") or {}).get(key))


@dataclass(frozen=True)
class _Group:
    label: str
    first: _Run
    by_seed: dict[Any, _Run]

    def values(self, key: str) -> dict[Any, float]:
        return {seed: value for seed, run in self.by_seed.items() if (value := run.figure(key)) is not None}


def compare(runs: Iterable[RunDir]) -> dict[str, Any]:
    """See above. Raises UsageError where a path is no run."""
    read = [_read(run) for run in runs]
    if not read:
        raise UsageError("nothing to compare", hint="name runs: sakd compare runs/*")
    identities = list(dict.fromkeys(run.identity for run in read))
    groups = _groups([[run for run in read if run.identity == identity] for identity in identities])
    rows = [_row(run) | {"group": identities.index(run.identity)} for run in read]
    return {
        "schema": SCHEMA,
        "level": LEVEL,
        "runs": rows,
        "differences": _differences(read),
        "groups": [_about(group) for group in groups],
        "comparisons": [_against(groups, mine, other) for mine, other in _pairs(groups)],
    }


def _read(run: RunDir) -> _Run:
    words = flat(run.config)
    if words.get("teacher.sha256") is None:  # a run that did not come so far as to find it
        words["teacher.sha256"] = words.get("teacher.source")
    summary = run.summary.plain() if run.finished else {}
    return _Run(plain(run.path), words, run.finished, summary, _curve(run.lines("metrics.jsonl")))


def _curve(lines: Iterable[Any]) -> list[dict[str, Any]]:
    """One row per epoch: means of the training images as they were augmented, figures of the images that select."""
    epochs: dict[int, dict[str, Any]] = {}
    steps, before = dict[int, float](), 0.0
    for line in lines:
        if not isinstance(line, dict) or line.get("kind") not in ("train", "eval") or not number(line.get("epoch")):
            continue
        epoch = int(line["epoch"])
        row = epochs.setdefault(epoch, dict.fromkeys(("train_loss", "train_top1", "selected_on", "top1", "loss")))
        if line["kind"] == "eval":
            row |= {"selected_on": plain(line.get("split")), "top1": number(line.get("top1"))}
            row["loss"] = number(line.get("loss"))
            continue
        step = number(line.get("step")) or 0.0
        weight, known = max(step - before, 0.0), steps.get(epoch, 0.0)
        before, steps[epoch] = step, known + weight
        # What methods share: the cross-entropy, where it is logged apart from a method's own terms.
        for key, logged in (("loss", "ce" if "ce" in line else "loss"), ("top1", "top1")):
            value, mean = number(line.get(logged)), row[f"train_{key}"]
            if value is not None and weight:
                row[f"train_{key}"] = value if mean is None else (mean * known + value * weight) / (known + weight)
    return [{"epoch": epoch} | epochs[epoch] for epoch in sorted(epochs)]


def _row(run: _Run) -> dict[str, Any]:
    best, teacher = run.summary.get("best") or {}, run.summary.get("teacher") or {}
    return {
        "run": run.path,
        "finished": run.finished,
        "task": run.word("task"),
        "network": run.network,
        "dataset": run.word("data.name"),
        "method": run.word("method.name"),
        "router": run.word("router.name"),
        "seed": run.word("seed"),
        "epochs": run.word("train.epochs"),
        "top1": run.figure("top1"),
        "top5": run.figure("top5"),
        "loss": run.figure("loss"),
        "best": {"epoch": number(best.get("epoch")), "top1": number(best.get("top1"))},
        "seconds": number(run.summary.get("seconds")),
        "teacher_top1": number(teacher.get("top1")),
        "curve": run.curve,
    }


def _differences(runs: list[_Run]) -> list[dict[str, Any]]:
    """Every word that is not the same everywhere, but for those of PLACES, with its value in each run."""
    keys = dict.fromkeys(key for run in runs for key in run.words if key not in PLACES)
    rows = [{"key": key, "values": [run.word(key) for run in runs]} for key in keys]
    return [row for row in rows if any(value != row["values"][0] for value in row["values"])]


def _groups(members: list[list[_Run]]) -> list[_Group]:
    firsts = [runs[0] for runs in members]
    told = ("task", "student", "model", "method.name", "router.name")
    extra = [row["key"] for row in _differences(firsts) if row["key"] not in (*told, "seed")]
    several = len({run.network for run in firsts}) > 1
    groups: list[_Group] = []
    for runs in members:
        first = runs[0]
        parts = [first.network if several else None, first.word("method.name") or "alone", first.word("router.name")]
        # Config of a method or a router follow from its name, unless the name is the same.
        kin = [run for run in firsts if [run.word(key) for key in told] == [first.word(key) for key in told]]
        own = [key for key in extra if len({str(run.word(key)) for run in kin}) > 1]
        parts += [f"{key}={first.word(key)}"[:40] for key in own]
        label = " ".join(plain(part) for part in parts if part is not None)
        groups.append(_Group(label, first, {run.word("seed"): run for run in runs}))
    return groups


def _about(group: _Group) -> dict[str, Any]:
    seeds = list(group.values("top1"))
    figures = {key: spread(list(group.values(key).values())) for key in ("top1", "top5", "loss")}
    return {"label": group.label, "distilled": not group.first.control, "seeds": seeds} | figures


def _pairs(groups: list[_Group]) -> list[tuple[_Group, _Group]]:
    pairs = []
    for group in groups:
        own = [other for other in groups if other is not group and not group.first.control]
        pairs += [(group, other) for other in own if other.first.control and _alike(group, other)]
        pairs += [(group, other) for other in own if _is_classical_twin(group.first, other.first)]
    return pairs or [(group, groups[0]) for group in groups[1:]]


def _alike(one: _Group, other: _Group) -> bool:
    same = one.first.network == other.first.network and one.first.word("data.name") == other.first.word("data.name")
    # Without distillation the method makes no difference, but for what it says of the cross-entropy.
    own = other.first.word("method.name")
    return same and own in (None, one.first.word("method.name"))


def _is_classical_twin(one: _Run, other: _Run) -> bool:
    return other.word("router.name") == CLASSICAL and not [
        key for key in _differing(one, other) if not key.startswith("router.")
    ]


def _differing(one: _Run, other: _Run) -> list[str]:
    keys = dict.fromkeys([*one.words, *other.words])
    return [key for key in keys if key not in PLACES | {"seed"} and one.word(key) != other.word(key)]


def _against(groups: list[_Group], mine: _Group, other: _Group) -> dict[str, Any]:
    ours, theirs = mine.values("top1"), other.values("top1")
    seeds = [seed for seed in ours if seed in theirs]
    found = paired([ours[seed] - theirs[seed] for seed in seeds])
    unequal = [key for key in _differing(mine.first, other.first) if key.partition(".")[0] not in DISTILLATION]
    return {
        "group": groups.index(mine),
        "against": groups.index(other),
        "seeds": seeds,
        "difference": found["mean"],
        "low": found["low"],
        "high": found["high"],
        "p": found["p"],
        "verdict": verdict_of(found),
        "unequal": unequal,
        "text": _said(mine, other, found, len(seeds))
        + (f" Not under one budget: {', '.join(unequal)}." * bool(unequal)),
    }


def _said(mine: _Group, other: _Group, found: dict[str, Any], seeds: int) -> str:
    verdict, names = verdict_of(found), f"{mine.label} against {other.label}"
    if verdict == "unknown":
        return f"{names}: no seed is finished in both."
    figure = f"{points(found['mean'], 2)} points top-1"
    plainly = other.first.control and not mine.first.control
    if verdict == "few seeds":
        return f"{names}: {figure} with {seeds} seed{'s' * (seeds > 1)}, too few to tell it from noise."
    low, high = (points(found[key], 2) for key in ("low", "high"))
    support = f"{figure} (95 % interval {low} to {high}, p = {fixed(found['p'], 3)}, {seeds} seeds)"
    what = {"noise": "the difference is noise", "better": "better", "worse": "worse"}[verdict]
    if plainly and verdict != "noise":
        what = {"better": "distillation helped", "worse": "distillation hurt"}[verdict]
    return f"{names}: {what}, {support}."
