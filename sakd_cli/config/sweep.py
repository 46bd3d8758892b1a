"""Many runs in words: a grid over methods, pairs, routers and seeds, and the controls beside it."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, NonNegativeInt, PositiveInt
from pydantic_core import PydanticCustomError

from sakd_cli.config.base import Config
from sakd_cli.config.methods import METHODS
from sakd_cli.config.networks import NetworkName, brought, find_trainable
from sakd_cli.config.routers import ROUTERS
from sakd_cli.errors import UsageError, unknown


def _of(kind: str, table: Mapping[str, Any]) -> AfterValidator:
    def known(names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if name not in table:
                raise PydanticCustomError("unknown_name", "{text}", {"text": unknown(kind, name, table)})
        return tuple(dict.fromkeys(names))

    return AfterValidator(known)


def _split(value: Any) -> Any:
    """`wrn_40_2:wrn_16_2` as two names."""
    return tuple(value.rsplit(":", 1)) if isinstance(value, str) else value


def is_path(teacher: str) -> bool:
    """Whether a teacher is a run directory or a weights file, and no network that may be trained."""
    return brought(teacher) is None and ("/" in teacher or teacher.endswith(".safetensors"))


def _teacher(name: str) -> str:
    """A network's own name, or a path as it is."""
    if is_path(name):
        return name
    try:
        return find_trainable(name).name
    except UsageError as error:
        raise PydanticCustomError("unknown_name", "{text}", {"text": error.message}) from None


def _named(overrides: dict[str, Any]) -> dict[str, Any]:
    """Keys of `overrides` are made of methods, routers and pairs, and stand under their own names."""
    try:
        return {" ".join(_own_name(name) for name in key.split()): words for key, words in overrides.items()}
    except UsageError as error:
        raise PydanticCustomError("unknown_name", "{text}", {"text": error.message}) from None


def _own_name(name: str) -> str:
    teacher, colon, student = name.rpartition(":")
    if colon:
        return f"{teacher if is_path(teacher) else find_trainable(teacher).name}:{find_trainable(student).name}"
    if name not in METHODS and name not in ROUTERS:
        raise UsageError(unknown("method, router or pair", name, [*METHODS, *ROUTERS]))
    return name


Pair = Annotated[tuple[Annotated[str, AfterValidator(_teacher)], NetworkName], BeforeValidator(_split)]
Section = dict[str, Any]
EMPTY: Section = {}
Names = Annotated[tuple[str, ...], Field(min_length=1)]


class SweepConfig(Config):
    """Every method under every router for every pair and seed.

    common      words of every run, as in the config of a distillation; a teacher is trained with those that it knows
    teachers    words of the teachers' runs that differ from `common`
    pairs       [teacher, student] or `teacher:student`. A network is trained once, unless a finished run has its very
                words; a run directory or a weights file (with a slash in it) is taken as it is, and so is a network
                whose `teacher.weights` are said
    seeds       how many, counted from the seed of `common`; or a list of them
    alone       also train every student without a teacher
    kd          also distil every pair by plain logits, always-on
    per         more words for a method, a router or a pair, by its name; for what is all of several: `nst vgg13:vgg8`
    impossible  what becomes of a method that cannot be used for a pair: refuse the sweep, or skip it and say so
    """

    task: Literal["sweep"] = "sweep"
    common: Section = EMPTY
    teachers: Section = EMPTY
    pairs: Annotated[tuple[Pair, ...], Field(min_length=1)]
    methods: Annotated[Names, _of("method", METHODS)]
    routers: Annotated[Names, _of("router", ROUTERS)] = ("always", "adaptive")
    seeds: PositiveInt | Annotated[tuple[NonNegativeInt, ...], Field(min_length=1)] = 1
    baseline: bool = False
    kd: bool = False
    overrides: Annotated[dict[str, Section], AfterValidator(_named)] = EMPTY
    infeasible: Literal["refuse", "skip"] = "refuse"
