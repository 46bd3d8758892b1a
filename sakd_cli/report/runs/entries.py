"""The runs of a folder: what there is, filtered and sorted, and what may be removed"""

import glob
import shutil
import time
import uuid
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from rich.console import RenderableType

from sakd_cli import runindex
from sakd_cli.config.base import written
from sakd_cli.config.keys import explain
from sakd_cli.config.resolve import flat, found_again
from sakd_cli.documents.listing import RunEntries, RunEntry
from sakd_cli.errors import DamagedError, DiskError, UsageError
from sakd_cli.files import resolved, sha256
from sakd_cli.report.render.format import fixed, named, plain
from sakd_cli.report.render.sheet import columns_of, left_out, table, varying
from sakd_cli.rundir import RunDir, look_up
from sakd_cli.writing import beside

KEYS = {"task": "task", "teacher": "teacher.source", "method": "method.name", "router": "router.name"}
KEYS |= {"dataset": "data.name", "seed": "seed", "epochs": "train.epochs"}
MOST = 1000  # rows of the table
COLUMNS = {"Run": "run", "State": "state", "Task": "task", "Network": "network", "Method": "method"}
COLUMNS |= {"Router": "router", "Data": "dataset", "Seed": "seed", "Epochs": "epochs", "Changed": "changed"}


def run_entries(runs_dir: Path, where: Mapping[str, Any], sort: str | None) -> list[RunEntry]:
    """The runs of a folder that agree with `where` (dotted keys, or columns), the newest first or by a column.

    sort  name of a column, with a hyphen before it for the largest first. Raises UsageError for an unknown one, and for
    a key in `where` that is neither a column, nor in any of these runs, nor a setting.
    """
    columns = set(RunEntry.model_fields) - {"settings"}
    if not isinstance(where, Mapping):
        raise UsageError(f"where: must be a mapping, such as {{'method.name': 'fitnet'}}, got {where!r}")
    runindex.require_readable(runs_dir)
    found, unseen = [], {key for key in where if key.count(".") < 2} - columns
    for path, (settings, verdict) in runindex.judged(runs_dir, _whole_and_top1).items():
        unseen -= {key for key in unseen if look_up(settings, key) is not None}
        try:
            entry = run_entry(RunDir(path.parent), settings, verdict)
        except FileNotFoundError:  # others have removed it since it was found
            continue
        known = {key: getattr(entry, key) for key in columns}
        if all(_same(known.get(key, look_up(settings, key)), value) for key, value in where.items()):
            found.append(entry)
    for key in sorted(unseen):
        explain(key)
    if sort is None:
        return found
    column = sort.removeprefix("-")
    if column not in columns:
        raise UsageError(f"--sort {sort}: no such column; there are {', '.join(sorted(columns))}")
    there = [entry for entry in found if getattr(entry, column) is not None]
    there.sort(key=lambda entry: getattr(entry, column), reverse=sort.startswith("-"))
    return there + [entry for entry in found if getattr(entry, column) is None]


def _same(value: Any, wanted: Any) -> bool:
    return bool(value == wanted) or (value is not None and str(value) == str(wanted))


def _whole_and_top1(folder: Path, settings: Mapping[str, Any] | None) -> tuple[bool, float | None]:
    """Whether what a run says of itself is whole, and its top-1 where it is finished."""
    run = RunDir(folder)
    try:
        if settings is None:
            raise DamagedError(f"{folder}: config.yaml is damaged")
        run.require_own_settings(dict(settings))
        return True, run.summary.last.top1 if run.finished else None
    except (UsageError, FileNotFoundError):  # damaged, or others remove it just now
        return False, None


def run_entry(run: RunDir, settings: Mapping[str, Any] | None, verdict: Any = None, *, shown: bool = False) -> RunEntry:
    """A run; verdict: what `_whole_and_top1` said of it; shown: with its settings."""
    last = max(file.stat().st_mtime for file in (run.path / "config.yaml", *run.path.glob("*.json*")))
    changed = time.strftime("%Y-%m-%d %H:%M", time.localtime(last))
    names = {name: look_up(settings, key) for name, key in KEYS.items()}
    names["network"] = look_up(settings, "student") or look_up(settings, "model")
    for name, value in names.items():
        kind = int if name in ("seed", "epochs") else str
        names[name] = value if isinstance(value, kind) and not isinstance(value, bool) else None
    whole, top1 = verdict or _whole_and_top1(run.path, settings)
    state = "damaged" if not whole else "finished" if run.finished else "in progress" if run.in_use else "stopped"
    about = {"run": plain(run.path), "state": state, "top1": top1, "changed": changed}
    return RunEntry.model_validate(names | about | {"settings": dict(settings or {}) if shown else None})


def entry_tables(document: RunEntries) -> list[RenderableType]:
    """The runs, and the settings of those that are shown."""
    columns = columns_of(named, COLUMNS) | {"Top-1 %": lambda row: fixed(row.top1, 2)}
    text = [*columns][:6]
    columns, same = varying(document.rows, columns)
    notes = [f"Runs: {len(document.rows)}", *same, *(f"removed: {name}" for name in document.removed)]
    notes += left_out(MOST, len(document.rows), "runs")
    tables: list[RenderableType] = [table("Runs", document.rows[:MOST], columns, notes, text)]
    for row in document.rows:
        if row.settings is not None:
            lines = [f"{key}: {plain(written(value))}" for key, value in flat(row.settings).items()]
            tables.append("\n".join([plain(row.run), *lines]))
    return tables


def why_kept(run: RunDir, removed: Collection[Path]) -> str | None:
    """Why a run must not be removed: it is in use, or others have learned from it; None where nothing speaks for it.

    removed  the runs, resolved, that are to go, it among them
    """
    if run.path.is_symlink():
        return "it is a symbolic link"
    if run.in_use:
        return "a process works on it"
    own = run.path.resolve()
    weights = None if run.deliverable is None else sha256(run.deliverable / "model.safetensors")
    of_sweep = (own.parents[1] / "sweeps" / own.parent.name).is_dir()
    for path, settings in runindex.all_settings(own.parents[1 if of_sweep else 0]).items():
        if settings is None or path.parent in removed:
            continue
        settings = found_again(settings, path.parent)
        others, matched = look_up(settings, "teacher.other_sha256"), look_up(settings, "router.run")
        pinned = [look_up(settings, "teacher.sha256"), *(others if isinstance(others, list) else [])]
        if weights is not None and weights in pinned:
            return f"it is the teacher of {plain(path.parent)}"
        if isinstance(matched, str) and resolved(matched) == own:
            return f"{plain(path.parent)} repeats its rates"
    return None


def remove(run: RunDir) -> None:
    """Remove a run: out of the way at once, then piece by piece, with what a removal that was cut short has left."""
    try:
        if run.path.exists():
            with run.locked():
                run.path.rename(beside(run.path, f"removed{uuid.uuid4().hex[:8]}"))
        for left in remains(run):
            shutil.rmtree(left, ignore_errors=True)  # others may remove it as well
            if left.exists():
                shutil.rmtree(left)  # which says why it cannot be
    except OSError as error:
        text = f"{run.path}: cannot be removed: {error.strerror}"
        raise DiskError(text, "once that is mended, the same command removes the rest") from None


def remains(run: RunDir) -> list[Path]:
    """What a removal of this run that was cut short has left."""
    aside = beside(run.path, "removed")
    return [*aside.parent.glob(f"{glob.escape(aside.name)}*")]
