"""Which files a data set of pictures has, by its config: a folder, a CSV file that lists them, a published archive.

No torch. A CSV file has columns path, class and, where it has a third one, part:

path,label,split
cats/1.jpg,cat,train
"""

import csv
import importlib
import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
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
from sakd_cli.data import pictures
from sakd_cli.data.decode import Reading
from sakd_cli.data.pictures import Finding, FolderContents, SplitContents
from sakd_cli.errors import DataError, UsageError, unreadable
from sakd_cli.files import MOST_JSON, of_user, read_bytes

PARTS = {name: names[0] for names in (pictures.TRAIN, pictures.VAL, pictures.TEST) for name in names}
default_root = partial(of_user, "XDG_CACHE_HOME", ".cache", "data")  # of the data sets
LINE = "its first line names the columns: path,label or path,label,split"


class Row(NamedTuple):
    """A line: part is None where the file has no column for it; more: cells that no column is for."""

    line: int
    path: str
    label: str
    part: str | None
    more: str


def scan_manifest(manifest: Path, root: Path) -> FolderContents:
    """What the file lists; paths are from `root`. Whole numbers as labels are in order of number, others of name.

    Raises DataError where it cannot be read, or is of other columns.
    """
    findings: list[Finding] = []
    found: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    lines: dict[str, int] = {}
    start = os.path.join(os.path.normpath(root), "")
    for row in _rows(manifest):
        where, path = f"{manifest}:{row.line}", os.path.normpath(root / row.path)
        # However root and path are written: what lies below root has one name, and so one part of the split.
        file = str(root / path.removeprefix(start)) if path.startswith(start) else str(root / row.path)
        part = "" if row.part is None else PARTS.get(row.part.lower())
        if not row.path or not row.label or part is None or row.more or not pictures.is_text(path):
            findings.append(Finding("manifest", where, _fault(row)))
        elif path in lines:
            findings.append(Finding("duplicate", where, f"lists {row.path} again, as line {lines[path]} does"))
        elif not os.path.lexists(file):
            findings.append(Finding("missing", where, f"lists {pictures.legible(row.path)}: no such file"))
        else:
            found[part][row.label].append(file)
        lines.setdefault(path, row.line)
    if not lines:
        raise DataError(f"{manifest}: lists no picture", LINE)
    parts = {part: _contents(manifest, part, files) for part, files in found.items()}
    findings += [fault for one in parts.values() for fault in pictures.faults_of(one)]
    if "" in parts or not parts:
        one = parts.get("", SplitContents(manifest, {}))
        return FolderContents(one, None, findings)
    train, val, test = (parts.get(names[0]) for names in (pictures.TRAIN, pictures.VAL, pictures.TEST))
    if train is None or (test or val) is None:
        raise DataError(f"{manifest}: its column split has no {'train' if train is None else 'test and no val'}")
    others = [part for part in (val, test) if part is not None]
    findings += [fault for part in others for fault in pictures.unequal_classes(train, part)]
    return FolderContents(train, others[-1], findings, others[0] if len(others) > 1 else None)


def _fault(row: Row) -> str:
    if not row.path or not row.label:
        return f"has no {'label' if row.path else 'path'}"
    if row.more:
        return f"has more cells than there are columns ({row.more[:20]!r}): a text with a comma goes into quotes"
    if row.part == "":
        return "has no split (train, val or test)"
    if row.part is not None and row.part.lower() not in PARTS:
        return f"is of the part {row.part[:20]!r}, not train, val or test"
    return f"lists a file whose name {pictures.NO_TEXT}"


def _contents(manifest: Path, part: str, files: dict[str, list[str]]) -> SplitContents:
    numbers = all(label.isdecimal() for label in files)
    labels = sorted(files, key=(lambda label: (int(label), label)) if numbers else None)
    folder = manifest.with_name(f"{manifest.name}:{part}") if part else manifest
    return SplitContents(folder, {label: sorted(files[label]) for label in labels})


def _rows(manifest: Path) -> Iterator[Row]:
    try:
        if not manifest.is_file():
            raise DataError(f"{pictures.legible(manifest)}: {'no file' if manifest.exists() else 'no such file'}", LINE)
        with manifest.open(encoding="utf-8-sig", newline="") as file:
            table = csv.DictReader(file)
            columns = {name.strip().lower(): name for name in table.fieldnames or () if name}
            if not {"path", "label"} <= columns.keys():
                raise DataError(f"{manifest}: has no columns path and label", LINE)
            split = columns.get("split")
            for row in table:
                path, label = ((row[columns[name]] or "").strip() for name in ("path", "label"))
                part = (row[split] or "").strip() if split else None
                yield Row(table.line_num, path, label, part, ",".join(row.get(None) or ()).strip(", "))
    except OSError as error:
        raise DataError(f"{manifest}: {unreadable(error)}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{manifest}: is no CSV in UTF-8 ({str(error)[:60]})", LINE) from None


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
        lines = read_bytes(root / "words.txt", MOST_JSON).decode().splitlines()
    except (OSError, ValueError):
        return folders
    meaning = {line.partition("\t")[0]: line.partition("\t")[2].split(",")[0].strip() for line in lines}
    named = [meaning.get(folder) or folder for folder in folders]
    both = zip(named, folders, strict=True)
    return tuple(f"{name} ({folder})" if named.count(name) > 1 else name for name, folder in both)


def _torchvisions(root: Path, folders: tuple[str, ...]) -> tuple[str, ...]:
    """The names that torchvision's networks use: in the order of the synsets, as the folders are."""
    names = importlib.import_module("torchvision.models").ResNet18_Weights.IMAGENET1K_V1.meta["categories"]
    return tuple(names) if len(set(names)) == len(names) == len(folders) else folders


def scan_imagefolder(config: ImageFolderConfig) -> FolderContents:
    if config.manifest is not None:
        return scan_manifest(config.manifest, own_root(config))
    return pictures.scan_folder(own_root(config))


def scan_labelled_images(config: ImageFolderConfig, classes: tuple[str, ...]) -> FolderContents:
    """All labelled pictures of a folder or a manifest as one part, for a network of these classes."""
    if config.manifest is None:
        return pictures.scan_labelled(own_root(config), classes)
    found = scan_imagefolder(config)
    faults = [one for one in found.findings if one.kind in ("manifest", "missing", "duplicate")]
    return pictures.as_one(config.manifest, found.parts, classes, faults, [])


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
        found = pictures.scan_folder(root, known.tests)
    except DataError as error:
        hint = f"unpack {known.source}; name its folder: --data-root"
        raise DataError(f"{config.name}: {error.message}", hint) from None
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
            text = f"is listed in {lists.name} as {kind[:20]!r}: no such file or class"
            findings.append(Finding("missing", str(path), text))
    return found._replace(test=SplitContents(test, files), findings=findings)


def reading_of(config: FilesConfig) -> Reading:
    return Reading(config.background, config.orientation, config.gray_range, config.max_pixels)


# Published sets that are folders of pictures.
PUBLISHED: dict[type[FilesConfig], PublishedSet] = {
    TinyImageNetConfig: PublishedSet(
        "tiny-imagenet-200",
        "tiny-imagenet-200.zip of Stanford's course CS231n",
        *(200, 100_000, 10_000),
        *((0.4802, 0.4481, 0.3975), (0.2770, 0.2691, 0.2821)),
        tests=("val",),
        names=_wordnet_names,
    ),
    CINIC10Config: PublishedSet(  # mean and standard deviation as its authors give them
        "CINIC-10",
        "CINIC-10.tar.gz of the University of Edinburgh (DataShare)",
        *(10, 90_000, 90_000),
        *((0.47889522, 0.47227842, 0.43047404), (0.24205776, 0.23828046, 0.25874835)),
        tests=("test",),
    ),
    ImageNetConfig: PublishedSet(
        "imagenet",
        "ILSVRC 2012 from image-net.org, its validation images sorted into folders as torchvision does",
        *(1000, 1_281_167, 50_000),
        *IMAGENET,
        tests=("val",),
        names=_torchvisions,
    ),
}


def scan(config: FilesConfig) -> FolderContents | None:
    """What is there of a data set of pictures, without loading it; None where it has none. DataError where nothing is.

    Only for a data set of torchvision, torch is imported.
    """
    if isinstance(config, TorchvisionConfig):
        from sakd_cli.data.torchvision_sets import scan_torchvision

        return scan_torchvision(config)
    if isinstance(config, ImageFolderConfig):
        return scan_imagefolder(config)
    return scan_published(config, PUBLISHED[type(config)])
