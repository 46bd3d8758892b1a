"""What every data set loads to, and the three ways of taking a part of one."""

import hashlib
from dataclasses import dataclass, replace

import torch
from torch import Tensor

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
    def side(self) -> int:
        """Height and width of the images in pixels."""
        return int(self.images.shape[-1])

    def subset(self, index: Tensor) -> "Split":
        """The samples at `index` [n] int64, in that order."""
        return Split(self.images[index], self.labels[index], self.origins()[index.cpu()])


@dataclass(frozen=True)
class Dataset:
    """A data set and all that training needs to know about it.

    mean, std  per channel, of pixels / 255
    padding    width in pixels of the zero border from which a random crop of the original size is cut
    flip       whether a mirrored image keeps its class
    scale      share of a picture's area, from and to, that a random resized crop takes instead; None: the border does
    skipped    files that could not be read and were left out
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


def first_classes(dataset: Dataset, count: int | None) -> Dataset:
    """The first `count` classes and their images, in order; None: all. Raises DataError where there are fewer."""
    if count is None or count == len(dataset.classes):
        return dataset
    if count > len(dataset.classes):
        raise DataError(
            f"{dataset.name}: has {len(dataset.classes)} classes, not {count}", "choose fewer with --set data.classes=N"
        )
    train, test = (split.subset((split.labels < count).nonzero().squeeze(1)) for split in (dataset.train, dataset.test))
    return replace(dataset, classes=dataset.classes[:count], train=train, test=test)


def limit_train(dataset: Dataset, limit: int | None, seed: int) -> Dataset:
    """The data set with at most `limit` training images, in order, equally many of each class to within one; None: all.

    A smaller limit with the same seed takes a subset of what a larger one takes.
    """
    if limit is None or limit >= len(dataset.train):
        return dataset
    rank, _, turn = _shuffled_ranks(dataset.train.labels, len(dataset.classes), seed, "limit")
    # Deal the images out class by class: every class's first, then every class's second, and so on.
    dealt = torch.argsort(rank * len(dataset.classes) + turn)
    return replace(dataset, train=dataset.train.subset(dealt[:limit].sort().values))


def hold_out(dataset: Dataset, fraction: float, seed: int, purpose: str = "holdout") -> tuple[Split, Split | None]:
    """Cut the training split in two: (training, held out), disjoint, each in its old order; None at fraction 0.

    Together the held-out images number `fraction` of the split, rounded; each class gives that fraction of its own
    images, to within one. Each purpose draws for itself. Raises DataError where either part would be empty.
    """
    if fraction == 0:
        return dataset.train, None
    labels = dataset.train.labels
    count = round(fraction * len(labels))
    if not 0 < count < len(labels):
        side = "held-out" if count <= 0 else "training"
        raise DataError(
            f"{dataset.name}: holding out {fraction:g} of {len(labels)} training images leaves no {side} image",
            "use more images, or hold out nothing (0)",
        )
    rank, size, turn = _shuffled_ranks(labels, len(dataset.classes), seed, purpose)
    # A class's images lie evenly spaced on [0, 1], so any cut takes the same share of every class to within one;
    # equal places (classes of equal size) are taken in a drawn order of the classes.
    place = (rank.double() + 0.5) / size
    by_turn = torch.argsort(turn, stable=True)
    chosen = by_turn[torch.argsort(place[by_turn], stable=True)][:count]
    selected = torch.zeros(len(labels), dtype=torch.bool)
    selected[chosen.cpu()] = True
    train = dataset.train
    return train.subset((~selected).nonzero().squeeze(1)), train.subset(selected.nonzero().squeeze(1))


def _shuffled_ranks(labels: Tensor, classes: int, seed: int, purpose: str) -> tuple[Tensor, Tensor, Tensor]:
    """Per sample [N], on the CPU: its place in its class's drawn order, its class's size, its class's drawn turn."""
    labels = labels.cpu()
    draw = seeded_generator(seed, purpose)
    order = torch.randperm(len(labels), generator=draw)
    turns = torch.randperm(classes, generator=draw)
    by_class = order[torch.argsort(labels[order], stable=True)]
    sizes = torch.bincount(labels, minlength=classes)
    first = sizes.cumsum(0) - sizes
    rank = torch.empty_like(labels)
    rank[by_class] = torch.arange(len(labels)) - first[labels[by_class]]
    return rank, sizes[labels], turns[labels]
