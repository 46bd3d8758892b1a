"""Picture files to RGB pixels, whatever their kind. No torch, so that a process that decodes starts at once."""

import ctypes
import errno
import importlib
import os
import stat
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from typing import Any, BinaryIO, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from sakd_cli.errors import MemoryLimitError

if sys.platform == "linux":
    import fcntl

# What is opened, by content. Never more: Pillow would start Ghostscript for PostScript.
FORMATS = ["JPEG", "PNG", "WEBP", "AVIF", "BMP", "DIB", "GIF", "JPEG2000", "PPM", "TIFF"]  # tried in this order
EXTRA = "HEIF"  # with the extra `heic`
STRIP = 16  # times longer than wide, and more: a strip, of which the middle is taken
BLANK = 100_000  # pixels for each byte of a large file: more have no content
BYTES = 12  # of memory for each pixel that a decoder may need
CANVASES = 2**29  # bytes of memory that a WebP of 67 million pixels needs to begin with
MOST_WEBP = 2**27  # pixels of a WebP, at 12 bytes each
LARGE = 2**25  # pixels from which pictures are decoded one at a time: 0.13 to 0.4 GB each, WebP 12 bytes a pixel

Result = TypeVar("Result")
_WIDE = {"I;16", "I;16B", "I;16L", "I;16N", "I", "F"}  # modes of one channel with more than 8 bits
_STRETCHED = {"PPM", "JPEG2000"}  # these say what white is, and Pillow makes it 65535; floats (PFM) it leaves
_KEYS = {"L;2": 85, "L;4": 17, "RGB;16B": 1 / 256}  # from a PNG's transparent colour to Pillow's pixels, by its bits
_HEIC = (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1")
_ORIENTATION = 274  # in EXIF
_WITH_ORIENTATION = {"exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp"}  # where Pillow looks for it
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_BACK = _UPRIGHT | {6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}


class Reading(NamedTuple):
    """How a file becomes RGB pixels: the settings `data.*` of these names."""

    background: tuple[int, int, int] = (255, 255, 255)
    orientation: bool = True
    gray_range: tuple[float, float] | None = None
    max_pixels: int = 200_000_000


class Unreadable(NamedTuple):
    """A file that is no picture, or not a complete one, or that cannot be read without a guess."""

    path: str
    reason: str


class _Refused(Exception):
    """Why a file that may be sound is not read."""


class Picture:
    """A picture file, open; `read` makes it.

    size    width and height, upright, in pixels
    turned  whether it is stored otherwise
    greys   least and greatest value where there are more than 8 bits, once `rgb` was called

    The pixels of a JPEG are decoded by `rgb` only, since a part of it may want fewer.
    """

    def __init__(self, path: str, file: BinaryIO, reading: Reading, turn: ExitStack) -> None:
        self._path, self._reading, self._turn = path, reading, turn
        self.greys: tuple[float, float] | None = None
        with _named(path):
            self._picture = picture = _identified(file, reading)
            key = picture.info.get("transparency") if picture.format == "PNG" else None
            if key is not None and (factor := _KEYS.get(str(picture.tile[0].args))):  # type: ignore[attr-defined]
                scaled = tuple(int(value * factor) for value in (key if isinstance(key, tuple) else (key,)))
                picture.info["transparency"] = scaled if isinstance(key, tuple) else scaled[0]
            self._later = picture.format in ("JPEG", "MPO")
            tiff = picture.format == "TIFF"  # Pillow turns it by itself, and forgets how
            turned = _orientation(picture) if tiff else 1
            if not self._later:
                self._load()
            if not tiff:
                turned = _orientation(picture)
        self.turned = turned > 1
        upright = _UPRIGHT if reading.orientation and not tiff else _BACK if tiff and not reading.orientation else {}
        self._method = upright.get(turned)
        self.size = picture.size[::-1] if self._method and turned > 4 else picture.size

    @property
    def frames(self) -> bool:
        """Whether there are several, beside what phones store with a photograph (MPO)."""
        return self._picture.format != "MPO" and bool(getattr(self._picture, "is_animated", False))

    def _load(self) -> None:
        picture = self._picture
        if picture.width * picture.height > LARGE:
            self._turn.enter_context(_TURN.taken())
        if picture.format == "WEBP":
            _without_canvases(picture)
        try:
            picture.load()
        except Exception:
            # Decoders say "damaged" of what they had no memory for. This touches none.
            np.empty(BYTES * picture.width * picture.height, np.uint8)
            raise

    def rgb(self, shrink: float = 1) -> Image.Image:
        """As RGB: upright, over the background, 8 bits by `gray_8bit`; of several frames the first.

        shrink  a JPEG may be decoded 2, 4 or 8 times smaller in width and height, not more than this
        """
        with _named(self._path):
            if self._later:
                if shrink >= 2:
                    width, height = self._picture.size
                    self._picture.draft(None, (int(width / shrink), int(height / shrink)))
                self._load()
            rgb = self._as_rgb()
            return rgb if self._method is None else rgb.transpose(self._method)

    def _as_rgb(self) -> Image.Image:
        picture, reading = self._picture, self._reading
        if picture.mode in _WIDE:
            values = np.asarray(picture)
            self.greys = float(values.min()), float(values.max())
            black_white = (0, 65535) if picture.format in _STRETCHED and picture.mode != "F" else reading.gray_range
            gray = Image.fromarray(gray_8bit(values, self.greys, black_white))
            if (key := picture.info.get("transparency")) is None:
                return gray.convert("RGB")
            over, mask = gray, Image.fromarray((values != key).astype(np.uint8) * 255)
        elif picture.has_transparency_data:
            over = picture if picture.mode == "RGBA" else picture.convert("RGBA")
            mask = over.getchannel("A")
        else:
            return picture if picture.mode == "RGB" else picture.convert("RGB")
        rgb = Image.new("RGB", over.size, reading.background)
        rgb.paste(over, mask=mask)
        return rgb


def read(path: str, reading: Reading, use: Callable[[Picture], Result]) -> Result | Unreadable:
    """What `use` makes of a file.

    Raises MemoryLimitError where memory or file descriptors run out, which is no fault of the file.
    """
    try:
        with warnings.catch_warnings(action="ignore"), ExitStack() as stack:
            with _named(path):
                file = stack.enter_context(_regular(path))
            return use(Picture(path, file, reading, stack))
    except _Refused as error:
        return Unreadable(path, str(error))
    except MemoryError as error:
        raise _no_memory(path) from error


def pixel_count(path: str, reading: Reading) -> int:
    """Width times height, from the file's header alone; 0 where it cannot be read."""
    try:
        with warnings.catch_warnings(action="ignore"), _named(path), _regular(path) as file:
            picture = _identified(file, reading)
            return picture.width * picture.height
    except _Refused:
        return 0


class _Turn:
    """One at a time, of all threads and (Linux) of all processes forked after the import; a killed one lets go."""

    def __init__(self) -> None:
        self._threads = threading.Lock()
        self._file = os.memfd_create("sakd-turn") if sys.platform == "linux" else None
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._fresh)

    def _fresh(self) -> None:
        self._threads = threading.Lock()

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Wait for it, and give it back."""
        with self._threads:
            if sys.platform != "linux" or self._file is None:
                yield
                return
            fcntl.lockf(self._file, fcntl.LOCK_EX)
            try:
                yield
            finally:
                with suppress(AttributeError, OSError):  # glibc would keep the memory for later
                    ctypes.CDLL(None).malloc_trim(0)
                fcntl.lockf(self._file, fcntl.LOCK_UN)


_TURN = _Turn()


@contextmanager
def _named(path: str) -> Iterator[None]:
    """Whatever goes wrong inside is the reason why the file is not read."""
    try:
        yield
    except (_Refused, MemoryLimitError):
        raise
    except Exception as error:  # Pillow raises nearly everything on damaged files, also SyntaxError and struct.error
        raise _Refused(_reason(path, error)) from None


def _without_canvases(picture: Image.Image) -> None:
    """Free the two copies of the picture that WebP's decoder keeps, as soon as it has handed out its pixels."""
    prepare = picture.load_prepare  # type: ignore[attr-defined]

    def free_first() -> None:
        for name in ("_decoder", "load_prepare"):  # this function too: with it the picture would refer to itself
            picture.__dict__.pop(name, None)
        prepare()

    picture.load_prepare = free_first  # type: ignore[attr-defined]


def _regular(path: str) -> BinaryIO:
    """The file, open for reading. A pipe or a device would be waited for, or never end."""
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise _Refused("is no regular file")
    return os.fdopen(handle, "rb")


@cache
def _formats() -> list[str]:
    Image.MAX_IMAGE_PIXELS = None  # `max_pixels` is the limit
    try:
        importlib.import_module("pillow_heif").register_heif_opener()
    except ImportError:
        return FORMATS
    return [*FORMATS, EXTRA]


def _identified(file: BinaryIO, reading: Reading) -> Image.Image:
    """The picture of a file, its header read."""
    try:
        picture = Image.open(file, formats=_formats())
    except UnidentifiedImageError:
        file.seek(0)
        start = file.read(12)
        if start[4:8] == b"ftyp" and start[8:] in _HEIC:
            raise _Refused("is HEIC: pip install 'sakd[heic]' reads it") from None
        raise _Refused("is no picture of a known format" if start else "is empty") from None
    if (pixels := picture.width * picture.height) > reading.max_pixels:
        raise _Refused(f"has {picture.width}x{picture.height} pixels, {pixels:,}: more than data.max_pixels")
    if picture.format == "WEBP" and pixels > MOST_WEBP:
        raise _Refused(f"has {pixels:,} pixels, and WebP takes 12 bytes for each: at most {MOST_WEBP:,}")
    if pixels > max(LARGE, BLANK * (size := os.fstat(file.fileno()).st_size)):
        raise _Refused(f"has {picture.width}x{picture.height} pixels in {size} bytes: nothing but memory to fill")
    return picture


def _orientation(picture: Image.Image) -> int:
    """1 to 8, as EXIF or XMP have it; 1 where they are missing or damaged."""
    if picture.format != "TIFF" and not _WITH_ORIENTATION & picture.info.keys():
        return 1
    try:
        value = picture.getexif().get(_ORIENTATION, 1)
    except Exception:  # as above
        return 1
    return value if value in _UPRIGHT else 1


def gray_8bit(
    values: NDArray[Any], greys: tuple[float, float], black_white: tuple[float, float] | None
) -> NDArray[np.uint8]:
    """Greys of more than 8 bits as 8: linear from black to white, rounded, what lies outside is clipped.

    greys        the least and the greatest value
    black_white  None: whole numbers must use the top bit of 16, of which the upper 8 are taken, as Pillow does; floats
                 must lie in 0 .. 1. Anything else may mean several things: raises `_Refused`
    """
    low, high = greys
    whole = values.dtype.kind in "iu"
    if not whole and not np.isfinite([low, high]).all():
        raise _Refused("holds values that are not finite")
    if black_white is None:
        limits = (0, 65535) if whole else (0, 1)
        if low < limits[0] or high > limits[1] or (whole and 0 < high < 2**15):
            raise _Refused(
                f"holds greys from {low:g} to {high:g}, and does not say what white is: --set data.gray_range=LOW,HIGH"
            )
        black_white = limits
        if whole:
            return np.right_shift(values, 8, dtype=np.int32).astype(np.uint8)
    black, white = black_white
    gray = np.empty(values.shape, np.uint8)
    for row, line in enumerate(values):  # a whole picture as float64 would take eight times its size
        gray[row] = ((line.astype(np.float64) - black) * (255 / (white - black))).round().clip(0, 255)
    return gray


def _reason(path: str, error: Exception) -> str:
    """What is wrong with a file. Raises MemoryLimitError where nothing is."""
    number = error.errno if isinstance(error, OSError) else None
    if "create decoder" in str(error):  # WebP's, which allocates at once, and says no more
        try:
            np.empty(CANVASES, np.uint8)
        except MemoryError:
            raise _no_memory(path) from error
    if isinstance(error, MemoryError) or number == errno.ENOMEM or "out of memory" in str(error).lower():
        raise _no_memory(path) from error
    if number in (errno.EMFILE, errno.ENFILE):
        raise MemoryLimitError(f"{path}: too many files are open at once to read it", "raise the limit: ulimit -n 4096")
    if number is not None:
        return os.strerror(number).lower()
    message = " ".join(str(error).split()).replace(path, "it")[:60]
    return f"is damaged ({message or type(error).__name__})"


def _no_memory(path: str) -> MemoryLimitError:
    return MemoryLimitError(
        f"{path}: memory ran out while it was read", "--set data.workers=1, a lower data.max_pixels"
    )
