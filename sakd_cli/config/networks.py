"""Networks in words: a name stands for a family and its arguments; the code is in `models/`.

To add a variant: one line in `_named`. To add a family: also a file in `models/` and one line in `models/table.py`.
"""

import re
from typing import Annotated, Any, NamedTuple

from pydantic import AfterValidator
from pydantic_core import PydanticCustomError

from sakd_cli.errors import UsageError, unknown


class Network(NamedTuple):
    """Name, family, the family's arguments, and the published learning rate of its students."""

    name: str
    family: str
    arguments: dict[str, Any]
    lr: float = 0.05


def _named() -> list[Network]:
    resnets = [Network(f"resnet{d}", "resnet", {"depth": d}) for d in (8, 14, 20, 32, 44, 56, 110)]
    wide = [Network(f"resnet{d}x4", "resnet", {"depth": d, "widths": (32, 64, 128, 256)}) for d in (8, 32)]
    wrns = [_wrn(d, w) for d, w in ((16, 1), (16, 2), (28, 4), (28, 10), (40, 1), (40, 2))]
    return resnets + wide + wrns


def _wrn(depth: int, width: int) -> Network:
    return Network(f"wrn_{depth}_{width}", "wrn", {"depth": depth, "width": width})


def _squashed(name: str) -> str:
    return re.sub(r"[-_]", "", name).lower()


NETWORKS = {network.name: network for network in _named()}
_SPELLINGS = {_squashed(name): name for name in NETWORKS}


def find_network(name: str) -> Network:
    """The network of that name, however it is spelled: `wrn40_2`, `wrn_40_2`, `WRN-40-2`; any `wrn_d_w` with d = 6n+4.

    Raises UsageError with the nearest name.
    """
    if (known := _SPELLINGS.get(_squashed(name))) is not None:
        return NETWORKS[known]
    if (wrn := re.fullmatch(r"wrn[-_]?(\d+)[-_](\d+)", name.lower())) is not None:
        depth, width = int(wrn[1]), int(wrn[2])
        if depth >= 10 and (depth - 4) % 6 == 0 and width >= 1:
            return _wrn(depth, width)
        raise UsageError(f"no wide ResNet {name!r}; depth is 6n+4 (10, 16, 22, 28, 34, 40 ...), width at least 1")
    raise UsageError(unknown("model", name, NETWORKS), hint="sakd list models shows them all")


def _canonical(name: str) -> str:
    try:
        return find_network(name).name
    except UsageError as error:
        raise PydanticCustomError("unknown_name", "{text}", {"text": error.message}) from None


NetworkName = Annotated[str, AfterValidator(_canonical)]
