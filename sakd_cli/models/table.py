"""Family -> the function that builds it. The variants of each family are in `config/networks.py`."""

from collections.abc import Callable
from functools import cache

import torch

from sakd_cli.config import code, plugins
from sakd_cli.config.networks import find_network
from sakd_cli.config.preprocessing import ImageSize
from sakd_cli.errors import UsageError
from sakd_cli.models import external, mobilenetv2, resnet, shufflenet, vgg
from sakd_cli.models.adapters import build_reused
from sakd_cli.models.cost import Cost, cost
from sakd_cli.models.staged import StagedModel


def _reused(name: str, num_classes: int, side: ImageSize, *, student: str, teacher: str, factor: int) -> StagedModel:
    ours, theirs = create(student, num_classes, side), create(teacher, num_classes, side)
    return build_reused(name, num_classes, student=ours, teacher=theirs, factor=factor)


FAMILIES: dict[str, Callable[..., StagedModel]] = {
    "resnet": resnet.build,
    "wrn": resnet.build_wide,
    "resnet_imagenet": resnet.build_imagenet,
    "vgg": vgg.build,
    "mobilenetv2": mobilenetv2.build,
    "shufflenetv1": shufflenet.build_v1,
    "shufflenetv2": shufflenet.build_v2,
}
# Those that are built for one side of the images.
FITTED: dict[str, Callable[..., StagedModel]] = {
    "reused": _reused,
    "torchvision": external.from_library,
    "timm": external.from_library,
    "factory": external.factory,
}


def _callable(name: str, build: object) -> Callable[[str, int], object]:
    if not callable(build):
        raise ValueError("is no function")
    return build


PLUGGED = plugins.Table[Callable[[str, int], object]]("network", {}, plugins.NETWORKS, _callable)


def create(name: str, num_classes: int, side: ImageSize = 32, *, drop_path: float = 0.0) -> StagedModel:
    """A freshly initialised network for images of `side` pixels. Raises UsageError with the nearest name."""
    network = find_network(name)
    more = {"drop_path": drop_path} if drop_path else {}
    if more and FITTED.get(network.family) is not external.from_library:
        raise UsageError(f"train.drop_path: {name} has no stochastic depth", "networks of timm and torchvision have it")
    if network.plugged:
        with code.as_usage_errors(f"{network.family}: network {name!r}"):
            made = PLUGGED.row(network.name)(network.name, num_classes)
        if not isinstance(made, StagedModel) or (made.name, made.num_classes) != (network.name, num_classes):
            raise UsageError(f"{network.family}: {name} is no StagedModel of that name for {num_classes} classes")
        here = torch.empty(0).device  # meta, where only shapes are wanted
        of_use = all(p.dtype == torch.float32 and p.device == here for p in made.parameters())
        if not (of_use and any(p.requires_grad for p in made.parameters())):
            raise UsageError(f"{network.family}: {name} must have float32 parameters, of which some are trained")
        return made
    if network.family in FITTED:
        return FITTED[network.family](network.name, num_classes, side, **network.arguments, **more)
    return FAMILIES[network.family](network.name, num_classes, **network.arguments)


@cache
def cost_of(name: str, classes: int, side: ImageSize) -> Cost:
    """What a network of that name costs; nothing is allocated and no random number drawn."""
    with torch.device("meta"):
        return cost(create(name, classes, side), side)
