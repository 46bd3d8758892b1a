"""Which networks are lighter than a given one: residual students by their multiply-accumulates (ResKD spec, 2.3)."""

from functools import cache

import torch

from sakd_cli.config.networks import NETWORKS, find_network
from sakd_cli.models.cost import Cost, cost
from sakd_cli.models.table import create


@cache
def cost_of(name: str, classes: int, side: int) -> Cost:
    """What a network of that name costs; nothing is allocated and no random number drawn."""
    with torch.device("meta"):
        return cost(create(name, classes, side), side)


def lighter(first: str, before: str, ratio: float, classes: int, side: int) -> str:
    """The largest network of the family of `first` with at most `ratio` of the MACs of `before`.

    Where there is none, the family's cheapest; but where `first` is that itself, all families are looked through.
    """
    family = [name for name, network in NETWORKS.items() if network.family == find_network(first).family]
    family = family or list(NETWORKS)  # a plug-in's network has none of its kind here
    cheapest = min(cost_of(name, classes, side).macs for name in family)
    if cost_of(first, classes, side).macs <= cheapest:
        family = list(NETWORKS)
    macs = {name: cost_of(name, classes, side).macs for name in family}
    limit = ratio * cost_of(before, classes, side).macs
    fitting = {name: count for name, count in macs.items() if count <= limit}
    return max(fitting, key=lambda name: fitting[name]) if fitting else min(macs, key=lambda name: macs[name])
