"""Images in files: decoded once and cached where they fit into memory, or read on demand by several processes."""

import atexit
import functools
import importlib
import math
import multiprocessing
import os
import signal
import sys
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any, NamedTuple, TypeVar

import torch
from PIL.Image import Image, Resampling
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from sakd_cli.config.preprocessing import Preprocessing, height_width
from sakd_cli.data.augment import RATIO
from sakd_cli.data.decode import STRIP, Picture, Reading, Unreadable, read
from sakd_cli.data.pictures import legible
from sakd_cli.errors import DataError, MemoryLimitError, SakdError
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


PREFETCH = 2  # batches that each process makes before they are needed
GRACE_SECONDS = 10
Answer = Callable[[Any], Tensor | tuple[Tensor, Tensor] | Unreadable | SakdError]


class _Requests:
    """The requests of the current pass."""

    def __init__(self) -> None:
        self.now: Iterable[Any] = ()

    def __iter__(self) -> Iterator[Any]:
        return iter(self.now)


class _RequestDataset(Dataset[Any]):
    """Answers a request with a batch."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer

    def __getitem__(self, request: Any) -> Tensor | tuple[Tensor, Tensor] | Unreadable | SakdError:
        try:
            answer = self._answer(request)
            for one in answer if isinstance(answer, tuple) else [answer]:
                if get_worker_info() and isinstance(one, Tensor):
                    one.share_memory_()  # by torch's own thread, which would lose it for want of room, unseen
            return answer
        except SakdError as error:  # torch would make another of it
            return error
        except RuntimeError as error:
            if "shared memory" not in str(error):
                raise
            return MemoryLimitError(f"a batch of images has no room in /dev/shm: {error}", "--set data.workers=0")


_POOLS: "weakref.WeakSet[Pool]" = weakref.WeakSet()


@atexit.register
def close_pools() -> None:
    """Before Python's own end, which would send signals that the processes wait out (`_defer_signals`)."""
    for pool in list(_POOLS):
        pool.close()


class Pool:
    """Reads batches ahead; what is read depends on the requests alone, whoever reads it.

    answer      makes a batch of a request, which can be pickled; an unreadable file is an answer, too
    persistent  its `workers` (0: this process) wait for further requests when these are done
    """

    def __init__(self, answer: Answer, *, workers: int, persistent: bool, device: torch.device) -> None:
        self._answer, self._workers, self._persistent, self._device = answer, workers, persistent, device
        self._requests = _Requests()
        self._loader: DataLoader[Any] | None = None
        _POOLS.add(self)

    def __call__(self, requests: Iterable[Any]) -> Iterator[Any]:
        """The answers in their order. DataError on an unreadable file, MemoryLimitError where a process was killed."""
        self._requests.now = requests
        loader = self._make_loader() if self._loader is None else self._loader
        self._loader = None
        try:
            with warnings.catch_warnings(action="ignore"):  # as below
                if loader.num_workers:  # as many as torch needs, which would begin, and end in a traceback
                    [multiprocessing.Lock() for _ in range(12 + 3 * loader.num_workers)]
                answers = iter(loader)
            for answer in answers:
                if isinstance(answer, SakdError):  # a copy: it would hold this frame, which holds it and the processes
                    raise type(answer)(answer.message, answer.hint)
                yield raise_if_unreadable(answer)
        except (RuntimeError, OSError) as error:
            if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
                raise
            raise MemoryLimitError(
                f"a process that reads images was killed or cannot be had, for lack of memory or /dev/shm? ({error})",
                "fewer of them: --set data.workers=1; or 0",
            ) from None
        # Not after a pass that was given up: its processes end with the loader, at once, and before anything is saved.
        self._loader = loader if self._persistent else None

    def close(self) -> None:
        """End the processes, if they wait for further requests."""
        self._loader = None

    def _make_loader(self) -> DataLoader[Any]:
        fork = self._workers > 0 and sys.platform == "linux"
        # Python warns of forks beside threads, torch of more processes than processors: both are meant.
        with warnings.catch_warnings(action="ignore"):
            return DataLoader(
                _RequestDataset(self._answer),
                sampler=self._requests,
                batch_size=None,
                num_workers=self._workers,
                pin_memory=self._device.type == "cuda",
                prefetch_factor=PREFETCH if self._workers else None,
                persistent_workers=self._persistent and self._workers > 0,
                worker_init_fn=_defer_signals,
                generator=torch.Generator(),  # else it would draw from the one that belongs to all
                multiprocessing_context=multiprocessing.get_context("fork") if fork else None,
            )


def _defer_signals(worker: int) -> None:
    """Leave Ctrl-C and SIGTERM, which all processes of the group get, to the main process for `GRACE_SECONDS`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform != "win32":
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(GRACE_SECONDS))
