"""What the routed step costs, counted against the literal published one: the bars of the project, without a clock."""

import copy
from functools import cache

import pytest
import torch
from published import published
from torch import nn

from sakd_cli.batch import Batch
from sakd_cli.bench.steps import Count, count, half_routed
from sakd_cli.config.resolve import ConfigSource, nested, resolve
from sakd_cli.config.train import Train
from sakd_cli.engine.optim import Optimizer
from sakd_cli.models.staged import StagedModel
from sakd_cli.models.table import create
from sakd_cli.runs.build import assemble

CLASSES, IMAGES = 100, 50_000
PAIRS = {"wrn": ("wrn40_2", "wrn16_2"), "vgg": ("vgg13", "vgg8")}
MORE_PAIRS = {"resnet": ("resnet56", "resnet20"), "resnetx4": ("resnet32x4", "resnet8x4")}
FLOPS = {"fitnet": 0.66, "sp": 0.60, "pkt": 0.60, "rkd": 0.60, "cc": 0.60, "ft": 0.60, "crd": 0.65}
FLOPS |= {"at": 0.86, "nst": 0.86, "vid": 0.86}
FLOPS_OF_VGG = FLOPS | {"fitnet": 0.70}
# FT's translator has BatchNorm: it sees the whole batch, forward and backward, in both. On 512 channels that is 22 % of
# our step. Teacher once, student four times, translator and half of the paraphraser alone are 0.638 of the published.
UNMET = {("vgg", "ft"): 0.642}
HELD = {"fitnet": 0.62, "sp": 0.56, "crd": 0.35, "at": 0.88}


@cache
def networks(pair: str) -> tuple[StagedModel, StagedModel]:
    torch.manual_seed(0)
    teacher, student = (create(name, CLASSES) for name in (PAIRS | MORE_PAIRS)[pair])
    return student, teacher.requires_grad_(False).eval()


def counted(pair: str, method: str, size: int) -> tuple[Count, Count]:
    """Of the published step and of ours."""
    student, teacher = (copy.deepcopy(network) for network in networks(pair))
    given = {
        "teacher.source": teacher.name,
        "student": student.name,
        "method.name": method,
        "router.teacher_bias": 0.0,
    }
    config = resolve("distill", [ConfigSource("test", nested(given))]).config
    labels = torch.arange(IMAGES) % CLASSES
    task = assemble(config, student, teacher, 32, labels).train()
    nn.init.zeros_(task.router.policy.weight)  # the noise alone decides
    noise = half_routed(len(task.spots), size)
    x, index = torch.randn(size, 3, 32, 32), torch.arange(size)
    batch = Batch(images=x, labels=labels[:size], index=index, noise=noise)
    rows = task.feature_distiller.draw(index, batch.labels) if method == "crd" else None
    slow, optimizer = published(task, method), Optimizer(task.groups(), Train())

    def ours() -> None:
        output = task(batch)
        optimizer.step(output.loss)
        assert output.use.weight.sum(dim=1).tolist() == [size / 2] * len(task.spots)

    here = [x, batch.labels, index, noise]
    theirs = [*slow.student.state_dict().values(), *teacher.state_dict().values(), *slow.compared.state_dict().values()]
    theirs += [p for group in slow.router_sgd.param_groups for p in group["params"]]
    theirs += [] if rows is None else [rows, *slow.compared[0].banks.values()]
    theirs = count(lambda: slow.step(x, batch.labels, noise, rows), [*here, *theirs])
    return theirs, count(ours, [*here, *task.state_dict().values(), *teacher.state_dict().values()])


@pytest.mark.parametrize("method", FLOPS)
@pytest.mark.parametrize("pair", ["wrn", "vgg"])
def test_flops_and_bytes_held_for_backward_against_the_published_step(pair: str, method: str) -> None:
    """Their shares are those of a batch of 16 to three digits."""
    theirs, ours = counted(pair, method, 4)
    assert ours.saved_bytes <= HELD.get(method, 1) * theirs.saved_bytes
    bar = (FLOPS_OF_VGG if pair == "vgg" else FLOPS)[method]
    assert ours.flops <= UNMET.get((pair, method), bar) * theirs.flops
    if (pair, method) in UNMET:
        pytest.xfail(f"the bar is {bar}")


@pytest.mark.parametrize(
    ("pair", "method"), [("resnet", "fitnet"), ("resnetx4", "sp"), ("resnet", "crd"), ("resnetx4", "at")]
)
def test_flops_of_more_pairs(pair: str, method: str) -> None:
    theirs, ours = counted(pair, method, 4)
    assert ours.flops <= FLOPS[method] * theirs.flops


def test_the_counters_see_what_they_count() -> None:
    x, w = torch.randn(8, 5), torch.randn(5, 3, requires_grad=True)

    def step() -> None:
        y = (x @ w).exp()
        rows = y[y.detach().sum(dim=1) > 0]
        (y.sum() + rows.sum()).backward()
        w.grad.sum().item()

    found = count(step, [x, w])
    assert found.flops == 2 * 2 * 8 * 5 * 3, "one product forward, one backward"
    # exp keeps its result; the choice by a mask keeps the mask and is a read, forward and backward.
    assert (found.saved_bytes, found.reads) == (8 * 3 * 4 + 8, 3)
    assert count(step, []).saved_bytes == found.saved_bytes + x.nbytes
