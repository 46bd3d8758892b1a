"""Folders of picture files, one per class, with all that is wrong there; no picture is opened."""

import errno
import os
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from sakd_cli.errors import DataError

# Names that are taken for pictures; what a file is, its content says.
_ENDINGS = """
apng avif bmp dib gif heic heif j2c j2k jfif jp2 jpe jpeg jpf jpg jpx pbm pgm png pnm ppm tif tiff webp
"""
ENDINGS = frozenset(f".{name}" for name in _ENDINGS.split())


TRAIN, TEST = ("train", "training"), ("test", "val", "valid", "validation")


class Finding(NamedTuple):
    """A fault: `kind` is missing, empty-class, single-class, case, classes-differ, loop, count or unreadable."""

    kind: str
    path: str
    text: str


class SplitContents(NamedTuple):
    """Pictures of one purpose: for each class its files, both in order of name."""

    folder: Path
    files: dict[str, list[str]]

    def __len__(self) -> int:
        return sum(map(len, self.files.values()))

    def pairs(self, classes: tuple[str, ...]) -> tuple[tuple[str, ...], list[int]]:
        """Paths, and the class of each as its place in `classes`."""
        found = [(path, place) for place, name in enumerate(classes) for path in self.files.get(name, ())]
        return tuple(path for path, _ in found), [place for _, place in found]


class FolderContents(NamedTuple):
    """The training and the test part (None: one is to be cut from the other), and what is wrong with them."""

    train: SplitContents
    test: SplitContents | None
    findings: list[Finding]

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(self.train.files)


def scan_folder(root: Path, tests: tuple[str, ...] = TEST) -> FolderContents:
    """Find `root`/train/CLASS/* and `root`/val/CLASS/* (or test, valid, validation), or `root`/CLASS/* alone.

    `tests`: names of the test folder, the preferred one first. Raises DataError where `root` has no folders of classes.
    """
    if not root.is_dir():
        raise DataError(f"{root}: {'not a folder' if root.exists() else 'no such folder'}", "name it with --data-root")
    try:
        inside = {name.lower(): name for name in _folders(root)}
    except OSError as error:
        raise DataError(f"{root}: {(error.strerror or 'cannot be read').lower()}") from None
    train = next((root / inside[name] for name in TRAIN if name in inside), None)
    test = next((root / inside[name] for name in tests if name in inside), None)
    findings: list[Finding] = []
    if train is None and test is not None and set(inside) <= {*TRAIN, *TEST}:
        raise DataError(f"{root}: has a folder {test.name} but no folder train")
    if train is None or test is None:
        if train is not None:
            raise DataError(
                f"{root}: has a folder {train.name} but none of {', '.join(tests)}",
                f"--data-root {train} keeps a share of its images for testing (data.split)",
            )
        one = scan_split(root, findings)
        return FolderContents(one, None, findings + _wrong(one))
    ours, theirs = scan_split(train, findings), scan_split(test, findings)
    return FolderContents(ours, theirs, findings + _wrong(ours) + _wrong(theirs) + _differ(ours, theirs))


def scan_split(folder: Path, findings: list[Finding]) -> SplitContents:
    """The classes of a folder and their files; loops and folders that cannot be read go to the findings."""
    above = (os.path.realpath(folder),)
    return SplitContents(folder, {name: sorted(_pictures(folder / name, above, findings)) for name in _folders(folder)})


def _folders(folder: Path) -> list[str]:
    """Names of the folders in a folder, in order; hidden ones are none, nor is what archivers leave behind."""
    with os.scandir(folder) as entries:
        return sorted(one.name for one in entries if not _hidden(one.name) and _is_folder(one))


def _hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads in a circle
        return entry.is_symlink()


def _pictures(folder: Path, above: tuple[str, ...], findings: list[Finding]) -> Iterator[str]:
    """Files below a folder that are named like pictures; a link back to a folder above it is not followed."""
    try:
        real = os.path.realpath(folder, strict=True)
        if real in above:
            findings.append(Finding("loop", str(folder), "is a link to a folder that it lies in"))
            return
        with os.scandir(folder) as entries:
            found = sorted(entries, key=lambda one: one.name)
    except OSError as error:
        kind = "loop" if error.errno == errno.ELOOP else "unreadable"
        findings.append(Finding(kind, str(folder), (error.strerror or "cannot be read").lower()))
        return
    for one in found:
        if _hidden(one.name):
            continue
        if _is_folder(one):
            yield from _pictures(Path(one.path), (*above, real), findings)
        elif os.path.splitext(one.name)[1].lower() in ENDINGS:
            yield one.path


def _wrong(part: SplitContents) -> list[Finding]:
    """Faults of one part alone."""
    where, names = str(part.folder), list(part.files)
    empty = [name for name, files in part.files.items() if not files]
    findings = [Finding("empty-class", str(part.folder / name), "holds no picture") for name in empty]
    if not names:
        findings.append(Finding("missing", where, "holds no folder: there is to be one for every class"))
    if len(names) == 1:
        findings.append(Finding("single-class", where, f"has one class only ({names[0]}): nothing to tell apart"))
    alike: dict[str, str] = {}
    for name in names:
        first = alike.setdefault(unicodedata.normalize("NFC", name).casefold(), name)
        if first != name:
            text = f"differs from class {first!r} only by case or by spelling of letters"
            findings.append(Finding("case", str(part.folder / name), text))
    return findings


def _differ(train: SplitContents, test: SplitContents) -> list[Finding]:
    """Classes of one part that the other does not have."""
    findings = []
    for here, there in ((train, test), (test, train)):
        if lacking := [name for name in here.files if name not in there.files]:
            shown = ", ".join(lacking[:5]) + (f" and {len(lacking) - 5} more" if len(lacking) > 5 else "")
            text = f"lacks {shown}, which {here.folder.name} has"
            findings.append(Finding("classes-differ", str(there.folder), text))
    return findings


def raise_on_findings(found: FolderContents) -> FolderContents:
    """The same. Raises DataError with the first finding and the number of the others."""
    if found.findings:
        first, more = found.findings[0], len(found.findings) - 1
        tail = f" (and {more} more)" if more else ""
        raise DataError(f"{first.path}: {first.text}{tail}", "sakd data check DIR lists all that is wrong")
    return found
