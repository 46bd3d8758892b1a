"""A sweep's config as single runs, in the order in which they can be made: teachers first, what matches rates last."""

import json
from collections.abc import Iterable, Iterator, Sequence
from enum import StrEnum
from itertools import product
from typing import Any, NamedTuple

from sakd_cli.config.identity import identity, is_plain
from sakd_cli.config.keys import explain
from sakd_cli.config.method import AUTO
from sakd_cli.config.methods import METHODS, KDConfig
from sakd_cli.config.resolve import ConfigSource, flat, nested, protocol_sources, resolve
from sakd_cli.config.routers import CLASSICAL, PLAIN, ROUTERS, AdaptiveConfig, RandomMatchedConfig
from sakd_cli.config.sweep import SweepConfig, is_path
from sakd_cli.config.training import DistillConfig, RunConfig
from sakd_cli.errors import UsageError

LEARNED, KD = AdaptiveConfig().name, KDConfig().name
Tried = tuple[tuple[str, Any], ...]
CHOSEN = ("method", "router")  # sections whose settings depend on a name of the grid


class Role(StrEnum):
    """What a run is for."""

    teacher = "teacher"
    baseline = "baseline"
    student = "student"


class Member(NamedTuple):
    """One run of a sweep. `key` names it within the sweep; `teacher` and `matched` are keys of runs it waits for.

    dose     multiple of the method's weight, or auto; 1: its own
    tried    values of the sweep's grid, by key
    teacher  whose network it learns from; None for what has no teacher, or takes one that is there already
    matched  whose rates its router repeats
    """

    key: str
    role: Role
    config: RunConfig
    pair: tuple[str, str] | None = None
    teacher: str | None = None
    matched: str | None = None
    dose: str = "1"
    tried: Tried = ()

    @property
    def cell(self) -> str:
        """What its seeds share."""
        return self.key.partition(" seed ")[0]

    @property
    def needs(self) -> list[str]:
        """Keys of the runs that must be finished first."""
        return [key for key in (self.teacher, self.matched) if key is not None]

    @property
    def method(self) -> str | None:
        """Name of its method, its dose where that is not the method's own, and what is tried."""
        config = self.config
        return _varied(config.method.name, self.dose, self.tried) if isinstance(config, DistillConfig) else None

    @property
    def router(self) -> str | None:
        return self.config.router.name if isinstance(self.config, DistillConfig) else None

    @property
    def control(self) -> str | None:
        """What all members share that distil nowhere and are one run, whatever their method and teacher; else None."""
        settings = flat(self.config.model_dump(mode="json"))
        return identity(settings, without=()) if is_plain(settings) else None


class Grid(NamedTuple):
    """The runs of a sweep, and what was left out of it: method, router and pair, and the reason."""

    members: list[Member]
    skipped: dict[str, str]


def grid(
    sweep: SweepConfig,
    given: Sequence[ConfigSource] = (),
    budget: str | None = None,
    part: float = 1.0,
    protocol: str | None = None,
) -> Grid:
    """Every run, each behind those that it waits for; seed by seed, so that a first answer comes early.

    given   settings from the command line and the environment, stronger than those of the file
    budget  share of the epochs ("0.1", "10%") or a number of epochs for the students ("24"): every schedule is
            shortened in proportion
    part    of that, once more (for successive halving); protocol: as `--protocol`, stronger than the file as well

    Raises UsageError, naming the run, for settings that exclude each other, unless those are to be skipped.
    """
    plan = _Plan(sweep, given, protocol)
    share = part * (_share(budget, plan.epochs) if budget else 1.0)
    made = {member.key: member._replace(config=_shortened(member.config, share)) for member in plan.members()}
    return Grid(list(made.values()), plan.skipped)


def in_order_of_need(routers: Iterable[str]) -> list[str]:
    """Their names in the same order, but the learned one first, and behind all others what matches another's rates."""
    return sorted(routers, key=lambda name: (name != LEARNED, ROUTERS[name] is RandomMatchedConfig))


class _Plan:
    def __init__(self, sweep: SweepConfig, given: Sequence[ConfigSource], protocol: str | None) -> None:
        self.sweep, self.skipped, self.protocol = sweep, dict[str, str](), protocol
        learned = ConfigSource("default", {"router": {"name": LEARNED}})
        self.below = [learned, ConfigSource("common", sweep.common), *(g for g in given if set(g.values) <= {*CHOSEN})]
        self.said = [layer for layer in given if not set(layer.values) <= {*CHOSEN}]
        first = resolve("distill", [*self.below, ConfigSource("pairs", _pair(sweep.pairs[0])), *self.above()]).config
        self.epochs, seed = first.train.epochs, first.seed
        several = sweep.seeds
        self.seeds = range(seed, seed + several) if isinstance(several, int) else sorted(several)
        self.routers = in_order_of_need(sweep.routers)
        for key in sweep.grid:
            if not any(_has(key, *cell) for cell in product(sweep.methods, sweep.routers)):
                explain(key)  # raises where there is no such key
                self.skipped[f"grid {key}"] = "no method or router here has it"

    def above(self, *own: ConfigSource) -> list[ConfigSource]:
        """What is stronger than the file: the protocol, as far as it is for the router of these, and what is given."""
        return [*protocol_sources(self.protocol, [*self.below, *own, *self.said]), *self.said]

    def members(self) -> Iterator[Member]:
        made = list(self._made())
        wanted = {member.teacher for member in made}
        for teacher in dict.fromkeys(teacher for teacher, _ in self.sweep.pairs):
            if (key := f"teacher {teacher}") in wanted:
                own = ConfigSource("teachers", self.sweep.teachers | {"model": teacher})
                yield Member(key, Role.teacher, self._from_scratch(teacher, own))
        yield from made

    def _made(self) -> Iterator[Member]:
        for seed in self.seeds:
            students = list[Member]()
            for pair in self.sweep.pairs:
                cells = list(product(self.sweep.methods, self.sweep.doses, self.routers))
                cells = [cell for cell in cells if cell[1] == "1" or cell[2] != PLAIN]  # no dose of nothing
                if self.sweep.kd:
                    cells = list(dict.fromkeys([(KD, "1", CLASSICAL), *cells]))
                varied = [(*cell, tried) for cell in cells for tried in self._tried(cell[0], cell[2])]
                students += filter(None, (self._student(pair, *cell, seed) for cell in varied))
            names = dict.fromkeys(student for _, student in self.sweep.pairs) if self.sweep.baseline else ()
            yield from (self._baseline(name, seed, students) for name in names)
            yield from students

    def _baseline(self, student: str, seed: int, others: list[Member]) -> Member:
        """From scratch; the run of one that distils nowhere where there is one, which is the same to the bit."""
        own, last = ConfigSource("the grid", {"model": student}), ConfigSource("the grid", {"seed": seed})
        key, config = f"baseline {student} seed {seed}", self._from_scratch(student, own, [last])
        wanted = flat(config.model_dump(mode="json", exclude={"task"}))
        for other in others:
            found = flat(other.config.model_dump(mode="json"))
            same = all(found[name] == value for name, value in wanted.items() if name in found)
            if other.control and found["student"] == student and same:
                return Member(key, Role.baseline, other.config, teacher=other.teacher)
        return Member(key, Role.baseline, config)

    def _from_scratch(self, name: str, own: ConfigSource, last: Sequence[ConfigSource] = ()) -> RunConfig:
        below, above = (
            [layer._replace(values=layer.values | {"task": "distill"}) for layer in layers]
            for layers in (self.below, self.above())
        )
        return _resolved(f"{name} from scratch", "pretrain", [*below, own, *above, *last])

    def _tried(self, method: str, router: str) -> list[Tried]:
        """Every combination of the grid's values, of the settings that a cell of this method and router has."""
        keys = [key for key in self.sweep.grid if _has(key, method, self._source(router) or router)]
        return [tuple(zip(keys, values, strict=True)) for values in product(*(self.sweep.grid[key] for key in keys))]

    def _student(
        self, pair: tuple[str, str], method: str, dose: str, router: str, tried: Tried, seed: int
    ) -> Member | None:
        label = ":".join(pair)
        cell = f"{_varied(method, dose, tried)} {router} {label}"
        named = ConfigSource("the grid", _pair(pair) | {"method": {"name": method}, "router": {"name": router}})
        # The more it says whom it is for, the stronger.
        mine = [key for key in self.sweep.overrides if set(key.split()) <= {label, method, router}]
        ranked = sorted(mine, key=lambda key: len(key.split()))
        per = [ConfigSource(f"overrides {key}", self.sweep.overrides[key]) for key in ranked]
        own = {key: value for key, value in tried if _has(key, method, router)}
        last = ConfigSource("grid", nested(own | {"seed": seed}))
        try:
            layers = [*self.below, named, *per, *self.above(named, *per), last]
            config = _resolved(cell, "distill", layers)
            if dose != "1":
                weight = dose if dose == AUTO else config.method.weight * float(dose)
                config = _resolved(cell, "distill", [*layers, ConfigSource("doses", {"method": {"weight": weight}})])
        except UsageError as error:
            if self.sweep.infeasible == "refuse":
                raise
            self.skipped[cell] = error.message.removeprefix(f"{cell}: ")
            return None
        there = is_path(pair[0]) or config.teacher.weights is not None
        teacher = None if there else f"teacher {pair[0]}"
        matched = None
        if ROUTERS[router] is RandomMatchedConfig and not config.router.run:
            if (source := self._source(router)) is None:
                raise UsageError(
                    f"routers: {router} matches the rates of {LEARNED}, or of another that selects: add it"
                )
            matched = f"{_varied(method, dose, tried)} {source} {label} seed {seed}"
        return Member(f"{cell} seed {seed}", Role.student, config, pair, teacher, matched, dose, tried)

    def _source(self, router: str) -> str | None:
        """Whose rates coins of this sweep have; None for what matches none."""
        coins = ROUTERS[router] is RandomMatchedConfig
        return next((name for name in self.routers if ROUTERS[name].selects), None) if coins else None


def _has(key: str, method: str, router: str) -> bool:
    """Whether a run of this method and router has the setting; what belongs to neither, all have."""
    section, _, leaf = key.partition(".")
    kind = {"method": METHODS[method], "router": ROUTERS[router]}.get(section)
    return kind is None or leaf in kind.model_fields


def _varied(method: str, dose: str, tried: Tried) -> str:
    """`fitnet`, `fitnet x10`, `fitnet auto`, `fitnet train.lr=0.1`."""
    doses = [] if dose == "1" else [dose if dose == AUTO else f"x{dose}"]
    return " ".join([method, *doses, *(f"{key}={json.dumps(value, separators=(',', ':'))}" for key, value in tried)])


def _pair(pair: tuple[str, str]) -> dict[str, Any]:
    return {"teacher": {"source": pair[0]}, "student": pair[1]}


def _resolved(key: str, task: str, layers: list[ConfigSource]) -> Any:
    try:
        return resolve(task, layers).config
    except UsageError as error:
        raise UsageError(f"{key}: {error.message}", error.hint) from None


def _share(text: str, epochs: int) -> float:
    try:
        share = float(text[:-1]) / 100 if text.endswith("%") else float(text)
        share = share / epochs if text.isdigit() else share
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise UsageError(f"--budget {text!r} is neither a share of the epochs nor a number of at most {epochs}", "0.1")
    return share


def _shortened(config: RunConfig, share: float) -> Any:
    """The same run with every number of epochs, and every milestone, in proportion."""
    if share == 1:
        return config
    settings = flat(config.model_dump(mode="json"))
    for key, value in settings.items():
        if key.endswith(("epochs", "_epochs")) and isinstance(value, int):
            settings[key] = max(1, round(value * share))
    if settings["train.milestones"] is not None:
        scaled = sorted({max(1, round(epoch * share)) for epoch in settings["train.milestones"]})
        settings["train.milestones"] = [epoch for epoch in scaled if epoch < settings["train.epochs"]]
    for key in ("train.warmup_epochs", "router.warmup_epochs"):
        if settings.get(key):
            settings[key] *= share
    return resolve(config.task, [ConfigSource("--budget", nested(settings))]).config
