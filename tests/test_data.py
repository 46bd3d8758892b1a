"""Splits, batches, random streams, and the CIFAR files: missing, damaged, replaced, downloaded."""

from collections import Counter
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import functional as pil

from sakd_cli.config.datasets import DATASETS as CONFIGS
from sakd_cli.config.datasets import ShapesConfig
from sakd_cli.data import table
from sakd_cli.data.augment import channel_tensor, crop_and_flip, normalise, pad
from sakd_cli.data.dataset import Dataset, Split, first_classes, hold_out, limit_train, seeded_generator
from sakd_cli.data.loader import EvalLoader, TrainLoader
from sakd_cli.errors import DataError

CPU = torch.device("cpu")
MEAN, STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)


def made(labels: Tensor, *, size: int = 32, classes: int = 4, flip: bool = True, padding: int = 4) -> Dataset:
    """A data set of random pixels; its test split holds the first ten training images."""
    pixels = torch.randint(
        0, 256, (len(labels), 3, size, size), dtype=torch.uint8, generator=seeded_generator(0, "pixels")
    )
    train = Split(pixels, labels)
    names = tuple(f"class{number}" for number in range(classes))
    return Dataset("made", names, MEAN, STD, padding, flip, train, train.subset(torch.arange(min(10, len(labels)))))


def loader(dataset: Dataset, *, seed: int = 0, batch_size: int = 64, noise_width: int = 3) -> TrainLoader:
    return TrainLoader(dataset.train, dataset, batch_size=batch_size, seed=seed, noise_width=noise_width, device=CPU)


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return made(torch.arange(200) % 4)


def same(one: Any, other: Any) -> bool:
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in ("images", "labels", "index", "noise"))


# --- augmentation


def test_augmentation_is_bit_for_bit_the_pil_pipeline(dataset: Dataset) -> None:
    loop = loader(dataset)
    draws = loop.draw(0)
    images = torch.cat([batch.images for batch in loop.epoch(0)])
    for place in range(len(dataset.train)):
        pixels = dataset.train.images[draws.order[place]]
        picture = pil.pad(Image.fromarray(pixels.permute(1, 2, 0).numpy()), [4])
        dy, dx = draws.corner[:, place].tolist()
        picture = pil.crop(picture, dy, dx, 32, 32)
        if draws.flip[place]:
            picture = pil.hflip(picture)
        expected = pil.normalize(pil.to_tensor(picture), list(MEAN), list(STD))
        assert torch.equal(images[place], expected)


def test_images_need_not_be_square() -> None:
    images = torch.arange(2 * 3 * 5 * 7, dtype=torch.uint8).view(2, 3, 5, 7)
    index, dy, dx = torch.tensor([1, 0, 1]), torch.tensor([2, 0, 2]), torch.tensor([2, 2, 2])
    cut = crop_and_flip(pad(images, 2), index, dy, dx, torch.tensor([False, False, True]), padding=2)
    assert torch.equal(cut[0], images[1])
    assert torch.equal(cut[1, :, 2:], images[0, :, :3])
    assert not cut[1, :, :2].any()
    assert torch.equal(cut[2], images[1].flip(2))


def test_normalise_leaves_its_input_alone() -> None:
    images = torch.full((1, 3, 2, 2), 255, dtype=torch.uint8)
    normal = normalise(images, channel_tensor(MEAN, CPU), channel_tensor(STD, CPU))
    assert normal.dtype == torch.float32
    assert images.eq(255).all()
    assert normal[0, :, 0, 0].tolist() == pytest.approx([(1 - m) / s for m, s in zip(MEAN, STD, strict=True)], abs=1e-6)


# --- random streams


def test_streams_are_the_same_everywhere_and_for_ever() -> None:
    """Numbers written down: a change here changes every published run."""
    assert torch.randint(1000, (4,), generator=seeded_generator(0, "order", 1)).tolist() == [49, 161, 624, 449]


def test_streams_differ_in_seed_purpose_and_epoch() -> None:
    options = [(seed, purpose, epoch) for seed in (0, 1, 11) for purpose in ("order", "crop") for epoch in (0, 1, 10)]
    assert len({tuple(torch.rand(4, generator=seeded_generator(*word)).tolist()) for word in options}) == len(options)


# --- training batches


def test_an_epoch_shows_every_sample_once(dataset: Dataset) -> None:
    loop = loader(dataset)
    batches = list(loop.epoch(0))
    assert loop.steps_per_epoch == len(batches) == 4
    assert [len(batch.index) for batch in batches] == [64, 64, 64, 8]
    index = torch.cat([batch.index for batch in batches])
    assert index.sort().values.tolist() == list(range(200))
    assert index.tolist() != list(range(200))
    assert torch.equal(torch.cat([batch.labels for batch in batches]), dataset.train.labels[index])
    assert batches[0].images.shape == (64, 3, 32, 32)
    assert batches[0].images.is_contiguous()
    assert batches[0].noise.shape == (64, 3)


def test_an_epoch_taken_up_in_its_middle_goes_on_the_same(dataset: Dataset) -> None:
    whole = list(loader(dataset).epoch(5))
    for start in range(5):
        tail = list(loader(dataset).epoch(5, start=start))
        assert len(tail) == 4 - start
        assert all(same(one, other) for one, other in zip(whole[start:], tail, strict=True))


def test_epochs_do_not_depend_on_what_was_iterated_before(dataset: Dataset) -> None:
    used = loader(dataset)
    list(used.epoch(0))
    next(used.epoch(1))
    torch.rand(3)
    assert all(same(one, other) for one, other in zip(used.epoch(2), loader(dataset).epoch(2), strict=True))


def test_the_global_generator_is_left_alone(dataset: Dataset) -> None:
    before = torch.get_rng_state()
    list(loader(dataset).epoch(0))
    limit_train(dataset, 10, seed=0)
    hold_out(dataset, 0.1, seed=0)
    assert torch.equal(torch.get_rng_state(), before)


def test_seeds_and_epochs_differ_in_every_draw(dataset: Dataset) -> None:
    draws = [loader(dataset, seed=seed).draw(epoch) for seed, epoch in [(0, 0), (1, 0), (0, 1)]]
    for one, other in [(0, 1), (0, 2), (1, 2)]:
        for name in ("order", "corner", "flip", "noise"):
            assert not torch.equal(getattr(draws[one], name), getattr(draws[other], name)), name


def test_draws_are_independent_and_uniform() -> None:
    draws = loader(made(torch.zeros(8100, dtype=torch.int64), size=1, classes=1), noise_width=2).draw(0)
    cells = Counter(zip(*draws.corner.tolist(), strict=True))
    assert sorted(cells) == [(dy, dx) for dy in range(9) for dx in range(9)]
    # 100 a cell expected: chi square with 80 degrees of freedom stays below 125 in 999 of 1000 draws.
    assert sum((number - 100) ** 2 / 100 for number in cells.values()) < 125
    table = torch.stack([*draws.corner.double(), draws.flip.double(), *draws.noise.double().T, draws.order.double()])
    correlation = torch.corrcoef(table) - torch.eye(len(table))
    assert correlation.abs().max() < 0.05  # 4.5 standard errors
    assert draws.flip.double().mean() == pytest.approx(0.5, abs=0.025)
    assert draws.noise.min() >= 0
    assert draws.noise.max() < 1


def test_noise_of_width_zero_changes_nothing_else(dataset: Dataset) -> None:
    without = next(loader(dataset, noise_width=0).epoch(0))
    assert without.noise.shape == (64, 0)
    assert torch.equal(without.images, next(loader(dataset).epoch(0)).images)


def test_no_mirroring_and_no_cropping_where_the_data_set_says_so() -> None:
    plain = made(torch.zeros(12, dtype=torch.int64), flip=False, padding=0)
    batch = next(loader(plain).epoch(0))
    expected = normalise(plain.train.images[batch.index], channel_tensor(MEAN, CPU), channel_tensor(STD, CPU))
    assert torch.equal(batch.images, expected)


# --- evaluation batches


def test_evaluation_is_in_order_and_repeatable(dataset: Dataset) -> None:
    loop = EvalLoader(dataset.train, dataset, device=CPU, batch_size=90)
    images, labels = (torch.cat(parts) for parts in zip(*loop, strict=True))
    assert len(loop) == 3
    assert torch.equal(labels, dataset.train.labels)
    assert torch.equal(images, normalise(dataset.train.images, channel_tensor(MEAN, CPU), channel_tensor(STD, CPU)))
    assert [len(part) for part, _ in loop] == [90, 90, 20]


# --- parts of a split


@pytest.mark.parametrize("limit", [1, 3, 4, 10, 199, 200])
def test_limit_is_balanced(dataset: Dataset, limit: int) -> None:
    train = limit_train(dataset, limit, seed=0).train
    numbers = train.labels.bincount(minlength=4)
    assert len(train) == len(train.images) == limit
    assert numbers.max() - numbers.min() <= 1


def test_limit_takes_what_there_is() -> None:
    lopsided = made(torch.tensor([0] * 20 + [1] * 2 + [2] * 20 + [3] * 20))
    assert limit_train(lopsided, 20, seed=0).train.labels.bincount().tolist() == [6, 2, 6, 6]
    assert limit_train(lopsided, 1000, seed=0) is lopsided
    assert limit_train(lopsided, None, seed=0) is lopsided


def test_limit_is_drawn_from_the_seed(dataset: Dataset) -> None:
    def taken(limit: int, seed: int) -> set[bytes]:
        return {image.numpy().tobytes() for image in limit_train(dataset, limit, seed).train.images}

    assert taken(40, 0) == taken(40, 0)
    assert taken(40, 0) != taken(40, 1)
    assert taken(40, 0) < taken(80, 0)


def test_the_first_classes_are_a_data_set_of_their_own(dataset: Dataset) -> None:
    few = first_classes(dataset, 3)
    assert few.classes == ("class0", "class1", "class2")
    for split, whole in ((few.train, dataset.train), (few.test, dataset.test)):
        assert split.labels.tolist() == [label for label in whole.labels.tolist() if label < 3]
        assert torch.equal(split.images, whole.images[split.origins()])
    assert limit_train(few, 10, seed=0).train.labels.bincount().tolist() in ([4, 3, 3], [3, 4, 3], [3, 3, 4])
    assert first_classes(dataset, None) is first_classes(dataset, 4) is dataset
    with pytest.raises(DataError, match="made: has 4 classes, not 5"):
        first_classes(dataset, 5)


@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.333, 0.9])
def test_hold_out_is_stratified_and_disjoint(fraction: float) -> None:
    dataset = made(torch.tensor([0] * 100 + [1] * 50 + [2] * 37 + [3] * 13)[torch.randperm(200)])
    train, held = hold_out(dataset, fraction, seed=0)
    assert held is not None
    assert len(held) == round(fraction * 200)
    parts = [image.numpy().tobytes() for split in (train, held) for image in split.images]
    assert sorted(parts) == sorted(image.numpy().tobytes() for image in dataset.train.images)
    wanted = dataset.train.labels.bincount() * fraction
    assert (held.labels.bincount(minlength=4) - wanted).abs().max() <= 1


def test_hold_out_is_drawn_from_the_seed(dataset: Dataset) -> None:
    held = [hold_out(dataset, 0.1, seed)[1] for seed in (0, 0, 1)]
    assert held[0] is not None
    assert held[1] is not None
    assert held[2] is not None
    assert torch.equal(held[0].images, held[1].images)
    assert not torch.equal(held[0].images, held[2].images)


def test_hold_out_of_equal_classes_is_exactly_equal(dataset: Dataset) -> None:
    train, held = hold_out(dataset, 0.1, seed=0)
    assert held is not None
    assert held.labels.bincount().tolist() == [5] * 4
    assert train.labels.bincount().tolist() == [45] * 4


def test_hold_out_of_nothing(dataset: Dataset) -> None:
    train, held = hold_out(dataset, 0, seed=0)
    assert train is dataset.train
    assert held is None


@pytest.mark.parametrize(("fraction", "side"), [(0.001, "held-out"), (0.999, "training")])
def test_hold_out_refuses_an_empty_part(dataset: Dataset, fraction: float, side: str) -> None:
    with pytest.raises(DataError, match=f"leaves no {side} image"):
        hold_out(dataset, fraction, seed=0)


# --- the table


def test_every_data_set_in_words_has_a_loader() -> None:
    assert table.DATASETS.keys() == CONFIGS.keys()


def test_load_looks_the_name_up() -> None:
    assert table.load(ShapesConfig(train=20, test=20)).name == "shapes"
    assert len(table.load(ShapesConfig(train=20, test=20, classes=5)).classes) == 5
    assert table.describe(CONFIGS["cifar100"](classes=2)).classes == ("apple", "aquarium_fish")


def test_a_part_of_a_part_still_knows_where_its_images_come_from(dataset: Dataset) -> None:
    train, held = hold_out(limit_train(dataset, 50, 3), 0.2, 3)
    assert held is not None
    for part in (train, held):
        assert torch.equal(dataset.train.images[part.origins()], part.images)
    assert len(set(train.origins().tolist()) | set(held.origins().tolist())) == 50
    assert dataset.train.origins().tolist() == list(range(len(dataset.train)))


def test_images_cropped_for_several_steps_at_once_are_those_of_each_step() -> None:
    """As on a GPU, from the middle of an epoch, and to its short last batch."""
    split = Split(torch.randint(256, (38, 3, 8, 8), dtype=torch.uint8), torch.arange(38) % 5)
    data = Dataset("noise", tuple("abcde"), (0.5,) * 3, (0.25,) * 3, padding=2, flip=True, train=split, test=split)
    loader = TrainLoader(split, data, batch_size=4, seed=0, noise_width=2, device=torch.device("cpu"))
    alone = list(loader.epoch(1, 2))
    assert loader.views is not None
    loader.views.together = 3
    together = list(loader.epoch(1, 2))
    assert [len(batch.labels) for batch in together] == [4] * 7 + [2]
    for one, other in zip(alone, together, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one.tensors(), other.tensors(), strict=True))
