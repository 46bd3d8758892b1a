"""Random resized crops: the boxes are drawn as torchvision draws them, and what is cut is as sharp as its own."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from sakd_cli.config.preprocessing import Preprocessing
from sakd_cli.data.augment import NUMBERS, boxes_in_copies, random_boxes
from sakd_cli.data.dataset import seeded_generator
from sakd_cli.data.files import Files, ImageSpec
from sakd_cli.data.sources import BatchReader, BatchRequest, crop_copies


def test_boxes_are_those_of_torchvision() -> None:
    """The same distribution: mean and spread of each number agree within their errors."""
    for size in ((48, 64), (20, 100)):
        numbers = torch.rand(4000, NUMBERS, generator=seeded_generator(0, "boxes"))
        ours = random_boxes(numbers, torch.tensor([size]).expand(4000, 2), (0.08, 1.0)).double()
        assert ((ours[:, 0] >= 0) & (ours[:, 0] + ours[:, 2] <= size[0])).all()
        assert ((ours[:, 1] >= 0) & (ours[:, 1] + ours[:, 3] <= size[1])).all()
        crop, blank = v2.RandomResizedCrop(8), torch.zeros(1, *size)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            drawn = [crop.make_params([blank]) for _ in range(4000)]
        theirs = torch.tensor([[one[key] for key in ("top", "left", "height", "width")] for one in drawn]).double()
        error = (ours.var(0) / 4000 + theirs.var(0) / 4000).sqrt().clamp(min=1e-9)
        assert ((ours.mean(0) - theirs.mean(0)).abs() < 4 * error + 1e-9).all()
        assert torch.allclose(ours.std(0), theirs.std(0), rtol=0.06)


def shown(side: int) -> Preprocessing:
    return Preprocessing(size=side, resize=side)


def test_a_cut_of_everything_changes_nothing_and_a_mirrored_one_is_mirrored() -> None:
    whole = torch.randint(256, (2, 3, 12, 12), dtype=torch.uint8, generator=seeded_generator(0, "whole"))
    size = torch.tensor([[30, 60], [12, 12]])  # of the first, a copy with fewer pixels
    everything = torch.tensor([[0, 0, 30, 60], [0, 0, 12, 12]])
    seen = crop_copies([*whole], everything, size, torch.tensor([False, True]), shown(12))
    assert torch.equal(seen, torch.stack([whole[0], whole[1].flip(2)]))
    corner = torch.tensor([[15, 0, 15, 30], [6, 6, 6, 6]])
    quarters = crop_copies([*whole], corner, size, torch.tensor([False, False]), shown(6))
    assert torch.equal(quarters, torch.stack([whole[0, :, 6:, :6], whole[1, :, 6:, 6:]]))


def test_a_box_in_a_small_copy_has_at_least_a_pixel_and_lies_in_it() -> None:
    size, copy = torch.tensor([[1000, 4000]]), torch.tensor([[5, 20]])
    for box in ([999, 3999, 1, 1], [0, 0, 1, 1], [0, 0, 1000, 4000], [497, 1, 3, 3999]):
        top, left, high, wide = boxes_in_copies(torch.tensor([box]), size, copy)[0].tolist()
        assert 0 <= top < top + high <= 5
        assert 0 <= left < left + wide <= 20


@pytest.fixture(scope="module")
def noise(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """White noise, of which a filter takes the most."""
    path = tmp_path_factory.mktemp("noise") / "noise.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (600, 800, 3), dtype=np.uint8)).save(path, quality=95)
    return path


@pytest.mark.parametrize("share", [0.08, 0.12, 0.25, 0.5, 1.0])
def test_random_crops_are_as_sharp_as_torchvisions(share: float, noise: Path) -> None:
    """Of cached copies with fewer pixels, and of a JPEG that is decoded at a reduced scale."""
    side, count, scale = 48, 24, (share, share)
    files = Files((str(noise),), ImageSpec(shown(side), 0))
    copies, sizes = files.full_images(0.08)
    assert copies[0].numel() < 0.2 * 3 * 800 * 600
    numbers = torch.rand(count, NUMBERS, generator=seeded_generator(0, "sharp"))
    box = random_boxes(numbers, sizes.expand(count, 2), scale)
    cached = crop_copies(copies * count, box, sizes.expand(count, 2), torch.zeros(count, dtype=torch.bool), shown(side))
    reduced = BatchReader(files.spec, scale, 0)(BatchRequest([str(noise)] * count, numbers.numpy()))
    whole = v2.functional.pil_to_tensor(Image.open(noise))
    exact = torch.stack([v2.functional.resized_crop(whole, *one, [side, side], antialias=True) for one in box.tolist()])

    def gradients(images: Tensor) -> float:
        return float(images.float().diff(dim=2).abs().mean() + images.float().diff(dim=3).abs().mean())

    assert isinstance(reduced, Tensor)
    for name, ours in (("cached", cached), ("reduced", reduced)):
        kept = gradients(ours) / gradients(exact)
        assert 0.9 < kept < 1.1, (name, kept)
        assert (ours.float() - exact.float()).abs().mean() < 0.35 * exact.float().std(), name
