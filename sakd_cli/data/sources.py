"""How a split's images come to a network: the only place that asks where they are."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, final

import torch
from numpy.typing import NDArray
from torch import Tensor

from sakd_cli.batch import Batch
from sakd_cli.config.datasets import DataConfig, FilesConfig
from sakd_cli.data.augment import constants, normalise
from sakd_cli.data.boxes import NUMBERS, Scale, boxes, cut
from sakd_cli.data.dataset import Dataset, Split
from sakd_cli.data.decode import Unreadable, open_rgb
from sakd_cli.data.files import Files, ImageSpec, middle, plain, v2
from sakd_cli.data.generators import seeded_generator
from sakd_cli.data.loader import Draws, EvalLoader, TrainLoader, Views, draws, fitting, step_slices
from sakd_cli.data.prefetch import Pool
from sakd_cli.errors import UsageError

BLOCK = 64  # places of an epoch whose boxes are drawn together, whatever the batches are


def train_loader(
    split: Split, dataset: Dataset, *, batch_size: int, seed: int, noise_width: int, device: torch.device
) -> "TrainLoader | FileTrainLoader":
    """Shuffled, augmented batches."""
    if dataset.scale is None and _materialize(split):
        return TrainLoader(
            materialize(split), dataset, batch_size=batch_size, seed=seed, noise_width=noise_width, device=device
        )
    return FileTrainLoader(split, dataset, batch_size=batch_size, seed=seed, noise_width=noise_width, device=device)


def eval_loader(
    split: Split, dataset: Dataset, *, device: torch.device, batch_size: int = 1000
) -> "EvalLoader | FileEvalLoader":
    """The split in its own order, without augmentation."""
    if _materialize(split):
        return EvalLoader(materialize(split), dataset, device=device, batch_size=batch_size)
    return FileEvalLoader(split, dataset, device=device, batch_size=batch_size)


def cache_policy(splits: Sequence[Split], dataset: Dataset, config: DataConfig) -> list[Split]:
    """The same splits, the training one first, marked whether they are held in memory: as asked for, or by their size.

    Splits that are in memory anyway stay as they are.
    """
    if not isinstance(config, FilesConfig):
        return list(splits)
    need = 3 * sum(len(split) * split.side**2 for split in splits)
    if dataset.scale is not None:
        need += 3 * len(splits[0]) * config.resized**2  # of the training images, all that crops are cut from
    cached = need <= config.cache_limit * 1e9 if config.cache == "auto" else config.cache
    return [
        replace(split, images=split.images.with_cache(cached)) for split in splits if isinstance(split.images, Files)
    ]


def preload(split: Split, *, full: bool = False) -> None:
    """Decode what is to be held in memory, now. Raises DataError naming a bad file. full: for random resized crops."""
    if isinstance(split.images, Files) and split.images.cached:
        if full:
            split.images.full_images()
        else:
            split.images.read()


def describe_reading(split: Split) -> str | None:
    """How images in files are read, in words; None for others."""
    if not isinstance(split.images, Files):
        return None
    spec = split.images.spec
    if split.images.cached:
        return f"images: all decoded before the first step and held in memory, {spec.side}x{spec.side}"
    return f"images: read from files by {spec.workers or 1} process{'es' * (spec.workers > 1)}, {spec.side}x{spec.side}"


def views(split: Split, dataset: Dataset, device: torch.device) -> Views:
    """Every way in which augmentation can show the images. Raises UsageError where they cannot be counted, or read."""
    if dataset.scale is not None or not _materialize(split):
        raise UsageError(
            f"teacher.bank: {dataset.name} is read from files or cropped at random sizes, a bank needs a set that is "
            "held in memory and cropped by a border",
            "--set teacher.bank=false; or, for small images: --set data.cache=on --set data.augment=border",
        )
    return Views(materialize(split), dataset, device)


def _materialize(split: Split) -> bool:
    return isinstance(split.images, Tensor) or split.images.cached


def materialize(split: Split) -> Split:
    """The same split with its pixels in memory; they are decoded once. Raises DataError naming a bad file."""
    return replace(split, images=split.images.read()) if isinstance(split.images, Files) else split


class BatchRequest(NamedTuple):
    """A batch that is asked for.

    where  per picture the 40 numbers of a random resized crop, [B, 40]; or the corner (dy, dx) in its border, [B, 2]
    flip   [B] whether it is mirrored
    """

    paths: list[str]
    where: NDArray[Any] | None = None
    flip: NDArray[Any] | None = None


@dataclass(frozen=True)
class BatchReader:
    """Makes the batch that is asked for, in whatever process: uint8 [B, 3, side, side].

    scale    of random resized crops; None: the picture as evaluation shows it, cut anew within a border of `padding`
    """

    spec: ImageSpec
    scale: Scale | None
    padding: int

    def __call__(self, asked: BatchRequest) -> Tensor | Unreadable:
        made: list[Tensor] = []
        for place, path in enumerate(asked.paths):
            one = plain(path, self.spec) if asked.where is None else self._cut(path, asked.where[place])
            if isinstance(one, Unreadable):
                return one
            made.append(one.flip(2) if asked.flip is not None and asked.flip[place] else one)
        return torch.stack(made)

    def _cut(self, path: str, where: NDArray[Any]) -> Tensor | Unreadable:
        picture = open_rgb(path)
        if isinstance(picture, Unreadable):
            return picture
        side = [self.spec.side, self.spec.side]
        if self.scale is None:
            top, left = map(int, where)
            shown = v2().crop(v2().pad(middle(picture, self.spec), [self.padding]), top, left, *side)
        else:
            size = torch.tensor([[picture.height, picture.width]])
            box = boxes(torch.from_numpy(where)[None], size, self.scale)[0].tolist()
            shown = v2().resized_crop(picture, *box, size=side, antialias=True)
        pixels: Tensor = v2().pil_to_tensor(shown)
        return pixels


@final
class FileTrainLoader:
    """Shuffled, augmented batches of pictures in files, or of decoded ones that are cropped at random sizes.

    The numbers behind a sample are a pure function of seed, epoch and its place in the epoch: who reads it does not
    matter, nor how the epoch is cut into batches, and one taken up in its middle goes on exactly as it would have gone
    on. Order, border crops and mirroring are those of TrainLoader. A resized crop from memory is the same part of the
    picture, cut from it at `resize` pixels.
    """

    def __init__(
        self, split: Split, dataset: Dataset, *, batch_size: int, seed: int, noise_width: int, device: torch.device
    ) -> None:
        assert isinstance(split.images, Files)
        self._files, self._dataset, self._device = split.images, dataset, device
        self._labels = split.labels.to(device)
        self._mean, self._std = constants(dataset.mean, device), constants(dataset.std, device)
        self._batch_size, self._seed, self._noise_width = batch_size, seed, noise_width
        self._pool: Pool | None = None
        self._whole: tuple[Tensor, Tensor] | None = None
        self.steps_per_epoch = -(-len(split) // batch_size)

    def __len__(self) -> int:
        """Number of batches in an epoch."""
        return self.steps_per_epoch

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Batches `start`, `start` + 1, ... of that epoch, whatever was or was not iterated before."""
        padding = self._dataset.padding if self._dataset.scale is None else 0
        drawn = draws(len(self._labels), padding, self._dataset.flip, self._seed, epoch, self._noise_width)
        steps = list(step_slices(len(self._labels), self._batch_size, start))
        parts = [turn.places for turn in steps]
        made = self._cut(drawn, parts, epoch) if self._files.cached else self._read(drawn, parts, epoch)
        for turn, pictures in zip(steps, made, strict=True):
            index = drawn.order[turn.places].to(self._device)
            here = pictures.to(self._device, non_blocking=True)
            images, noise = normalise(here, self._mean, self._std), drawn.noise[turn.places].to(self._device)
            yield Batch(
                images, self._labels[index], index, noise, global_size=turn.global_size, shard_weight=turn.shard_weight
            )

    def _where(self, drawn: Draws, part: slice, epoch: int) -> Tensor:
        if self._dataset.scale is None:
            return drawn.corner[:, part].T
        count = len(drawn.order[part])
        first, last = part.start // BLOCK, (part.start + max(count, 1) - 1) // BLOCK
        blocks = [
            torch.rand(BLOCK, NUMBERS, generator=seeded_generator(self._seed, f"box/{block}", epoch))
            for block in range(first, last + 1)
        ]
        start = part.start - first * BLOCK
        return torch.cat(blocks)[start : start + count]

    def _read(self, drawn: Draws, parts: list[slice], epoch: int) -> Iterator[Tensor]:
        spec = self._files.spec
        if self._pool is None:
            maker = BatchReader(spec, self._dataset.scale, self._dataset.padding)
            self._pool = Pool(maker, workers=spec.workers, staying=True, device=self._device)
        return self._pool(
            BatchRequest(
                [self._files.paths[place] for place in drawn.order[part].tolist()],
                self._where(drawn, part, epoch).numpy(),
                drawn.flip[part].numpy(),
            )
            for part in parts
        )

    def _cut(self, drawn: Draws, parts: list[slice], epoch: int) -> Iterator[Tensor]:
        assert self._dataset.scale is not None
        if self._whole is None:
            pixels, sizes = self._files.full_images()
            self._whole = pixels.to(self._device), sizes
        pixels, sizes = self._whole
        for part in parts:
            index = drawn.order[part]
            size = sizes[index]
            box = boxes(self._where(drawn, part, epoch), size, self._dataset.scale)
            whole = pixels[index.to(self._device)]
            box, size, flip = (numbers.to(self._device) for numbers in (box, size, drawn.flip[part]))
            yield cut(whole, box, size, flip, self._files.spec.side)


@final
class FileEvalLoader:
    """A split in files, in its own order and without augmentation; iterate it as often as wanted.

    Batches as those of EvalLoader.
    """

    def __init__(self, split: Split, dataset: Dataset, *, device: torch.device, batch_size: int) -> None:
        assert isinstance(split.images, Files)
        self._files, self._labels, self._device = split.images, split.labels.to(device), device
        self._mean, self._std = constants(dataset.mean, device), constants(dataset.std, device)
        self.batch_size = fitting(batch_size, split)

    def __len__(self) -> int:
        """Number of batches."""
        return -(-len(self._labels) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        spec, paths = self._files.spec, self._files.paths
        parts = [slice(first, first + self.batch_size) for first in range(0, len(paths), self.batch_size)]
        pool = Pool(BatchReader(spec, None, 0), workers=spec.workers, staying=False, device=self._device)
        for part, pictures in zip(parts, pool(BatchRequest(list(paths[part])) for part in parts), strict=True):
            here = pictures.to(self._device, non_blocking=True)
            yield normalise(here, self._mean, self._std), self._labels[part]
