"""What every data set loads to, and the three ways of taking a part of one."""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sakd_cli.config.preprocessing import ImageSize, Preprocessing, side_of
from sakd_cli.data.augment import Changes, Mixing
from sakd_cli.data.files import Files
from sakd_cli.errors import DataError

Channels = tuple[float, float, float]


def seeded_generator(seed: int, purpose: str, epoch: int = 0) -> torch.Generator:
    """A CPU generator that is a pure function of its arguments, the same in every process and after every resume.

    The seed is a BLAKE2b hash of `seed/purpose/epoch`: Python's `hash` of a string differs between processes, and a
    sum would make epoch 1 of seed 0 the same as epoch 0 of seed 1.
    """
    key = f"{seed}/{purpose}/{epoch}".encode()
    # torch's CPU engine (mt19937) keeps the low 32 bits of a seed only; give it those and no false promise of more.
    digest = hashlib.blake2b(key, digest_size=4).digest()
    return torch.Generator(device="cpu").manual_seed(int.from_bytes(digest, "little"))


@dataclass(frozen=True)
class Split:
    """Images of one purpose, in memory or in files.

    images  [N, 3, H, W]  uint8, or files that stand for them and are read when they are asked for
    labels  [N]           int64 class index
    origin  [N]           int64 position in the data set's own split; None: in order, nothing left out
    """

    images: Tensor | Files
    labels: Tensor
    origin: Tensor | None = None

    def origins(self) -> Tensor:
        """Position of every sample in the data set's own split, [N]."""
        return torch.arange(len(self)) if self.origin is None else self.origin

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def pixels(self) -> Tensor:
        """All images, uint8; those in files are read. Raises DataError naming a bad file."""
        return self.images.read() if isinstance(self.images, Files) else self.images

    @property
    def side(self) -> ImageSize:
        """Side of the square images in pixels, or their height and width."""
        return side_of(*map(int, self.images.shape[-2:]))

    @property
    def keys(self) -> tuple[str, ...] | None:
        """What each image is known by, whatever lies beside it; None: its place, in sets that never change."""
        return self.images.keys if isinstance(self.images, Files) else None

    def subset(self, index: Tensor) -> "Split":
        """The samples at `index` [n] int64, in that order."""
        return Split(self.images[index], self.labels[index], self.origins()[index.cpu()])


def join_splits(splits: Sequence[Split]) -> Split:
    """All images of several splits of one data set, one after another."""
    if len(splits) == 1:
        return splits[0]
    files = [split.images for split in splits if isinstance(split.images, Files)]
    tensors = [split.images for split in splits if isinstance(split.images, Tensor)]
    images = Files.joined(files) if files else torch.cat(tensors)
    return Split(images, torch.cat([split.labels for split in splits]))


def _numbers(value: Any, count: int, above: float = -math.inf) -> bool:
    """Whether there are so many finite numbers, each above that one."""
    given = value if isinstance(value, list | tuple) and len(value) == count else [math.nan]
    return all(isinstance(one, int | float) and above < one < math.inf for one in given)


@dataclass(frozen=True)
class Dataset:
    """A data set and all that training needs to know about it.

    mean, std  per channel, of pixels / 255
    padding    width in pixels of the zero border from which a random crop of the original size is cut
    flip       whether a mirrored image keeps its class
    scale      share of a picture's area, from and to, that a random resized crop takes instead; None: the border does
    skipped    files that could not be read and were left out
    notes      what was left out of the folder, a line each
    seen       how its pictures are shown; None: they are no files
    rates      how often an epoch shows each training image, from their labels [N]: mean 1; None: each once
    changes    of colours and shapes of training images; None: none
    mixing     how training images are mixed in pairs; None: they are not
    val        what the data set itself sets aside to choose the best epoch; None: nothing
    """

    name: str
    classes: tuple[str, ...]
    mean: Channels
    std: Channels
    padding: int
    flip: bool
    train: Split
    test: Split
    scale: tuple[float, float] | None = None
    skipped: int = 0
    val: Split | None = None
    seen: Preprocessing | None = None
    notes: tuple[str, ...] = ()
    rates: Callable[[Tensor], Tensor] | None = None
    mixing: Mixing | None = None
    changes: Changes | None = None

    @classmethod
    def of(
        cls,
        train: tuple[Tensor, Tensor],
        test: tuple[Tensor, Tensor],
        classes: Sequence[str] | None = None,
        *,
        val: tuple[Tensor, Tensor] | None = None,
        padding: int = 4,
        flip: bool = True,
    ) -> "Dataset":
        """A data set of one's own: images [N, 3, H, W] uint8 and labels [N] int64 of each part.

        Mean and std are those of the training images. val: images that choose the best epoch; None: some of `train`.
        """
        (images, labels), other = (tuple(map(torch.as_tensor, part)) for part in (train, test))
        held_out = None if val is None else Split(*map(torch.as_tensor, val))
        names = tuple(classes or map(str, range(int(labels.max()) + 1 if len(labels) else 0)))
        both = Split(images, labels), Split(*other)
        made = cls("", names, (0.5,) * 3, (0.25,) * 3, padding, flip, *both, val=held_out)
        if made.wrong():  # whoever asked for it says so
            return made
        pixels = images.double() / 255
        mean, std = pixels.mean((0, 2, 3)).tolist(), pixels.std((0, 2, 3), correction=0).clamp(min=1e-3).tolist()
        return replace(made, mean=tuple(mean), std=tuple(std))

    def wrong(self) -> str | None:
        """What no training can use of it, in a line; None: nothing."""
        if any(not isinstance(one, str) or self.classes.count(one) > 1 for one in self.classes):
            return f"its classes must be texts, each another one, not {list(self.classes)}"[:120]
        for key, right, what in (
            ("mean", _numbers(self.mean, 3), "three numbers, of pixels / 255"),
            ("std", _numbers(self.std, 3, above=0.0), "three numbers above 0, of pixels / 255"),
            ("padding", type(self.padding) is int and self.padding >= 0, "a number of pixels from 0"),
            ("flip", type(self.flip) is bool, "True or False"),
            (
                "scale",
                self.scale is None or _numbers(self.scale, 2, above=0.0),
                "two shares of the area, above 0, or None",
            ),
            ("notes", isinstance(self.notes, tuple), "a tuple of lines"),
        ):
            if not right:
                return f"its {key} must be {what}, not {getattr(self, key)!r}"[:120]
        for name, split in {"train": self.train, "test": self.test, "val": self.val}.items():
            if split is None or isinstance(getattr(split, "images", None), Files):
                continue
            if not (isinstance(split, Split) and isinstance(split.images, Tensor) and isinstance(split.labels, Tensor)):
                return f"{name} must be a Split of tensors, images and labels, which Dataset.of makes of two"
            if self.scale is not None or self.seen is not None:
                return "its scale and seen are for pictures in files, and these are tensors: leave them out"
            images, labels, known = split.images, split.labels, len(self.classes)
            shape = list(images.shape)
            if images.dtype != torch.uint8 or len(shape) != 4 or shape[1] != 3 or not len(images):
                return f"the images of {name} must be uint8 [N, 3, H, W], not {images.dtype} {shape}"
            if labels.dtype != torch.int64 or list(labels.shape) != shape[:1]:
                return f"the labels of {name} must be int64 [{shape[0]}], not {labels.dtype} {list(labels.shape)}"
            if not 0 <= int(labels.min()) <= int(labels.max()) < known:
                return f"the labels of {name} must be 0 to {known - 1}, not {int(labels.min())} to {int(labels.max())}"
            if shape[2:] != list(self.train.images.shape[-2:]):
                return f"the images of {name} have {shape[2:]} pixels, those of train {[*self.train.images.shape[-2:]]}"
        return None

    def map(self, change: Callable[[Split], Split]) -> "Dataset":
        val = None if self.val is None else change(self.val)
        return replace(self, train=change(self.train), test=change(self.test), val=val)


def balanced_rates(labels: Tensor, classes: int, threshold: float | None = None) -> Tensor:
    """How often an epoch shows each image, [N] in float64 with mean 1; images without a label (-1) once.

    Without a threshold every class is shown equally often. With one, an image is shown in proportion to max(1,
    sqrt(threshold / f)), f being its class's share of the images: Gupta, Dollar, Girshick, "LVIS", CVPR 2019, section
    4.1. Theirs makes epochs longer; ours are as long as before, so that schedules and shapes stay.
    """
    known = labels[labels >= 0].cpu()
    share = torch.bincount(known, minlength=classes).double() / max(len(known), 1)
    factor = 1 / share if threshold is None else (threshold / share).sqrt().clamp(min=1)
    rates = torch.ones(len(labels), dtype=torch.float64)
    rates[labels.cpu() >= 0] = factor[known] / factor[known].mean() if len(known) else 1.0
    return rates


def first_classes(dataset: Dataset, count: int | None) -> Dataset:
    """The first `count` classes and their images, in order; None: all. Raises DataError where there are fewer."""
    if count is None or count == len(dataset.classes):
        return dataset
    if count > len(dataset.classes):
        raise DataError(
            f"{dataset.name}: has {len(dataset.classes)} classes, not {count}", "choose fewer with --set data.classes=N"
        )
    few = dataset.map(lambda split: split.subset((split.labels < count).nonzero().squeeze(1)))
    return replace(few, classes=dataset.classes[:count])


def limit_train(dataset: Dataset, limit: int | None, seed: int) -> Dataset:
    """The data set with at most `limit` training images, in order, equally many of each class to within one; None: all.

    A smaller limit with the same seed takes a subset of what a larger one takes.
    """
    train = dataset.train
    if limit is None or limit >= len(train):
        return dataset
    rank, _, turn = _shuffled_ranks(train.labels, len(dataset.classes), seed, "limit", train.keys)
    # Deal the images out class by class: every class's first, then every class's second, and so on.
    dealt = torch.argsort(rank * len(dataset.classes) + turn)
    return replace(dataset, train=train.subset(dealt[:limit].sort().values))


def hold_out(dataset: Dataset, fraction: float, seed: int, purpose: str = "holdout") -> tuple[Split, Split | None]:
    """Cut the training split in two: (training, held out), disjoint, each in its old order; None at fraction 0.

    Images that have keys are drawn one by one (`_drawn_by_key`), those in memory by their places: together these number
    `fraction` of the split, rounded; each class gives that fraction of its own images, to within one. Each purpose
    draws for itself. Raises DataError where either part would be empty.
    """
    if fraction == 0:
        return dataset.train, None
    train = dataset.train
    draw = _drawn_by_place if train.keys is None else _drawn_by_key
    selected = draw(train, len(dataset.classes), fraction, seed, purpose)
    if not 0 < int(selected.sum()) < len(train):
        side = "training" if bool(selected.any()) else "held-out"
        raise DataError(
            f"{dataset.name}: holding out {fraction:g} of {len(train)} training images leaves no {side} image",
            "use more images, or hold out nothing (0)",
        )
    return train.subset((~selected).nonzero().squeeze(1)), train.subset(selected.nonzero().squeeze(1))


def _drawn_by_place(train: Split, classes: int, fraction: float, seed: int, purpose: str) -> Tensor:
    rank, size, turn = _shuffled_ranks(train.labels, classes, seed, purpose)
    # A class's images lie evenly spaced on [0, 1], so any cut takes the same share of every class to within one;
    # equal places (classes of equal size) are taken in a drawn order of the classes.
    place = (rank.double() + 0.5) / size
    by_turn = torch.argsort(turn, stable=True)
    chosen = by_turn[torch.argsort(place[by_turn], stable=True)][: round(fraction * len(train))]
    selected = torch.zeros(len(train), dtype=torch.bool)
    selected[chosen.cpu()] = True
    return selected


def _drawn_by_key(train: Split, classes: int, fraction: float, seed: int, purpose: str) -> Tensor:
    """Which images are held out: those whose key draws a number below `fraction`, whatever other images there are.

    Therefore an image that comes, goes or is renamed moves no other one, and a class gives the fraction on the average
    only. Exceptions: a class keeps the image with its greatest number, and where none would be held out although the
    fraction comes to half an image, that with the least number is: of every class for a test split, else of all.
    """
    assert train.keys is not None
    number = torch.tensor(_drawn_numbers(train.keys, seed, purpose), dtype=torch.float64)
    selected = number < fraction
    rank, size, _ = _shuffled_ranks(train.labels, classes, seed, purpose, train.keys)
    selected &= rank < size - 1
    groups = train.labels if purpose == "split" else torch.zeros_like(train.labels)
    first, of, _ = _shuffled_ranks(groups, classes, seed, purpose, train.keys)
    given = torch.bincount(groups[selected], minlength=classes)[groups]
    return selected | ((first == 0) & (given == 0) & (fraction * of >= 0.5) & (size > 1))


def _drawn_numbers(keys: Sequence[str], seed: int, purpose: str) -> list[float]:
    """A number in [0, 1) for each key, a pure function of the arguments (BLAKE2b)."""
    start = hashlib.blake2b(f"{seed}/{purpose}/".encode(), digest_size=8)
    numbers = []
    for key in keys:
        drawn = start.copy()
        drawn.update(key.encode(errors="surrogateescape"))
        numbers.append(int.from_bytes(drawn.digest()[:6], "little") / 2**48)
    return numbers


def _shuffled_ranks(
    labels: Tensor, classes: int, seed: int, purpose: str, keys: Sequence[str] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Per sample [N], on the CPU: its place in its class's drawn order, its class's size, its class's drawn turn.

    keys  the order of a class is that of the numbers its images' keys draw; None: it is drawn over their places
    """
    labels = labels.cpu()
    draw = seeded_generator(seed, purpose)
    order = torch.randperm(len(labels), generator=draw)
    turns = torch.randperm(classes, generator=draw)
    if keys is not None:
        order = torch.argsort(torch.tensor(_drawn_numbers(keys, seed, purpose), dtype=torch.float64), stable=True)
    by_class = order[torch.argsort(labels[order], stable=True)]
    sizes = torch.bincount(labels, minlength=classes)
    first = sizes.cumsum(0) - sizes
    rank = torch.empty_like(labels)
    rank[by_class] = torch.arange(len(labels)) - first[labels[by_class]]
    return rank, sizes[labels], turns[labels]
