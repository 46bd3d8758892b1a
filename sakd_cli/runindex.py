"""The settings of all runs of a folder, quickly: read once, kept in an index that may be deleted at any time.

`.index.json` of a folder of runs: a line with the SHA-256 of the rest, then the settings of every run beside what its
`config.yaml` looked like (time, size, inode). An entry counts only as long as that is so, and whoever uses a run reads
its own file again. A small folder has none.
"""

import errno
import hashlib
import json
import os
import re
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from sakd_cli import files, writing
from sakd_cli.errors import DiskError

NAME = ".index.json"
MANY = 50  # runs that were read anew, from which on the index is written
MOST = 2**28  # bytes: 100,000 runs
JUDGED = ("summary.json", "env.json", "checkpoints/last/state.json")
Settings = dict[str, Any]


def require_readable(runs_dir: Path) -> None:
    """Raise DiskError for a folder of runs that may not be read: it is not one without runs."""
    if runs_dir.is_dir() and not os.access(runs_dir, os.R_OK | os.X_OK):
        raise DiskError(f"{runs_dir}: cannot be read: {os.strerror(errno.EACCES)}", hint="--runs-dir DIR")


def config_files(runs_dir: Path) -> dict[Path, os.stat_result]:
    """`config.yaml` of every run in the folder, and in a folder there that is no run (a sweep's), the newest first."""
    found, names = [], _names(runs_dir)
    while names:
        name = names.pop()
        try:
            about = os.stat(os.path.join(runs_dir, name, "config.yaml"))
            found.append((about.st_mtime_ns, name, about))
        except OSError:
            if os.sep not in name:
                names += [os.path.join(name, run) for run in _names(runs_dir / name)]
    return {Path(runs_dir, name, "config.yaml"): about for _, name, about in sorted(found, reverse=True)}


def _names(folder: Path) -> list[str]:
    try:
        return [entry.name for entry in os.scandir(folder) if entry.is_dir() and entry.name[0] != "."]
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return []


def read_config(path: Path, parse: Callable[[str], Any] = files.parse_yaml) -> Settings | None:
    """A config file as a plain tree; None where it is none."""
    try:
        settings = parse(files.read_bytes(path, files.MOST_YAML).decode())
    except (OSError, ValueError, yaml.YAMLError):
        return None
    # A key may be a number in YAML, and then it is none of ours.
    ours = isinstance(settings, dict) and settings and all(isinstance(key, str) for key in settings)
    return settings if ours else None


def _by_blocks(text: str) -> Any:
    """As `files.parse_yaml`; a top-level key whose value other files have too is parsed once, for all of them."""
    with suppress(AttributeError, ValueError, yaml.YAMLError):
        blocks = [_block(block) for block in re.split(r"^(?=[^\s#-])", text, flags=re.MULTILINE) if block]
        settings = {key: value for block in blocks for key, value in block.items()}
        if settings and len(settings) == len(blocks) == sum(map(len, blocks)):
            return settings
    return files.parse_yaml(text)


_block = lru_cache(2**14)(files.parse_yaml)


def all_settings(runs_dir: Path) -> dict[Path, Settings | None]:
    """The settings of every run in the folder by its `config.yaml`, the newest first; None where it is damaged."""
    return {path: settings for path, (settings, _) in judged(runs_dir).items()}


def judged(
    runs_dir: Path, judge: Callable[[Path, Settings | None], Any] | None = None
) -> dict[Path, tuple[Settings | None, Any]]:
    """As `all_settings`, and what `judge` says of each run, given its folder and settings, by the files `JUDGED`."""
    known, found, anew = _read(runs_dir / NAME), dict[Path, tuple[Settings | None, Any]](), 0
    entries: dict[str, Any] = {}
    start = len(str(runs_dir / "x")) - 1
    for path, about in config_files(runs_dir).items():
        folder, looks = os.path.dirname(path), _looks(about)
        before = known.get(folder[start:])
        if not (isinstance(before, list) and len(before) == 4 and before[0] == looks):
            before, anew = [looks, read_config(path, _by_blocks), None, None], anew + 1
        settings, others, said = before[1:]
        now = [_looks_of(f"{folder}/{name}") for name in (JUDGED if judge else ())]
        if judge and others != now:
            others, said, anew = now, judge(path.parent, settings), anew + 1
        entries[folder[start:]] = [looks, settings, others, said]
        found[path] = settings if isinstance(settings, dict) else None, said
    if anew >= MANY or (known and (anew or len(known) > len(entries))):
        _write(runs_dir / NAME, entries)
    return found


def _looks(about: os.stat_result) -> list[int]:
    return [about.st_mtime_ns, about.st_ctime_ns, about.st_size, about.st_ino]


def _looks_of(place: str) -> list[int] | None:
    """None where there is nothing, or no longer."""
    try:
        return _looks(os.stat(place))
    except OSError:
        return None


def _read(path: Path) -> dict[str, Any]:
    try:
        digest, _, body = files.read_bytes(path, MOST).partition(b"\n")
        entries = json.loads(body) if digest.decode() == hashlib.sha256(body).hexdigest() else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return entries if isinstance(entries, dict) else {}


def _write(path: Path, entries: dict[str, Any]) -> None:
    try:
        body = json.dumps(entries).encode()
        writing.write_aside(path, hashlib.sha256(body).hexdigest().encode() + b"\n" + body)
    except (DiskError, TypeError, ValueError):  # dates, or a folder that is not ours to write: it is read again then
        return
