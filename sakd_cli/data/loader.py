"""Batches for training and for evaluation, made on the device without a worker process.

The whole split lies on the device as uint8 (CIFAR: 154 MB, 240 MB with its border). Every random number of an epoch
is drawn before its first batch, on the CPU, from generators that depend on (seed, purpose, epoch) alone: the numbers
are the same on every device, and an epoch taken up in its middle goes on exactly as it would have gone on.
"""

import hashlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from sakd_cli import distributed
from sakd_cli.batch import Batch
from sakd_cli.data.augment import constants, crop_and_flip, normalise, pad
from sakd_cli.data.dataset import Dataset, Split
from sakd_cli.data.generators import seeded_generator

MOST_BYTES = 2**27  # of an evaluation's batch, as float32: 10,922 images of 32 pixels, 222 of 224


class Draws(NamedTuple):
    """All random numbers of one epoch; row k belongs to the k-th place in the epoch's order, whatever sample is there.

    order   [N]     int64 which sample comes k-th: a permutation
    corner  [2, N]  int64 upper left corner of the crop, (dy, dx), each 0 .. 2 padding
    flip    [N]     bool
    noise   [N, W]  float32 uniform in [0, 1)
    """

    order: Tensor
    corner: Tensor
    flip: Tensor
    noise: Tensor


def draws(count: int, padding: int, flip: bool, seed: int, epoch: int, noise_width: int) -> Draws:
    """The random numbers of an epoch over `count` samples, on the CPU: a pure function of the arguments."""
    order = torch.randperm(count, generator=seeded_generator(seed, "order", epoch))
    corner = torch.randint(2 * padding + 1, (2, count), generator=seeded_generator(seed, "crop", epoch))
    coin = torch.rand(count, generator=seeded_generator(seed, "flip", epoch))
    noise = torch.rand(count, noise_width, generator=seeded_generator(seed, "noise", epoch))
    return Draws(order, corner, (coin < 0.5) & flip, noise)


class StepSlice(NamedTuple):
    """A step of an epoch: this process's places in its order, samples of the whole batch, and what they count for."""

    places: slice
    global_size: int
    shard_weight: float


def step_slices(samples: int, batch_size: int, start: int) -> Iterator[StepSlice]:
    """The steps of an epoch from `start` on."""
    for first in range(start * batch_size, samples, batch_size):
        whole = min(batch_size, samples - first)
        rows = distributed.shard_rows(whole)
        yield StepSlice(slice(first + rows.start, first + rows.stop), whole, distributed.shard_weight(whole))


def fitting(batch_size: int, split: Split) -> int:
    """As many images as are asked for, but no more than make `MOST_BYTES`."""
    _, channels, height, width = split.images.shape
    return max(1, min(batch_size, MOST_BYTES // (4 * channels * height * width)))


class Views:
    """All images of a split on a device, and every way in which augmentation can show them.

    There are `count` views of an image: view = ((dy (2 padding + 1)) + dx) 2 + flip, without the 2 and the flip where
    the data set is not mirrored.
    """

    def __init__(self, split: Split, dataset: Dataset, device: torch.device) -> None:
        here = split.to(device)
        self.labels = here.labels
        self.device = device
        self.dataset = dataset
        self._padded = pad(here.pixels, dataset.padding)
        self._mean, self._std = constants(dataset.mean, device), constants(dataset.std, device)
        self._sides, self._mirrored = 2 * dataset.padding + 1, 1 + dataset.flip
        self.count = self._sides**2 * self._mirrored

    def __len__(self) -> int:
        return len(self.labels)

    def images(self, index: Tensor, view: Tensor) -> Tensor:
        """Views [B] of the images at `index` [B], normalised: [B, 3, H, W]."""
        index, view = index.to(self.device), view.to(self.device)
        corner, flip = view // self._mirrored, view % self._mirrored == 1
        dy, dx = corner // self._sides, corner % self._sides
        images = crop_and_flip(self._padded, index, dy, dx, flip, padding=self.dataset.padding)
        return normalise(images, self._mean, self._std)

    def view(self, corner: Tensor, flip: Tensor) -> Tensor:
        """Number [B] of the view with upper left corner (dy, dx) [2, B], mirrored where `flip` [B]."""
        return (corner[0] * self._sides + corner[1]) * self._mirrored + flip * (self._mirrored - 1)

    def digest(self) -> str:
        """SHA-256 of all that the views are made of."""
        words = [self.dataset.mean, self.dataset.std, self.dataset.padding, self.dataset.flip, *self._padded.shape]
        content = hashlib.sha256(repr(words).encode())
        content.update(self._padded.cpu().numpy().data)
        return content.hexdigest()


class TrainLoader:
    """Shuffled, augmented batches of a split that lives on the device.

    An epoch shows every sample once; the last batch of an epoch may be smaller than `batch_size`.
    """

    def __init__(
        self, split: Split, dataset: Dataset, *, batch_size: int, seed: int, noise_width: int, device: torch.device
    ) -> None:
        self.views = Views(split, dataset, device)
        self._batch_size = batch_size
        self._seed = seed
        self._noise_width = noise_width
        self._device = device
        self.steps_per_epoch = -(-len(split) // batch_size)

    def __len__(self) -> int:
        """Number of batches in an epoch."""
        return self.steps_per_epoch

    def draw(self, epoch: int) -> Draws:
        """The epoch's random numbers, on the device: a pure function of the loader's seed and `epoch`."""
        data = self.views.dataset
        drawn = draws(len(self.views), data.padding, data.flip, self._seed, epoch, self._noise_width)
        return Draws(*(numbers.to(self._device) for numbers in drawn))

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Batches `start`, `start` + 1, ... of that epoch, whatever was or was not iterated before."""
        draws = self.draw(epoch)
        for places, whole, share in step_slices(len(self.views), self._batch_size, start):
            index, noise = draws.order[places], draws.noise[places]
            view = self.views.view(draws.corner[:, places], draws.flip[places])
            images, labels = self.views.images(index, view), self.views.labels[index]
            yield Batch(images, labels, index, noise, view, global_size=whole, shard_weight=share)


class EvalLoader:
    """The split in its own order, without augmentation; iterate it as often as wanted.

    Yields (images [B, 3, H, W] float32 normalised, labels [B] int64), both on the device; the last batch may be
    smaller. The batch size changes speed and memory only, so it is large by default, and smaller for large images.
    """

    def __init__(self, split: Split, dataset: Dataset, *, device: torch.device, batch_size: int = 1000) -> None:
        here = split.to(device)
        self._images, self._labels = here.pixels, here.labels
        self._mean, self._std = constants(dataset.mean, device), constants(dataset.std, device)
        self.batch_size = fitting(batch_size, split)

    def __len__(self) -> int:
        """Number of batches."""
        return -(-len(self._labels) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for first in range(0, len(self._labels), self.batch_size):
            part = slice(first, first + self.batch_size)
            yield normalise(self._images[part], self._mean, self._std), self._labels[part]
