"""Method -> its distiller and the places where it distils. The only place where a method's name meets an object.

`pairs` are the (student stage, teacher stage) pairs of maps that belong together, in order of depth.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from sakd_cli.config.methods import MethodConfig
from sakd_cli.distillers.at import AT
from sakd_cli.distillers.distiller import Distiller
from sakd_cli.distillers.fitnet import FitNet
from sakd_cli.distillers.kd import KD
from sakd_cli.distillers.sp import SP
from sakd_cli.errors import UsageError
from sakd_cli.models.spot import Spot, aligned, spots_at
from sakd_cli.models.staged import StagedModel

Pairs = list[tuple[int, int]]


def every_map(config: Any, pairs: Pairs) -> Pairs:
    return pairs


def last_map(config: Any, pairs: Pairs) -> Pairs:
    return pairs[-1:]


def chosen_map(config: Any, pairs: Pairs) -> Pairs:
    if config.stage > len(pairs):
        raise UsageError(f"method.stage: {config.stage} is beyond the last of {len(pairs)} stages of this pair")
    return [pairs[config.stage - 1]]


class Entry(NamedTuple):
    """Class of the feature distiller (None: the logits are all there is) and where it distils."""

    distiller: Callable[..., Distiller] | None
    places: Callable[[Any, Pairs], Pairs]


DISTILLERS: dict[str, Entry] = {
    "kd": Entry(None, lambda config, pairs: []),
    "fitnet": Entry(FitNet, chosen_map),
    "at": Entry(AT, every_map),
    "sp": Entry(SP, last_map),
}


class Distillers(NamedTuple):
    """What one method distils: `features` at all spots but the last, `logits` at the last."""

    spots: tuple[Spot, ...]
    features: Distiller | None
    logits: Distiller


def build(config: MethodConfig, student: StagedModel, teacher: StagedModel, side: int) -> Distillers:
    """The distillers of a method for this pair of networks and images of `side` pixels."""
    entry = DISTILLERS[config.name]
    spots = tuple(spots_at(student, teacher, entry.places(config, aligned(student, teacher)), side))
    features = entry.distiller(spots[:-1], config) if entry.distiller else None
    return Distillers(spots, features, KD(spots[-1:], config.temperature))
