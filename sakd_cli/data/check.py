"""What is wrong with a data set: everything at once, where a run would end at the first fault"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from sakd_cli.config.datasets import DataConfig
from sakd_cli.data import table
from sakd_cli.data.decode import find_unreadable
from sakd_cli.data.folder import Finding, FolderContents, SplitContents
from sakd_cli.errors import DataError


def check(config: DataConfig, begin: Callable[[int], None], advance: Callable[[int], None]) -> dict[str, Any]:
    """The document of `sakd data check --json` (schema: report/documents.py); nothing is downloaded.

    begin, advance  called with the number of files to decode, and after each file with the number done
    Raises DataError where there is no folder to look at.
    """
    if config.name not in table.FOLDERS:
        return _loaded(config)
    found: FolderContents = table.FOLDERS[config.name](config)
    parts = [part for part in (found.train, found.test) if part is not None]
    paths = [path for part in parts for files in part.files.values() for path in files]
    begin(len(paths))
    findings = list(found.findings)
    for number, fault in enumerate(find_unreadable(paths), start=1):
        if fault is not None:
            findings.append(Finding("unreadable", fault.path, fault.reason))
        advance(number)
    return _document(config, len(found.classes), [_row(part) for part in parts], len(paths), findings)


def _row(part: SplitContents) -> dict[str, Any]:
    sizes = [len(files) for files in part.files.values()]
    return {
        "folder": str(part.folder),
        "images": len(part),
        "classes": len(sizes),
        "least": min(sizes, default=0),
        "most": max(sizes, default=0),
    }


def _loaded(config: DataConfig) -> dict[str, Any]:
    """A data set that is not made of pictures: its own loader is its check."""
    try:
        data = table.load(config.model_copy(update={"download": False}))
    except DataError as error:
        return _document(config, 0, [], 0, [Finding("missing", str(config.root or ""), error.message)])
    rows = []
    for name, split in (("train", data.train), ("test", data.test)):
        sizes = split.labels.bincount(minlength=len(data.classes)).tolist()
        row = {"folder": name, "images": len(split), "classes": len(sizes), "least": min(sizes), "most": max(sizes)}
        rows.append(row)
    return _document(config, len(data.classes), rows, sum(row["images"] for row in rows), [])


def _document(
    config: DataConfig, classes: int, parts: list[dict[str, Any]], read: int, findings: list[Finding]
) -> dict[str, Any]:
    root: Path | None = config.root
    return {
        "schema": "sakd.data-check/1",
        "dataset": config.name,
        "root": None if root is None else str(root),
        "classes": classes,
        "parts": parts,
        "read": read,
        "findings": [finding._asdict() for finding in findings],
    }
