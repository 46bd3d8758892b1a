"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009) through torchvision.

The files are pickles, which can run code when loaded. Every file is therefore compared with its official MD5 before
anything is unpickled: here, to tell a missing file from a damaged one, and again inside torchvision's constructor.
"""

import contextlib
import importlib
import os
import socket
import sys
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sakd_cli.config.datasets import CIFAR10Config, CIFAR100Config
from sakd_cli.data.dataset import Dataset, Split
from sakd_cli.data.published import default_root
from sakd_cli.errors import DataError

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
    missing = _missing(config.name, root, kind)
    if missing and config.download:
        _fetch(config.name, root, kind)
        missing = _missing(config.name, root, kind)
    if missing:
        raise _not_found(config.name, root, kind, missing)
    with warnings.catch_warnings(action="ignore"):  # the pickles date from 2009; numpy warns of their types' spelling
        train, test = kind(root, train=True), kind(root, train=False)
    classes = tuple(train.classes)
    if len(set(classes)) != len(classes):
        raise DataError(f"{config.name}: {root / kind.base_folder / kind.meta['filename']}: two classes of one name")
    splits = [
        _split(images, len(classes), f"{config.name}: {'train' if images.train else 'test'} files in {root}")
        for images in (train, test)
    ]
    return replace(known, classes=classes, train=splits[0], test=splits[1])


def _split(images: Any, classes: int, where: str) -> Split:
    pixels: Tensor = torch.from_numpy(images.data)  # [N, 32, 32, 3]
    labels = torch.tensor(images.targets, dtype=torch.int64)
    if len(pixels) != len(labels) or not len(labels):
        raise DataError(f"{where}: {len(pixels)} images and {len(labels)} labels")
    odd = labels[(labels < 0) | (labels >= classes)]
    if len(odd):
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


def _fetch(name: str, root: Path, kind: Any) -> None:
    """Download the archive and put the missing files in place, each whole; leaves no trace if that fails."""
    tools = _torchvision().utils
    missing = _missing(name, root, kind)
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


@contextlib.contextmanager
def _made(folder: Path) -> Iterator[None]:
    """`folder` exists inside the block; if the block fails, the folders made for it are removed again."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for path in made:
            # Not empty: another process has used it in the meantime.
            with contextlib.suppress(OSError):
                path.rmdir()
        raise


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Nothing on standard output, which belongs to the command's own result; no waiting for ever for a server."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(PATIENCE)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        socket.setdefaulttimeout(before)
