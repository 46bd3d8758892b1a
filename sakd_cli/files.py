"""Files, read safely: regular, no pickle, bounded in size and nesting. `writing.py` writes them."""

import errno
import fnmatch
import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from io import BufferedReader
from pathlib import Path
from typing import Any, TypeVar

import yaml

from sakd_cli.documents.base import Document
from sakd_cli.documents.training import LogEnd
from sakd_cli.errors import DamagedError, UsageError

AnyDocument = TypeVar("AnyDocument", bound=Document)

MOST_YAML = 64 * 1024  # bytes; a whole config has 2 kB, and PyYAML reads 100 kB a second
MOST_JSON = 64 * 1024**2  # bytes
MOST_LOG, MOST_LINE = 2**30, 2**24  # bytes of a log and of a line; 240 epochs of CIFAR-100 leave 1 MB
MOST_HEADER = 4 * 1024**2  # bytes of a safetensors header; that of ResNet152 has 0.1 MB
SEAL = "sha256"  # key of a document in a file: the digest of its other entries
CARD_SEAL = "digest"  # that of an ensemble's card
DEEPEST = 32
MOST_EVENTS = 20_000
LONGEST_NUMBER = 19  # digits of a whole number: 64 bits
ODD_NUMBER = re.compile(r"\d{20}|[eE]\+?\d{3}")  # may stand in a hash as well


def expanded(path: str | Path) -> Path:
    """The path with `~` written out. Raises UsageError where nobody knows whose home that is."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UsageError(f"{path}: nobody knows that home folder", "set HOME, or name a folder without ~") from None


def of_user(variable: str, folder: str, name: str) -> Path:
    """`sakd/name` in the folder of an environment variable; in `~/folder` where that is unset, empty or relative."""
    place = Path(os.environ.get(variable, ""))
    return (place if place.is_absolute() else expanded("~") / folder) / "sakd" / name


def resolved(path: str | Path) -> Path:
    """The path with all links followed. A loop of links raises nothing, and is no file."""
    return Path(os.path.realpath(path))


def nearest_folder(path: Path) -> Path:
    """The path, if there is something, else the nearest of the folders above it that there are."""
    return next(one for one in (path.absolute(), *path.absolute().parents) if one.exists())


def below(folder: Path, pattern: str = "*") -> Iterator[Path]:
    """What lies below a folder and has such a name, also while others move it, where `Path.rglob` raises."""
    for place, folders, names in os.walk(folder):
        yield from (Path(place, name) for name in fnmatch.filter([*folders, *names], pattern))


def size_below(folder: Path, pattern: str) -> int:
    """Bytes of the files below a folder that have such a name."""
    total = 0
    for path in below(folder, pattern):
        with suppress(FileNotFoundError):
            total += path.stat().st_size
    return total


@contextmanager
def opened(path: Path) -> Iterator[BufferedReader]:
    """A file to read. Raises OSError where it cannot be, or is no regular file: a pipe or a device would never end."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    with os.fdopen(handle, "rb", closefd=True) as file:
        mode = os.fstat(handle).st_mode
        if not stat.S_ISREG(mode):
            number = errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL
            raise OSError(number, os.strerror(number) if number == errno.EISDIR else "Not a regular file", str(path))
        yield file


def read_bytes(path: Path, most: int) -> bytes:
    """A file's content. Raises OSError as `opened`, ValueError where it is longer."""
    with opened(path) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"longer than {most // 1024} kB")
    return content


def parse_yaml(text: str) -> Any:
    """As `_parse_yaml`, by libyaml where that is installed; what is wrong is said by PyYAML, which names the line."""
    fast = getattr(yaml, "CSafeLoader", None)
    if fast is not None:
        with suppress(yaml.YAMLError, ValueError):
            return _parse_yaml(text, fast)
    return _parse_yaml(text, yaml.SafeLoader)


def _number(loader: Any, node: Any) -> Any:
    """A number as everybody reads it: to YAML 1.1 `010` is 8 and `1:30` is 90."""
    if ":" in node.value:
        return node.value
    if re.fullmatch("[-+]?0[0-9_]+", node.value):
        return int(node.value.replace("_", ""))
    return yaml.SafeLoader.yaml_constructors[node.tag](loader, node)


class _Once:
    """A loader whose mappings have every key once: of two, one would be lost without a word."""

    yaml_constructors = yaml.SafeLoader.yaml_constructors | {
        f"tag:yaml.org,2002:{kind}": _number for kind in ("int", "float")
    }

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        before = set[str]()
        for key in [key for key, _ in node.value if isinstance(key.value, str)]:
            if key.value in before:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} stands twice", key.start_mark)
            before.add(key.value)
        return super().construct_mapping(node, deep)  # type: ignore[misc]


def _parse_yaml(text: str, loader: Any) -> Any:
    """YAML of plain values. Raises yaml.YAMLError, or ValueError for what is legal but not taken.

    Not taken are aliases: with them, a few lines can stand for more values than a computer holds.
    """
    if len(text) > MOST_YAML:
        raise ValueError(f"longer than {MOST_YAML // 1024} kB")
    depth = 0
    for count, event in enumerate(yaml.parse(text, Loader=loader)):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.ScalarEvent) and re.search("[\ud800-\udbff]", event.value):
            raise ValueError("half of a character (\\ud83c), as JSON escapes it; write the character itself")
        if isinstance(event, yaml.AliasEvent):
            raise ValueError("an alias (*name) is not taken; write the value out")
        if depth > DEEPEST or count > MOST_EVENTS:
            raise ValueError("nested too deeply or too long")
    try:
        return yaml.load(text, Loader=type("Once", (_Once, loader), {}))
    except ValueError:  # the number of a date or of digits
        raise ValueError("a value cannot be read") from None


def parse_json(content: bytes | str, *, finite: bool = True) -> Any:
    """One JSON document. Raises ValueError whatever is wrong with it, also for NaN, infinity and numbers without end.

    finite: False lets NaN and infinity through, for a reader that says where they stand
    """
    text = content if isinstance(content, str) else content.decode()
    careful: dict[str, Any] = {"parse_constant": _finite} if finite else {}
    if ODD_NUMBER.search(text):
        careful |= {"parse_int": _whole} | ({"parse_float": _finite} if finite else {})
    try:
        return json.loads(text, **careful)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _whole(text: str) -> int:
    if len(text) > LONGEST_NUMBER:
        raise ValueError("a number of too many digits")
    return int(text)


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError("a number that is not finite")
    return value


def read_json(path: Path, *, sealed: bool = False) -> Any:
    """One JSON document from a file. Raises OSError or ValueError; `sealed`: also where its seal says otherwise."""
    found = parse_json(read_bytes(path, MOST_JSON))
    return unsealed(found) if sealed else found


def unsealed(found: Any, key: str = SEAL, *, needed: bool = False) -> Any:
    """A document without its seal, if it has one. Raises ValueError where it is another than was sealed.

    needed  also where it has none
    """
    if needed and key not in found:
        raise ValueError("has no digest")
    if isinstance(found, dict) and key in found and found.pop(key) != _seal(found):
        raise ValueError("is not as it was written")
    return found


def sealed(content: Mapping[str, Any], key: str = SEAL) -> dict[str, Any]:
    """A document with a digest of all of it under `key`."""
    return {**content, key: _seal(content)}


def weights_file(path: Path) -> Path:
    """The weights of a network: its file, or the one in its folder."""
    return path / "model.safetensors" if path.is_dir() else path


def folder_of(path: Path) -> Path:
    """The folder of a network: itself, or the one around its weights file."""
    return path if path.is_dir() else path.parent


def read_about(folder: Path) -> dict[str, Any]:
    """The card (`config.json`) of a network's folder; empty where there is none. Raises DamagedError.

    People add to it by hand, so it has no seal: what it says is checked against weights and images.
    """
    try:
        return dict(read_json(folder / "config.json"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError) as error:
        raise DamagedError(f"{folder / 'config.json'}: the network's card is damaged ({error})") from None


def read_document(path: Path, kind: type[AnyDocument]) -> AnyDocument:
    """One of our own documents from a file. Raises DamagedError where it is missing, damaged or of another kind."""
    try:
        return kind.model_validate_json(json.dumps(read_json(path, sealed=True)), strict=True)
    except (OSError, ValueError):
        raise DamagedError(f"{path}: missing or damaged") from None


def line_digest(before: str, line: bytes) -> str:
    """SHA-256 of a log that had the digest `before` and got another line; "" is that of an empty log.

    A digest of digests, so that a writer goes on with it without the lines.
    """
    return hashlib.sha256(before.encode() + line.removesuffix(b"\n")).hexdigest()


def log_digest(path: Path, most: int | None = None) -> str:
    """That of a log, whole or to so many bytes; of none that of an empty one."""
    digest, length = "", 0
    with suppress(OSError), opened(path) as file:
        for line in iter(partial(file.readline, MOST_LINE), b""):
            length += len(line)
            if most is not None and length > most:
                break
            digest = line_digest(digest, line)
    return digest


def read_lines(path: Path, known: LogEnd | None = None, *, whole: bool = False) -> Iterator[Any]:
    """The records of a log. Lines that are no JSON are left out.

    known, whole: where its writer says that it came to, and that nothing followed. Raises DamagedError, after the last
    record, where that is not so; before, where the log cannot be read or is longer than that of any run.
    """
    length, digest, same = 0, "", known is None or known.bytes == 0
    try:
        if not path.is_file() or path.stat().st_size > MOST_LOG:
            raise DamagedError(f"{path}: missing, not a file, or longer than {MOST_LOG // 2**20} MB")
        with path.open("rb") as file:
            for line in iter(partial(file.readline, MOST_LINE), b""):
                length, digest = length + len(line), line_digest(digest, line)
                same = same or (known is not None and known == LogEnd(bytes=length, sha256=digest))
                with suppress(ValueError):
                    yield parse_json(line, finite=False)
    except OSError as error:
        raise DamagedError(f"{path}: cannot be read: {error.strerror}") from None
    if not same or (whole and known is not None and known.bytes != length):
        raise DamagedError(f"{path}: is not what its run wrote: it was changed by others", "put it back as it was")


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


def card_settings(path: Path) -> dict[str, Any]:
    """What a weights file of ours says of its network. Raises OSError, ValueError, KeyError or TypeError."""
    check_header(path)
    with path.open("rb") as file:
        header = parse_json(file.read(int.from_bytes(file.read(8), "little")))
    return dict(parse_json(parse_json(header["__metadata__"]["sakd"])["card"]))


def columns_digest(columns: Mapping[str, Any]) -> str:
    """SHA-256 over the names, types, shapes and bytes of arrays of numpy in order of name."""
    summed = hashlib.sha256()
    for name in sorted(columns):
        column = columns[name]
        summed.update(f"{name} {column.dtype} {tuple(column.shape)} ".encode() + column.tobytes())
    return summed.hexdigest()


def sha256(path: Path) -> str:
    """Hex digest of a file. Raises OSError as `opened`."""
    with opened(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _seal(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json_bytes(content)).hexdigest()


def json_bytes(content: Any) -> bytes:
    """The one way in which a JSON document is written, so that a changed byte is noticed."""
    return (json.dumps(content, indent=2, allow_nan=False) + "\n").encode()


def yaml_bytes(content: Any) -> bytes:
    """Settings as YAML, in the order of their class."""
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True).encode()
