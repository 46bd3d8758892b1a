"""Images in files, and how one becomes what a network sees; decoded once and cached where all fit into memory."""

import functools
import importlib
import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any, NamedTuple, TypeVar

import torch
from PIL.Image import Image, Resampling
from torch import Tensor

from sakd_cli.config.preprocessing import Preprocessing, height_width
from sakd_cli.data.augment import RATIO
from sakd_cli.data.decode import STRIP, Picture, Reading, Unreadable, read
from sakd_cli.data.pictures import legible
from sakd_cli.errors import DataError
from sakd_cli.torchrun import cpu_count

Result = TypeVar("Result")
COPY = 1.1  # side of the smallest crop of a cached copy, over the side of what is made of it
GAP = 2  # pixels that a JPEG is decoded to at the least, in width and in height, for each one that is made of them
AHEAD = 4  # pictures for each thread that are made before they are wanted
HINT = "sakd data check names all such files; --set data.on_bad_image=skip leaves them out"


class ImageSpec(NamedTuple):
    """How a file becomes what a network sees: RGB by `reading`, then as `seen` says; `workers`: processes that read.

    also  as what a teacher sees the same crop in training; None: as the student does
    """

    seen: Preprocessing
    workers: int
    reading: Reading = Reading()
    also: Preprocessing | None = None

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the images."""
        return height_width(self.seen.size)

    @property
    def shown(self) -> tuple[Preprocessing, ...]:
        """All that is made of one crop."""
        return (self.seen,) if self.also is None else (self.seen, self.also)


@dataclass(eq=False)
class Files:
    """Images in files, used like a tensor [N, 3, H, W] of uint8.

    cached  decoded once, then in memory
    root    the data set's folder: a picture's name is its path from there
    keys    what decides about each picture's part of a split; none: its name
    """

    paths: tuple[str, ...]
    spec: ImageSpec
    _: KW_ONLY
    cached: bool = False
    root: str = "/"
    keys: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.keys = self.keys or self.names
        self.shape, self.device = torch.Size([len(self.paths), 3, *self.spec.size]), torch.device("cpu")
        self._plain: Tensor | None = None
        self._full: tuple[list[Tensor], Tensor] | None = None

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: Tensor | slice) -> "Files":
        """Those at `index` [n], in that order; nothing is read."""
        places = torch.arange(len(self))[index].tolist()
        paths, keys = (tuple(of[place] for place in places) for of in (self.paths, self.keys))
        return replace(self, paths=paths, keys=keys)

    @staticmethod
    def joined(files: "Sequence[Files]") -> "Files":
        """Those of several parts of one data set, one after another."""
        paths, keys = (sum(parts, ()) for parts in ([one.paths for one in files], [one.keys for one in files]))
        return replace(files[0], paths=paths, cached=all(one.cached for one in files), keys=keys)

    def as_seen(self, seen: Preprocessing) -> "Files":
        return replace(self, spec=self.spec._replace(seen=seen, also=None))

    @property
    def names(self) -> tuple[str, ...]:
        """Path of every picture from the data set's folder, with `/` on every system."""
        start = os.path.join(self.root, "")
        return tuple(path.removeprefix(start).replace(os.sep, "/") for path in self.paths)

    def read(self) -> Tensor:
        """All of them as evaluation shows them, uint8 [N, 3, H, W]. Raises DataError naming a bad file."""
        if self._plain is not None:
            return self._plain
        with torch.inference_mode(False):  # it outlives an evaluation that asks for it first
            pixels = torch.empty(self.shape, dtype=torch.uint8)
            for row, image in enumerate(_each(len(self), lambda place: load_eval_image(self.paths[place], self.spec))):
                pixels[row] = image
        if self.cached:
            self._plain = pixels
        return pixels

    def full_images(self, least: float) -> tuple[list[Tensor], Tensor]:
        """Copies from which random crops are cut: uint8 [3, h, w], each; height and width of the pictures, [N, 2].

        least  the smallest share of a picture's area that is cut. A picture that has more pixels than such crops need
               is made smaller (Lanczos), `COPY` of the crop's side for its own: of the gradients of torchvision's crops
               95 % are left in white noise at that area, 99 % in photographs and in larger crops.
        """
        if self._full is None:
            spec = self.spec
            pixels = copy_pixels(spec, least)

            def copied(place: int) -> tuple[Tensor, tuple[int, int]] | Unreadable:
                return read(self.paths[place], spec.reading, lambda picture: _copy(picture, pixels))

            made = list(_each(len(self), copied))
            self._full = [copy for copy, _ in made], torch.tensor([size for _, size in made])
        return self._full


def copy_pixels(spec: ImageSpec, least: float) -> float:
    """Most pixels of a cached copy from which the share `least` of its area is cut."""
    if not all(seen.antialias for seen in spec.shown):
        return math.inf
    return COPY**2 * max(math.prod(height_width(seen.size)) for seen in spec.shown) / (least * RATIO[0])


def _copy(picture: Picture, most: float) -> tuple[Tensor, tuple[int, int]]:
    """The picture with at most about so many pixels; its height and width before."""
    width, height = picture.size
    smaller = max(1.0, (width * height / most) ** 0.5)
    rgb = picture.rgb(smaller / GAP)
    if smaller > 1:
        rgb = rgb.resize((max(1, round(width / smaller)), max(1, round(height / smaller))), Resampling.LANCZOS)
    return _pixels(rgb), (height, width)


@functools.cache
def v2() -> Any:
    """torchvision's functions, imported late: it takes 1.6 s that data sets without files need not wait for."""
    return importlib.import_module("torchvision.transforms.v2.functional")


def _each(count: int, make: Callable[[int], Result | Unreadable]) -> Iterator[Result]:
    """What is made of 0, 1, ...; several at a time: PIL decodes without holding the GIL. DataError names a bad file."""
    v2()  # imported before the threads start
    threads = min(32, cpu_count())
    with ThreadPoolExecutor(threads) as pool:
        for first in range(0, count, AHEAD * threads):
            for made in pool.map(make, range(first, min(count, first + AHEAD * threads))):
                yield raise_if_unreadable(made)


def load_eval_image(path: str, spec: ImageSpec) -> Tensor | Unreadable:
    """The picture as evaluation shows it: resized, its middle cut out."""
    return read(path, spec.reading, lambda picture: resize_and_center_crop(picture.rgb(), spec.seen))


def resize_and_center_crop(picture: Image, seen: Preprocessing) -> Tensor:
    """torchvision's Resize and CenterCrop, uint8 [3, H, W]. Nothing is resampled that has its size already.

    Of a strip, the ends are cut off first: resized as a whole, 1x40000 pixels would take gigabytes.
    """
    if max(picture.size) > STRIP * min(picture.size) and seen.resize_mode == "shorter":
        longest = STRIP * min(picture.size)
        picture = v2().center_crop(picture, [min(side, longest) for side in (picture.height, picture.width)])
    shown: Any = picture if seen.antialias else _pixels(picture)
    size = seen.scaled(picture.height, picture.width)
    if size != (picture.height, picture.width):
        shown = v2().resize(shown, list(size), **resampling(seen))
    shown = v2().center_crop(shown, list(height_width(seen.size)))
    return _pixels(shown) if isinstance(shown, Image) else shown


def cut_and_resize(picture: Image | Tensor, box: Sequence[int], seen: Preprocessing) -> Tensor:
    """torchvision's resized_crop of top, left, height and width, uint8 [3, H, W] on the picture's device."""
    shown: Any = picture
    device = None if isinstance(picture, Image) else picture.device
    if isinstance(picture, Tensor) and seen.interpolation == "lanczos":  # which is Pillow's
        shown = v2().to_pil_image(picture.cpu())
    elif isinstance(picture, Image) and not seen.antialias:
        shown = _pixels(picture)
    shown = v2().resized_crop(shown, *box, size=list(height_width(seen.size)), **resampling(seen))
    return _pixels(shown).to(device) if isinstance(shown, Image) else shown


def resampling(seen: Preprocessing) -> dict[str, Any]:
    """Arguments of torchvision's functions that resize."""
    mode = importlib.import_module("torchvision.transforms").InterpolationMode(seen.interpolation)
    return {"interpolation": mode, "antialias": seen.antialias}


def _pixels(picture: Image) -> Tensor:
    return v2().pil_to_tensor(picture)


def raise_if_unreadable(found: Result | Unreadable) -> Result:
    """The same. Raises DataError, naming the file and the class, where it is none."""
    if isinstance(found, Unreadable):
        folder = os.path.basename(os.path.dirname(found.path))
        raise DataError(f"{legible(found.path)} (class {legible(folder)}): {found.reason}", HINT)
    return found
