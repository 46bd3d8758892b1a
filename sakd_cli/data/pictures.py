"""Folders of picture files, one per class, with all that is wrong there; no picture is opened."""

import errno
import os
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from sakd_cli.errors import DataError, unreadable

# Names that are taken for pictures; what a file is, its content says.
_ENDINGS = """
apng avif bmp dib gif heic heif j2c j2k jfif jp2 jpe jpeg jpf jpg jpx pbm pgm png pnm ppm tif tiff webp
"""
ENDINGS = frozenset(f".{name}" for name in _ENDINGS.split())

TRAIN, TEST, VAL = ("train", "training"), ("test",), ("val", "valid", "validation")
# What lies beside the classes of a folder without parts, and is written by programs.
NO_CLASS = {"runs", "reports", "report", "logs", "exports", "checkpoints", "plots", "figures"}
RUN = ("config.yaml", "env.json")  # files of a run directory
NO_TEXT = "is not UTF-8, as of an archive from Windows: rename it"


class Finding(NamedTuple):
    """A fault or a note; the kinds are those of `DataFinding`."""

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
    """The training and the test part (None: one is to be cut from the other), and what is wrong with them.

    val    the part that chooses the best epoch; None: it is to be cut from the training part
    notes  what was left out, which is no fault
    """

    train: SplitContents
    test: SplitContents | None
    findings: list[Finding]
    val: SplitContents | None = None
    notes: tuple[Finding, ...] = ()

    @property
    def parts(self) -> list[SplitContents]:
        return [part for part in (self.train, self.val, self.test) if part is not None]

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(self.train.files)


def scan_folder(root: Path, tests: tuple[str, ...] | None = None) -> FolderContents:
    """Find `root`/train/CLASS/* with val (or valid, validation), test or both, or `root`/CLASS/* alone.

    With both, val chooses the best epoch and test is for the result; one of the two is for the result.

    tests  names of the test folder, the preferred one first, where no other part counts
    Raises DataError where `root` has no folders of classes.
    """
    inside = {name.lower(): root / name for name in _inside(root)}
    train, test, val = (
        next((inside[name] for name in names if name in inside), None)
        for names in (TRAIN, tests or TEST, () if tests else VAL)
    )
    findings: list[Finding] = []
    notes: list[Finding] = []
    if train is None and (test or val) is not None and set(inside) <= {*TRAIN, *TEST, *VAL}:
        raise DataError(f"{root}: has a folder {(test or val or root).name} but no folder train")
    if train is None or (test or val) is None:
        if train is not None:
            raise DataError(
                f"{root}: has a folder {train.name} but none of {', '.join(tests or (*TEST, *VAL))}",
                f"--data-root {train} keeps a share of its images for testing (data.split)",
            )
        one = scan_split(root, findings, notes)
        return FolderContents(one, None, findings + faults_of(one), notes=tuple(notes))
    ours = scan_split(train, findings, notes)
    _tell_beside(root, (train, test, val), notes)
    if test is not None and val is not None and not ours.files.keys() & set(_folders(test)):
        notes.append(Finding("unlabelled", str(test), f"has no folder of a class of {train.name}: not used"))
        test = None
    parts = [scan_split(part, findings, notes) for part in (val, test) if part is not None]
    findings += [fault for part in (ours, *parts) for fault in faults_of(part)]
    findings += [fault for part in parts for fault in unequal_classes(ours, part)]
    return FolderContents(ours, parts[-1], findings, parts[0] if len(parts) > 1 else None, tuple(notes))


def scan_labelled(root: Path, classes: tuple[str, ...]) -> FolderContents:
    """All that has a label below `root` as one part: the parts that have folders of these classes, or `root` itself.

    Raises DataError where there is none of these classes.
    """
    findings: list[Finding] = []
    notes: list[Finding] = []
    there = [root / name for name in _inside(root) if name.lower() in {*TRAIN, *TEST, *VAL}]
    parts = [part for folder in there if (part := scan_split(folder, findings, notes)).files.keys() & set(classes)]
    labelled = {part.folder for part in parts}
    left = [folder for folder in there if folder not in labelled]
    if parts:
        _tell_beside(root, there, notes)
    notes += [Finding("unlabelled", str(folder), "has no folder of a class: not used") for folder in left]
    return as_one(root, parts or [scan_split(root, findings, notes)], classes, findings, notes)


def as_one(
    root: Path, parts: list[SplitContents], classes: tuple[str, ...], findings: list[Finding], notes: list[Finding]
) -> FolderContents:
    """Several parts as one, for a network of these classes. Raises DataError where there is no picture of them."""
    names = sorted({name for part in parts for name in part.files})
    files = {name: [path for part in parts for path in part.files.get(name, ())] for name in names}
    if not findings and not any(files.get(name) for name in classes):
        raise DataError(f"{root}: has no picture of a class of the network ({', '.join([*classes][:5])} ...)")
    one = SplitContents(root, files)
    unknown = [name for name in names if name not in classes]
    findings = findings + [
        Finding("unknown-class", str(root), f"{name} is no class of the network") for name in unknown
    ]
    return FolderContents(one, one, findings, notes=tuple(notes))


def scan_split(folder: Path, findings: list[Finding], notes: list[Finding]) -> SplitContents:
    """The classes of a folder and their files; loops and folders that cannot be read go to the findings."""
    above = (os.path.realpath(folder),)
    names = _folders(folder)
    part = folder.name.lower() in {*TRAIN, *TEST, *VAL}
    for name in list(names):
        if (not part and name.lower() in NO_CLASS) or _holds_runs(folder / name):
            notes.append(Finding("no-class", str(folder / name), "is no class, but what a program writes: not used"))
            names.remove(name)
    _tell_stray(folder, notes)
    left: Counter[str] = Counter()
    files = {name: sorted(_pictures(folder / name, above, findings, left)) for name in names}
    if left:
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(left.items()))
        notes.append(Finding("not-taken", str(folder), f"holds files that are not taken: {kinds}"))
    for name, paths in files.items():  # a network's card could not hold names that are no text
        if not is_text(name):
            findings.append(Finding("name", legible(folder / name), f"the name of this class {NO_TEXT}"))
        else:
            findings += [Finding("name", legible(path), f"its name {NO_TEXT}") for path in paths if not is_text(path)]
    return SplitContents(folder, files)


def _tell_beside(root: Path, parts: Sequence[Path | None], notes: list[Finding]) -> None:
    """Note the folders and pictures that lie beside the parts of a data set."""
    beside = [root / name for name in _inside(root) if root / name not in parts]
    notes += [Finding("not-taken", str(folder), "is no part of the data set: not used") for folder in beside]
    _tell_stray(root, notes)


def _tell_stray(folder: Path, notes: list[Finding]) -> None:
    """Note the pictures that lie in no folder of a class."""
    with os.scandir(folder) as entries:
        named = [one.name for one in entries if one.name.lower().endswith(tuple(ENDINGS)) and not _is_folder(one)]
    if files := sorted(name for name in named if not _hidden(name)):
        text = f"{len(files)} of its pictures, first {legible(files[0])}, lie in no folder of a class: not used"
        notes.append(Finding("not-taken", str(folder), text))


def is_text(name: str) -> bool:
    try:
        return bool(name.encode())
    except UnicodeEncodeError:
        return False


def legible(path: Path | str) -> str:
    """A path as text on one line; bytes that are none as `\\xe9`, signs that are not seen as `\\n` or `\\u202e`."""
    text = os.fsencode(path).decode(errors="backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _holds_runs(folder: Path) -> bool:
    """Whether it is a run directory or holds some."""
    try:
        with os.scandir(folder) as entries:
            below = [Path(one.path) for one in entries if one.is_dir()]
        return any(all((one / name).is_file() for name in RUN) for one in (folder, *below))
    except OSError:
        return False


def _inside(root: Path) -> list[str]:
    """Names of the folders in the data set's folder. Raises DataError where it is none."""
    if not is_text(str(root)):
        raise DataError(f"{legible(root)}: its name {NO_TEXT}")
    if not root.is_dir():
        raise DataError(f"{root}: {'not a folder' if root.exists() else 'no such folder'}", "name an unpacked folder")
    try:
        return _folders(root)
    except OSError as error:
        raise DataError(f"{root}: {unreadable(error)}") from None


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


def _pictures(folder: Path, above: tuple[str, ...], findings: list[Finding], left: "Counter[str]") -> Iterator[str]:
    """Files below a folder that are named like pictures; a link back to a folder above it is not followed.

    left  counts the other files, by what they are
    """
    try:
        real = os.path.realpath(folder, strict=True)
        if real in above:
            findings.append(Finding("loop", str(folder), "is a link to a folder that it lies in"))
            return
        with os.scandir(folder) as entries:
            found = sorted(entries, key=lambda one: one.name)
    except OSError as error:
        kind = "loop" if error.errno == errno.ELOOP else "unreadable"
        findings.append(Finding(kind, str(folder), unreadable(error)))
        return
    for one in found:
        ending = os.path.splitext(one.name)[1].lower()
        if _hidden(one.name):
            left["hidden"] += 1
        elif _is_folder(one):
            yield from _pictures(Path(one.path), (*above, real), findings, left)
        elif ending in ENDINGS:
            yield one.path
        else:
            left[f"*{legible(ending)}" if ending else "without an ending"] += 1


def pictures_below(folder: Path, findings: list[Finding]) -> Iterator[str]:
    """Files below a folder that are named like pictures, in order of their names; what cannot be read is a finding."""
    return _pictures(folder, (), findings, Counter())


def faults_of(part: SplitContents) -> list[Finding]:
    where, names = str(part.folder), list(part.files)
    empty = [name for name, files in part.files.items() if not files]
    findings = [Finding("empty-class", str(part.folder / name), "holds no picture") for name in empty]
    if not names:
        findings.append(Finding("missing", where, "holds no folder: there is to be one for every class"))
    if len(names) == 1:
        findings.append(Finding("single-class", where, f"has one class only ({names[0]}): nothing to tell apart"))
    alike: dict[str, str] = {}
    for name in filter(is_text, names):
        first = alike.setdefault(unicodedata.normalize("NFC", name).casefold(), name)
        if first != name:
            text = f"differs from class {first!r} only by case or by spelling of letters"
            findings.append(Finding("case", str(part.folder / name), text))
    return findings


def unequal_classes(train: SplitContents, test: SplitContents) -> list[Finding]:
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
