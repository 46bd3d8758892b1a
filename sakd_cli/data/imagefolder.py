"""Data sets that are folders of pictures: your own, Tiny ImageNet, CINIC-10, ImageNet"""

import importlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from sakd_cli.config.datasets import FilesConfig, ImageFolderConfig
from sakd_cli.data.cifar import default_root
from sakd_cli.data.dataset import Channels, Dataset, Split, first_classes, hold_out
from sakd_cli.data.decode import Reading, find_unreadable
from sakd_cli.data.files import Files, ImageSpec, cpu_count
from sakd_cli.data.fingerprint import content_hashes
from sakd_cli.data.pictures import (
    Finding,
    FolderContents,
    SplitContents,
    raise_on_findings,
    scan_folder,
    scan_labelled,
)
from sakd_cli.errors import DataError, UsageError

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class PublishedSet(NamedTuple):
    """What is known of a published set.

    folder  that its archive makes; source: where that is to be had
    classes, train, test  how many there are
    names   gives the classes their names, from the root and the folders' names; None: the folders'
    tests   names of the folder of test images
    """

    folder: str
    source: str
    classes: int
    train: int
    test: int
    mean: Channels
    std: Channels
    tests: tuple[str, ...]
    names: Callable[[Path, tuple[str, ...]], tuple[str, ...]] | None = None


def _wordnet_names(root: Path, folders: tuple[str, ...]) -> tuple[str, ...]:
    """The first word of each folder's line in words.txt; the folder's own name where it has none, or one of another."""
    try:
        lines = (root / "words.txt").read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return folders
    meaning = {line.partition("\t")[0]: line.partition("\t")[2].split(",")[0].strip() for line in lines}
    named = [meaning.get(folder) or folder for folder in folders]
    return tuple(
        f"{name} ({folder})" if named.count(name) > 1 else name for name, folder in zip(named, folders, strict=True)
    )


def _torchvisions(root: Path, folders: tuple[str, ...]) -> tuple[str, ...]:
    """The names that torchvision's networks use: in the order of the synsets, as the folders are."""
    names = importlib.import_module("torchvision.models").ResNet18_Weights.IMAGENET1K_V1.meta["categories"]
    return tuple(names) if len(set(names)) == len(names) == len(folders) else folders


TINY_IMAGENET = PublishedSet(
    "tiny-imagenet-200",
    "tiny-imagenet-200.zip of Stanford's course CS231n",
    *(200, 100_000, 10_000),
    *((0.4802, 0.4481, 0.3975), (0.2770, 0.2691, 0.2821)),
    tests=("val",),
    names=_wordnet_names,
)
CINIC10 = PublishedSet(  # mean and standard deviation as its authors give them
    "CINIC-10",
    "CINIC-10.tar.gz of the University of Edinburgh (DataShare)",
    *(10, 90_000, 90_000),
    *((0.47889522, 0.47227842, 0.43047404), (0.24205776, 0.23828046, 0.25874835)),
    tests=("test",),
)
IMAGENET_1K = PublishedSet(
    "imagenet",
    "ILSVRC 2012 from image-net.org, its validation images sorted into folders as torchvision does",
    *(1000, 1_281_167, 50_000),
    *IMAGENET,
    tests=("val",),
    names=_torchvisions,
)


def load_imagefolder(config: ImageFolderConfig) -> Dataset:
    """Folders train and val, or one folder of classes cut in two. DataError names what is wrong with them."""
    found = raise_on_findings(scan_imagefolder(config))
    return _dataset(config, found, _own_root(config), found.classes, *IMAGENET, share=config.split)


def scan_imagefolder(config: ImageFolderConfig) -> FolderContents:
    """What is there of one's own images."""
    return scan_folder(_own_root(config))


def load_labelled(config: ImageFolderConfig, classes: tuple[str, ...]) -> Dataset:
    """All labelled pictures of a folder as test images, for a network of these classes; it may lack some of them.

    Raises DataError where a folder is of another class, or something is wrong with one.
    """
    found = raise_on_findings(scan_labelled(_own_root(config), classes))
    every = SplitContents(found.train.folder, {name: found.train.files.get(name, []) for name in classes})
    found = found._replace(train=every, test=every)
    return _dataset(config.model_copy(update={"classes": None}), found, _own_root(config), classes, *IMAGENET)


def _own_root(config: ImageFolderConfig) -> Path:
    if config.root is None:
        raise UsageError("imagefolder: which folder? There is no usual place for it", "--data-root DIR")
    return config.root


def load_published(config: FilesConfig, known: PublishedSet) -> Dataset:
    """A published set; DataError where something is missing."""
    found = raise_on_findings(scan_published(config, known))
    names = found.classes if known.names is None else known.names(_root(config, known), found.classes)
    return _dataset(config, found, _root(config, known), names, known.mean, known.std)


def scan_published(config: FilesConfig, known: PublishedSet) -> FolderContents:
    """What is there of a published set; its findings say also what is missing. DataError where nothing is there."""
    root = _root(config, known)
    lists = root / "val" / "val_annotations.txt"
    try:
        found = scan_folder(root, known.tests)
    except DataError as error:
        raise DataError(
            f"{config.name}: {error.message}", f"unpack {known.source}; name its folder: --data-root"
        ) from None
    if lists.is_file():
        found = _with_listed(found, lists)
    findings = list(found.findings)
    counts = [(len(found.classes), known.classes, "classes"), (len(found.train), known.train, "training images")]
    counts += [(0 if found.test is None else len(found.test), known.test, "test images")]
    for there, wanted, what in counts:
        if there != wanted:
            text = f"{config.name} has {wanted:,} {what}, here are {there:,}; from: {known.source}"
            findings.append(Finding("count", str(root), text))
    return found._replace(findings=findings)


def _root(config: FilesConfig, known: PublishedSet) -> Path:
    """The folder with train in it: the one that is named, or that of the archive in it."""
    root = config.root or default_root()
    return root / known.folder if (root / known.folder).is_dir() else root


def _with_listed(found: FolderContents, lists: Path) -> FolderContents:
    """Tiny ImageNet has its test images in one folder, and their classes in a list."""
    files: dict[str, list[str]] = {name: [] for name in found.classes}
    test = lists.parent
    # Not of its two folders that are no classes.
    findings = [one for one in found.findings if one.kind != "classes-differ" and not one.path.startswith(str(test))]
    for line in lists.read_text(encoding="utf-8", errors="replace").splitlines():
        name, _, rest = line.partition("\t")
        kind, path = rest.partition("\t")[0], test / "images" / name
        if kind in files and "/" not in name and path.is_file():
            files[kind].append(str(path))
        else:
            findings.append(
                Finding("missing", str(path), f"is listed in {lists.name} as {kind[:20]!r}: no such file or class")
            )
    return found._replace(test=SplitContents(test, files), findings=findings)


def reading_of(config: FilesConfig) -> Reading:
    """How the data set's files become RGB."""
    return Reading(config.background, config.orientation, config.gray_range, config.max_pixels)


def _dataset(
    config: FilesConfig,
    found: FolderContents,
    root: Path,
    names: tuple[str, ...],
    mean: Channels,
    std: Channels,
    share: float = 0.0,
) -> Dataset:
    workers = min(8, cpu_count()) if config.workers is None else config.workers
    spec = ImageSpec(config.size, config.resized, workers, reading_of(config))
    parts = [_split(config, root, spec, *part.pairs(found.classes)) for part in found.parts]
    border = config.size // 8 if config.bordered else 0
    scale = None if config.bordered else config.crop
    plain = Dataset(config.name, names, mean, std, border, config.flip, parts[0], parts[-1], scale)
    plain = first_classes(replace(plain, val=parts[1] if found.val else None), config.classes)
    plain = replace(plain, notes=tuple(f"{one.path}: {one.text}" for one in found.notes))
    if config.on_bad_image == "skip":
        plain = _without_bad(plain, one_part=found.test is None)
    if found.test is None:
        train, test = hold_out(plain, share, config.split_seed, "split")
        assert test is not None, "a share of 0 is refused"
        plain = replace(plain, train=train, test=test)
    return plain


def _split(config: FilesConfig, root: Path, spec: ImageSpec, paths: tuple[str, ...], labels: list[int]) -> Split:
    files = Files(paths, spec, root=str(root))
    if config.split_by == "content":
        files = Files(paths, spec, root=str(root), keys=content_hashes(paths))
    return Split(files, torch.tensor(labels, dtype=torch.int64))


def _without_bad(dataset: Dataset, *, one_part: bool) -> Dataset:
    """The data set without the files that cannot be read. DataError where a class loses all of its images."""
    splits, skipped = [], 0
    there = [dataset.train, *(() if dataset.val is None else (dataset.val,)), *(() if one_part else (dataset.test,))]
    for split in there:
        assert isinstance(split.images, Files)
        good = torch.tensor(
            [error is None for error in find_unreadable(split.images.paths, split.images.spec.reading)],
            dtype=torch.bool,
        )
        skipped += len(good) - int(good.sum())
        readable = split.subset(good.nonzero().squeeze(1))
        counts = torch.bincount(readable.labels, minlength=len(dataset.classes))
        if not bool(counts.all()):
            name = dataset.classes[int(counts.argmin())]
            raise DataError(f"{dataset.name}: class {name}: none of its pictures can be read", "sakd data check DIR")
        splits.append(readable)
    val = None if dataset.val is None else splits[1]
    return replace(dataset, train=splits[0], test=splits[-1], val=val, skipped=skipped)
