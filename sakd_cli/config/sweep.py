"""Config of many runs: a grid over methods, pairs, routers and seeds, and the controls beside it."""

import math
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, NonNegativeInt, PositiveInt

from sakd_cli.config.base import Config, choose, of_file, once, read_by, written
from sakd_cli.config.method import AUTO
from sakd_cli.config.methods import METHODS
from sakd_cli.config.networks import NetworkName, brought, find_trainable
from sakd_cli.config.options import OPTIONS
from sakd_cli.config.routers import ROUTERS
from sakd_cli.errors import UsageError

PAIR = re.compile(r"(.+?):([^:]+\.py:[A-Za-z_]\w*|[^:]*)")


def _of(kind: str, table: Mapping[str, Any]) -> AfterValidator:
    """Names of a table, under their own names and each once."""
    return read_by(lambda names: once(tuple(choose(kind, name, table) for name in names)))


def is_path(teacher: str) -> bool:
    """Whether a teacher is a run directory or a weights file, and no network that may be trained."""
    return brought(teacher) is None and ("/" in teacher or teacher.endswith(".safetensors"))


def _teacher(name: str) -> str:
    """A network's own name, or a path as it is."""
    return name if is_path(name) else find_trainable(name).name


def _named(overrides: dict[str, Any]) -> dict[str, Any]:
    """Keys of `overrides` are made of methods, routers and pairs, and stand under their own names."""
    return {" ".join(_own_name(name) for name in key.split()): settings for key, settings in overrides.items()}


def _own_name(name: str) -> str:
    if isinstance(pair := _two(name), tuple):
        return f"{_teacher(pair[0])}:{find_trainable(pair[1]).name}"
    return choose("method, router or pair", name, [*METHODS, *ROUTERS])


def _as_texts(values: Any) -> Any:
    """Numbers of a list as texts."""
    if not isinstance(values, list | tuple):
        return values
    return [f"{value:g}" if isinstance(value, int | float) else value for value in values]


def _as_number(value: Any) -> Any:
    """The number that 1e-3 is; YAML has a text there, unless it is written as 1.0e-3."""
    return float(value) if isinstance(value, str) and re.fullmatch(r"[-+]?\d+\.?\d*[eE][-+]?\d+", value) else value


def _tried(grid: dict[str, tuple[Any, ...]]) -> dict[str, tuple[Any, ...]]:
    """Values by dotted key; an option's name stands for its key."""
    keys: dict[str, tuple[Any, ...]] = {}
    for name, values in grid.items():
        key = (OPTIONS[name].key if name in OPTIONS else "") or name
        if key in FIELDS:
            raise UsageError(f"{key} has a field of its own: {FIELDS[key]}")
        if key in keys:
            raise UsageError(f"{key} is there twice, as the key and as an option's name")
        values = tuple(map(_as_number, values))
        if not values or len({str(value) for value in values}) < len(values):
            raise UsageError(f"{key} needs values, each once, got {list(map(written, values))}".replace("'", ""))
        keys[key] = values
    return keys


def _doses(names: tuple[str, ...]) -> tuple[str, ...]:
    """Multiples as they are written, each once."""
    for name in names:
        try:
            fits = name == AUTO or 0 < float(name) < math.inf
        except ValueError:
            fits = False
        if not fits:
            raise UsageError(f"{name!r} is neither a multiple of the method's weight nor {AUTO}")
    return once(names)


def _two(pair: Any) -> Any:
    """Teacher and student of `teacher:student`, of which each may be a name in a file, `my.py:Name`."""
    found = None if not isinstance(pair, str) or of_file(pair) else PAIR.fullmatch(pair)
    return found.groups() if found else pair


def _pair(pair: Any) -> Any:
    if isinstance(pair := _two(pair), str):
        raise ValueError("is not of the form TEACHER:STUDENT")
    return pair


Seeds = Annotated[tuple[NonNegativeInt, ...], Field(min_length=1)]
Pair = Annotated[
    tuple[Annotated[str, read_by(_teacher)], NetworkName],
    BeforeValidator(_pair),
]
Section = dict[str, Any]
# What a sweep has a field for.
FIELDS = {"seed": "seeds", "student": "pairs", "teacher.source": "pairs", "method.name": "methods", "method": "methods"}
FIELDS |= {"router.name": "routers", "router": "routers", "task": "the command"}
EMPTY: Section = {}
Names = Annotated[tuple[str, ...], Field(min_length=1)]


class SweepConfig(Config):
    """Every method under every router for every pair and seed."""

    task: Literal["sweep"] = "sweep"
    """Always sweep."""
    common: Section = EMPTY
    """Settings of every run, as in the config of a distillation; a teacher is trained with those that it has."""
    teachers: Section = EMPTY
    """Settings of the teachers' runs that differ from common."""
    pairs: Annotated[tuple[Pair, ...], Field(min_length=1), read_by(once)]
    """[teacher, student] or teacher:student; a teacher is trained once, unless it is a path or has teacher.weights."""
    methods: Annotated[Names, _of("method", METHODS)]
    """Methods, as in `sakd list methods`."""
    routers: Annotated[Names, _of("router", ROUTERS)] = ("always", "adaptive")
    """Routers, as in `sakd list routers`."""
    doses: Annotated[Names, BeforeValidator(_as_texts), read_by(_doses)] = ("1",)
    """Weights of the feature loss as multiples of the method's own, and auto, which balances it."""
    grid: Annotated[dict[str, tuple[Any, ...]], read_by(_tried)] = EMPTY
    """Values to try of any other settings, by dotted key or option: {lr: [0.05, 0.1], method.kl_weight: [1, 2]}."""
    halving: Annotated[int, Field(ge=2)] | None = None
    """Successive halving of grid and doses (Optuna): after 1/halving² and 1/halving of the run one in so many stays."""
    seeds: Annotated[PositiveInt | Seeds, read_by(lambda given: given if isinstance(given, int) else once(given))] = 1
    """Number of seeds, counted from the seed of common; or a list of seeds."""
    baseline: bool = False
    """Also train every student from scratch, without a teacher."""
    kd: bool = False
    """Also distill every pair by plain logits, with router always."""
    overrides: Annotated[dict[str, Section], read_by(_named)] = EMPTY
    """Further settings of a method, a router or a pair, by its name, or of a combination: `nst vgg13:vgg8`."""
    infeasible: Literal["refuse", "skip"] = "refuse"
    """What to do about a method that cannot be used for a pair: refuse the sweep, or skip it and report."""
