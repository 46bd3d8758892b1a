"""Data sets of torchvision, read by its own classes: CIFAR-10 and CIFAR-100 (Krizhevsky 2009), and others by name.

CIFAR's files are pickles, which can run code when loaded. Every file is therefore compared with its official MD5 before
anything is unpickled: here, to tell a missing file from a damaged one, and again inside torchvision's constructor.
"""

import importlib
import os
import socket
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from sakd_cli.config.base import own_name
from sakd_cli.config.datasets import CIFAR10Config, CIFAR100Config, TorchvisionConfig
from sakd_cli.config.preprocessing import height_width
from sakd_cli.data.dataset import Dataset, Split, first_classes, hold_out
from sakd_cli.data.files import resize_and_center_crop
from sakd_cli.data.imagefolder import dataset_of
from sakd_cli.data.pictures import FolderContents, SplitContents
from sakd_cli.data.published import IMAGENET, default_root
from sakd_cli.errors import DataError, UsageError, first_line, unknown

PATIENCE = 30.0  # seconds without an answer before a download is given up; Python's own default is for ever

CLASSES_10 = "airplane automobile bird cat deer dog frog horse ship truck"
CLASSES_100 = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle
caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant flatfish
forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle
mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine
possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider squirrel streetcar
sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle wardrobe whale
willow_tree wolf woman worm
"""
_NONE = Split(torch.empty(0, 3, 32, 32, dtype=torch.uint8), torch.empty(0, dtype=torch.int64))
_MORE: dict[str, Any] = {"padding": 4, "flip": True, "train": _NONE, "test": _NONE}
# The constants that most published CIFAR code uses (the std is the mean of the images' own std's).
CIFAR10 = Dataset("cifar10", tuple(CLASSES_10.split()), (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010), **_MORE)
# The constants of the published distillation code; the exact ones differ by 0.0002 at most.
CIFAR100 = Dataset("cifar100", tuple(CLASSES_100.split()), (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761), **_MORE)


def _torchvision() -> Any:
    """`torchvision.datasets`, imported late: it takes 1.6 s that drawn shapes need not wait for; it has no types."""
    return importlib.import_module("torchvision.datasets")


def load_cifar(config: CIFAR10Config | CIFAR100Config) -> Dataset:
    """50,000 training and 10,000 test images of 32 pixels; DataError where the files are missing or damaged."""
    known = CIFAR10 if isinstance(config, CIFAR10Config) else CIFAR100
    kind = getattr(_torchvision(), known.name.upper())
    root = config.root or default_root()
    if root.name == kind.base_folder and not _missing(config.name, root.parent, kind):
        root = root.parent  # of the folder of the files, not of that around it
    missing = _missing(config.name, root, kind)
    if missing and config.download:
        _fetch(config.name, root, kind, missing)
        missing = _missing(config.name, root, kind)
    if missing:
        raise _not_found(config.name, root, kind, missing)
    with warnings.catch_warnings(action="ignore"):  # the pickles date from 2009; numpy warns of their types' spelling
        train, test = kind(root, train=True), kind(root, train=False)
    classes = tuple(train.classes)
    if len(set(classes)) != len(classes):
        raise DataError(f"{config.name}: {root / kind.base_folder / kind.meta['filename']}: two classes of one name")
    splits = [
        _checked(images, len(classes), f"{config.name}: {'train' if images.train else 'test'} files in {root}")
        for images in (train, test)
    ]
    return replace(known, classes=classes, train=splits[0], test=splits[1])


def _checked(images: Any, classes: int, where: str) -> Split:
    pixels: Tensor = torch.from_numpy(images.data)  # [N, 32, 32, 3]
    labels = torch.tensor(images.targets, dtype=torch.int64)
    if len(pixels) != len(labels) or not len(labels):
        raise DataError(f"{where}: {len(pixels)} images and {len(labels)} labels")
    if len(odd := labels[(labels < 0) | (labels >= classes)]):
        raise DataError(f"{where}: label {int(odd[0])} where there are {classes} classes")
    return Split(pixels.permute(0, 3, 1, 2).contiguous(), labels)


def _files(kind: Any) -> dict[str, str]:
    """File name -> official MD5."""
    return {**dict(kind.train_list), **dict(kind.test_list), kind.meta["filename"]: kind.meta["md5"]}


def _missing(name: str, root: Path, kind: Any) -> list[str]:
    """Names of the files that are not there. Raises DataError if one that is there is not the official one."""
    check_integrity = _torchvision().utils.check_integrity
    folder = root / kind.base_folder
    missing = []
    for file, checksum in _files(kind).items():
        try:
            if not (folder / file).is_file():
                missing.append(file)
            elif not check_integrity(folder / file, checksum):
                raise DataError(
                    f"{name}: damaged file {file!r} in {folder}: its checksum differs from the official one",
                    "delete the file and run again to download it, or put the official one in its place",
                )
        except OSError as error:
            raise DataError(
                f"{name}: cannot read {folder / file}: {error.strerror}", "allow reading it, or see --data-root"
            ) from error
    return missing


def _not_found(name: str, root: Path, kind: Any, missing: list[str], reason: str = "") -> DataError:
    what = "files" if len(missing) == len(_files(kind)) else f"{', '.join(missing)} of {kind.base_folder}"
    return DataError(
        f"{name}: {what} not found in {root}{reason}",
        f"put the folder '{kind.base_folder}' of the official archive into {root}, "
        "or name another folder with --data-root",
    )


def _fetch(name: str, root: Path, kind: Any, missing: list[str]) -> None:
    """Download the archive and put the missing files in place, each whole; leaves no trace if that fails."""
    tools = _torchvision().utils
    try:
        with _made(root), tempfile.TemporaryDirectory(prefix=".download-", dir=root) as aside, quiet():
            tools.download_and_extract_archive(kind.url, aside, filename=kind.filename, md5=kind.tgz_md5)
            for file in missing:
                source = Path(aside) / kind.base_folder / file
                if not tools.check_integrity(source, _files(kind)[file]):
                    raise RuntimeError(f"the archive holds no sound {file!r}")
            (root / kind.base_folder).mkdir(exist_ok=True)
            for file in missing:
                os.replace(Path(aside) / kind.base_folder / file, root / kind.base_folder / file)
    # Whatever torchvision, urllib, ssl and tarfile raise when a network or a disk fails: OSError mostly.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise _not_found(name, root, kind, missing, f"; the download failed: {reason}") from error


@contextmanager
def _made(folder: Path) -> Iterator[None]:
    """`folder` exists inside the block; if the block fails, the folders made for it are removed again."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for path in made:
            # Not empty: another process has used it in the meantime.
            with suppress(OSError):
                path.rmdir()
        raise


@contextmanager
def quiet() -> Iterator[None]:
    """Nothing on standard output, which belongs to the command's own result; no waiting for ever for a server."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(PATIENCE)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        socket.setdefaulttimeout(before)


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
    if (files := _contents(config, parts, names)) is None:
        return _in_memory(config, parts, names)
    return dataset_of(config, files, _root(config), names, *IMAGENET, share=config.split)


def scan_torchvision(config: TorchvisionConfig) -> FolderContents | None:
    """The files of a data set; None where torchvision keeps its images in memory."""
    return _contents(config, *_parts(config))


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
    kind, root = getattr(_torchvision(), name), _root(config)
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


def _contents(config: TorchvisionConfig, parts: Mapping[str, Items], names: tuple[str, ...]) -> FolderContents | None:
    """The files of each part by class; None where the images are in memory."""
    if not all(isinstance(item, str) for items in parts.values() for item, _ in items):
        return None
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
    height, width = height_width(config.seen.size)
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
