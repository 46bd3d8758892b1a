"""Name of a data set -> what loads it. To add a data set: a file here, a config class, one line below."""

from collections.abc import Callable
from typing import Any

from sakd_cli.config.datasets import DataConfig
from sakd_cli.data.cifar import CIFAR10, CIFAR100, load_cifar10, load_cifar100
from sakd_cli.data.dataset import Dataset, first_classes
from sakd_cli.data.shapes import load_shapes

DATASETS: dict[str, Callable[[Any], Dataset]] = {
    "cifar10": load_cifar10,
    "cifar100": load_cifar100,
    "shapes": load_shapes,
}
# What is known of those that are files, without the files.
DESCRIBED: dict[str, Dataset] = {"cifar10": CIFAR10, "cifar100": CIFAR100}


def describe(config: DataConfig) -> Dataset:
    """Classes, normalisation and size of images of the data set; its splits may be empty."""
    return first_classes(DESCRIBED[config.name], config.classes) if config.name in DESCRIBED else load(config)


def load(config: DataConfig) -> Dataset:
    """The data set that `config` names, with the classes it asks for: limit and hold-out are the caller's."""
    return first_classes(DATASETS[config.name](config), config.classes)
