"""Reading files that anyone may have written: no pickle, regular files only, bounded in size, nesting and length."""

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any

import yaml

from sakd_cli.errors import UsageError

MOST_YAML = 64 * 1024  # bytes; a whole config has 2 kB, and PyYAML reads 100 kB a second
MOST_JSON = 64 * 1024**2  # bytes
MOST_HEADER = 4 * 1024**2  # bytes of a safetensors header; that of ResNet152 has 0.1 MB
DEEPEST = 32
MOST_EVENTS = 20_000


def expanded(path: str | Path) -> Path:
    """The path with `~` written out. Raises UsageError where nobody knows whose home that is."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UsageError(f"{path}: nobody knows that home folder") from None


def read_bytes(path: Path, most: int) -> bytes:
    """A file's content. Raises OSError where it is no regular file or cannot be read, ValueError where it is longer."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a named pipe would wait for ever
    with os.fdopen(handle, "rb", closefd=True) as file:
        mode = os.fstat(handle).st_mode
        if not stat.S_ISREG(mode):
            number = errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL
            raise OSError(number, os.strerror(number) if number == errno.EISDIR else "Not a regular file", str(path))
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"longer than {most // 1024} kB")
    return content


def parse_yaml(text: str) -> Any:
    """YAML of plain values. Raises yaml.YAMLError, or ValueError for what is legal but not taken.

    Not taken are aliases: with them, a few lines can stand for more values than a computer holds.
    """
    if len(text) > MOST_YAML:
        raise ValueError(f"longer than {MOST_YAML // 1024} kB")
    depth = 0
    for count, event in enumerate(yaml.parse(text, Loader=yaml.SafeLoader)):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.AliasEvent):
            raise ValueError("an alias (*name) is not taken; write the value out")
        if depth > DEEPEST or count > MOST_EVENTS:
            raise ValueError("nested too deeply or too long")
    try:
        return yaml.safe_load(text)
    except ValueError:  # the number of a date or of digits
        raise ValueError("a value cannot be read") from None


def parse_json(content: bytes | str) -> Any:
    """One JSON document. Raises ValueError whatever is wrong with it."""
    try:
        return json.loads(content)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_json(path: Path) -> Any:
    """One JSON document from a file. Raises OSError or ValueError."""
    return parse_json(read_bytes(path, MOST_JSON))


def check_header(path: Path) -> None:
    """Raise ValueError where the header of a safetensors file is longer than any of ours; OSError as `read_bytes`."""
    if not path.is_file():
        raise OSError(errno.EINVAL, "Not a regular file", str(path))
    with path.open("rb") as file:
        beginning = file.read(8)
    if beginning[:2] in (b"PK", b"\x80\x02"):
        raise ValueError("a pickle, as torch.save writes them")
    if int.from_bytes(beginning, "little") > MOST_HEADER:
        raise ValueError("no header of such a file")
