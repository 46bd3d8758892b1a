"""Data sets in words; the loaders are in `data/`."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, NonNegativeInt, PositiveInt, SerializeAsAny

from sakd_cli.config.words import Words, by_name, chosen_by_name
from sakd_cli.reading import expanded


class DataConfig(Words):
    """Which images, and how many.

    root      folder of the data set's files; None: the user's cache folder
    classes   only the first so many classes, for training and for testing; None: all of them
    limit     train on this many images only, the same number of each class as far as it goes
    holdout   share of the training images kept for choosing the best epoch; 0: the test set does, as in the literature
    split_seed  draws what limit and holdout keep, whatever the run's seed is, so that no other run trains on it
    download  fetch missing files when a network is there
    """

    name: str
    root: Annotated[Path, AfterValidator(lambda path: expanded(path).absolute())] | None = None
    classes: Annotated[int, Field(ge=2)] | None = None
    limit: PositiveInt | None = None
    holdout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.1
    split_seed: NonNegativeInt = 0
    download: bool = True

    def identity(self) -> dict[str, Any]:
        """The words, with dotted keys, in which two runs agree that can be teacher and student."""
        return {"data.name": self.name, "data.classes": self.classes}


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


DATASETS = by_name(DataConfig)
Data = Annotated[SerializeAsAny[DataConfig], chosen_by_name("data set", DATASETS, default="cifar100")]
