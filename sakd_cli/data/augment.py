"""Augmentation of a whole batch at once, on the images' device; shapes are static, nothing is read by the host."""

import importlib
import math
from collections.abc import Callable, Sequence
from functools import cache
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

TRIES = 10  # of which the first that fits is taken, as torchvision does
NUMBERS = 4 * TRIES  # that one box takes
RATIO = (3 / 4, 4 / 3)  # width over height
ALIKE = 4  # images in a row of an epoch whose random changes are the same: a call of torchvision takes them at once

Scale = tuple[float, float]


def pad(images: Tensor, padding: int) -> Tensor:
    """[N, 3, H, W] -> [N, 3, H + 2 padding, W + 2 padding] with a border of zeros (black), in the images' own type."""
    return functional.pad(images, (padding, padding, padding, padding)).contiguous()


def crop_and_flip(padded: Tensor, index: Tensor, dy: Tensor, dx: Tensor, flip: Tensor, *, padding: int) -> Tensor:
    """Take the samples at `index`, cut each at its own offset, mirror those that `flip` names.

    padded      [N, 3, H + 2 padding, W + 2 padding]  uint8, contiguous, from `pad`
    index       [B]  int64 row of `padded`
    dy, dx      [B]  int64 upper left corner of the crop, 0 .. 2 padding; `padding` is the image as it was
    flip        [B]  bool, left and right exchanged
    returns     [B, 3, H, W] uint8

    One gather by computed addresses: only the pixels that are kept are read, and mirroring is part of the address.
    """
    _, channels, rows, columns = padded.shape
    height, width = rows - 2 * padding, columns - 2 * padding
    along = torch.arange(width, device=padded.device)
    x = torch.where(flip[:, None], width - 1 - along, along) + dx[:, None]
    y = torch.arange(height, device=padded.device) + dy[:, None]
    plane = index[:, None] * channels + torch.arange(channels, device=padded.device)
    address = (plane[:, :, None, None] * rows + y[:, None, :, None]) * columns + x[:, None, None, :]
    return padded.view(-1).index_select(0, address.view(-1)).view(address.shape)


def corners_at(corner: Tensor, padding: int, size: tuple[int, int], other: tuple[int, int]) -> tuple[Tensor, int]:
    """Upper left corners [2, B] of crops from a border, and that border, as they lie in images of another size."""
    ratio = torch.tensor([[theirs / ours] for ours, theirs in zip(size, other, strict=True)], device=corner.device)
    border = math.ceil(padding * float(ratio.max()))
    return ((corner - padding) * ratio).round().long() + border, border


def channel_tensor(values: tuple[float, float, float], device: torch.device) -> Tensor:
    """One number per channel as [3, 1, 1] on the device, for `normalise`; of torch's default type, as weights are."""
    return torch.tensor(values, device=device).view(3, 1, 1)


def normalise(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """uint8 [B, 3, H, W] -> (pixels / 255 - mean) / std, of the type of mean and std [3, 1, 1].

    The operations of torchvision's ToTensor and Normalize in their order: in float32 bit for bit the same.
    """
    return images.to(mean.dtype).div_(255).sub_(mean).div_(std)


def random_boxes(draws: Tensor, size: Tensor, scale: Scale) -> Tensor:
    """Top, left, height and width in pixels, [B, 4] int64, of a part of each picture.

    draws  [B, 40] uniform in [0, 1)
    size   [B, 2]  height and width of the picture in pixels
    scale  smallest and largest fraction of the picture's area

    The rule of torchvision's RandomResizedCrop: area uniform, logarithm of width/height uniform in 3/4 .. 4/3, then the
    place uniform; ten tries for one that fits, and else the largest part in the middle that keeps to the ratios. Only
    the source of the random numbers is ours.
    """
    # By numpy: of a single picture, as each file is one, torch's calls take five times as long.
    area, ratio, down, right = np.moveaxis(draws.numpy().astype(np.float64).reshape(-1, TRIES, 4), 2, 0)
    high, wide = np.split(size.numpy().astype(np.float64), 2, axis=1)
    area = high * wide * (scale[0] + area * (scale[1] - scale[0]))
    low, top = (math.log(edge) for edge in RATIO)
    ratio = np.exp(low + ratio * (top - low))
    w, h = np.sqrt(area * ratio).round(), np.sqrt(area / ratio).round()
    fits = (w > 0) & (w <= wide) & (h > 0) & (h <= high)
    first = fits.argmax(axis=1)[:, None]
    h, w, down, right = (np.take_along_axis(one, first, 1)[:, 0] for one in (h, w, down, right))
    high, wide = high[:, 0], wide[:, 0]
    found = [np.floor(down * (high - h + 1)), np.floor(right * (wide - w + 1)), h, w]
    if not (fitting := fits.any(axis=1)).all():
        h = np.minimum(high, (wide / RATIO[0]).round())
        w = np.minimum(wide, (high * RATIO[1]).round())
        largest = np.floor((high - h) / 2), np.floor((wide - w) / 2), h, w
        found = [np.where(fitting, one, middle) for one, middle in zip(found, largest, strict=True)]
    return torch.from_numpy(np.stack(found, axis=1).astype(np.int64))


def boxes_in_copies(box: Tensor, size: Tensor, copy: Tensor) -> Tensor:
    """The boxes [B, 4] of pictures of height and width `size` [B, 2] in copies of `copy` [B, 2], whole pixels."""
    scale = (copy.double() / size).repeat(1, 2)
    start = box[:, :2].double()
    corners = (torch.cat([start, start + box[:, 2:]], dim=1) * scale).round().long()
    first = torch.minimum(corners[:, :2], copy - 1)
    return torch.cat([first, (corners[:, 2:] - first).clamp(min=1)], dim=1)


class Mixing(NamedTuple):
    """Pairs of images become one: blended (mixup, Zhang et al., ICLR 2018) or pasted (cutmix, Yun et al., ICCV 2019).

    Each image is paired with the one that is as far from the other end of its batch, as timm does it, and each has a
    share r and, where both kinds are asked for, a coin of its own. mixup, cutmix: a of r ~ Beta(a, a); 0: not.
    """

    mixup: float
    cutmix: float

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Of `count` images, [count, 4]: share of its own image, 1 where a box is pasted, the box's centre (y, x)."""
        pasted = torch.rand(count, generator=generator) < (0.5 if self.mixup else 1.0) * (self.cutmix > 0)
        alpha = torch.where(pasted, self.cutmix, self.mixup)[:, None].expand(count, 2).contiguous()
        share = torch._sample_dirichlet(alpha, generator=generator)[:, :1]
        return torch.cat([share, pasted[:, None], torch.rand(count, 2, generator=generator)], dim=1)

    def __call__(self, images: Tensor, drawn: Tensor) -> tuple[Tensor, Tensor]:
        """Images [B, 3, H, W], mixed, and the share [B] of its own image that each has kept, to the pixel."""
        others, (height, width) = images.flip(0), images.shape[2:]
        share, pasted, *centre = drawn.to(images.dtype).unbind(dim=1)
        inside, area = torch.ones_like(images[:, :1], dtype=torch.bool), torch.ones_like(share)
        for side, middle, shape in zip((height, width), centre, ((-1, 1, height, 1), (-1, 1, 1, width)), strict=True):
            half = side * (1 - share).clamp(min=0).sqrt() / 2
            start, end = ((middle * side + sign * half).round().clamp(0, side) for sign in (-1, 1))
            along = torch.arange(side, device=images.device)
            inside = inside & ((along >= start[:, None]) & (along < end[:, None])).view(shape)
            area = area * (end - start)
        kept = torch.where(pasted > 0, 1 - area / (height * width), share)
        box = inside & (pasted > 0).view(-1, 1, 1, 1)
        blend = torch.where(pasted > 0, 1.0, share).to(images.dtype).view(-1, 1, 1, 1)
        return torch.where(box, others, torch.lerp(others, images, blend)), kept


class Changes(NamedTuple):
    """Random changes of colour, shape and area by torchvision's transforms, of uint8 images.

    policy, ops, magnitude  randaugment, autoaugment or trivialaugment, and of the first its settings; None: none of it
    jitter  of brightness, contrast and saturation; erase: chance of a box of the colour `mean`, of pixels / 255
    large   whether what AutoAugment has learned is of ImageNet, else of CIFAR-10
    """

    policy: str | None
    ops: int
    magnitude: int
    jitter: float
    erase: float
    mean: tuple[float, ...]
    large: bool

    def seeds(self, count: int, generator: torch.Generator) -> list[int]:
        """One for each place of an epoch; `ALIKE` places in a row share theirs, for fewer calls."""
        groups = torch.randint(2**31, (-(-count // ALIKE),), generator=generator).tolist()
        return [groups[place // ALIKE] for place in range(count)]

    def __call__(self, images: Tensor, seeds: Sequence[int]) -> Tensor:
        """Images [B, 3, H, W] changed, each by its seed alone; torch's own generator is left as it was."""
        change, state, made = _transform(self), torch.get_rng_state(), []
        alike = [list(group) for _, group in groupby(seeds)]
        try:
            for group, part in zip(alike, images.split(list(map(len, alike))), strict=True):
                torch.default_generator.manual_seed(group[0])
                made.append(change(part))
        finally:
            torch.set_rng_state(state)
        return torch.cat(made)


@cache
def _transform(changes: Changes) -> Any:
    """torchvision's transform."""
    v2 = importlib.import_module("torchvision.transforms.v2")
    bilinear = {"interpolation": v2.InterpolationMode.BILINEAR}
    learned = v2.AutoAugmentPolicy.IMAGENET if changes.large else v2.AutoAugmentPolicy.CIFAR10
    policies: dict[str | None, Callable[[], Any]] = {
        "randaugment": lambda: v2.RandAugment(changes.ops, changes.magnitude, **bilinear),
        "autoaugment": lambda: v2.AutoAugment(learned, **bilinear),
        "trivialaugment": lambda: v2.TrivialAugmentWide(**bilinear),
        None: v2.Identity,
    }
    steps = [policies[changes.policy]()]
    if changes.jitter:
        steps.append(v2.ColorJitter(changes.jitter, changes.jitter, changes.jitter))
    if changes.erase:
        steps.append(v2.RandomErasing(changes.erase, value=[round(255 * mean) for mean in changes.mean]))
    return v2.Compose(steps)
