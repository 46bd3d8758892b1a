"""Files and folders written whole or not at all, and only where a run is still the one that was locked."""

import errno
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from sakd_cli.errors import DiskError, RunInUseError, SakdError, UsageError
from sakd_cli.files import json_bytes, nearest_folder

# On a file system without flock (Lustre) the file itself is the lock, which is as good.
warnings.filterwarnings("ignore", "flock not supported")
ONWARD = "go on: --resume"
_guards: dict[Path, Callable[[], None]] = {}


@contextmanager
def guarded(folder: Path, check: Callable[[], None]) -> Iterator[None]:
    """Meanwhile `check` is called before anything below `folder` is written; it raises where that must not be."""
    _guards[folder.absolute()] = check
    try:
        yield
    finally:
        _guards.pop(folder.absolute(), None)


def verify(path: Path) -> None:
    """Raise where a folder above `path` is guarded and is no longer what it was."""
    for check in _guards_of(path):
        check()


def _guards_of(path: Path) -> list[Callable[[], None]]:
    return [check for folder, check in list(_guards.items()) if path.absolute().is_relative_to(folder)]


def beside(path: Path, ending: str) -> Path:
    """A hidden name beside it, for what is not to be seen; of one of 255 bytes, which has no room for more, cut."""
    return path.with_name(f".{os.fsdecode(os.fsencode(path.name)[:230])}.{ending}")


def write_aside(path: Path, content: bytes) -> None:
    """Write a whole file or nothing: aside, flushed to the disk, then renamed over the old one."""
    aside = beside(path, "tmp")
    verify(path)
    try:
        with aside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        verify(path)
        aside.replace(path)
    except OSError as error:
        with suppress(OSError):
            aside.unlink(missing_ok=True)
        raise disk_error(path, error, len(content)) from None


def write_json(path: Path, content: Any) -> None:
    """Write one JSON document, atomically."""
    write_aside(path, json_bytes(content))


def require_room(folder: Path, needed: int, again: str = "") -> None:
    """Raise DiskError where the disk of a folder that is, or will be, lacks so many bytes; `again`: what to do then."""
    if shutil.disk_usage(nearest_folder(folder)).free < needed:
        raise disk_error(folder, OSError(errno.ENOSPC, ""), needed, again)


def not_made(text: str, error: OSError, hint: str | None = None) -> SakdError:
    """What to say where the system has refused to make something: of a name that is too long whose mistake it is."""
    kind = UsageError if error.errno == errno.ENAMETOOLONG else DiskError
    return kind(f"{text}: {error.strerror}", hint)


def disk_error(path: Path, error: OSError, needed: int, again: str = "") -> SakdError:
    """What to say where `needed` bytes could not be written; on a full disk with what is needed and what is free."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return not_made(f"{path}: cannot be written", error)
    needs, free = (f"{size / 1e6:.3f} MB" for size in (needed, shutil.disk_usage(nearest_folder(path)).free))
    again = again or (ONWARD if _guards_of(path) else "the same command again")
    return DiskError(f"{path}: the disk is full, {needs} needed, {free} free", hint=f"make room, then {again}")


def acquire_lock(path: Path, wait: float = 0.0, *, failed: str = "", hint: str | None = None) -> FileLock | None:
    """A lock on this file, held; None where another process has it after `wait` seconds (-1: it is waited for).

    failed  what to say where there can be none, in a DiskError; empty: that it cannot be locked
    """
    lock = FileLock(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(wait)
    except Timeout:
        return None
    except OSError as error:
        raise not_made(failed or f"{path}: cannot be locked", error, hint) from None
    return lock


def wait_for_lock(path: Path, tell: Callable[[], None], hint: str | None = None) -> FileLock:
    """The same, held in any case; `tell` is called where another process is to be waited for."""
    if (lock := acquire_lock(path, hint=hint)) is None:
        tell()
        lock = acquire_lock(path, wait=-1, hint=hint)
    assert lock is not None, "it was waited for"
    return lock


def make_folder(path: Path, hint: str | None = None) -> None:
    """A folder and those above it, where they are not there yet. Raises DiskError."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise not_made(f"{path}: cannot be made", error, hint) from None


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill aside, which then takes the place of `folder`, or leaves nothing. DiskError where it cannot.

    The old one is renamed before and removed after; killed between the two renames, the next call puts it back.
    RunInUseError while another process fills it.
    """
    aside, old, held = (beside(folder, end) for end in ("new", "old", "lock"))
    failed = f"{folder}: cannot be made"
    if (lock := acquire_lock(held, failed=failed, hint="--out DIR")) is None:
        raise RunInUseError(f"{folder}: another process is writing it")
    try:
        if old.is_dir() and not folder.exists():
            old.replace(folder)
        shutil.rmtree(aside, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
        aside.mkdir()
        yield aside
        flush(aside)
        if folder.exists():
            folder.replace(old)
        try:
            aside.replace(folder)
        except OSError:
            with suppress(FileNotFoundError):  # there was none
                old.replace(folder)
            raise
        flush(folder.parent)
    except OSError as error:
        raise not_made(failed, error, "--out DIR") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
        held.unlink(missing_ok=True)
        lock.release()


def flush(path: Path) -> None:
    """Make a file, or the names in a folder, survive a loss of power; of a folder where its file system can (SMB)."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP)):
            raise
    finally:
        os.close(handle)
