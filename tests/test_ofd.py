"""What OFD needs beside the contract of distillers: the margins of every family of networks."""

import functools
import math

import pytest
import torch
from ghosts import ghost
from oracles import close
from torch import Tensor, nn

from sakd_cli.config.methods import METHODS
from sakd_cli.config.networks import NETWORKS
from sakd_cli.distillers.maps import FAR, margins
from sakd_cli.distillers.table import build
from sakd_cli.errors import UsageError
from sakd_cli.models.staged import StagedModel
from sakd_cli.models.table import create

# The lightest of each family; of resnet_imagenet one with each kind of block.
LIGHT = ("resnet8", "wrn_10_1", "vgg8", "ShuffleNetV1", "ShuffleNetV2_0_5", "ResNet18", "ResNet50")


@functools.cache
def network(name: str) -> StagedModel:
    """With BatchNorms that are all different, and statistics that fit its inputs."""
    torch.manual_seed(3)
    model = create(name, 10)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)
            norm.momentum = None
    with torch.no_grad():
        model.train()(torch.randn(8, 3, 16, 16))
    return model


def seeing_norms(model: StagedModel, x: Tensor) -> list[tuple[nn.BatchNorm2d, Tensor]]:
    """Every BatchNorm with what it gave, in the order of their calls."""
    met: list[tuple[nn.BatchNorm2d, Tensor]] = []
    norms = [norm for norm in model.modules() if isinstance(norm, nn.BatchNorm2d)]
    hooks = [norm.register_forward_hook(lambda norm, given, out: met.append((norm, out))) for norm in norms]
    with torch.no_grad():
        model.eval().features(x)
    for hook in hooks:
        hook.remove()
    return met


def test_all_families_that_have_preactivations_are_tried() -> None:
    seen = {arguments.family for arguments in NETWORKS.values() if ghost(arguments.name, 2).has_preactivations}
    assert {ghost(name, 2).family for name in LIGHT} == seen


@pytest.mark.parametrize("name", LIGHT)
def test_the_declared_batchnorm_is_a_term_of_the_preactivation(name: str) -> None:
    """Its gradient: a change of its bias alone, channel by channel, moves the preactivation by just that."""
    model, x = network(name), torch.randn(2, 3, 16, 16)
    met = seeing_norms(model, x)
    for stage in model.map_stages:
        weight, bias = (numbers.detach() for numbers in model.affine_before_activation(stage))
        with torch.no_grad():
            before = model.features(x, want="preactivations").preactivations[stage]
        assert weight.shape == bias.shape == before.shape[1:2]
        there = weight != 0
        found = [out for norm, out in met if torch.equal(norm.weight, weight[there])]
        assert len(found) == 1
        (rest,) = [before[:, there] - out for out in found]
        own = norm_with(model, weight[there])
        assert torch.equal(bias[there], own.bias)
        assert not bias[~there].any()
        with torch.no_grad():
            own.bias.add_(1.0)
            moved = model.features(x, want="preactivations").preactivations[stage]
            own.bias.sub_(1.0)
        assert close(moved[:, there] - rest, found[0] + 1, 1e-4)
        assert torch.equal(moved[:, ~there], before[:, ~there])
        assert (before[:, ~there] >= 0).all(), "what passes by a BatchNorm needs no margin only if it is not negative"


def norm_with(model: StagedModel, weight: Tensor) -> nn.BatchNorm2d:
    (found,) = [
        norm for norm in model.modules() if isinstance(norm, nn.BatchNorm2d) and torch.equal(norm.weight, weight)
    ]
    return found


def test_a_margin_is_the_mean_of_the_negative_part() -> None:
    weight, bias = torch.tensor([1.0, -0.5, 2.0, 0.3]).double(), torch.tensor([0.0, 0.4, -3.0, 0.5]).double()
    x = bias + weight * torch.randn(2_000_000, 4, generator=torch.Generator().manual_seed(0)).double()
    expected = (x * (x < 0)).sum(dim=0) / (x < 0).sum(dim=0)
    assert close(margins((weight, bias)), expected, 2e-3)
    assert float(margins((weight, bias))[0]) == pytest.approx(-math.sqrt(2 / math.pi))


def test_margins_of_channels_that_are_hardly_ever_negative_or_constant() -> None:
    weight, bias = torch.tensor([0.1, 0.0, 0.0, 0.0, 1e-30]), torch.tensor([1.0, 1.0, -1.0, 0.0, 5.0])
    assert close(margins((weight, bias)), torch.tensor([0.1 * FAR, 0.0, -1.0, 0.0, 0.0]), 1e-6)
    assert margins((weight, bias)).dtype == torch.float32


@pytest.mark.parametrize("name", LIGHT)
def test_margins_of_every_family_are_finite_and_not_positive(name: str) -> None:
    student, teacher = network("resnet8"), network(name)
    distiller = build(METHODS["ofd"](), student, teacher, 32).features
    assert distiller is not None
    assert distiller.want == "preactivations"
    found = dict(distiller.named_buffers())
    for k, spot in enumerate(distiller.spots):
        margin = found[f"margin{k}"]
        assert margin.shape == spot.teacher_shape[:1]
        assert margin.isfinite().all()
        assert (margin <= 0).all()
    assert not any("margin" in name for name in distiller.state_dict()), "they are the teacher's, not the run's"


def test_a_family_without_preactivations_has_no_norm_in_front_of_them() -> None:
    with pytest.raises(UsageError, match="MobileNetV2_half has no pre-activation features"):
        create("MobileNetV2_half", 10).affine_before_activation(1)
