"""Images in files: read on demand, or decoded once and cached where they fit into memory."""

import functools
import importlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar, final

import torch
from PIL.Image import Image
from torch import Tensor

from sakd_cli.data.decode import Unreadable, open_rgb
from sakd_cli.errors import DataError

Result = TypeVar("Result")
HINT = "sakd data check names all such files; --set data.on_bad_image=skip leaves them out"


class ImageSpec(NamedTuple):
    """Image size: `side` of the network's input, cut from the middle of a picture with shorter side `resize`.

    workers  processes that read
    """

    side: int
    resize: int
    workers: int


@final
class Files:
    """Images in files, used like a tensor [N, 3, side, side] of uint8; `cached`: decoded once, then in memory."""

    def __init__(self, paths: tuple[str, ...], spec: ImageSpec, *, cached: bool = False) -> None:
        self.paths, self.spec, self.cached = paths, spec, cached
        self.shape = torch.Size([len(paths), 3, spec.side, spec.side])
        self.device = torch.device("cpu")
        self._plain: Tensor | None = None
        self._full: tuple[Tensor, Tensor] | None = None

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: Tensor | slice) -> "Files":
        """Those at `index` [n], in that order; nothing is read."""
        places = torch.arange(len(self))[index].tolist()
        return Files(tuple(self.paths[place] for place in places), self.spec, cached=self.cached)

    def read(self) -> Tensor:
        """All of them as evaluation shows them, uint8 [N, 3, side, side]. Raises DataError naming a bad file."""
        if self._plain is not None:
            return self._plain
        with torch.inference_mode(False):  # it outlives an evaluation that asks for it first
            pixels = torch.empty(self.shape, dtype=torch.uint8)
            _fill(pixels, lambda place: load_eval_image(self.paths[place], self.spec))
        if self.cached:
            self._plain = pixels
        return pixels

    def full_images(self) -> tuple[Tensor, Tensor]:
        """All of each picture squeezed to a square, uint8 [N, 3, resize, resize]; height and width before, [N, 2]."""
        if self._full is not None:
            return self._full
        side = self.spec.resize
        pixels = torch.empty(len(self), 3, side, side, dtype=torch.uint8)
        sizes = torch.empty(len(self), 2, dtype=torch.int64)

        def squeezed(place: int) -> Tensor | Unreadable:
            picture = open_rgb(self.paths[place])
            if isinstance(picture, Unreadable):
                return picture
            sizes[place] = torch.tensor([picture.height, picture.width])
            return _pixels(v2().resize(picture, [side, side], antialias=True))

        _fill(pixels, squeezed)
        self._full = pixels, sizes
        return self._full


@functools.cache
def v2() -> Any:
    """torchvision's functions, imported late: it takes 1.6 s that data sets without files need not wait for."""
    return importlib.import_module("torchvision.transforms.v2.functional")


def cpu_count() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _fill(stack: Tensor, make: Callable[[int], Tensor | Unreadable]) -> None:
    """Fill every row, several at a time: PIL decodes without holding the GIL."""

    def store(row: int) -> Unreadable | None:
        image = make(row)
        if isinstance(image, Unreadable):
            return image
        stack[row] = image
        return None

    v2()  # imported before the threads start
    with ThreadPoolExecutor(min(32, cpu_count())) as pool:
        for error in pool.map(store, range(len(stack))):
            raise_if_unreadable(error)


def load_eval_image(path: str, spec: ImageSpec) -> Tensor | Unreadable:
    """The picture as evaluation shows it: its shorter side made `resize` pixels, the middle square cut out."""
    picture = open_rgb(path)
    return picture if isinstance(picture, Unreadable) else _pixels(resize_and_center_crop(picture, spec))


def resize_and_center_crop(picture: Image, spec: ImageSpec) -> Image:
    """torchvision's Resize and CenterCrop. Nothing is resampled that has its size already."""
    if min(picture.size) != spec.resize:
        picture = v2().resize(picture, [spec.resize], antialias=True)
    return v2().center_crop(picture, [spec.side, spec.side])


def _pixels(picture: Image) -> Tensor:
    return v2().pil_to_tensor(picture)


def raise_if_unreadable(found: Result | Unreadable) -> Result:
    """The same. Raises DataError, naming the file and the class, where it is none."""
    if isinstance(found, Unreadable):
        folder = os.path.basename(os.path.dirname(found.path))
        raise DataError(f"{found.path} (class {folder}): {found.reason}", HINT)
    return found
