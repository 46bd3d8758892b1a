"""Name of a data set -> what loads it. To add a data set: a file here, a config class, one line below."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from sakd_cli.config import code, plugins
from sakd_cli.config.datasets import DataConfig
from sakd_cli.data import imagefolder
from sakd_cli.data.dataset import Dataset, first_classes
from sakd_cli.data.shapes import load_shapes
from sakd_cli.data.torchvision_sets import CIFAR10, CIFAR100, load_cifar, load_torchvision
from sakd_cli.errors import DataError


def _plugged(name: str, function: Callable[..., object]) -> Callable[[Any], Dataset]:
    def load(config: DataConfig) -> Dataset:
        found = code.construct(function, config, {"config": config, "root": config.root})
        where = code.line_of(function) or name
        if not isinstance(found, Dataset):
            raise DataError(f"{where}: returned a {type(found).__name__}, not a Dataset of sakd_cli.api", code.GUIDE)
        if wrong := found.wrong():
            raise DataError(f"{where}: {wrong}", code.GUIDE)
        return replace(found, name=config.name)

    return load


_BUILTIN: dict[str, Callable[[Any], Dataset]] = {
    "cifar10": load_cifar,
    "cifar100": load_cifar,
    "shapes": load_shapes,
    "imagefolder": imagefolder.load_imagefolder,
    "tiny-imagenet": imagefolder.load_published,
    "cinic10": imagefolder.load_published,
    "imagenet": imagefolder.load_published,
    "torchvision/NAME": load_torchvision,
}
DATASETS = plugins.Table("data set", _BUILTIN, plugins.DATASETS, _plugged, folder="data")
# What is known of those that are files, without the files.
DESCRIBED: dict[str, Dataset] = {"cifar10": CIFAR10, "cifar100": CIFAR100}


def describe(config: DataConfig) -> Dataset:
    """Classes, normalisation and size of images of the data set; its splits may be empty."""
    return apply_overrides(DESCRIBED[config.name], config) if config.name in DESCRIBED else load(config)


def load(config: DataConfig) -> Dataset:
    """The data set that `config` names, with the classes it asks for: limit and hold-out are the caller's."""
    return apply_overrides(DATASETS.row(config.row)(config), config)


def apply_overrides(dataset: Dataset, config: DataConfig) -> Dataset:
    """The data set with the classes and the normalisation that `config` asks for."""
    few = first_classes(dataset, config.classes)
    return replace(few, mean=config.mean or few.mean, std=config.std or few.std)
