"""Picture files to RGB pixels, whatever their kind. No torch, so that a process that decodes starts at once."""

import multiprocessing
import os
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from sakd_cli.errors import DataError

ENDINGS = frozenset([".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"])
MIN_FILES = 200  # below this, decoding in this process is faster
CHUNK = 32  # files that a process gets at a time

_WIDE = {"I;16", "I;16B", "I;16L", "I;16N", "I"}  # modes of one channel with 16 bits


class Unreadable(NamedTuple):
    """A file that is not a picture, or not a complete one."""

    path: str
    reason: str


def open_rgb(path: str) -> Image.Image | Unreadable:
    """The picture as RGB: without transparency, the first frame of an animation, the upper 8 of 16 bits of grey."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as picture:
                picture.load()
                if picture.mode in _WIDE:
                    wide = np.asarray(picture).astype(np.int64)
                    return Image.fromarray((wide.clip(0, 65535) >> 8).astype(np.uint8)).convert("RGB")
                return picture.convert("RGB")
    except Exception as error:  # PIL raises nearly everything on damaged files, also SyntaxError and struct.error
        return Unreadable(path, _reason(path, error))


def _reason(path: str, error: Exception) -> str:
    if isinstance(error, OSError) and error.errno is not None:
        return (error.strerror or "cannot be read").lower()
    if isinstance(error, UnidentifiedImageError):
        return "is empty" if Path(path).stat().st_size == 0 else "is no picture"
    if isinstance(error, Image.DecompressionBombWarning | Image.DecompressionBombError):
        return "has too many pixels"
    message = " ".join(str(error).split()).replace(path, "it")[:60]
    return f"is damaged ({message or type(error).__name__})"


def decode_error(path: str) -> Unreadable | None:
    """What is wrong with a file, found by decoding all of it; None: nothing."""
    picture = open_rgb(path)
    return picture if isinstance(picture, Unreadable) else None


def _ignore_interrupts() -> None:
    """Ctrl-C goes to all processes of the group; only the main one handles it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def find_unreadable(paths: Sequence[str], processes: int | None = None) -> Iterator[Unreadable | None]:
    """Per file, in order, what is wrong with it; None: nothing. Raises DataError where a decoder crashes."""
    number = min(16, os.cpu_count() or 1) if processes is None else processes
    if len(paths) < MIN_FILES or number < 2:
        yield from map(decode_error, paths)
        return
    context = multiprocessing.get_context("fork") if sys.platform == "linux" else None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads: the children touch none
            with ProcessPoolExecutor(number, context, initializer=_ignore_interrupts) as pool:
                yield from pool.map(decode_error, paths, chunksize=CHUNK)
    except BrokenProcessPool:
        raise DataError("a process that decoded pictures was killed: for lack of memory, or by a picture") from None
