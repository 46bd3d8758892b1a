"""How a picture becomes what a network sees, without torch: it is part of the network, and stands on its card."""

import importlib
import math
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, PositiveInt

from sakd_cli.config.base import Config
from sakd_cli.errors import UsageError, download_error, first_line

ImageSize = int | tuple[int, int]  # side of a square image, or height and width, in pixels


def height_width(size: ImageSize) -> tuple[int, int]:
    """Both sides; a number is the side of a square."""
    return (size, size) if isinstance(size, int) else size


def side_of(height: int, width: int) -> ImageSize:
    """The shortest way to say a size: the side of a square, or height and width."""
    return height if height == width else (height, width)


Byte = Annotated[int, Field(ge=0, le=255)]
Pixels = Annotated[int, Field(ge=8, le=4096)]
Side = Annotated[PositiveInt, Field(le=8192)]
Size = Annotated[Pixels | tuple[Pixels, Pixels], AfterValidator(lambda size: side_of(*height_width(size)))]
ResizeMode = Literal["shorter", "squash", "none"]
Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos"]
HUB = "hf-hub:"  # of the Hugging Face hub, whose config.json says which network of timm's it is
SOURCE = "data.preprocessing"  # the setting that takes all from a library's network
MEANT = f"{SOURCE} is timm/NAME, torchvision/NAME or torchvision/WEIGHTS.VERSION"


def size_text(size: ImageSize) -> str:
    """`96x128`: height and width."""
    height, width = height_width(size)
    return f"{height}x{width}"


class Preprocessing(Config):
    """From a picture file to the pixels that a network sees: opened, resized, its middle cut out.

    The fields are the settings `data.*` of the same names, with their effective values.
    """

    size: Annotated[Side | tuple[Side, Side], AfterValidator(lambda size: side_of(*height_width(size)))]
    resize: Side
    resize_mode: ResizeMode = "shorter"
    interpolation: Interpolation = "bilinear"
    antialias: bool = True
    orientation: bool = True
    background: tuple[Byte, Byte, Byte] = (255, 255, 255)
    gray_range: tuple[float, float] | None = None

    def scaled(self, height: int, width: int) -> tuple[int, int]:
        """Height and width to which a picture of this size is resized, before the middle is cut out.

        The box is `size` enlarged until its shorter side is `resize`. squash: the box. shorter: as small as covers the
        box in the picture's own proportions, the longer side rounded down as torchvision's Resize does.
        """
        if self.resize_mode == "none":
            return height, width
        own = height_width(self.size)
        high, wide = (round(side * self.resize / min(own)) for side in own)
        if self.resize_mode == "squash":
            return high, wide
        if high * width >= wide * height:  # the height decides
            return high, max(wide, width * high // height)
        return max(high, height * wide // width), wide

    @property
    def text(self) -> str:
        """In words, for a README."""
        plain = "" if self.antialias else ", without antialiasing"
        how = {
            "shorter": f"shorter side {self.resize}, {self.interpolation}{plain}",
            "squash": f"squashed to a shorter side of {self.resize}, {self.interpolation}{plain}",
            "none": "not resized",
        }
        upright = "turned upright by EXIF" if self.orientation else "as stored, whatever EXIF says"
        return f"{upright}, over {self.background}, {how[self.resize_mode]}, the middle {size_text(self.size)} cut out"

    def at(self, other: "Preprocessing") -> "Preprocessing | None":
        """The same part of a picture at the size of another network, resampled as that one does; None: the same."""
        alike = {"size", "interpolation", "antialias"}
        theirs = other.model_dump(include=alike)
        if theirs == self.model_dump(include=alike):
            return None
        ratio = min(height_width(other.size)) / min(height_width(self.size))
        return self.model_copy(update=theirs | {"resize": max(1, round(self.resize * ratio))})

    def alike(self, other: "Preprocessing") -> bool:
        """Whether images of both have the same proportions, to within two per cent."""
        (height, width), (high, wide) = height_width(self.size), height_width(other.size)
        return abs(height * wide - width * high) <= 0.02 * height * wide

    def differences(self, other: "Preprocessing", whose: str = "its card") -> list[str]:
        """`resize 64; its card says 73`, for each setting that `other`, that of the card, has otherwise."""
        mine, theirs = (one.model_dump(mode="json") for one in (self, other))
        others = [key for key in mine if mine[key] != theirs[key]]
        return [f"{key} {_text(mine[key])}; {whose} says {_text(theirs[key])}" for key in others]


def _text(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def library_preprocessing(name: str) -> dict[str, Any]:
    """Settings `data.*` with which a network of timm or torchvision was trained. UsageError where that is not known."""
    library, _, entry = name.partition("/")
    if library not in _LIBRARIES or not entry:
        raise UsageError(f"{name}: {MEANT}")
    try:
        return _LIBRARIES[library](entry)
    except UsageError:
        raise
    except Exception as error:  # whatever a library raises on a name that it does not know
        if HUB in entry:
            raise download_error(f"{name}: cannot be had from the hub", error) from None
        raise UsageError(f"{name}: {library} does not say how it was trained ({first_line(error)})", MEANT) from None


def _of_torchvision(entry: str) -> dict[str, Any]:
    models = importlib.import_module("torchvision.models")
    weights = models.get_weight(entry) if "." in entry else models.get_model_weights(entry).DEFAULT
    shown = weights.transforms()
    return {
        "size": shown.crop_size[0],
        "resize": shown.resize_size[0],
        "resize_mode": "shorter",
        "interpolation": shown.interpolation.value,
        "antialias": bool(shown.antialias),
        "mean": tuple(shown.mean),
        "std": tuple(shown.std),
    }


def of_timm(what: str, module: str = "timm") -> Any:
    """A module of timm. UsageError, naming what asks for it, where it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UsageError(f"{what}: timm is not installed", hint="pip install 'sakd[timm]'") from None


def timm_config_of(entry: str) -> Any:
    """What timm says of a network, as its PretrainedCfg; of one on the Hugging Face hub, what its config.json says."""
    timm = of_timm(f"timm/{entry}")
    if not entry.startswith(HUB):
        return timm.get_pretrained_cfg(entry)
    said = timm.models.load_model_config_from_hf(entry.removeprefix(HUB))[0]
    kind = of_timm(entry, "timm.models._pretrained").PretrainedCfg  # its values where that says nothing
    return kind(**{key: value for key, value in said.items() if key in kind.__dataclass_fields__ and value is not None})


def _of_timm(entry: str) -> dict[str, Any]:
    if (found := timm_config_of(entry)) is None:
        raise UsageError(f"timm/{entry}: timm does not say how it was trained", MEANT)
    _, height, width = found.input_size
    if found.crop_mode not in ("center", "squash"):
        raise UsageError(f"timm/{entry}: crops by {found.crop_mode!r}, which is not offered here")
    return {
        "size": side_of(height, width),
        "resize": math.floor(min(height, width) / found.crop_pct),
        "resize_mode": "squash" if found.crop_mode == "squash" else "shorter",
        "interpolation": found.interpolation,
        "antialias": True,
        "mean": tuple(found.mean),
        "std": tuple(found.std),
    }


_LIBRARIES = {"timm": _of_timm, "torchvision": _of_torchvision}
