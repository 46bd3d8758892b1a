"""Files of weights that other programs have written, as plain data; the only reader of pickled weights.

A PyTorch file is read with `weights_only=True` and in no other way, whatever fails. What training scripts keep beside
the weights (`HARMLESS`) becomes an empty object, of which no code runs.
"""

import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sakd_cli.errors import UsageError
from sakd_cli.files import parse_json, read_bytes
from sakd_cli.models.artifact import read_tensors

ROOM = 512 * 1024**2  # bytes beside the weights: another network, an optimizer, a memory bank of CRD (50 MB)
ALONE = "where you trust the file, save its weights alone: torch.save(model.state_dict(), FILE)"


class _Aside:
    """Stands for an object beside the weights: takes what the file has of it, and keeps nothing."""

    def __new__(cls, *_: Any) -> "_Aside":
        return object.__new__(cls)

    def __init__(self, *_: Any) -> None:
        return

    def __setstate__(self, _: Any) -> None:
        return


def _filled(kind: Callable[[], Any]) -> type:
    """Stands for a class of dicts or lists, which the unpickler fills: a plain one, whatever it is called with."""
    return type("_Filled", (), {"__new__": lambda cls, *_: kind()})


_LIGHTNING = [f"{name}.utilities.data" for name in ("lightning.fabric", "lightning_fabric")]
_LIGHTNING += [f"{name}.utilities.parsing" for name in ("lightning.pytorch", "pytorch_lightning")]
_NAMES: dict[Callable[..., Any], list[str]] = {
    _Aside: [
        *("argparse.Namespace", "types.SimpleNamespace", "numpy.dtype", "numpy.ndarray", "functools.partial"),
        *("uuid.UUID", "decimal.Decimal", "fractions.Fraction"),
        *(f"datetime.{name}" for name in ("date", "datetime", "time", "timedelta", "timezone")),
        *(f"builtins.{name}" for name in ("int", "float", "bool", "str", "list", "dict", "tuple", "frozenset")),
        *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
        *(f"pathlib{at}.{kind}Path" for at in ("", "._local") for kind in ("Posix", "Windows", "PurePosix")),
    ],
    _filled(OrderedDict): [
        *("collections.defaultdict", "yacs.config.CfgNode", "easydict.EasyDict"),
        *(f"{place}.AttributeDict" for place in _LIGHTNING),
    ],
    _filled(list): ["collections.deque"],
}
HARMLESS: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    (kind, name) for kind, names in _NAMES.items() for name in names
]


def read_foreign(file: Path, most: int) -> Any:
    """What a file of weights holds, as plain data. Raises UsageError where it has more than `most` bytes, or other."""
    if not file.is_file():
        raise UsageError(f"{file}: {'no file' if file.exists() else 'no such file'}")
    if file.stat().st_size > most:
        raise UsageError(f"{file}: has {file.stat().st_size >> 20} MB, too many for this network", hint=ALONE)
    if file.name.endswith(".index.json"):
        return _parts(file, most)
    with file.open("rb") as opened:
        start = opened.read(9)  # what it is, the content says, not the name
    if start[:2] == b"PK" or start[:1] == b"\x80":
        return _unpickled(file)
    if start[8:] == b"{":
        return read_tensors(file, None)[1]
    what = f"no file of PyTorch or safetensors, it begins with {start.decode(errors='replace')!r}" if start else "empty"
    raise UsageError(f"{file}: {what}", "a pointer of Git LFS: git lfs pull" if start == b"version h" else None)


def _parts(index: Path, most: int) -> dict[str, Any]:
    """The tensors of a file in several parts, from the index of the Hugging Face libraries beside them."""
    try:
        places = dict(parse_json(read_bytes(index, most).decode())["weight_map"])
        files = sorted({str(name) for name in places.values()})
        if not all(Path(name).name == name and not name.endswith(".json") for name in files):
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError):
        raise UsageError(f"{index}: is no index of a file in parts, with a weight_map of names beside it") from None
    parts = [read_foreign(index.parent / part, most) for part in files]
    found = {name: tensor for part in parts if isinstance(part, dict) for name, tensor in part.items()}
    if odd := sorted(map(str, places.keys() ^ found.keys())):
        raise UsageError(f"{index}: its parts have not the {len(places)} tensors that it names, first {odd[0][:40]!r}")
    return found


def _unpickled(file: Path) -> Any:
    """What a PyTorch file holds, if that is plain data and as large as it looks."""
    if zipfile.is_zipfile(file):
        try:
            with zipfile.ZipFile(file) as archive:
                members = archive.infolist()
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
            raise UsageError(f"{file}: damaged, its archive cannot be read") from None
        if {"constants.pkl", "archive_format"} & {member.filename.rpartition("/")[2] for member in members}:
            raise UsageError(f"{file}: is a program (torch.jit, torch.export), no state dict", hint=ALONE)
        packed = any(member.compress_type != zipfile.ZIP_STORED for member in members)
        if packed or sum(member.file_size for member in members) > file.stat().st_size:
            raise UsageError(f"{file}: its members are compressed, which PyTorch never does; not opened")
    try:
        # Opened here: torch.load reads a file by the ending of its name.
        with (
            warnings.catch_warnings(action="ignore"),
            torch.serialization.safe_globals(HARMLESS),
            file.open("rb") as opened,
        ):
            return torch.load(opened, map_location="cpu", weights_only=True)
    except Exception as error:  # a hostile file makes the unpickler raise anything; there is no second way
        wanted = re.search(r"GLOBAL ([\w.]{1,60})", str(error))
        what = f"asks for {wanted[1]}, more than plain tensors" if wanted else "damaged, or more than plain tensors"
        raise UsageError(f"{file}: {what}; it was not loaded", hint=ALONE) from None
