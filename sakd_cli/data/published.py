"""Which files a data set of pictures has, by its config: a folder of one's own, or a published archive. No torch."""

import importlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from sakd_cli.config.datasets import (
    Channels,
    CINIC10Config,
    FilesConfig,
    ImageFolderConfig,
    ImageNetConfig,
    TinyImageNetConfig,
    TorchvisionConfig,
)
from sakd_cli.data.decode import Reading
from sakd_cli.data.manifest import scan_manifest
from sakd_cli.data.pictures import Finding, FolderContents, SplitContents, as_one, scan_folder, scan_labelled
from sakd_cli.errors import DataError, UsageError
from sakd_cli.files import expanded

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


def default_root() -> Path:
    """`$XDG_CACHE_HOME/sakd/data`, or `~/.cache/sakd/data` where the variable is unset, empty or relative."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (cache if cache.is_absolute() else expanded("~") / ".cache") / "sakd" / "data"


def scan_imagefolder(config: ImageFolderConfig) -> FolderContents:
    if config.manifest is not None:
        return scan_manifest(config.manifest, own_root(config))
    return scan_folder(own_root(config))


def scan_labelled_images(config: ImageFolderConfig, classes: tuple[str, ...]) -> FolderContents:
    """All labelled pictures of a folder or a manifest as one part, for a network of these classes."""
    if config.manifest is None:
        return scan_labelled(own_root(config), classes)
    found = scan_imagefolder(config)
    faults = [one for one in found.findings if one.kind in ("manifest", "missing", "duplicate")]
    return as_one(config.manifest, found.parts, classes, faults, [])


def own_root(config: ImageFolderConfig) -> Path:
    """The folder from which paths count: that of the manifest, where none is named."""
    if config.root is not None:
        return config.root
    if config.manifest is None:
        raise UsageError("imagefolder: which folder? There is no usual place for it", "--data-root DIR")
    return config.manifest.parent


def scan_published(config: FilesConfig, known: PublishedSet) -> FolderContents:
    """What is there of a published set; its findings say also what is missing. DataError where nothing is there."""
    root = published_root(config, known)
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
    # Archives hold other files too, always the same.
    return found._replace(findings=findings, notes=tuple(note for note in found.notes if note.kind != "not-taken"))


def published_root(config: FilesConfig, known: PublishedSet) -> Path:
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
    return Reading(config.background, config.orientation, config.gray_range, config.max_pixels)


# Published sets that are folders of pictures.
PUBLISHED: dict[type[FilesConfig], PublishedSet] = {
    TinyImageNetConfig: TINY_IMAGENET,
    CINIC10Config: CINIC10,
    ImageNetConfig: IMAGENET_1K,
}


def scan(config: FilesConfig) -> FolderContents | None:
    """What is there of a data set of pictures, without loading it; None where it has none. DataError where nothing is.

    Only for a data set of torchvision, torch is imported.
    """
    if isinstance(config, TorchvisionConfig):
        found: FolderContents | None = importlib.import_module("sakd_cli.data.torchvision_sets").scan_torchvision(
            config
        )
        return found
    if isinstance(config, ImageFolderConfig):
        return scan_imagefolder(config)
    return scan_published(config, PUBLISHED[type(config)])
