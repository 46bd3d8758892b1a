"""Every file of a data set decoded once, by several processes: what is wrong with it, and what is odd. No torch."""

import hashlib
import multiprocessing
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from typing import NamedTuple, TypeVar

from PIL.Image import Image

from sakd_cli.data.decode import STRIP, Picture, Reading, Unreadable, open_rgb, read
from sakd_cli.errors import DataError

Result = TypeVar("Result")
MIN_FILES = 200  # below this, decoding in this process is faster
CHUNK = 32  # files that a process gets at a time
ROWS = 2**22  # pixels that are hashed at a time


class Looks(NamedTuple):
    """What a picture is like.

    digest  of its pixels as they are read, and of its size: equal pictures have equal ones, whatever their files
    turned  stored otherwise than upright; frames: has several, of which the first is taken
    strip   width and height where one is so much larger that most of the picture is never seen
    greys   least and greatest value, where the range that is set is not filled, or left
    """

    digest: bytes
    turned: bool
    frames: bool
    strip: tuple[int, int] | None
    greys: tuple[float, float] | None


def look_at(path: str, reading: Reading) -> Looks | Unreadable:
    """Decode all of a file."""
    return read(path, reading, partial(_looks, reading=reading))


def _looks(picture: Picture, reading: Reading) -> Looks:
    digest = _digest(picture.rgb())
    strip = picture.size if max(picture.size) > STRIP * min(picture.size) else None
    odd = None
    if picture.greys is not None:
        low, high = picture.greys
        black, white = reading.gray_range or (low, high)
        if low < black or high > white or high - black < (white - black) / 2:
            odd = low, high
    return Looks(digest, picture.turned, picture.frames, strip, odd)


def _digest(rgb: Image) -> bytes:
    content = hashlib.blake2b(repr(rgb.size).encode(), digest_size=16)
    rows = max(1, ROWS // rgb.width)
    for top in range(0, rgb.height, rows):
        content.update(rgb.crop((0, top, rgb.width, min(rgb.height, top + rows))).tobytes())
    return content.digest()


def decode_error(path: str, reading: Reading) -> Unreadable | None:
    """What is wrong with a file, found by decoding all of it; None: nothing."""
    picture = open_rgb(path, reading)
    return picture if isinstance(picture, Unreadable) else None


def find_unreadable(
    paths: Sequence[str], reading: Reading, processes: int | None = None
) -> Iterator[Unreadable | None]:
    """Per file, in order, what is wrong with it; None: nothing. Raises DataError where a decoder crashes."""
    return of_each(partial(decode_error, reading=reading), paths, processes)


def _ignore_interrupts() -> None:
    """Ctrl-C goes to all processes of the group; only the main one handles it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def of_each(function: Callable[[str], Result], paths: Sequence[str], processes: int | None = None) -> Iterator[Result]:
    """What a function makes of each file, in order. Raises DataError where a decoder crashes."""
    number = min(16, os.cpu_count() or 1) if processes is None else processes
    if len(paths) < MIN_FILES or number < 2:
        yield from map(function, paths)
        return
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads: the children touch none
            with ProcessPoolExecutor(number, context, initializer=_ignore_interrupts) as pool:
                yield from pool.map(function, paths, chunksize=CHUNK)
    except BrokenProcessPool:
        raise DataError("a process that decoded pictures was killed: for lack of memory, or by a picture") from None
