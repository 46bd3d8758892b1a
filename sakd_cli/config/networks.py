"""Names of networks: a name stands for a family and its arguments; the code is in `models/`.

To add a variant: one line in `_named`. To add a family: also a file in `models/` and one line in `models/table.py`.
Names of other libraries and of the user's own code (`brought`) are accepted as they are: whether there is such a
network is checked where it is built.
"""

import re
from difflib import get_close_matches
from typing import Annotated, Any, NamedTuple

from sakd_cli.config import plugins
from sakd_cli.config.base import in_place, of_file, read_by
from sakd_cli.errors import UsageError, unknown


class Network(NamedTuple):
    """Name, family, the family's arguments, the published learning rate of its students, and its kin.

    kin      networks of one kin count as one family for the router's prior; a wide variant is a kin of its own
    student  of a network that only a distillation makes: the student in it
    plugged  whether a plug-in builds it (`plugins.py`); its family is the package
    line     of a network of another library: what it shares with its kin there
    """

    name: str
    family: str
    arguments: dict[str, Any]
    lr: float = 0.05
    wide: bool = False
    student: "Network | None" = None
    plugged: bool = False
    line: str = ""

    @property
    def kin(self) -> str:
        if self.student is not None:
            return self.student.kin
        if self.line:
            return f"{self.family}/{self.line}"
        return f"{self.family} x4" if self.wide else self.family


def _named() -> list[Network]:
    resnets = [Network(f"resnet{d}", "resnet", {"depth": d}) for d in (8, 14, 20, 32, 44, 56, 110)]
    wide = [Network(f"resnet{d}x4", "resnet", {"depth": d, "widths": (32, 64, 128, 256)}, wide=True) for d in (8, 32)]
    wrns = [_wrn(d, w) for d, w in ((16, 1), (16, 2), (28, 4), (28, 10), (40, 1), (40, 2))]
    blocks = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
    large = [Network(f"ResNet{d}", "resnet_imagenet", {"blocks": blocks[d], "bottleneck": d >= 50}) for d in blocks]
    layers = {8: (1, 1, 1, 1, 1), 11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
    vggs = [Network(f"vgg{d}", "vgg", {"convolutions": layers[d]}) for d in layers]
    # The benchmarks (RepDistiller, mdistiller) call the half-width one MobileNetV2.
    mobile = [Network("MobileNetV2", "mobilenetv2", {"width": 1.0}, lr=0.01)]
    mobile += [Network("MobileNetV2_half", "mobilenetv2", {"width": 0.5}, lr=0.01)]
    # ShuffleNetV2 without a number is 1x, as in the benchmarks (ShuffleV2 there).
    widths = {"": (116, 232, 464, 1024), "_0_5": (48, 96, 192, 1024), "_2": (244, 488, 976, 2048)}
    shuffle = [Network("ShuffleNetV1", "shufflenetv1", {}, lr=0.01)]
    shuffle += [
        Network(f"ShuffleNetV2{name}", "shufflenetv2", {"widths": (*w,), "embedding": embedding}, lr=0.01)
        for name, (*w, embedding) in widths.items()
    ]
    return resnets + wide + wrns + large + vggs + mobile + shuffle


def _wrn(depth: int, width: int) -> Network:
    return Network(f"wrn_{depth}_{width}", "wrn", {"depth": depth, "width": width})


def _spelling(name: str) -> str:
    return re.sub(r"[-_.]", "", name).lower()


NETWORKS = {network.name: network for network in _named()}
# ResNet18 .. 152 and the CIFAR ResNets share no depth here, so that `resnet50` in any case means ResNet50.
_SPELLINGS = {_spelling(name): name for name in NETWORKS} | {"shufflev1": "ShuffleNetV1", "shufflev2": "ShuffleNetV2"}


def reusing(student: str, teacher: str, factor: int) -> Network:
    """A student's stages under a teacher's pooling and head; `factor` as in `models/adapters.py`.

    A student's name holds no hyphen, so the rest behind the second hyphen is the teacher's, which may be of this kind.
    """
    inner, outer = find_network(student), find_network(teacher)
    if "-" in inner.name:
        raise UsageError(f"{inner.name}: method simkd needs a name without a hyphen", "rename the file or its folder")
    parts = {"student": inner.name, "teacher": outer.name, "factor": factor}
    return Network(f"simkd{factor}-{inner.name}-{outer.name}", "reused", parts, inner.lr, student=inner)


def all_names() -> list[str]:
    return [*NETWORKS, *plugins.plugged(plugins.NETWORKS)]


def of_library(name: str) -> bool:
    """Whether torchvision, timm or the Hugging Face hub has a network of that name, and so perhaps weights."""
    network = brought(name)
    return network is not None and network.family != "factory"


def brought(name: str) -> Network | None:
    """`torchvision/NAME`, `timm/NAME`, `package.module:factory` or `my.py:factory`; None for a name of no such form.

    `hf-hub:owner/name`, a network of timm's on the Hugging Face hub, is `timm/hf-hub:owner/name`.

    Networks of one library are kin where their names begin with the same letters (resnet18 and resnet50; vit_b_16 and
    vit_l_16); a factory's network has no kin but itself. lr: transformers do not learn at 0.05.
    """
    name = re.sub("^(torchvision|timm):", r"\1/", name)
    if (of_library := re.fullmatch(r"(torchvision|timm)/(([A-Za-z]+)[\w.]*)", name)) is not None:
        family, entry, line = of_library.groups()
        return Network(name, family, {"entry": entry}, 0.01, line=line)
    if of_hub := re.fullmatch(r"(?:timm/)?hf[-_]hub:([\w.-]+/([A-Za-z]*)[\w.-]*(?:@[\w.-]+)?)", name):
        entry = f"hf-hub:{of_hub[1]}"
        return Network(f"timm/{entry}", "timm", {"entry": entry}, 0.01, line=of_hub[2])
    name = in_place(name)
    if of_file(name) or re.fullmatch(r"[A-Za-z_]\w*(\.\w+)*:[A-Za-z_]\w*", name):
        return Network(name, "factory", {"entry": name}, 0.01, line=name)
    return None


class Release(NamedTuple):
    """A teacher that others have published: its network, data set and top-1 there in percent, and who says so."""

    network: str
    dataset: str
    top1: float
    source: str


_CRD, _ZOO = "RepDistiller, the CRD benchmark", "pytorch-cifar-models"
_CRD_TEACHERS = {"wrn_40_2": 75.61, "resnet56": 72.34, "resnet110": 74.31}
_CRD_TEACHERS |= {"resnet32x4": 79.42, "vgg13": 74.64, "ResNet50": 79.34}
_ZOO_TEACHERS = {  # on CIFAR-10 and CIFAR-100
    "resnet20": (92.60, 68.83),
    "resnet32": (93.53, 70.16),
    "resnet44": (94.01, 71.63),
    "resnet56": (94.37, 72.63),
}
RELEASES = {f"{name}_vanilla": Release(name, "cifar100", top1, _CRD) for name, top1 in _CRD_TEACHERS.items()} | {
    f"cifar{count}_{name}": Release(name, f"cifar{count}", top1, _ZOO)
    for name, both in _ZOO_TEACHERS.items()
    for count, top1 in zip((10, 100), both, strict=True)
}  # by the name of the folder or the file that they come in

LONGEST = 200  # letters of a name; what is distilled from what was distilled is named after all of them


def find_network(name: str) -> Network:
    """The network of that name, however it is spelled: `wrn40_2`, `wrn_40_2`, `WRN-40-2`; any `wrn_d_w` with d = 6n+4.

    What a distillation has made has one spelling: `simkd2-resnet8-resnet20`. Raises UsageError with the nearest name.
    """
    if len(name) > LONGEST:
        raise UsageError(f"no model has a name of {len(name)} letters")
    if name in plugins.plugged(plugins.NETWORKS):
        package = plugins.plugged(plugins.NETWORKS)[name][0].package
        if _spelling(name) in _SPELLINGS:
            raise UsageError(f"network {name!r}: wanted by sakd and by {package}", hint=f"uninstall {package}")
        return Network(name, f"plug-in {package}", {}, plugged=True)
    if (made := re.fullmatch(r"simkd([1-9]\d{0,8})-([^-]+)-(.+)", name)) is not None:
        return reusing(made[2], made[3], int(made[1]))
    if (one := brought(name)) is not None:
        return one
    if (wrn := re.fullmatch(r"wrn[-_]?(\d{1,9})[-_](\d{1,9})", name.lower())) is not None:
        depth, width = int(wrn[1]), int(wrn[2])
        if 10 <= depth <= 1000 and (depth - 4) % 6 == 0 and 1 <= width <= 100:
            return _wrn(depth, width)
        raise UsageError(
            f"no wide ResNet {name[:40]!r}; depth is 6n+4 (10, 16, 22, 28, 34, 40 ... 1000), width 1 to 100"
        )
    if (known := _SPELLINGS.get(_spelling(name))) is not None:
        return NETWORKS[known]
    raise UsageError(_unknown(name), hint="sakd list models shows them all")


def _unknown(name: str) -> str:
    """What to say of a name of no network: one of nearly that name here, or where a library would have it."""
    if re.search(r"\.(pth?|ckpt|bin|safetensors|tar)$", name):
        return f"unknown model {name!r}: it is a file of weights; sakd import-weights brings it in"
    if name in RELEASES:
        return f"unknown model {name!r}; its network is {RELEASES[name].network!r}"
    own = name.endswith(".py") or name.startswith("python:")
    if own or get_close_matches(name.lower(), map(str.lower, all_names()), n=1, cutoff=0.82):
        return unknown("model", name, all_names())
    if "/" in name:
        return f"unknown model {name!r}; timm/NAME, torchvision/NAME, or timm's of the Hugging Face hub: hf-hub:{name}"
    bare = re.sub(r"^((torchvision|timm|models)[.:])+", "", name)
    return f"unknown model {name!r}; of a library: torchvision/{bare}, timm/{bare}"


def of_one_family(name: str, other: str) -> bool:
    """Whether two networks are kin, for the router's prior. Raises UsageError as `find_network`."""
    return find_network(name).kin == find_network(other).kin


def find_trainable(name: str) -> Network:
    """As `find_network`, but UsageError for a network that only a distillation makes."""
    network = find_network(name)
    if network.student is not None:
        raise UsageError(
            f"{name} is made by a distillation and has no training of its own",
            hint="as a teacher, name its run directory or its weights",
        )
    return network


NetworkName = Annotated[str, read_by(lambda name: find_trainable(name).name)]
