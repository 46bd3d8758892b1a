"""Images in files: decoded once and cached where they fit into memory, or read on demand by several processes."""

import functools
import importlib
import multiprocessing
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import torch
from PIL.Image import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sakd_cli.data.decode import Reading, Unreadable, open_rgb
from sakd_cli.errors import DataError, MemoryLimitError

Result = TypeVar("Result")
HINT = "sakd data check names all such files; --set data.on_bad_image=skip leaves them out"


class ImageSpec(NamedTuple):
    """Image size: `side` of the network's input, cut from the middle of a picture with shorter side `resize`.

    workers  processes that read
    reading  how a file becomes RGB
    """

    side: int
    resize: int
    workers: int
    reading: Reading = Reading()


class Files:
    """Images in files, used like a tensor [N, 3, side, side] of uint8.

    cached  decoded once, then in memory
    root    the data set's folder: a picture's name is its path from there
    keys    what decides about each picture's part of a split; None: its name
    """

    def __init__(
        self,
        paths: tuple[str, ...],
        spec: ImageSpec,
        *,
        cached: bool = False,
        root: str = "/",
        keys: tuple[str, ...] | None = None,
    ) -> None:
        self.paths, self.spec, self.cached, self.root = paths, spec, cached, root
        self.keys = self.names if keys is None else keys
        self.shape = torch.Size([len(paths), 3, spec.side, spec.side])
        self.device = torch.device("cpu")
        self._plain: Tensor | None = None
        self._full: tuple[Tensor, Tensor] | None = None

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: Tensor | slice) -> "Files":
        """Those at `index` [n], in that order; nothing is read."""
        places = torch.arange(len(self))[index].tolist()
        paths, keys = (tuple(of[place] for place in places) for of in (self.paths, self.keys))
        return Files(paths, self.spec, cached=self.cached, root=self.root, keys=keys)

    @classmethod
    def joined(cls, files: "Sequence[Files]") -> "Files":
        """Those of several parts of one data set, one after another."""
        paths, keys = (sum(parts, ()) for parts in ([one.paths for one in files], [one.keys for one in files]))
        return cls(paths, files[0].spec, cached=all(one.cached for one in files), root=files[0].root, keys=keys)

    @property
    def names(self) -> tuple[str, ...]:
        """Path of every picture from the data set's folder, with `/` on every system."""
        start = os.path.join(self.root, "")
        return tuple(path.removeprefix(start).replace(os.sep, "/") for path in self.paths)

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
            picture = open_rgb(self.paths[place], self.spec.reading)
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
    picture = open_rgb(path, spec.reading)
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


PREFETCH = 2  # batches that each process makes before they are needed
GRACE_SECONDS = 10
Answer = Callable[[Any], Tensor | Unreadable]


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

    def __getitem__(self, request: Any) -> Tensor | Unreadable:
        return self._answer(request)


class Pool:
    """Reads batches ahead; what is read depends on the requests alone, whoever reads it.

    answer      makes a batch of a request, which can be pickled; an unreadable file is an answer, too
    persistent  its `workers` (0: this process) wait for further requests when these are done
    """

    def __init__(self, answer: Answer, *, workers: int, persistent: bool, device: torch.device) -> None:
        self._answer, self._workers, self._persistent, self._device = answer, workers, persistent, device
        self._requests = _Requests()
        self._loader: DataLoader[Any] | None = None

    def __call__(self, requests: Iterable[Any]) -> Iterator[Tensor]:
        """The answers in their order. DataError on an unreadable file, MemoryLimitError where a process was killed."""
        self._requests.now = requests
        loader = self._make_loader() if self._loader is None else self._loader
        self._loader = None
        try:
            with warnings.catch_warnings(action="ignore"):  # as below
                answers = iter(loader)
            for answer in answers:
                yield raise_if_unreadable(answer)
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise MemoryLimitError(
                "a process that reads images was killed, probably for lack of memory (or of /dev/shm)",
                "fewer of them: --set data.workers=1; or 0",
            ) from None
        # Not after a pass that was given up: its processes end with the loader, at once, and before anything is saved.
        self._loader = loader if self._persistent else None

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
