"""Router -> how to build it. The only place where a router's name meets an object."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sakd_cli.config.routers import RouterConfig
from sakd_cli.routing.policies import Adaptive, Anti, Fixed, Random
from sakd_cli.routing.router import Router


class Pair(NamedTuple):
    """What a router must know of the pair: number of spots, widths of both pooled vectors, whether of one family.

    matched  [epochs, S] rates that another run logged; only `random-matched` needs them
    """

    spots: int
    teacher: int
    student: int
    one_family: bool
    matched: Tensor | None = None


SAME_FAMILY_BIAS = 10.0  # of the published runs (guide `methods`)


def _adaptive(config: Any, pair: Pair) -> Router:
    published = SAME_FAMILY_BIAS if pair.one_family else 0.0
    bias = published if config.teacher_bias is None else config.teacher_bias
    return Adaptive(pair.spots, pair.teacher, pair.student, tau=config.tau, teacher_bias=bias)


def _matched(config: Any, pair: Pair) -> Router:
    assert pair.matched is not None, "the builder finds the rates before it makes this router"
    return Random(pair.matched)


ROUTERS: dict[str, Callable[[Any, Pair], Router]] = {
    "adaptive": _adaptive,
    "anti": lambda config, pair: Anti(_adaptive(config, pair)),
    "always": lambda config, pair: Fixed(pair.spots, 1.0),
    "never": lambda config, pair: Fixed(pair.spots, 0.0),
    "random": lambda config, pair: Random(torch.full((1, pair.spots), config.rate)),
    "random-matched": _matched,
}


def build(config: RouterConfig, pair: Pair) -> Router:
    """The router that the config names."""
    return ROUTERS[config.name](config, pair)
