"""The drawn shapes: reproducible, balanced, of the stated colours, every class itself and no other."""

import itertools

import numpy as np
import pytest
import torch
from conftest import CliRunner

from sakd_cli.config.datasets import ShapesConfig
from sakd_cli.data.dataset import Split
from sakd_cli.data.shapes import CLASSES, MEAN, OUTLINES, STD, TEST, TRAIN, draw_shapes, load_shapes


@pytest.fixture(scope="module")
def drawn() -> Split:
    return draw_shapes(2000, seed=0)


def _areas(split: Split) -> torch.Tensor:
    return split.images.float().mean((1, 2, 3))


def test_shape_type_and_balance(drawn: Split) -> None:
    assert drawn.images.shape == (2000, 3, 32, 32)
    assert drawn.images.dtype == torch.uint8
    assert drawn.labels.dtype == torch.int64
    assert drawn.labels.bincount(minlength=20).tolist() == [100] * 20
    assert len(drawn.labels[:100].unique()) > 10  # in drawn order, not class by class


@pytest.mark.parametrize("count", [1, 7, 20, 33])
def test_any_count_is_balanced_to_within_one(count: int) -> None:
    numbers = draw_shapes(count, seed=3).labels.bincount(minlength=20)
    assert numbers.sum() == count
    assert numbers.max() - numbers.min() <= 1


def test_the_same_words_draw_the_same_images() -> None:
    first = draw_shapes(60, seed=5)
    draw_shapes.cache_clear()
    again = draw_shapes(60, seed=5)
    assert torch.equal(first.images, again.images)
    assert torch.equal(first.labels, again.labels)


def test_seed_and_stream_change_the_images() -> None:
    images = [draw_shapes(40, seed, stream).images for seed, stream in [(0, TRAIN), (0, TEST), (1, TRAIN), (1, TEST)]]
    for one, other in itertools.combinations(images, 2):
        assert not (one == other).flatten(1).all(1).any()


def test_the_drawing_has_not_changed() -> None:
    """Coarse on purpose: the last bit of a sine differs between processors, the drawing does not."""
    split = draw_shapes(40, seed=0)
    assert split.labels[:8].tolist() == [11, 7, 4, 4, 3, 2, 3, 14]
    assert _areas(split)[:4].tolist() == pytest.approx([68.21, 58.54, 73.77, 111.43], abs=0.5)


def test_constants_are_those_of_the_drawing(drawn: Split) -> None:
    pixels = drawn.images.float() / 255
    assert pixels.mean((0, 2, 3)).tolist() == pytest.approx(MEAN, abs=0.01)
    assert pixels.std((0, 2, 3)).tolist() == pytest.approx(STD, abs=0.01)


def test_load_gives_both_splits() -> None:
    dataset = load_shapes(ShapesConfig(train=50, test=30))
    assert (len(dataset.train), len(dataset.test)) == (50, 30)
    assert dataset.classes == CLASSES
    assert len(set(dataset.classes)) == 20
    assert torch.equal(dataset.test.images, draw_shapes(30, 0, TEST).images)


def _masks(size: int = 61) -> dict[str, np.ndarray]:
    """Every class's inside on a grid, at 36 angles: [36, size, size] bool."""
    line = np.linspace(-1.2, 1.2, size, dtype=np.float32)
    y, x = np.meshgrid(line, line, indexing="ij")
    turns = np.linspace(0, 2 * np.pi, 36, endpoint=False, dtype=np.float32)
    return {
        name: np.stack([outline(np.cos(t) * x + np.sin(t) * y, np.cos(t) * y - np.sin(t) * x) < 0 for t in turns])
        for name, outline in OUTLINES.items()
    }


def test_no_class_is_another_one_turned_or_mirrored() -> None:
    """Training mirrors images and every image is turned: the best overlap over both must leave a difference."""
    masks = _masks()
    for one, other in itertools.combinations(masks, 2):
        shape = masks[one][0]
        turned = np.concatenate([masks[other], masks[other][:, :, ::-1]])
        overlap = (shape & turned).sum((1, 2)) / (shape | turned).sum((1, 2))
        assert overlap.max() < 0.97, (one, other)


def test_every_outline_fits_into_its_radius_and_covers_its_share() -> None:
    for name, mask in _masks().items():
        assert not mask[:, 0].any(), name
        assert 0.1 < mask[0].mean() < 0.6, name


def test_difficulty_differs_from_sample_to_sample(drawn: Split) -> None:
    """The noise of the upper left pixels' differences spreads from almost nothing to a lot."""
    corner = drawn.images[:, :, :, :3].float() / 255
    rough = (corner[..., 1:] - corner[..., :-1]).abs().mean((1, 2, 3))
    low, high = rough.quantile(torch.tensor([0.1, 0.9])).tolist()
    assert high > 3 * low


@pytest.mark.parametrize("size", [16, 64])
def test_another_size_shows_the_same_at_another_scale(size: int) -> None:
    """The first images that are drawn have the same numbers behind them: but for the noise, the same pictures."""
    config = ShapesConfig(train=20, test=20, size=size)
    own, usual = load_shapes(config), load_shapes(config.model_copy(update={"size": 32}))
    assert (own.train.side, own.padding, config.identity()["data.size"]) == (size, size // 8, size)
    row = int((own.train.labels == 0).nonzero()[0])
    assert torch.equal(own.train.labels, usual.train.labels)
    small, large = (torch.nn.functional.adaptive_avg_pool2d(one.train.images[row].float(), 8) for one in (own, usual))
    assert float((small - large).abs().mean()) < 6, "of 255"


def test_more_images_than_memory_holds_are_refused_before_they_are_drawn(cli: CliRunner) -> None:
    """Linux would end the process in the middle of it, without a word; a million of 32 pixels may be."""
    assert ShapesConfig(train=1_000_000, test=1_000_000)
    few = ["--set", "data.train=33000", "--set", "data.size=256"]
    cli.assert_rejects(["pretrain-teacher", "resnet8", "--dataset", "shapes", *few], 2, "data: train, test and size ")
