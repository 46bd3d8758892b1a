"""Compare runs from their directories alone: settings, curves, results, seeds, and a plain verdict

Runs that differ in nothing but the seed (and in settings that change no result) form a group. Groups are compared seed
by seed: with plain training of the same network (router never, or a pretraining), with the classical distillation that
differs in the router only (how much), with coins of its own rates (where), and with another method or dose under the
same router; where there is nothing of the kind, with the first group. Or all with a baseline. The tests are one family.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from sakd_cli.config.base import written
from sakd_cli.config.identity import LOCATIONS, identity, is_plain
from sakd_cli.config.method import MethodConfig
from sakd_cli.config.methods import METHODS
from sakd_cli.config.resolve import flat
from sakd_cli.config.routers import CLASSICAL, PLAIN
from sakd_cli.documents.base import PairedTest
from sakd_cli.documents.table import BestEpoch, Comparison, Difference, Point, RunRow, SeedGroup, Versus
from sakd_cli.errors import UsageError
from sakd_cli.files import resolved
from sakd_cli.report.render.format import number, plain
from sakd_cli.report.runs import statistics
from sakd_cli.report.runs.statistics import Arm, by_seed
from sakd_cli.rundir import RunDir

# Where something lies; the teacher itself is known by its SHA-256, the matched run is another one for every seed.
COINS = {"router.run", "router.run_sha256"}  # whose rates are repeated: for each seed another run
PLACES = LOCATIONS | COINS
LEARNING = ("task", "method", "router", "teacher", "student", "model", "stage_map", "residual")
DISTILLATION = (*LEARNING, "init_from", "init_from_branches", "friendly")
NAMES = ("task", "student", "model", "method.name", "router.name")  # what a label is made of


class _Settings(dict[str, Any]):
    """The settings of a run by their keys; None for a key that it does not have."""

    def __missing__(self, key: str) -> None:
        return None

    @classmethod
    def of(cls, run: RunDir) -> "_Settings":
        run.require_own_settings()
        settings = cls(flat(run.config))
        if settings["teacher.sha256"] is None:  # a run that has not yet found its teacher
            settings["teacher.sha256"] = settings["teacher.source"]
        return settings

    @property
    def network(self) -> Any:
        return self["student"] or self["model"]

    @property
    def control(self) -> bool:
        """Whether nothing was distilled."""
        return self["router.name"] in (None, PLAIN)

    @property
    def budget(self) -> dict[str, Any]:
        """On what, how often and how long it is trained, whatever is distilled."""
        return {key: self[key] for key in self if key.partition(".")[0] not in (*DISTILLATION, "code")}

    @property
    def identity(self) -> str:
        """What all runs of a group share."""
        return identity(self, without={*COINS, "seed"})


class _Group(NamedTuple):
    number: int
    label: str
    settings: _Settings  # of its first run
    runs: list[RunRow]
    said: str = ""  # the label with what each word is


def compare(runs: Iterable[RunDir], baseline: str | None = None) -> Comparison:
    """See above; `baseline`: a run, or words of a group's label. Raises UsageError where a path is no run."""
    if not (given := list(runs)):
        raise UsageError("nothing to compare", hint="name runs: sakd compare runs/*")
    settings = [_Settings.of(run) for run in given]
    identities = list(dict.fromkeys(one.identity for one in settings))
    rows = [_row(run, one, identities.index(one.identity)) for run, one in zip(given, settings, strict=True)]
    groups = _groups(settings, rows)
    questions = statistics.asked(_arms(groups, rows, settings))
    pairs = dict.fromkeys((ours.number, theirs.number) for _, ours, theirs in questions)
    pairs |= dict.fromkeys((ours.number, theirs.number) for ours, theirs in _pairs(groups))
    if baseline is not None:
        chosen = _baseline(baseline, groups)
        others = [group for group in groups if group not in chosen]  # each with the one that differs least from it
        least = [min((len(_unequal(ours, theirs)), theirs.number) for theirs in chosen) for ours in others]
        pairs = {(ours.number, number): None for ours, (_, number) in zip(others, least, strict=True)}
    pairs = pairs or {(group.number, 0): None for group in groups[1:]}
    tests = [statistics.paired_test(by_seed(groups[ours].runs), by_seed(groups[theirs].runs)) for ours, theirs in pairs]
    found = dict(zip(pairs, statistics.corrected(tests), strict=True))
    return Comparison(
        level=statistics.LEVEL,
        runs=rows,
        differences=_differences(settings),
        groups=[_statistics(group) for group in groups],
        comparisons=[_versus(groups[ours], groups[theirs], test) for (ours, theirs), test in found.items()],
        answers=[
            statistics.answer(question, ours, theirs, found[ours.number, theirs.number])
            for question, ours, theirs in questions
            if (ours.number, theirs.number) in found
        ],
    )


def run_curve(run: RunDir) -> list[Point]:
    """One point per epoch of its metrics.jsonl."""
    epochs: dict[int, dict[str, Any]] = {}
    steps, last = dict[int, float](), 0.0
    for line in run.lines("metrics.jsonl"):
        if not isinstance(line, dict) or line.get("kind") not in ("train", "eval") or not number(line.get("epoch")):
            continue
        epoch = int(line["epoch"])
        row = epochs.setdefault(epoch, {"epoch": epoch})
        if line["kind"] == "eval":
            row |= {"selected_on": plain(line.get("split"))} | {key: number(line.get(key)) for key in ("top1", "loss")}
            continue
        step = number(line.get("step")) or 0.0
        weight, known = max(step - last, 0.0), steps.get(epoch, 0.0)
        last, steps[epoch] = step, known + weight
        # What methods share: the cross-entropy, where it is logged apart from a method's own terms.
        for key, logged in (("train_loss", "ce" if "ce" in line else "loss"), ("train_top1", "top1")):
            if (value := number(line.get(logged))) is not None and weight:
                row[key] = (row.get(key, value) * known + value * weight) / (known + weight)
    return [Point(**epochs[epoch]) for epoch in sorted(epochs)]


def _row(run: RunDir, settings: _Settings, group: int) -> RunRow:
    keys = {"task": "task", "dataset": "data.name", "method": "method.name", "router": "router.name"}
    keys |= {"seed": "seed", "epochs": "train.epochs"}
    found: dict[str, Any] = {"network": settings.network} | {name: settings[key] for name, key in keys.items()}
    if run.finished:
        summary = run.summary
        found |= {key: getattr(summary.last, key) for key in ("top1", "top5", "loss")}
        found |= {"seconds": summary.seconds, "teacher_top1": summary.teacher and summary.teacher.top1}
        found["best"] = BestEpoch(epoch=summary.best.epoch, top1=summary.best.top1)
    try:
        return RunRow(run=plain(run.path), finished=run.finished, curve=run_curve(run), group=group, **found)
    except ValidationError:
        raise UsageError(f"{run.path}: its config.yaml is damaged") from None


def _differences(runs: list[_Settings]) -> list[Difference]:
    """Every setting that is not the same everywhere, but for those of PLACES, with its value in each run."""
    keys = dict.fromkeys(key for run in runs for key in run if key not in PLACES)
    rows = {key: [run[key] for run in runs] for key in keys}
    return [Difference(key=key, values=row) for key, row in rows.items() if any(value != row[0] for value in row)]


def _groups(settings: list[_Settings], rows: list[RunRow]) -> list[_Group]:
    firsts: dict[int, _Settings] = {}
    for run, row in zip(settings, rows, strict=True):
        firsts.setdefault(row.group, run)
    runs = list(firsts.values())
    extra = [row.key for row in _differences(runs) if row.key not in (*NAMES, "seed")]
    groups: list[_Group] = []
    for index, first in firsts.items():
        names = [first.network] if len({run.network for run in runs}) > 1 else []
        shared = is_plain(first) and len({run["method.name"] for run in runs} - {None}) > 1
        method, router = first["method.name"], first["router.name"]
        words = [*names, *([] if shared else [f"method {method}" if method else "from scratch"])]
        words += [f"router {router}"] * (router is not None)
        names += [*([] if shared else [method or "from scratch"]), router]
        # Settings of a method or a router follow from its name, unless the name is the same.
        alike = [run for run in runs if all(run[key] == first[key] for key in NAMES)]
        own = [key for key in extra if len({str(run[key]) for run in alike}) > 1]
        own = list(filter(None, (_said(key, first) for key in own)))
        names += own
        label = " ".join(plain(name) for name in names if name is not None)
        said = ", ".join(map(plain, [*words, *own]))
        groups.append(_Group(index, label, first, [row for row in rows if row.group == index], said))
    return groups


def _said(key: str, run: _Settings) -> str:
    """A setting in a label; the balance that `auto` stands for has a word there, and none has none."""
    auto = METHODS.own.get(run["method.name"], MethodConfig).auto_balance
    if key == "method.balance" and run[key] in (0.0, auto):
        return "balanced" if run[key] else ""
    return f"{key}={written(run[key])}"[:40]


def _statistics(group: _Group) -> SeedGroup:
    found = {key: by_seed(group.runs, key) for key in ("top1", "top5", "loss")}
    means = {key: statistics.seed_statistics(values.values()) for key, values in found.items()}
    return SeedGroup(label=group.label, distilled=not group.settings.control, seeds=[*found["top1"]], **means)


def _pairs(groups: list[_Group]) -> list[tuple[_Group, _Group]]:
    pairs = []
    for ours in groups:
        others = [other for other in groups if other is not ours and not ours.settings.control]
        pairs += [(ours, other) for other in others if other.settings.control and _same_data(ours, other)]
        for theirs in others:
            unequal = _unequal(ours, theirs)
            classical = theirs.settings["router.name"] == CLASSICAL and all(k.startswith("router.") for k in unequal)
            method = theirs.number < ours.number and all(k.startswith(("method.", "router.run")) for k in unequal)
            pairs += [(ours, theirs)] * (classical or method)
    return pairs


def _baseline(wanted: str, groups: list[_Group]) -> list[_Group]:
    """The groups with this run, or with all these words in their labels. Raises UsageError where there is none."""
    path = resolved(wanted)
    found = [group for group in groups if any(Path(run.run).resolve() == path for run in group.runs)]
    found = found or [group for group in groups if {*wanted.split()} <= {*group.label.split()}]
    if not found or len(found) == len(groups) > 1:
        labels, which = ", ".join(group.label for group in groups), "is every group" if found else "no such group"
        raise UsageError(f"--baseline {wanted!r}: {which}", f"a run's folder, or words of one of: {labels}")
    return found


def _arms(groups: list[_Group], rows: list[RunRow], settings: list[_Settings]) -> list[Arm]:
    """The groups as the questions see them; what was trained without a teacher is compared with every method."""
    labels = {Path(row.run).name: groups[row.group].label for row in rows}
    matched = {row.group: str(one["router.run"]) for row, one in zip(rows, settings, strict=True) if one["router.run"]}
    arms = []
    for group in groups:
        own = group.settings
        last = {row.seed: row.curve[-1].top1 for row in group.runs if row.seed is not None and row.curve}
        whom = own["teacher.sha256"], own["method.name"]
        arms.append(
            Arm(
                number=group.number,
                label=group.label,
                said=group.said,
                about=(own.network, identity(own.budget, without={"seed"}), *(() if own.control else whom)),
                router=own["router.name"],
                top1=by_seed(group.runs),
                validation={seed: top1 for seed, top1 in last.items() if top1 is not None},
                matched_of=labels.get(Path(matched[group.number]).name) if group.number in matched else None,
            )
        )
    return arms


def _same_data(ours: _Group, control: _Group) -> bool:
    mine, other = ours.settings, control.settings
    # Without distillation most methods make no difference, but for what they say of the cross-entropy.
    same = mine["method.name"] if not is_plain(other) else other["method.name"]
    method = other["method.name"] in (None, same) and other["method.ce_weight"] in (None, mine["method.ce_weight"])
    return method and mine.network == other.network and mine["data.name"] == other["data.name"]


def _unequal(ours: _Group, theirs: _Group) -> list[str]:
    return [row.key for row in _differences([ours.settings, theirs.settings]) if row.key != "seed"]


def _versus(ours: _Group, theirs: _Group, test: PairedTest) -> Versus:
    unequal = [key for key in _unequal(ours, theirs) if key in ours.settings.budget | theirs.settings.budget]
    of_both = ([row for row in one.runs if row.finished and row.curve] for one in (ours, theirs))
    our_end, their_end = ({row.seed: row.curve[-1].epoch for row in runs} for runs in of_both)
    if not unequal and any(our_end[seed] != their_end[seed] for seed in our_end.keys() & their_end.keys()):
        unequal.append("epochs until train.patience ended a run")
    budget = f" Not under one budget: {', '.join(unequal)}." * bool(unequal)
    helps = theirs.settings.control and not ours.settings.control
    said = {"better": "distillation helped", "worse": "distillation hurt"} if helps else {}
    verdict = f"{said.get(test.verdict, test.verdict)}, " * (test.verdict in ("better", "worse", "not shown"))
    text = f"{ours.label} against {theirs.label}: {verdict}{statistics.in_words(test)}.{budget}"
    return Versus(**dict(test), group=ours.number, against=theirs.number, unequal=unequal, text=text)
