"""Config of data sets; the loaders are in `data/`."""

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    SerializeAsAny,
    model_validator,
)

from sakd_cli.config import code, plugins
from sakd_cli.config.base import Config, by_name, chosen_by_name, must
from sakd_cli.config.preprocessing import (
    Byte,
    Interpolation,
    Preprocessing,
    ResizeMode,
    Side,
    Size,
    height_width,
    size_text,
)
from sakd_cli.errors import unknown
from sakd_cli.files import expanded

Channels = tuple[float, float, float]
Place = Annotated[Path, AfterValidator(lambda path: expanded(path).absolute())]

Two = tuple[float, float]
Shares = Annotated[Two, must(lambda at: 0 < at[0] <= at[1] <= 1, "is two shares, rising, above 0 and up to 1")]
Rising = Annotated[Two, must(lambda at: at[0] < at[1], "is black and white, the lower value first")]
Beta = Annotated[NonNegativeFloat, must(lambda a: not a or 0.05 <= a <= 1000, "is 0, or from 0.05 to 1000")]

Geometry = Literal["auto", "crop", "border", "none"]
Policy = Literal["randaugment", "autoaugment", "trivialaugment"]
POLICIES = get_args(Policy)


def _words(value: Any) -> Any:
    """One policy alone is a list of one."""
    known = (*get_args(Geometry), *POLICIES)
    for word in (value,) if isinstance(value, str) else value if isinstance(value, list | tuple) else ():
        if word not in known:
            raise ValueError(unknown("change", str(word), known))
    return (value,) if value in POLICIES else value


def _one_of_a_kind(words: Any) -> Any:
    for kind in (POLICIES, get_args(Geometry)):
        if not isinstance(words, str) and len([word for word in words if word in kind]) > 1:
            raise ValueError(f"{', '.join(words)}: one of {', '.join(kind)} at most")
    return words


Augment = Annotated[Geometry | tuple[Geometry | Policy, ...], BeforeValidator(_words), AfterValidator(_one_of_a_kind)]


class DataConfig(Config):
    """Which images, and how many."""

    own: ClassVar[set[str]] = {"name", "classes"}
    published: ClassVar[tuple[int, int] | None] = None  # training images and classes, where every class has as many
    name: str
    """Data set, as in `sakd list datasets`."""
    root: Place | None = None
    """Folder of the data set's files; null: the user's cache folder."""
    classes: Annotated[int, Field(ge=2)] | None = None
    """Use only the first so many classes, for training and for testing; null: all of them."""
    limit: PositiveInt | None = None
    """Train on this many images only, equally many of each class as far as possible; null: all of them."""
    validation: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.1
    """Fraction of the training images that selects the best epoch; 0: the test set does; unused beside a folder val."""
    balance: Literal["balanced", "repeated-factor"] | None = None
    """Show rare classes more often: balanced: all equally; repeated-factor: those below a share; null: as they are."""
    balance_threshold: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    """Share of the images below which repeated-factor repeats a class; null: 1 / classes."""
    augment: Augment = "auto"
    """auto: as the data set is cropped and mirrored; and/or randaugment, autoaugment or trivialaugment."""
    randaugment: tuple[PositiveInt, Annotated[int, Field(ge=0, le=30)]] = (2, 9)
    """Operations for each image and their magnitude, 0 to 30, of randaugment (Cubuk et al. 2020)."""
    jitter: NonNegativeFloat = 0.0
    """Change brightness, contrast and saturation by up to this factor, 0.4 is usual; 0: do not."""
    erase: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    """Chance that a random box of a training image is erased, 0.1 to 0.25 is usual (Zhong et al. 2020)."""
    mixup: Beta = 0.0
    """Blend pairs of training images by shares from Beta(mixup, mixup), 0.2 to 1 (Zhang et al. 2018); 0: do not."""
    cutmix: Beta = 0.0
    """Paste a box of one training image into another, its area from Beta(cutmix, cutmix) (Yun et al. 2019); 0: not."""
    unlabeled: Place | None = None
    """Folder of pictures without labels, mixed into a distillation's training images: the teacher alone counts."""
    split_seed: NonNegativeInt = 0
    """Random seed of limit and validation, whatever the run's seed is, so that all runs leave out the same images."""
    download: bool = True
    """Download missing files."""
    mean: Channels | None = None
    """Mean per channel of pixels in [0, 1] for the normalisation; null: the data set's."""
    std: Annotated[Channels, must(lambda values: min(values) > 0, "must be above 0")] | None = None
    """Standard deviation per channel of pixels in [0, 1] for the normalisation; null: the data set's."""

    @property
    def geometry(self) -> Geometry:
        words = (self.augment,) if isinstance(self.augment, str) else self.augment
        found: list[Any] = [word for word in words if word not in POLICIES]
        return found[0] if found else "auto"

    @property
    def mixed(self) -> list[str]:
        """The keys by which images are mixed in pairs."""
        return [key for key in ("mixup", "cutmix") if getattr(self, key)]

    @property
    def policy(self) -> str | None:
        return next((word for word in self.augment if word in POLICIES), None)

    @model_validator(mode="after")
    def _settings_fit(self) -> "DataConfig":
        if self.geometry != "auto" and not isinstance(self, FilesConfig):
            raise ValueError(f"augment {self.geometry} is of pictures in files; {self.name} is cropped from a border")
        if self.balance_threshold is not None and self.balance != "repeated-factor":
            raise ValueError("balance_threshold is of balance=repeated-factor alone")
        if self.policy != "randaugment" and self.randaugment != type(self).model_fields["randaugment"].default:
            raise ValueError("randaugment has the operations and magnitude of augment=randaugment alone")
        return self

    def training_images(self) -> int | None:
        """Training images before limit and validation; None where only the files say it."""
        if self.published is None:
            return None
        images, classes = self.published
        return images * min(self.classes or classes, classes) // classes

    @property
    def row(self) -> str:
        """Its row in the table of data sets."""
        return str(type(self).model_fields["name"].default)

    def identity(self) -> dict[str, Any]:
        """The settings, with dotted keys, that a student's run must share with its teacher's."""
        return {f"data.{key}": value for key, value in self.model_dump(mode="json", include=self.own).items()}


class CIFAR10Config(DataConfig):
    """50,000 + 10,000 photographs, 32x32, 10 classes (Krizhevsky 2009)"""

    published: ClassVar[tuple[int, int] | None] = (50000, 10)
    name: Literal["cifar10"] = "cifar10"


class CIFAR100Config(DataConfig):
    """50,000 + 10,000 photographs, 32x32, 100 classes (Krizhevsky 2009)"""

    published: ClassVar[tuple[int, int] | None] = (50000, 100)
    name: Literal["cifar100"] = "cifar100"


class ShapesConfig(DataConfig):
    """Drawn shapes, 32x32 or any size, 20 classes, nothing to download"""

    own: ClassVar[set[str]] = {"name", "classes", "size"}
    name: Literal["shapes"] = "shapes"
    train: Annotated[PositiveInt, Field(le=1_000_000)] = 10000
    """Number of training images to draw."""
    test: Annotated[PositiveInt, Field(le=1_000_000)] = 2000
    """Number of test images to draw."""
    size: Annotated[int, Field(ge=8, le=256)] = 32
    """Side in pixels of the drawn images."""
    seed: NonNegativeInt = 0
    """Random seed of the drawing, apart from the run's seed: the same images in every run."""

    @model_validator(mode="after")
    def _fits_into_memory(self) -> "ShapesConfig":
        if (size := 3e-9 * (self.train + self.test) * self.size**2) > 6.2:  # a million of 32 pixels each
            raise ValueError(f"train, test and size ask for {size:,.1f} GB of images in memory, 6.2 at most")
        return self

    def training_images(self) -> int | None:
        return self.train if self.classes is None else None


class FilesConfig(DataConfig):
    """Pictures in files, of any size and kind."""

    own: ClassVar[set[str]] = {"name", "classes", "size"}
    preprocessing: str | None = None
    """Take size, resize, interpolation, mean and std from timm/NAME or torchvision/NAME, as far as they are not set."""
    size: Size = 224
    """Side in pixels of what a network gets, or its height and width."""
    resize: Side | None = None
    """Shorter side in pixels before `size` is cut from the middle; null: 8/7 of that of size, the same for border."""
    resize_mode: ResizeMode = "shorter"
    """shorter: keep a picture's proportions; squash: make it as wide and high as size is; none: do not resize."""
    interpolation: Interpolation = "bilinear"
    """How pixels are resampled: nearest, bilinear, bicubic or lanczos."""
    antialias: bool = True
    """Low-pass before making a picture smaller, as Pillow does; off: as torchvision resizes tensors without it."""
    augment: Augment = "auto"
    """crop: random resized crop, border: from a border of size/8, none, auto: border up to 64; or a policy as well."""
    crop: Shares = (0.08, 1.0)
    """Fraction of a picture's area that a random resized crop covers, from and to; torchvision's defaults."""
    flip: bool = True
    """Whether training images are mirrored at random."""
    cache: Literal["auto"] | bool = "auto"
    """Decode all pictures once and cache them in memory, on the device; auto: where that needs at most cache_limit."""
    cache_limit: NonNegativeFloat = 4.0
    """Largest size in GB of the images in memory with cache auto."""
    workers: NonNegativeInt | None = None
    """Processes that read pictures which are not in memory; null: one per processor, 8 at most."""
    background: tuple[Byte, Byte, Byte] = (255, 255, 255)
    """Red, green and blue, 0 to 255, behind pictures that are transparent in places."""
    orientation: bool = True
    """Turn photographs upright as their EXIF orientation says; off: as they are stored."""
    gray_range: Rising | None = None
    """Black and white of grey pictures of more than 8 bits; null: 0,65535 where the top bit is used, 0,1 in floats."""
    max_pixels: PositiveInt = 200_000_000
    """Pixels that a picture may have, width times height."""
    split_by: Literal["path", "content"] = "path"
    """What decides which part of a split a picture belongs to: its path below root, or its content (SHA-256)."""
    fingerprint: Literal["auto", "content", "sizes"] = "auto"
    """What a run keeps of every file: content: size and SHA-256; sizes: size alone; auto: content up to 20 GB."""
    on_bad_image: Literal["fail", "skip"] = "fail"
    """fail: an unreadable file ends the run; skip: all files are checked first and unreadable ones left out."""

    @model_validator(mode="after")
    def _the_square_fits(self) -> "FilesConfig":
        if self.resize is not None and self.resize < min(height_width(self.size)):
            size = size_text(self.size)
            raise ValueError(f"resize {self.resize} is smaller than the {size} pixels that are cut from it")
        if self.resize is not None and self.resize_mode == "none":
            raise ValueError("resize_mode none leaves pictures as large as they are; resize belongs to the others")
        if self.interpolation == "lanczos" and not self.antialias:
            raise ValueError("interpolation lanczos is only there with antialias")
        return self

    @property
    def bordered(self) -> bool:
        return max(height_width(self.size)) <= 64 if self.geometry == "auto" else self.geometry == "border"

    @property
    def border(self) -> int:
        """Width in pixels of the border that a training image is cut from within."""
        return min(height_width(self.size)) // 8 if self.bordered else 0

    @property
    def seen(self) -> Preprocessing:
        """How pictures are shown, with the values that settings which are left open come to."""
        side = min(height_width(self.size))
        margin = not self.bordered and self.geometry != "none" and self.resize_mode != "none"
        resize = self.resize or (round(side * 8 / 7) if margin else side)
        return Preprocessing(resize=resize, **self.model_dump(include=Preprocessing.model_fields.keys() - {"resize"}))


class ImageFolderConfig(FilesConfig):
    """Your own images: --data-root DIR with train/CLASS/* and val/CLASS/*, or with CLASS/* alone"""

    own: ClassVar[set[str]] = {"name", "classes", "size", "root", "manifest"}
    name: Literal["imagefolder"] = "imagefolder"
    manifest: Place | None = None
    """CSV file that lists the pictures, with columns path, label and perhaps split; paths are from root, or from it."""
    split: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.2
    """Fraction of each class used for testing where the folder has no train and val."""


class TorchvisionConfig(FilesConfig):
    """A classification data set of torchvision by its class there, such as torchvision/OxfordIIITPet"""

    name: Annotated[str, Field(pattern=r"^torchvision/\w+$")] = "torchvision/NAME"
    split: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.2
    """Fraction of each class used for testing where the data set has no test images."""


class TinyImageNetConfig(FilesConfig):
    """100,000 + 10,000 photographs, 64x64, 200 classes; cropped from a border of 8 (published: flips alone, a preset)

    The published runs only mirror, and normalise with CIFAR-10's statistics: preset `tiny-imagenet-sakd`. Our default
    crops, as every other small set is cropped (240 epochs of flips alone overfit), and normalises with its own
    statistics.
    """

    name: Literal["tiny-imagenet"] = "tiny-imagenet"
    size: Size = 64


class CINIC10Config(FilesConfig):
    """90,000 + 90,000 photographs, 32x32, 10 classes (Darlow et al. 2018); its folder valid is not used"""

    name: Literal["cinic10"] = "cinic10"
    size: Size = 32


class ImageNetConfig(FilesConfig):
    """1.28 million + 50,000 photographs of any size, 1000 classes: folders train and val of synsets (ILSVRC 2012)"""

    name: Literal["imagenet"] = "imagenet"


def _plugged(name: str, function: object) -> type[DataConfig]:
    """The settings of somebody's data set; a student's run shares them with its teacher's."""
    if not callable(function):
        raise ValueError("is no function")
    found = code.settings_class(name, function, DataConfig, ("config", "root"))
    found.own = {"name", "classes", *(found.model_fields.keys() - DataConfig.model_fields.keys())}
    return found


DATASETS = plugins.Table[type[Any]]("data set", by_name(DataConfig), plugins.DATASETS, _plugged)
Data = Annotated[SerializeAsAny[DataConfig], chosen_by_name("data set", DATASETS, default="cifar100")]
