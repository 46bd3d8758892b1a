"""Searches in two levels: whose turn it is, what it reads, what it changes, and the gradient that looks ahead."""

import itertools
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor, nn

from sakd_cli.batch import Batch, UpperBatch
from sakd_cli.data.dataset import Dataset, Split
from sakd_cli.data.loader import AlternatingLoader, TrainLoader, split_in_halves
from sakd_cli.engine.optim import BilevelOptimizer, unrolled_gradient
from sakd_cli.engine.task import ParamGroup

CPU, CLASSES, IMAGES = torch.device("cpu"), 4, 42


def dataset() -> Dataset:
    """Every pixel of image k is 5 k, so that an image says which one it is."""
    pixels = 5 * torch.arange(IMAGES, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 4, 4).contiguous()
    split = Split(pixels, torch.arange(IMAGES) % CLASSES)
    return Dataset("dots", tuple("abcd"), (0.0,) * 3, (1.0,) * 3, padding=0, flip=False, train=split, test=split)


def in_turn(share: float, *, ahead: bool = False) -> tuple[AlternatingLoader, Split, Split]:
    data = dataset()
    parts = split_in_halves(data, data.train, share, seed=3)
    loaders = [TrainLoader(part, data, batch_size=5, seed=1, noise_width=0, device=CPU) for part in parts]
    return AlternatingLoader(*loaders, ahead=ahead), *parts


def origins(batch: Batch) -> set[int]:
    return {round(float(image[0, 0, 0]) * 51) for image in batch.images}


@pytest.mark.parametrize("share", [0.5, 0.2, 0.8])
def test_mixtures_and_weights_read_different_images_and_together_all(share: float) -> None:
    loader, upper, lower = in_turn(share)
    read: dict[bool, list[int]] = {True: [], False: []}
    for epoch in range(1, 6):
        for step, batch in enumerate(loader.epoch(epoch)):
            assert isinstance(batch, UpperBatch) == (step % 2 == 0)
            read[step % 2 == 0] += origins(batch)
        assert step + 1 == loader.steps_per_epoch
    assert set(read[True]) == set(upper.origins().tolist())
    assert set(read[False]) == set(lower.origins().tolist())
    assert not set(read[True]) & set(read[False])
    assert set(read[True]) | set(read[False]) == set(range(IMAGES))
    assert len(read[False]) == 5 * len(lower), "an epoch shows every image of the lower level once"
    for part in (upper, lower):
        counts = torch.bincount(part.labels, minlength=CLASSES)
        assert int(counts.max() - counts.min()) <= 1


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("share", [0.5, 0.2])
def test_an_epoch_taken_up_anywhere_goes_on_alike(share: float, ahead: bool) -> None:
    loader, _, _ = in_turn(share, ahead=ahead)
    for epoch in (1, 3):
        whole = list(loader.epoch(epoch))
        for start in range(len(whole) + 1):
            rest = list(loader.epoch(epoch, start))
            assert [origins(batch) for batch in rest] == [origins(batch) for batch in whole[start:]]
            for batch, after in itertools.pairwise(rest):
                if isinstance(batch, UpperBatch):
                    assert (batch.lower is after) == ahead


class Quadratic:
    """Lower: (w - a beta)^2 / 2 + beta w;  upper: (w - c)^2 / 2 + beta^2 w."""

    def __init__(self) -> None:
        self.w, self.beta = (nn.Parameter(torch.tensor([x], dtype=torch.float64)) for x in (0.7, -0.4))
        self.a, self.c, self.upper_turn = 1.5, 2.0, True

    def lower_loss(self) -> Tensor:
        return ((self.w - self.a * self.beta) ** 2 / 2 + self.beta * self.w).sum()

    def upper_loss(self) -> Tensor:
        return ((self.w - self.c) ** 2 / 2 + self.beta**2 * self.w).sum()


def test_the_gradient_that_looks_ahead_is_that_of_the_unrolled_step() -> None:
    levels, rate = Quadratic(), 0.3
    before = levels.w.detach().clone()
    (found,) = unrolled_gradient(levels.upper_loss, levels.lower_loss, [levels.beta], [levels.w], rate)
    assert torch.equal(levels.w, before), "put back exactly"
    w, b = levels.w.item(), levels.beta.item()
    ahead = w - rate * ((w - levels.a * b) + b)
    expected = 2 * b * ahead + (ahead - levels.c + b**2) * rate * (levels.a - 1)
    assert float(found) == pytest.approx(expected, rel=1e-3)


def optimizer(levels: Any, **more: Any) -> BilevelOptimizer:
    groups = ParamGroup("mixtures", [levels.beta], 0.01, 0.0), ParamGroup("weights", [levels.w], 0.1, 0.5)
    return BilevelOptimizer(levels, *groups, **({"momentum": 0.9, "epochs": 4, "second_order": False} | more))


@pytest.mark.parametrize("second_order", [False, True])
def test_a_level_moves_in_its_own_turn_only_and_goes_on_from_what_was_saved(second_order: bool) -> None:
    levels, again = Quadratic(), Quadratic()
    first, second = (optimizer(each, second_order=second_order) for each in (levels, again))
    for step in range(8):
        levels.upper_turn = again.upper_turn = step % 2 == 0
        before = levels.w.detach().clone(), levels.beta.detach().clone()
        if step == 5:  # another process goes on
            with torch.no_grad():
                again.w.copy_(levels.w)
                again.beta.copy_(levels.beta)
            second.load_tensors({name: tensor.clone() for name, tensor in first.tensors().items()})
            second.begin_epoch(2)
        for each, optim in ((levels, first), (again, second)):
            optim.begin_epoch(1 + step // 4)
            optim.step(each.upper_loss() if each.upper_turn else each.lower_loss())
        assert torch.equal(levels.w, before[0]) == levels.upper_turn
        assert torch.equal(levels.beta, before[1]) != levels.upper_turn
    assert torch.equal(levels.w, again.w)
    assert torch.equal(levels.beta, again.beta)
    with pytest.raises(ValueError, match="unknown parameter"):
        first.load_tensors({"weights/7/momentum_buffer": torch.zeros(1)})


@pytest.mark.parametrize("second_order", [False, True])
def test_on_a_gpu_what_is_not_finite_stays_out_of_both_levels(
    second_order: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There nothing is read back: the guard's flag alone keeps the update from being made."""
    monkeypatch.setattr("sakd_cli.engine.optim.updates_on_device", lambda parameter: True)
    levels = Quadratic()
    optim = optimizer(levels, second_order=second_order)
    optim.begin_epoch(1)
    for bad in (False, True, True):
        before = levels.w.detach().clone(), levels.beta.detach().clone()
        for levels.upper_turn in (True, False):
            loss = (levels.upper_loss() if levels.upper_turn else levels.lower_loss()) * (float("nan") if bad else 1.0)
            optim.step(loss, Mock(return_value=torch.tensor(float(bad))))
        assert torch.equal(levels.w, before[0]) == torch.equal(levels.beta, before[1]) == bad
    steps = [tensor for name, tensor in optim.tensors().items() if name.endswith("/step")]
    assert [int(step) for step in steps] == [1], "Adam counts the updates that were made"
    again = optimizer(Quadratic(), second_order=second_order)
    again.load_tensors(optim.tensors())
    assert again.constants() == (), "the rate is no part of a captured step"


def test_a_batch_in_a_batch_is_mapped_and_told_apart_with_it() -> None:
    loader, _, _ = in_turn(0.5, ahead=True)
    batch = next(loader.epoch(1))
    moved = batch.map(lambda tensor: tensor + 1)
    assert torch.equal(moved.lower.images, batch.lower.images + 1)
    assert torch.equal(moved.labels, batch.labels + 1)


def test_the_lower_rate_falls_to_nothing_as_half_a_cosine() -> None:
    optim, rates = optimizer(Quadratic()), []
    for epoch in range(1, 6):
        optim.begin_epoch(epoch)
        rates.append(optim.sgd.param_groups[0]["lr"])
    assert rates == pytest.approx([0.1, 0.08535534, 0.05, 0.01464466, 0.0])
