"""One picture file to RGB pixels, whatever its kind; no torch, so that a process for it starts at once."""

import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

ENDINGS = frozenset([".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"])
_WIDE = {"I;16", "I;16B", "I;16L", "I;16N", "I"}  # modes of one channel with 16 bits


class Unreadable(NamedTuple):
    """A file that is no picture, or not a whole one."""

    path: str
    reason: str


def open_rgb(path: str) -> Image.Image | Unreadable:
    """The whole picture, decoded, as RGB; transparency is dropped, of an animation the first frame is taken.

    Sixteen bits of grey become eight by leaving out the lower ones: PIL alone would cut all above 255 to white.
    """
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
        return Unreadable(path, _told(path, error))


def _told(path: str, error: Exception) -> str:
    if isinstance(error, OSError) and error.errno is not None:
        return (error.strerror or "cannot be read").lower()
    if isinstance(error, UnidentifiedImageError):
        return "is empty" if Path(path).stat().st_size == 0 else "is no picture"
    if isinstance(error, Image.DecompressionBombWarning | Image.DecompressionBombError):
        return "has too many pixels"
    words = " ".join(str(error).split()).replace(path, "it")[:60]
    return f"is damaged ({words or type(error).__name__})"


def fault(path: str) -> Unreadable | None:
    """What is wrong with a file, found by decoding all of it; None: nothing."""
    seen = open_rgb(path)
    return seen if isinstance(seen, Unreadable) else None
