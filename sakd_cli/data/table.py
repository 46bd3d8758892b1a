"""Name of a data set -> what loads it. To add a data set: a file here, a config class, one line below."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from sakd_cli.config.datasets import DataConfig
from sakd_cli.data import imagefolder
from sakd_cli.data.cifar import CIFAR10, CIFAR100, load_cifar
from sakd_cli.data.dataset import Dataset, first_classes
from sakd_cli.data.shapes import load_shapes
from sakd_cli.data.torchvision_sets import load_torchvision
from sakd_cli.errors import no_row

DATASETS: dict[str, Callable[[Any], Dataset]] = {
    "cifar10": load_cifar,
    "cifar100": load_cifar,
    "shapes": load_shapes,
    "imagefolder": imagefolder.load_imagefolder,
    "tiny-imagenet": imagefolder.load_published,
    "cinic10": imagefolder.load_published,
    "imagenet": imagefolder.load_published,
    "torchvision/NAME": load_torchvision,
}
# What is known of those that are files, without the files.
DESCRIBED: dict[str, Dataset] = {"cifar10": CIFAR10, "cifar100": CIFAR100}


def describe(config: DataConfig) -> Dataset:
    """Classes, normalisation and size of images of the data set; its splits may be empty."""
    return apply_overrides(DESCRIBED[config.name], config) if config.name in DESCRIBED else load(config)


def load(config: DataConfig) -> Dataset:
    """The data set that `config` names, with the classes it asks for: limit and hold-out are the caller's."""
    if config.row not in DATASETS:
        raise no_row("data set", config.row, "data")
    return apply_overrides(DATASETS[config.row](config), config)


def apply_overrides(dataset: Dataset, config: DataConfig) -> Dataset:
    """The data set with the classes and the normalisation that `config` asks for."""
    few = first_classes(dataset, config.classes)
    return replace(few, mean=config.mean or few.mean, std=config.std or few.std)
