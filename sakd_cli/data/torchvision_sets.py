"""Classification data sets of torchvision by name, read by torchvision's own classes."""

import importlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image

from sakd_cli.config.base import own_name
from sakd_cli.config.datasets import TorchvisionConfig
from sakd_cli.data.cifar import quiet
from sakd_cli.data.dataset import Dataset, Split, first_classes, hold_out
from sakd_cli.data.files import resize_and_center_crop
from sakd_cli.data.imagefolder import dataset_of
from sakd_cli.data.pictures import FolderContents, SplitContents
from sakd_cli.data.published import IMAGENET, default_root
from sakd_cli.errors import DataError, UsageError, first_line, unknown


class Known(NamedTuple):
    """Arguments of the class for each part; None: there is none. flip: whether a mirrored image keeps its class."""

    train: Mapping[str, Any]
    val: Mapping[str, Any] | None = None
    test: Mapping[str, Any] | None = None
    flip: bool = True


def _split(*values: str, flip: bool = True, **more: Any) -> Known:
    """By the argument `split`: train and test, or train, val and test."""
    train, *others = ({"split": value} | more for value in values)
    return Known(train, others[0] if len(others) > 1 else None, others[-1], flip)


_DIGITS = Known({"train": True}, None, {"train": False}, flip=False)
_THREE, _TWO = _split("train", "val", "test"), _split("train", "test")
# fmt: off
KNOWN = {
    "Caltech101": Known({}), "Caltech256": Known({}), "EuroSAT": Known({}), "SUN397": Known({}),
    "SEMEION": Known({}, flip=False),
    "Country211": _split("train", "valid", "test"), "DTD": _THREE, "Flowers102": _THREE, "PCAM": _THREE,
    "RenderedSST2": _split("train", "val", "test", flip=False),
    "FGVCAircraft": _THREE, "FER2013": _TWO, "Food101": _TWO, "StanfordCars": _TWO, "STL10": _TWO,
    "GTSRB": _split("train", "test", flip=False), "SVHN": _split("train", "test", flip=False),
    "OxfordIIITPet": _split("trainval", "test"), "Imagenette": _split("train", "val"),
    "LFWPeople": _TWO, "Places365": _split("train-standard", "val", small=True),
    "FashionMNIST": _DIGITS._replace(flip=True), "KMNIST": _DIGITS, "MNIST": _DIGITS, "QMNIST": _DIGITS,
    "USPS": _DIGITS,
    "EMNIST": Known({"split": "balanced", "train": True}, None, {"split": "balanced", "train": False}, flip=False),
}
# fmt: on


def load_torchvision(config: TorchvisionConfig) -> Dataset:
    """A data set of torchvision. DataError where its files are missing, or where torchvision cannot read them."""
    name, known = _known(config)
    config = config.model_copy(update={"flip": config.flip and known.flip, "name": f"torchvision/{name}"})
    parts, names = _parts(config)
    if all(isinstance(item, str) for items in parts.values() for item, _ in items):
        return dataset_of(config, _contents(config, parts, names), _root(config), names, *IMAGENET, share=config.split)
    return _in_memory(config, parts, names)


def scan_torchvision(config: TorchvisionConfig) -> FolderContents | None:
    """The files of a data set; None where torchvision keeps its images in memory."""
    parts, names = _parts(config)
    files = all(isinstance(item, str) for items in parts.values() for item, _ in items)
    return _contents(config, parts, names) if files else None


Items = list[tuple[Any, int]]  # path or picture, and label


def _known(config: TorchvisionConfig) -> tuple[str, Known]:
    wanted = config.name.partition("/")[2]
    if (name := own_name(wanted, KNOWN)) is None:
        raise UsageError(f"torchvision/{wanted}: {unknown('data set', wanted, KNOWN)}")
    return name, KNOWN[name]


def _root(config: TorchvisionConfig) -> Path:
    return config.root or default_root()


def _parts(config: TorchvisionConfig) -> tuple[dict[str, Items], tuple[str, ...]]:
    """The images of each part, and the names of the classes."""
    name, known = _known(config)
    found, names = {}, tuple[str, ...]()
    arguments = {"train": known.train, "val": known.val, "test": known.test}
    for part, its in arguments.items():
        if its is not None:
            opened = _opened(name, config, its)
            found[part] = _items(opened, f"torchvision/{name}")
            names = names or _names(opened)
    labels = [label for items in found.values() for _, label in items]
    names = names or tuple(map(str, range(max(labels) + 1)))
    if not labels or min(labels) < 0 or max(labels) >= len(names):
        raise DataError(f"torchvision/{name}: {len(names)} classes, and labels up to {max(labels, default=0)}")
    return found, names


def _opened(name: str, config: TorchvisionConfig, arguments: Mapping[str, Any]) -> Any:
    kind, root = getattr(importlib.import_module("torchvision.datasets"), name), _root(config)
    code = [base.__init__.__code__ for base in kind.__mro__ if hasattr(base.__init__, "__code__")]
    downloads = config.download and any("download" in one.co_varnames for one in code)
    more = {"download": True} if downloads else {}
    try:
        root.mkdir(parents=True, exist_ok=True)
        with quiet():
            return kind(root, **arguments, **more)
    except ImportError as error:
        raise UsageError(f"torchvision/{name}: needs another package ({first_line(error)})") from None
    except Exception as error:  # whatever torchvision, urllib and the files' formats raise
        raise DataError(
            f"torchvision/{name}: not read from {root}: {first_line(error)}",
            "put its files there as torchvision lays them out, or name another folder with --data-root",
        ) from None


def _names(opened: Any) -> tuple[str, ...]:
    """The names of the classes, none where there are none; of several names of one the first."""
    found = getattr(opened, "classes", None) or getattr(opened, "categories", None) or ()
    names = [str(one[0]) if isinstance(one, tuple | list) else str(one) for one in found]
    return tuple(f"{name} ({k})" if names.count(name) > 1 else name for k, name in enumerate(names))


class _Unopened:
    """Stands for a picture that is not opened: only its path is wanted."""

    def __init__(self, file: Any, *_: Any, **__: Any) -> None:
        self.path = os.fspath(file if isinstance(file, str | os.PathLike) else file.name)

    def convert(self, *_: Any) -> "_Unopened":
        return self


@contextmanager
def _paths_only() -> Iterator[None]:
    """Inside, Pillow opens no picture: torchvision's classes then say where it lies, each in its own way."""
    opening: Any = Image.open
    vars(Image)["open"] = _Unopened
    try:
        yield
    finally:
        vars(Image)["open"] = opening


def _items(opened: Any, name: str) -> Items:
    items: Items = []
    try:
        with _paths_only():
            for place in range(len(opened)):
                image, label = opened[place]
                items.append((image.path if isinstance(image, _Unopened) else image, int(label)))
    except (TypeError, ValueError, AttributeError, OSError) as error:
        raise DataError(f"{name}: image {len(items)} has no file or no label ({first_line(error)})") from None
    return items


def _contents(config: TorchvisionConfig, parts: Mapping[str, Items], names: tuple[str, ...]) -> FolderContents:
    listed = {}
    for part, items in parts.items():
        files: dict[str, list[str]] = {name: [] for name in names}
        for path, label in items:
            files[names[label]].append(path)
        listed[part] = SplitContents(_root(config) / part, files)
    return FolderContents(listed["train"], listed.get("test"), [], listed.get("val"))


def _in_memory(config: TorchvisionConfig, parts: Mapping[str, Items], names: tuple[str, ...]) -> Dataset:
    """Images that torchvision holds itself, resized once; random resized crops are for files."""
    count = sum(map(len, parts.values()))
    height, width = config.seen.size if isinstance(config.seen.size, tuple) else (config.seen.size,) * 2
    if (need := 3e-9 * count * height * width) > config.cache_limit:
        raise DataError(
            f"{config.name}: {count:,} images of {height}x{width} pixels need {need:.1f} GB, data.cache_limit is "
            f"{config.cache_limit:g}",
            "--set data.size=32, or a larger data.cache_limit",
        )
    splits = {part: _tensors(config, items) for part, items in parts.items()}
    train = splits["train"]
    border, test = config.border or min(height, width) // 8, splits.get("test", train)
    plain = Dataset(config.name, names, *IMAGENET, border, config.flip, train, test)
    plain = first_classes(replace(plain, seen=config.seen, val=splits.get("val")), config.classes)
    if "test" in splits:
        return plain
    train, cut = hold_out(plain, config.split, config.split_seed, "split")
    assert cut is not None, "a share of 0 is refused"
    return replace(plain, train=train, test=cut)


def _tensors(config: TorchvisionConfig, items: Items) -> Split:
    images = [resize_and_center_crop(image.convert("RGB"), config.seen) for image, _ in items]
    return Split(torch.stack(images), torch.tensor([label for _, label in items], dtype=torch.int64))
