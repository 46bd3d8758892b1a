"""Data sets in words; the loaders are in `data/`."""

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    SerializeAsAny,
    model_validator,
)

from sakd_cli.config.base import Config, by_name, chosen_by_name
from sakd_cli.files import expanded

Channels = tuple[float, float, float]


def _positive(values: Channels) -> Channels:
    if min(values) <= 0:
        raise ValueError("must be above 0")
    return values


def _shares(values: tuple[float, float]) -> tuple[float, float]:
    if not 0 < values[0] <= values[1] <= 1:
        raise ValueError("is two shares, rising, above 0 and up to 1")
    return values


class DataConfig(Config):
    """Which images, and how many.

    root      folder of the data set's files; None: the user's cache folder
    classes   only the first so many classes, for training and for testing; None: all of them
    limit     train on this many images only, the same number of each class as far as it goes
    validation  fraction of the training images that selects the best epoch; 0: the test set does, as in the literature
    split_seed  draws what limit and validation keep, whatever the run's seed is, so that no other run trains on it
    download  fetch missing files when a network is there
    mean, std  per channel, of pixels between 0 and 1, by which images are normalised; None: those of the data set
    """

    own: ClassVar[set[str]] = {"name", "classes"}
    name: str
    root: Annotated[Path, AfterValidator(lambda path: expanded(path).absolute())] | None = None
    classes: Annotated[int, Field(ge=2)] | None = None
    limit: PositiveInt | None = None
    validation: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.1
    split_seed: NonNegativeInt = 0
    download: bool = True
    mean: Channels | None = None
    std: Annotated[Channels, AfterValidator(_positive)] | None = None

    def identity(self) -> dict[str, Any]:
        """The words, with dotted keys, in which two runs agree that can be teacher and student."""
        words = self.model_dump(mode="json", include=self.own)
        return {f"data.{key}": value for key, value in words.items()}


class CIFAR10Config(DataConfig):
    """50,000 + 10,000 photographs, 32x32, 10 classes (Krizhevsky 2009)"""

    name: Literal["cifar10"] = "cifar10"


class CIFAR100Config(DataConfig):
    """50,000 + 10,000 photographs, 32x32, 100 classes (Krizhevsky 2009)"""

    name: Literal["cifar100"] = "cifar100"


class ShapesConfig(DataConfig):
    """Drawn shapes, 32x32, 20 classes, nothing to download

    train, test  number of images drawn for each split
    seed         of the drawing, apart from the run's seed: the same images in every run
    """

    name: Literal["shapes"] = "shapes"
    train: PositiveInt = 10000
    test: PositiveInt = 2000
    seed: NonNegativeInt = 0


class FilesConfig(DataConfig):
    """Pictures in files, of any size and kind.

    size          side in pixels of what a network gets
    resize        shorter side before that square is cut from the middle; None: 8/7 of size (256 for 224), or size
                  where augmentation is by border
    augment       crop: the standard random resized crop; border: a crop of the size from within a border of size/8;
                  auto: border up to 64 pixels
    crop          share of a picture's area that a random resized crop takes, from and to
    flip          whether a mirrored image keeps its class
    cache         decode all pictures once and hold them in memory, on the device; auto: where that takes no more than
    cache_limit   so many GB
    workers       processes that read pictures where they are not held; None: one per processor, 8 at most
    on_bad_image  fail: a file that cannot be read ends the run; skip: all files are read once before, and such left out
    """

    own: ClassVar[set[str]] = {"name", "classes", "size"}
    size: Annotated[int, Field(ge=8, le=4096)] = 224
    resize: PositiveInt | None = None
    augment: Literal["auto", "crop", "border"] = "auto"
    crop: Annotated[tuple[float, float], AfterValidator(_shares)] = (0.08, 1.0)
    flip: bool = True
    cache: Literal["auto"] | bool = "auto"
    cache_limit: NonNegativeFloat = 4.0
    workers: NonNegativeInt | None = None
    on_bad_image: Literal["fail", "skip"] = "fail"

    @model_validator(mode="after")
    def _the_square_fits(self) -> "FilesConfig":
        if self.resize is not None and self.resize < self.size:
            raise ValueError(f"resize {self.resize} is smaller than the square of {self.size} that is cut from it")
        return self

    @property
    def bordered(self) -> bool:
        """Whether a training image is cut from within a border."""
        return self.size <= 64 if self.augment == "auto" else self.augment == "border"

    @property
    def resized(self) -> int:
        """Shorter side in pixels before the square is cut."""
        return self.resize or (self.size if self.bordered else round(self.size * 8 / 7))


class ImageFolderConfig(FilesConfig):
    """Your own images: --data-root DIR with train/CLASS/* and val/CLASS/*, or with CLASS/* alone

    split  share of the images kept for testing, of every class alike, where DIR has no folders train and val
    """

    own: ClassVar[set[str]] = {"name", "classes", "size", "root"}
    name: Literal["imagefolder"] = "imagefolder"
    split: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.2


class TinyImageNetConfig(FilesConfig):
    """100,000 + 10,000 photographs, 64x64, 200 classes, as the official archive has them"""

    name: Literal["tiny-imagenet"] = "tiny-imagenet"
    size: Annotated[int, Field(ge=8, le=4096)] = 64


class CINIC10Config(FilesConfig):
    """90,000 + 90,000 photographs, 32x32, 10 classes (Darlow et al. 2018); its folder valid is not used"""

    name: Literal["cinic10"] = "cinic10"
    size: Annotated[int, Field(ge=8, le=4096)] = 32


class ImageNetConfig(FilesConfig):
    """1.28 million + 50,000 photographs of any size, 1000 classes: folders train and val of synsets (ILSVRC 2012)"""

    name: Literal["imagenet"] = "imagenet"


DATASETS = by_name(DataConfig)
Data = Annotated[SerializeAsAny[DataConfig], chosen_by_name("data set", DATASETS, default="cifar100")]
