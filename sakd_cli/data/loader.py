"""Batches for training and for evaluation, wherever the images are.

Every random number of an epoch is drawn before its first batch, on the CPU, from generators that depend on (seed,
purpose, epoch) alone: the numbers are the same on every device and in every process, whoever reads the images and
however the epoch is cut into batches, and an epoch that is resumed in its middle continues exactly as it would have.
"""

from collections.abc import Iterator
from dataclasses import fields, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sakd_cli import distributed
from sakd_cli.batch import Batch, Loader, UpperBatch
from sakd_cli.config.effective import steps_per_epoch
from sakd_cli.data.augment import NUMBERS, Mixing, channel_tensor, normalise, random_boxes
from sakd_cli.data.dataset import Dataset, Split, hold_out, seeded_generator
from sakd_cli.data.files import Files
from sakd_cli.data.pool import Pool
from sakd_cli.data.sources import BatchReader, BatchRequest, TeacherViews, Views, crop_copies, in_memory

MAX_BYTES = 2**27  # of an evaluation batch, as float32: 10,922 images of 32 pixels, 222 of 224
Shown = tuple[Tensor, Tensor | None, Tensor | None]  # images, number of their view, the same for a teacher
BLOCK = 64  # places of an epoch whose crop boxes are drawn together, whatever the batches are


class Draws(NamedTuple):
    """All random numbers of one epoch; row k belongs to the k-th place in the epoch's order, whatever sample is there.

    order   [N]     int64 which sample comes k-th: a permutation, unless classes are balanced
    corner  [2, N]  int64 upper left corner of the crop, (dy, dx), each 0 .. 2 padding
    flip    [N]     bool
    noise   [N, W]  float32 uniform in [0, 1)
    mixing  [N, 4]  of `Mixing.draw`; [N, 0] where nothing is mixed
    """

    order: Tensor
    corner: Tensor
    flip: Tensor
    noise: Tensor
    mixing: Tensor


def draws(
    count: int, padding: int, flip: bool, seed: int, epoch: int, noise_width: int, rates: Tensor | None = None
) -> Draws:
    """The random numbers of an epoch over `count` samples, on the CPU: a pure function of the arguments."""
    shuffle = seeded_generator(seed, "order", epoch)
    order = torch.randperm(count, generator=shuffle)
    if rates is not None:
        order = _repeated(order, rates, shuffle)
    corner = torch.randint(2 * padding + 1, (2, count), generator=seeded_generator(seed, "crop", epoch))
    mirrored = torch.rand(count, generator=seeded_generator(seed, "flip", epoch))
    noise = torch.rand(count, noise_width, generator=seeded_generator(seed, "noise", epoch))
    return Draws(order, corner, (mirrored < 0.5) & flip, noise, torch.empty(count, 0))


def _repeated(order: Tensor, rates: Tensor, draw: torch.Generator) -> Tensor:
    """As many samples as in `order`, [N], each floor(rate) or ceil(rate) times, on the average `rates` [N] times."""
    ends = rates[order].cumsum(0)
    places = (torch.arange(len(order)) + torch.rand(1, dtype=torch.float64, generator=draw)) * (ends[-1] / len(order))
    taken = order[torch.searchsorted(ends, places, right=True).clamp(max=len(order) - 1)]
    return taken[torch.randperm(len(order), generator=draw)]


class StepSlice(NamedTuple):
    """A step of an epoch: this process's rows of its order; the rest is that of `Batch`."""

    rows: slice
    global_size: int
    shard_weight: float


def step_slices(samples: int, batch_size: int, start: int) -> Iterator[StepSlice]:
    """The steps of an epoch from `start` on; the last one has what is left (`steps_per_epoch`)."""
    steps = steps_per_epoch(samples, batch_size)
    for step in range(start, steps):
        first = step * batch_size
        size = batch_size if step < steps - 1 else samples - first
        rows = distributed.shard_rows(size)
        yield StepSlice(slice(first + rows.start, first + rows.stop), size, distributed.shard_weight(size))


class TrainLoader:
    """Shuffled, augmented batches of a split; the last batch of an epoch may be smaller, or one image larger.

    Images in memory are on the device as uint8 (CIFAR: 154 MB, 240 MB with its border) and are cropped from a border
    there. Images in files are read by worker processes. Random resized crops of cached images are cut on the device
    from copies that have all pixels which crops need.

    views   every way in which augmentation can show the images; None for files and for random resized crops
    """

    def __init__(
        self, split: Split, dataset: Dataset, *, batch_size: int, seed: int, noise_width: int, device: torch.device
    ) -> None:
        cropped = dataset.scale is None and in_memory(split)
        self.views = Views(split, dataset, device) if cropped else None
        also = split.images.spec.also if isinstance(split.images, Files) else None
        self._teacher_views = TeacherViews(split, dataset, also, device) if cropped and also is not None else None
        self._images, self._dataset, self._device = split.images, dataset, device
        known = split.labels >= 0
        self._known = None if bool(known.all()) else known.to(device, torch.float32)
        self._labels = split.labels.clamp(min=0).to(device)
        self._mean, self._std = channel_tensor(dataset.mean, device), channel_tensor(dataset.std, device)
        self._batch_size, self._seed, self._noise_width = batch_size, seed, noise_width
        self._pool: Pool | None = None
        self._full_images: tuple[list[Tensor], Tensor] | None = None
        self._rates = None if dataset.rates is None else dataset.rates(split.labels)
        self.steps_per_epoch = steps_per_epoch(len(split), batch_size)

    def draw(self, epoch: int) -> Draws:
        """The epoch's random numbers: a pure function of the loader's seed and `epoch`."""
        padding = self._dataset.padding if self._dataset.scale is None else 0
        drawn = draws(len(self._labels), padding, self._dataset.flip, self._seed, epoch, self._noise_width, self._rates)
        if self._dataset.mixing is not None:
            draw = seeded_generator(self._seed, "mixing", epoch)
            drawn = drawn._replace(mixing=self._dataset.mixing.draw(len(self._labels), draw))
        return drawn if self.views is None else Draws(*(numbers.to(self._device) for numbers in drawn))

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Batches `start`, `start` + 1, ... of that epoch, whatever was or was not iterated before."""
        drawn = self.draw(epoch)
        steps = list(step_slices(len(self._labels), self._batch_size, start))
        rows = [step.rows for step in steps]
        seeds = self._seeds(epoch)
        if self.views is not None:
            images = self._crop_views(self.views, drawn, rows, seeds)
        else:
            assert isinstance(self._images, Files)
            source = self._crop_cached if self._images.cached else self._read
            images = map(self._normalised, source(self._images, drawn, rows, epoch, seeds))
        order, noise_of_all, mixing_of_all = (
            numbers.to(self._device)
            for numbers in (drawn.order, drawn.noise, drawn.mixing)  # at once
        )
        mixing = self._dataset.mixing
        for step, (x, view, y) in zip(steps, images, strict=True):
            index, noise = order[step.rows], noise_of_all[step.rows]
            batch = Batch(x, self._labels[index], index, noise, view, None, step.global_size, step.shard_weight, y)
            batch = batch if self._known is None else replace(batch, ratio=self._known[index])
            yield batch if mixing is None else _mixed(batch, mixing, mixing_of_all[step.rows])

    def _normalised(self, pixels: Tensor | tuple[Tensor, Tensor]) -> Shown:
        if isinstance(pixels, Tensor):
            return self._normalise(pixels), None, None
        return self._normalise(pixels[0]), None, self._normalise(pixels[1])

    def _normalise(self, pixels: Tensor) -> Tensor:
        return normalise(_on(self._device, pixels), self._mean, self._std)

    def _where(self, drawn: Draws, rows: slice, epoch: int) -> Tensor:
        """`BatchRequest.where` of these rows."""
        if self._dataset.scale is None:
            return drawn.corner[:, rows].T
        count = len(drawn.order[rows])
        first, last = rows.start // BLOCK, (rows.start + max(count, 1) - 1) // BLOCK
        blocks = [
            torch.rand(BLOCK, NUMBERS, generator=seeded_generator(self._seed, f"box/{block}", epoch))
            for block in range(first, last + 1)
        ]
        start = rows.start - first * BLOCK
        return torch.cat(blocks)[start : start + count]

    def _seeds(self, epoch: int) -> list[int]:
        """Of random changes, one for each place of the epoch; 0 where there are none."""
        if self._dataset.changes is None:
            return [0] * len(self._labels)
        return self._dataset.changes.seeds(len(self._labels), seeded_generator(self._seed, "changes", epoch))

    def _read(self, files: Files, drawn: Draws, steps: list[slice], epoch: int, seeds: list[int]) -> Iterator[Any]:
        if self._pool is None:
            reader = BatchReader(files.spec, self._dataset.scale, self._dataset.padding, self._dataset.changes)
            self._pool = Pool(reader, workers=files.spec.workers, persistent=True, device=self._device)
        return self._pool(
            BatchRequest(
                [files.paths[place] for place in drawn.order[rows].tolist()],
                self._where(drawn, rows, epoch).numpy(),
                drawn.flip[rows].numpy(),
                seeds[rows],
            )
            for rows in steps
        )

    def _crop_cached(
        self, files: Files, drawn: Draws, steps: list[slice], epoch: int, seeds: list[int]
    ) -> Iterator[Any]:
        assert self._dataset.scale is not None
        if self._full_images is None:
            copies, sizes = files.full_images(self._dataset.scale[0])
            self._full_images = [copy.to(self._device) for copy in copies], sizes
        copies, sizes = self._full_images
        for rows in steps:
            index = drawn.order[rows]
            box = random_boxes(self._where(drawn, rows, epoch), sizes[index], self._dataset.scale)
            shown = [copies[place] for place in index.tolist()]
            made = [crop_copies(shown, box, sizes[index], drawn.flip[rows], seen) for seen in files.spec.shown]
            if (changes := self._dataset.changes) is not None:
                made = [changes(images, seeds[rows]) for images in made]
            yield tuple(made) if len(made) > 1 else made[0]

    def _crop_views(self, views: Views, drawn: Draws, steps: list[slice], seeds: list[int]) -> Iterator[Shown]:
        """Image by image the same, however many are cropped at once."""
        changes, teachers = self._dataset.changes, self._teacher_views
        for first in range(0, len(steps), views.together):
            group = steps[first : first + views.together]
            rows = slice(group[0].start, group[-1].stop)
            index, corner, flip = drawn.order[rows], drawn.corner[:, rows], drawn.flip[rows]
            view = views.view(corner, flip)
            change = None if changes is None else partial(changes.__call__, seeds=seeds[rows])
            images = views.images(index, view, change)
            theirs = None if teachers is None else teachers.images(index, corner, flip, change)
            for step in group:
                own = slice(step.start - rows.start, step.stop - rows.start)
                yield images[own], view[own], None if theirs is None else theirs[own]


def _mixed(batch: Batch, mixing: Mixing, drawn: Tensor) -> Batch:
    """A batch, mixed in pairs, also as a teacher sees it, with labels and places of both images."""
    images, ratio = mixing(batch.images, drawn)
    theirs = None if batch.teacher_images is None else mixing(batch.teacher_images, drawn)[0]
    mixed = replace(batch, images=images, teacher_images=theirs, ratio=ratio)
    return replace(mixed, other_index=batch.index.flip(0), other_labels=batch.labels.flip(0))


def _on(device: torch.device, pixels: Tensor) -> Tensor:
    """Pixels on the device. CUDA lets one free what it has yet to read; MPS would read what comes after."""
    return pixels.to(device, non_blocking=device.type != "mps")


class EvalLoader:
    """The split in its own order, without augmentation; can be iterated any number of times.

    Yields (images [B, 3, H, W] float32 normalised, labels [B] int64), both on the device; the last batch may be
    smaller. The batch size changes speed and memory only, so it is large by default, and smaller for large images.
    """

    def __init__(self, split: Split, dataset: Dataset, *, device: torch.device, batch_size: int = 1000) -> None:
        self._images = split.pixels.to(device) if in_memory(split) else split.images
        self._labels, self._device = split.labels.to(device), device
        self._mean, self._std = channel_tensor(dataset.mean, device), channel_tensor(dataset.std, device)
        _, channels, height, width = split.images.shape
        self.batch_size = max(1, min(batch_size, MAX_BYTES // (4 * channels * height * width)))

    def __len__(self) -> int:
        return -(-len(self._labels) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        rows = [slice(first, first + self.batch_size) for first in range(0, len(self._labels), self.batch_size)]
        if isinstance(images := self._images, Files):
            reader = BatchReader(images.spec, None, 0)
            pool = Pool(reader, workers=images.spec.workers, persistent=False, device=self._device)
            read = pool(BatchRequest(list(images.paths[part])) for part in rows)
        else:
            read = (images[part] for part in rows)
        for part, pixels in zip(rows, read, strict=True):
            yield normalise(_on(self._device, pixels), self._mean, self._std), self._labels[part]


class EvalPairs:
    """A split as two networks see it, ((images, the other's images), labels); otherwise like `EvalLoader`."""

    def __init__(
        self, split: Split, other: Split, dataset: Dataset, *, device: torch.device, batch_size: int = 1000
    ) -> None:
        splits = [split] if other is split else [split, other]
        self._loaders = [EvalLoader(one, dataset, device=device, batch_size=batch_size) for one in splits]
        self.batch_size = min(loader.batch_size for loader in self._loaders)
        for loader in self._loaders:
            loader.batch_size = self.batch_size

    def __len__(self) -> int:
        return len(self._loaders[0])

    def __iter__(self) -> Iterator[tuple[tuple[Tensor, Tensor], Tensor]]:
        for seen in zip(*self._loaders, strict=True):
            (images, labels), (others, _) = seen[0], seen[-1]
            yield (images, others), labels


def split_in_halves(dataset: Dataset, train: Split, share: float, seed: int) -> tuple[Split, Split]:
    """Cut `train` in two, disjoint, every class alike: `share` of it for the upper level, the rest for the lower."""
    lower, upper = hold_out(replace(dataset, train=train), share, seed)
    assert upper is not None, "a share of 0 is no share"
    return upper, lower


class HeldOutLoader:
    """Each batch of a loader with one of held-out images, which go round and round beside them."""

    def __init__(self, loader: Loader, held_out: Loader) -> None:
        self.loader, self.held_out = loader, held_out
        self.steps_per_epoch = loader.steps_per_epoch

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        beside = _endless(self.held_out, (epoch - 1) * self.steps_per_epoch + start)
        return (replace(batch, held_out=next(beside)) for batch in self.loader.epoch(epoch, start))


class AlternatingLoader:
    """A batch of the upper level, as an UpperBatch, then one of the lower, and so on.

    An epoch shows the lower level's images once; the upper level's go round and round beside them. As with one loader,
    the batches from any step on are a pure function of epoch and step. ahead: an UpperBatch has the next lower one.
    """

    def __init__(self, upper: Loader, lower: Loader, *, ahead: bool) -> None:
        self.upper, self.lower, self.ahead = upper, lower, ahead
        self.steps_per_epoch = 2 * lower.steps_per_epoch

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        pair = (epoch - 1) * self.lower.steps_per_epoch + start // 2
        above, below = _endless(self.upper, pair + start % 2), _endless(self.lower, pair)
        coming: Batch | None = None
        for step in range(start, self.steps_per_epoch):
            if step % 2:
                yield coming or next(below)
                continue
            coming = next(below) if self.ahead else None
            batch = next(above)
            yield UpperBatch(**{field.name: getattr(batch, field.name) for field in fields(batch)}, lower=coming)


def _endless(loader: Loader, first: int) -> Iterator[Batch]:
    """Batches `first`, `first` + 1, ... of epoch after epoch."""
    epoch, start = divmod(first, loader.steps_per_epoch)
    while True:
        yield from loader.epoch(epoch + 1, start)
        epoch, start = epoch + 1, 0
