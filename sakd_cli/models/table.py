"""Family -> the function that builds it. The variants of each family are words, in `config/networks.py`."""

from collections.abc import Callable

from sakd_cli.config.networks import find_network
from sakd_cli.models import resnet, wrn
from sakd_cli.models.staged import StagedModel

FAMILIES: dict[str, Callable[..., StagedModel]] = {
    "resnet": resnet.build,
    "wrn": wrn.build,
}


def create(name: str, num_classes: int) -> StagedModel:
    """A freshly initialised network. Raises UsageError with the nearest name."""
    network = find_network(name)
    return FAMILIES[network.family](network.name, num_classes, **network.arguments)
