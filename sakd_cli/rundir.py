"""A run on disk, without torch: how it is made, locked, written, found. What lies where: guide `run-directory`."""

import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from sakd_cli import files, runindex, writing
from sakd_cli.config.base import EFFECTIVE
from sakd_cli.config.identity import EXTENDED, HELD, differences, listed
from sakd_cli.config.resolve import PATHS, flat, found_again
from sakd_cli.documents.training import LogEnd, Summary
from sakd_cli.errors import DamagedError, DiskError, RunInUseError, UsageError

DELIVERABLES = ("student", "teacher")
SUMMARY = "summary.json"
IMAGES = "images.json"  # which images the run has (`data/fingerprint.py`)
OF_THE_END = ("survey.safetensors", "ensemble/ensemble.json")  # what a run leaves once all is trained, beside these
SUMMED = ("env.json", "images.json", "*.safetensors", "student/*", "teacher/*", "branches/*", "ensemble/*.json")


class RunDir:
    """One run directory. `listeners` are called with each line that `append` has written: file name and record.

    silent       another process of the same run writes and holds it; this one only reads
    fingerprint  what its checkpoints say of the run that made them: its `settings` by their dotted keys
    """

    def __init__(self, path: Path, *, silent: bool = False) -> None:
        try:
            os.fsencode(path).decode()  # the bytes: Python may be in a locale without UTF-8
        except UnicodeDecodeError:
            raise UsageError(f"{path}: the name of a run's folder must be UTF-8") from None
        self.path = path
        self.silent = silent
        self.fingerprint: dict[str, Any] = {}
        self._handle: int | None = None  # of the folder, while it is locked
        self._identity: str | None = None
        self._digests: dict[str, str] = {}  # of what was written into each log
        self.listeners: list[Callable[[str, dict[str, Any]], None]] = []

    @classmethod
    def create(cls, runs_dir: Path, label: str) -> "RunDir":
        """Make a new directory `<date>-<time>-<label>`; never one that exists."""
        stamp = time.strftime("%Y%m%d-%H%M%S")
        for attempt in range(1, 1000):
            path = runs_dir / (f"{stamp}-{label}" if attempt == 1 else f"{stamp}-{label}-{attempt}")
            try:
                path.mkdir(parents=True)
            except OSError as error:
                if path.exists():
                    continue
                raise DiskError(
                    f"{runs_dir}: cannot make a run directory: {error.strerror}", hint="--runs-dir DIR"
                ) from None
            return cls(path)
        raise DiskError(f"{runs_dir}: too many runs of the same second")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes out. RunInUseError, naming the holder, where one is in; a dead one holds nothing.

        UsageError where the run holds a symbolic link: what is written to it would go elsewhere.
        """
        if self.silent:
            yield
            return
        for path in files.below(self.path):
            if path.is_symlink():
                raise UsageError(f"{path}: a symbolic link; no run is written that holds one")
        # `in_use` of another process has the lock for a moment.
        holder, failed = self.path / ".holder", f"{self.path}: cannot be locked"
        if (lock := writing.acquire_lock(self.path / ".lock", 0.5, failed=failed)) is None:
            try:
                who = files.read_json(holder)
                name, hint = f"process {int(who['pid'])} on {who['host']}", None
            except (OSError, ValueError, KeyError, TypeError):  # without flock, a lock that was copied here as well
                name, hint = "another process", f"if there is none, remove {self.path / '.lock'}"
            raise RunInUseError(f"{self.path}: in use by {name}", hint)
        self._handle = os.open(self.path, os.O_RDONLY)
        try:
            with writing.guarded(self.path, self._require_same):
                with suppress(DiskError):  # a full disk, of which this run is to be removed
                    writing.write_json(holder, {"host": platform.node(), "pid": os.getpid()})
                yield
        finally:
            with suppress(OSError, RunInUseError):
                self._require_same()
                holder.unlink(missing_ok=True)
            os.close(self._handle)
            self._handle = None
            lock.release()

    def _require_same(self) -> None:
        """RunInUseError where the folder at this path is no longer the one that was locked, or holds another run."""
        assert self._handle is not None
        try:
            same = os.path.samestat(os.stat(self.path), os.fstat(self._handle))
        except OSError:
            same = False
        if not same or (self._identity is not None and self._read_identity() != self._identity):
            raise RunInUseError(
                f"{self.path}: is another folder or run than the one that this process trains; nothing more is written",
                hint="what was saved resumes where it lies now",
            )

    def clear(self) -> None:
        """Remove all that a run wrote, what says that it is one first; keep the folder and its lock."""
        writing.verify(self.path)
        self._identity = None
        self._digests = {}
        for path in sorted(self.path.iterdir(), key=lambda path: path.name not in (SUMMARY, "config.yaml")):
            if path.name not in (".lock", ".holder"):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()

    @property
    def config(self) -> dict[str, Any]:
        """All settings of the run, as a plain tree."""
        if (settings := runindex.read_config(self.path / "config.yaml")) is None:
            place = self.path / "config.yaml"
            what = "missing" if not place.exists() else "damaged" if os.access(place, os.R_OK) else "not to be read"
            kind = {"missing": UsageError, "damaged": DamagedError}.get(what, DiskError)
            raise kind(f"{self.path}: not a run directory, its config.yaml is {what}", hint="sakd runs lists the runs")
        return found_again({key: value for key, value in settings.items() if key != EFFECTIVE}, self.path)

    def require_own_settings(self, settings: dict[str, Any] | None = None, *, but: str = "") -> None:
        """Raise DamagedError where config.yaml (`settings`) is not what the run's last checkpoint was trained with.

        but  a key that may be another, since whoever uses it sees that
        """
        try:
            trained = files.read_json(self.path / "checkpoints" / "last" / "state.json")["fingerprint"]["settings"]
        except (OSError, ValueError, KeyError, TypeError):
            return
        if not isinstance(trained, dict):
            return
        told = flat(settings or self.config)
        here = {key: value for key, value in told.items() if not key.startswith(f"{EFFECTIVE}.")}
        found = differences(trained, here)
        allowed = HELD | EXTENDED if trained.get("train.epochs") in self.extended else HELD
        if changed := [one for one in found if one.key not in {*allowed, but}]:
            raise DamagedError(
                f"{self.path}: config.yaml is not what it was trained with: {listed(changed)}", "put it back as it was"
            )

    @property
    def identity(self) -> str | None:
        """What tells this run from every other, also of the same settings; None for a folder that never was one."""
        if self._identity is None:
            self._identity = self._read_identity()
        return self._identity

    def _read_identity(self) -> str | None:
        return None if (known := self._about().get("id")) is None else str(known)

    def _about(self) -> dict[str, Any]:
        with suppress(UsageError):
            return self.read_json("env.json", sealed=True)
        return {}

    @property
    def extended(self) -> list[int]:
        """The numbers of epochs after which it would have ended before it was extended, in that order."""
        known = self._about().get("extended")
        return [epochs for epochs in known if isinstance(epochs, int)] if isinstance(known, list) else []

    def extend(self, epochs: int) -> None:
        """Note that the run was to end after so many epochs, and take back what it left at its end."""
        if epochs not in self.extended:
            about = self._about() | {"extended": [*self.extended, epochs]}
            writing.write_json(self.path / "env.json", files.sealed(about))
        for name in (SUMMARY, *OF_THE_END):
            (self.path / name).unlink(missing_ok=True)

    @property
    def finished(self) -> bool:
        """Whether the run came to its end."""
        return (self.path / SUMMARY).is_file()

    @property
    def in_use(self) -> bool:
        """Whether a process works on it now."""
        if not (self.path / ".lock").is_file():
            return False
        try:
            if (lock := writing.acquire_lock(self.path / ".lock")) is not None:
                lock.release()
            return lock is None
        except DiskError:  # not to be written; what a process in it has written there is seen
            return (self.path / ".holder").is_file()

    @property
    def summary(self) -> Summary:
        """What the finished run ended with. Raises UsageError where it is missing, damaged, or that of another run."""
        found = files.read_document(self.path / SUMMARY, Summary).model_copy(update={"run": str(self.path)})
        if (known := found.files.get("env.json")) is not None:
            self.read_json("env.json", sealed=True, needed=True)
            if files.sha256(self.path / "env.json") != known:
                reason = "it or the run's env.json is of another run"
                raise DamagedError(f"{self.path / SUMMARY}: {reason}", "put them back as they were")
        return found

    @property
    def environment(self) -> dict[str, Any]:
        """What `env.json` holds. DamagedError where it is damaged or, of a run that is not finished, of another one."""
        about = self.read_json("env.json", sealed=True, needed=True)
        for path in files.below(self.path / "checkpoints", "last") if not self.finished else ():
            with suppress(OSError, ValueError, KeyError, TypeError):
                if files.read_json(path / "state.json")["run"] != about["id"]:
                    reason = "is of another run than its last checkpoint"
                    raise DamagedError(f"{self.path / 'env.json'}: {reason}", "put it back as it was")
        return about

    @property
    def deliverable(self) -> Path | None:
        """Folder of the deployable network, if the run has saved one."""
        folders = [self.path / name for name in DELIVERABLES]
        return next((folder for folder in folders if (folder / "model.safetensors").is_file()), None)

    def require_deliverable(self) -> Path:
        """The same. Raises UsageError where there is none."""
        if (folder := self.deliverable) is None:
            raise UsageError(f"{self.path}: this run has not saved a network yet")
        return folder

    @property
    def ensemble(self) -> Path | None:
        """Folder of the student with its residual students, if they are trained."""
        folder = self.path / "ensemble"
        return folder if (folder / "ensemble.json").is_file() else None

    def append(self, name: str, record: dict[str, Any]) -> None:
        """Add one line to a JSON-lines file; a line that was torn before stays a line of its own."""
        if self.silent:
            return
        line = json.dumps(record, allow_nan=False).encode() + b"\n"
        writing.verify(self.path / name)
        digest = self._digest(name)
        try:
            with open(self.path / name, "ab+", opener=self._opened) as file:
                torn = file.tell() > 0 and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n"
                file.write(b"\n" * torn + line)
        except OSError as error:
            raise writing.disk_error(self.path / name, error, len(line)) from None
        self._digests[name] = files.line_digest(digest, line)
        for listener in self.listeners:
            listener(name, record)

    def _opened(self, path: str, flags: int) -> int:
        """A file below the folder that was locked, wherever that lies now."""
        if self._handle is None:
            return os.open(path, flags, 0o666)
        return os.open(os.path.basename(path), flags, 0o666, dir_fd=self._handle)

    def _digest(self, name: str) -> str:
        """That of a log as it was written, which another process may have begun."""
        known = self._digests.get(name)
        return files.log_digest(self.path / name) if known is None else known

    def log_ends(self) -> dict[str, LogEnd]:
        """Where every log ends, after they were flushed to the disk; the mixtures' file counts as one."""
        ends = {}
        for path in sorted([*self.path.glob("*.jsonl"), *self.path.glob("*dfa.json")]):
            ends[path.name] = LogEnd(bytes=path.stat().st_size, sha256=self._digest(path.name))
            try:
                writing.flush(path)
            except OSError as error:
                raise writing.disk_error(path, error, ends[path.name].bytes) from None
        return ends

    def digests(self) -> dict[str, str]:
        """SHA-256 of every file that is no log and that readers take figures or weights from, by its place."""
        found = sorted(path for pattern in SUMMED for path in self.path.glob(pattern) if path.suffix != ".md")
        return {path.relative_to(self.path).as_posix(): files.sha256(path) for path in found}

    def require_files(self, *names: str) -> None:
        """Raise DamagedError where the run has ended and files whose places begin so are gone or others than then."""
        known = dict[str, str]()
        with suppress(UsageError):  # who shows anything of the summary says what is wrong with it
            known = self.summary.files if self.finished else {}
        for name, digest in known.items():
            path = self.path / name
            if name.startswith(names) and not (path.is_file() and files.sha256(path) == digest):
                what = "damaged or changed" if path.exists() else "missing"
                raise DamagedError(f"{path}: {what}", "put it back as it was")

    def cut_logs(self, sizes: dict[str, int], digests: dict[str, str] | None = None) -> None:
        """Take back what was written after `log_ends` said this, and the checkpoints of stages that come again.

        Raises DamagedError where what was written before is no longer that.
        """
        writing.verify(self.path)
        for name, digest in (digests or {}).items() if not self.silent else ():
            if name.endswith(".jsonl") and files.log_digest(self.path / name, sizes.get(name, 0)) != digest:
                raise DamagedError(f"{self.path / name}: was changed by others since then", "put it back as it was")
        for path, known in self._checkpointed().items() if not self.silent else ():
            if any(end.bytes > sizes.get(name, 0) for name, end in known.items()):
                shutil.rmtree(path)
        for path in self.path.glob("*.jsonl") if not self.silent else ():
            if path.stat().st_size > sizes.get(path.name, 0):
                os.truncate(path, sizes.get(path.name, 0))
        self._digests = dict(digests or {})

    def _checkpointed(self) -> dict[Path, dict[str, LogEnd]]:
        """Where the logs ended when each last checkpoint was written, as far as those say it."""
        found = {}
        for path in files.below(self.path / "checkpoints", "last"):
            with suppress(OSError, ValueError, KeyError, TypeError):
                state = files.read_json(path / "state.json")
                sizes, digests = state["logs"], state["log_sha256"]
                found[path] = {name: LogEnd(bytes=sizes[name], sha256=digests[name]) for name in sizes}
        return found

    def lines(self, name: str) -> Iterator[dict[str, Any]]:
        """The records of a log; none if there is none. Raises DamagedError as `files.read_lines`.

        It must be what the run says in its summary or, while it is not finished, in its last checkpoint.
        """
        known, whole = None, False
        if self.finished:
            with suppress(UsageError):  # who shows anything of the summary says what is wrong with it
                if logs := self.summary.logs:
                    known, whole = logs.get(name, LogEnd(bytes=0, sha256="")), True
        else:
            saved = [ends[name] for ends in self._checkpointed().values() if name in ends]
            known = max(saved, key=lambda end: end.bytes, default=None)
        if (self.path / name).exists() or (known and known.bytes):
            yield from files.read_lines(self.path / name, known, whole=whole)

    def read_json(self, name: str, *, sealed: bool = False, needed: bool = False) -> dict[str, Any]:
        """One JSON document of the run, as `files.read_json`. Raises UsageError if it is missing or damaged."""
        content = None
        with suppress(OSError, ValueError):
            found = files.read_json(self.path / name)
            content = files.unsealed(found, needed=needed) if sealed else found
        if not isinstance(content, dict):
            raise DamagedError(f"{self.path / name}: missing or damaged")
        return content


def all_runs(runs_dir: Path) -> list[RunDir]:
    """Every run in the folder, newest first."""
    runindex.require_readable(runs_dir)
    return [RunDir(path.parent) for path in runindex.config_files(runs_dir)]


def runs_like(runs_dir: Path, wanted: dict[str, Any]) -> Iterator[RunDir]:
    """The runs whose config agrees with `wanted` (dotted keys), newest first; damaged ones are left out."""
    runindex.require_readable(runs_dir)
    for path, settings in runindex.all_settings(runs_dir).items():
        if settings is None or any(look_up(settings, key) != wanted[key] for key in wanted if key not in PATHS):
            continue
        run = RunDir(path.parent)
        with suppress(UsageError):  # the index may be of another time
            config = run.config
            if all(_same(key, look_up(config, key), value) for key, value in wanted.items()):
                yield run


def _same(key: str, value: Any, wanted: Any) -> bool:
    if key in PATHS and isinstance(value, str):
        return os.path.abspath(value) == str(wanted)
    return bool(value == wanted)


def newest_run(
    runs_dir: Path, wanted: dict[str, Any], *, finished: bool = True, delivered: bool = False
) -> RunDir | None:
    """The newest run whose config agrees with `wanted` (dotted keys); damaged ones are left out.

    finished: it came to its end; delivered: it has saved a network.
    """
    runs = runs_like(runs_dir, wanted) if wanted else iter(all_runs(runs_dir))
    for run in runs:
        if (finished and not run.finished) or (delivered and run.deliverable is None):
            continue
        with suppress(UsageError):
            if run.config:
                return run
    return None


def look_up(tree: Any, key: str) -> Any:
    """The value of a dotted key in a plain tree; None where there is none."""
    for part in key.split("."):
        tree = tree.get(part) if isinstance(tree, dict) else None
    return tree
