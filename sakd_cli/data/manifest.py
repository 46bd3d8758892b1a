"""A CSV file that lists pictures: path, class and, where it has a third column, part. No torch.

path,label,split
cats/1.jpg,cat,train
"""

import csv
import os
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from sakd_cli.data.pictures import (
    NO_TEXT,
    TEST,
    TRAIN,
    VAL,
    Finding,
    FolderContents,
    SplitContents,
    differences,
    faults_of,
    is_text,
    shown,
)
from sakd_cli.errors import DataError

PARTS = {name: names[0] for names in (TRAIN, VAL, TEST) for name in names}
LINE = "its first line names the columns: path,label or path,label,split"


class Row(NamedTuple):
    """A line: part is empty where the file has no column for it."""

    line: int
    path: str
    label: str
    part: str


def scan_manifest(manifest: Path, root: Path) -> FolderContents:
    """What the file lists; paths are from `root`. Whole numbers as labels are in order of number, others of name.

    Raises DataError where it cannot be read, or is of other columns.
    """
    findings: list[Finding] = []
    found: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    lines: dict[str, int] = {}
    for row in _rows(manifest):
        where, path = f"{manifest}:{row.line}", os.path.normpath(root / row.path)
        part = PARTS.get(row.part.lower()) if row.part else ""
        if not row.path or not row.label or part is None or not is_text(path):
            findings.append(Finding("manifest", where, _fault(row)))
        elif path in lines:
            findings.append(Finding("duplicate", where, f"lists {row.path} again, as line {lines[path]} does"))
        elif not os.path.lexists(path):
            findings.append(Finding("missing", where, f"lists {row.path}: no such file"))
        else:
            found[part][row.label].append(path)
        lines.setdefault(path, row.line)
    if not lines:
        raise DataError(f"{manifest}: lists no picture", LINE)
    parts = {part: _contents(manifest, part, files) for part, files in found.items()}
    findings += [fault for one in parts.values() for fault in faults_of(one)]
    if "" in parts or not parts:
        one = parts.get("", SplitContents(manifest, {}))
        return FolderContents(one, None, findings)
    train, val, test = (parts.get(names[0]) for names in (TRAIN, VAL, TEST))
    if train is None or (test or val) is None:
        raise DataError(f"{manifest}: its column split has no {'train' if train is None else 'test and no val'}")
    others = [part for part in (val, test) if part is not None]
    findings += [fault for part in others for fault in differences(train, part)]
    return FolderContents(train, others[-1], findings, others[0] if len(others) > 1 else None)


def _fault(row: Row) -> str:
    if not row.path or not row.label:
        return f"has no {'label' if row.path else 'path'}"
    if PARTS.get(row.part.lower()) is None and row.part:
        return f"is of the part {row.part[:20]!r}, not train, val or test"
    return f"lists a file whose name {NO_TEXT}"


def _contents(manifest: Path, part: str, files: dict[str, list[str]]) -> SplitContents:
    numbers = all(label.isdecimal() for label in files)
    labels = sorted(files, key=(lambda label: (int(label), label)) if numbers else None)
    folder = manifest.with_name(f"{manifest.name}:{part}") if part else manifest
    return SplitContents(folder, {label: sorted(files[label]) for label in labels})


def _rows(manifest: Path) -> Iterator[Row]:
    try:
        if not manifest.is_file():
            raise DataError(f"{shown(manifest)}: {'no file' if manifest.exists() else 'no such file'}", LINE)
        with manifest.open(encoding="utf-8-sig", newline="") as file:
            table = csv.DictReader(file)
            columns = {name.strip().lower(): name for name in table.fieldnames or () if name}
            if not {"path", "label"} <= columns.keys():
                raise DataError(f"{manifest}: has no columns path and label", LINE)
            split = columns.get("split")
            for row in table:
                path, label = ((row[columns[name]] or "").strip() for name in ("path", "label"))
                part = (row[split] or "").strip() or "-" if split else ""
                yield Row(table.line_num, path, label, part)
    except OSError as error:
        raise DataError(f"{manifest}: {(error.strerror or 'cannot be read').lower()}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{manifest}: is no CSV in UTF-8 ({str(error)[:60]})", LINE) from None
