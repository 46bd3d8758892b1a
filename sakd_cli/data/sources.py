"""Where a split's images are, in memory or in files, and how they are read. Nothing else asks."""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from numpy.typing import NDArray
from PIL.Image import Image
from torch import Tensor

from sakd_cli.config.datasets import DataConfig, FilesConfig
from sakd_cli.config.preprocessing import Preprocessing, height_width, size_text
from sakd_cli.data import augment
from sakd_cli.data.dataset import Dataset, Split
from sakd_cli.data.decode import Picture, Unreadable, pixel_count, read
from sakd_cli.data.files import (
    GAP,
    Files,
    ImageSpec,
    copy_pixels,
    cut_and_resize,
    load_eval_image,
    resize_and_center_crop,
)
from sakd_cli.errors import UsageError

SAMPLE = 256  # files whose headers say how large the others are
Change = Callable[[Tensor], Tensor] | None  # of uint8 images
TOGETHER = 8  # steps whose images a GPU crops at once: an eighth of the launches


def cache_policy(splits: Sequence[Split], dataset: Dataset, config: DataConfig) -> list[Split]:
    """The splits, the training one first, those in files marked to be cached in memory: as configured, or by size."""
    files = [split.images for split in splits if isinstance(split.images, Files)]
    if not isinstance(config, FilesConfig) or not files:
        return list(splits)
    train = files[0]
    need: float = sum(one.shape.numel() for one in files)
    need += sum(3 * len(train) * math.prod(height_width(seen.size)) for seen in train.spec.shown[1:])
    if dataset.scale is not None:  # what random crops are cut from, by the headers of some files
        some, most = train.paths[:: max(1, len(train) // SAMPLE)], copy_pixels(train.spec, dataset.scale[0])
        need += 3 * len(train) * sum(min(pixel_count(path, train.spec.reading), most) for path in some) / len(some)
    cached = need <= config.cache_limit * 1e9 if config.cache == "auto" else config.cache
    return [replace(split, images=replace(one, cached=cached)) for split, one in zip(splits, files, strict=True)]


def shown_to_both(split: Split, also: Preprocessing | None) -> Split:
    """The split, whose crops a teacher sees as `also`; None: as the student does."""
    files = split.images
    if also is None or not isinstance(files, Files):
        return split
    return replace(split, images=replace(files, spec=files.spec._replace(also=also)))


def as_seen(split: Split, seen: Preprocessing | None) -> Split:
    """The split as another network sees it in evaluation; None: as it is."""
    files = split.images
    if seen is None or not isinstance(files, Files) or seen == files.spec.seen:
        return split
    return replace(split, images=files.as_seen(seen))


def preload(split: Split, *, scale: augment.Scale | None = None) -> None:
    """Decode what is to be cached in memory, now. DataError names a bad file. scale: of random resized crops."""
    if isinstance(split.images, Files) and split.images.cached:
        if scale is not None:
            split.images.full_images(scale[0])
        else:
            split.images.read()


def describe_reading(split: Split) -> str | None:
    """One line on how images in files are read; None for others."""
    if not isinstance(split.images, Files):
        return None
    spec = split.images.spec
    if split.images.cached:
        return f"images: all decoded before the first step and cached in memory, {size_text(spec.seen.size)}"
    workers = f"{spec.workers or 1} process{'es' * (spec.workers > 1)}"
    return f"images: read from files by {workers}, {size_text(spec.seen.size)}"


class Views:
    """All images of a split on a device, and the `count` ways in which augmentation can show each of them.

    view = (dy (2 padding + 1) + dx) 2 + flip; without the 2 and the flip where the data set is not mirrored.
    """

    def __init__(self, split: Split, dataset: Dataset, device: torch.device) -> None:
        self.labels = split.labels.to(device)
        self.device = device
        self.together = TOGETHER if device.type == "cuda" else 1
        self.dataset = dataset
        self._padded = augment.pad(split.pixels.to(device), dataset.padding)
        self._mean, self._std = (augment.channel_tensor(one, device) for one in (dataset.mean, dataset.std))
        self._sides, self._mirrored = 2 * dataset.padding + 1, 1 + dataset.flip
        self.count = self._sides**2 * self._mirrored

    def __len__(self) -> int:
        return len(self.labels)

    def images(self, index: Tensor, view: Tensor, change: Change = None) -> Tensor:
        """Views [B] of the images at `index` [B], changed and normalised: [B, 3, H, W]."""
        index, view = index.to(self.device), view.to(self.device)
        corner, flip = view // self._mirrored, view % self._mirrored == 1
        dy, dx = corner // self._sides, corner % self._sides
        images = augment.crop_and_flip(self._padded, index, dy, dx, flip, padding=self.dataset.padding)
        return augment.normalise(images if change is None else change(images), self._mean, self._std)

    def view(self, corner: Tensor, flip: Tensor) -> Tensor:
        """Number [B] of the view with upper left corner (dy, dx) [2, B], mirrored where `flip` [B]."""
        return (corner[0] * self._sides + corner[1]) * self._mirrored + flip * (self._mirrored - 1)

    def digest(self) -> str:
        """SHA-256 of all that the views are made of."""
        settings = [self.dataset.mean, self.dataset.std, self.dataset.padding, self.dataset.flip, *self._padded.shape]
        content = hashlib.sha256(repr(settings).encode())
        content.update(self._padded.cpu().numpy().data)
        return content.hexdigest()


def views(split: Split, dataset: Dataset, device: torch.device) -> Views:
    """Every way in which augmentation can show the images. Raises UsageError where they cannot be counted, or read."""
    if dataset.scale is not None or not in_memory(split):
        raise UsageError(
            f"teacher.cache: {dataset.name} is read from files or cropped at random sizes, a teacher cache needs one "
            "in memory and cropped by a border",
            "--set teacher.cache=false; or, for small images: --set data.cache=on --set data.augment=border",
        )
    return Views(split, dataset, device)


class TeacherViews:
    """What a teacher sees of the same views, in its own size."""

    def __init__(self, split: Split, dataset: Dataset, also: Preprocessing, device: torch.device) -> None:
        files = split.images
        assert isinstance(files, Files)
        self._size, self._other, self._padding = files.spec.size, height_width(also.size), dataset.padding
        _, self._border = augment.corners_at(torch.zeros(2, 1), dataset.padding, self._size, self._other)
        self._padded = augment.pad(files.as_seen(also).read().to(device), self._border)
        self._mean, self._std = (augment.channel_tensor(one, device) for one in (dataset.mean, dataset.std))

    def images(self, index: Tensor, corner: Tensor, flip: Tensor, change: Change = None) -> Tensor:
        """Views with upper left corners [2, B] of the student's, mirrored where `flip` [B], changed, normalised."""
        (dy, dx), border = augment.corners_at(corner, self._padding, self._size, self._other)
        images = augment.crop_and_flip(self._padded, index, dy, dx, flip, padding=border)
        return augment.normalise(images if change is None else change(images), self._mean, self._std)


def in_memory(split: Split) -> bool:
    """Whether the images are tensors, or files that are decoded once and cached."""
    return isinstance(split.images, Tensor) or split.images.cached


def crop_copies(copies: Sequence[Tensor], box: Tensor, size: Tensor, flip: Tensor, seen: Preprocessing) -> Tensor:
    """Parts of pictures as `seen`, uint8 [B, 3, H, W], as torchvision's resized_crop.

    copies  B of [3, h, w]  the pictures, or copies of them with fewer pixels, on any device
    box     [B, 4]          as from `random_boxes`, in pixels of the pictures
    size    [B, 2]          height and width of the pictures
    flip    [B]             bool, left and right exchanged
    """
    box = augment.boxes_in_copies(box, size, torch.tensor([copy.shape[1:] for copy in copies]))
    images = []
    for copy, where, mirrored in zip(copies, box.tolist(), flip.tolist(), strict=True):
        cut = cut_and_resize(copy, where, seen)
        images.append(cut.flip(2) if mirrored else cut)
    return torch.stack(images)


class BatchRequest(NamedTuple):
    """A batch to read; `flip` [B]: whether to mirror.

    where  40 numbers of a random resized crop, [B, 40], or the corner (dy, dx) in the border, [B, 2]
    seeds  of random changes, one for each image
    """

    paths: list[str]
    where: NDArray[Any] | None = None
    flip: NDArray[Any] | None = None
    seeds: list[int] | None = None


@dataclass(frozen=True)
class BatchReader:
    """Reads a requested batch, in any process: uint8 [B, 3, H, W], and the same crops as a teacher sees them, if any.

    scale  of random resized crops; None: the evaluation image, cropped from a border of `padding` pixels
    """

    spec: ImageSpec
    scale: augment.Scale | None
    padding: int
    changes: augment.Changes | None = None

    def __call__(self, request: BatchRequest) -> Tensor | tuple[Tensor, Tensor] | Unreadable:
        rows: list[list[Tensor]] = []
        for row, path in enumerate(request.paths):
            images = self._read(path, None if request.where is None else request.where[row])
            if isinstance(images, Unreadable):
                return images
            rows.append([x.flip(2) for x in images] if request.flip is not None and request.flip[row] else images)
        stacked = [torch.stack(column) for column in zip(*rows, strict=True)]
        if self.changes is not None and request.seeds is not None:
            stacked = [self.changes(images, request.seeds) for images in stacked]
        return stacked[0] if len(stacked) == 1 else (stacked[0], stacked[1])

    def _read(self, path: str, where: NDArray[Any] | None) -> list[Tensor] | Unreadable:
        if where is None:
            image = load_eval_image(path, self.spec)
            return image if isinstance(image, Unreadable) else [image]
        if self.scale is None:
            return read(path, self.spec.reading, lambda picture: self._from_border(picture.rgb(), where))
        return read(path, self.spec.reading, lambda picture: self._random_box(picture, where))

    def _from_border(self, picture: Image, where: NDArray[Any]) -> list[Tensor]:
        found = []
        for seen in self.spec.shown:
            height, width = size = height_width(seen.size)
            corner, border = augment.corners_at(torch.from_numpy(where)[:, None], self.padding, self.spec.size, size)
            top, left = corner[:, 0].tolist()
            padded = augment.pad(resize_and_center_crop(picture, seen), border)
            found.append(padded[:, top : top + height, left : left + width])
        return found

    def _random_box(self, picture: Picture, where: NDArray[Any]) -> list[Tensor]:
        assert self.scale is not None
        size = torch.tensor([picture.size[::-1]])
        box = augment.random_boxes(torch.from_numpy(where)[None], size, self.scale)
        _, _, high, wide = box[0].tolist()
        sides = [height_width(seen.size) for seen in self.spec.shown]
        rgb = picture.rgb(min(min(high / height, wide / width) for height, width in sides) / GAP)
        if rgb.size != picture.size:
            box = augment.boxes_in_copies(box, size, torch.tensor([rgb.size[::-1]]))
        return [cut_and_resize(rgb, box[0].tolist(), seen) for seen in self.spec.shown]
