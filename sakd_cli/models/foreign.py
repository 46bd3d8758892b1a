"""Weights of other programs, tensor by tensor into one of our networks; the only reader of pickled weights.

A PyTorch file is read with `weights_only=True` and in no other way, whatever fails. `DIALECTS` says how other programs
name the tensors of our networks: as the CIFAR teachers that the CRD benchmark (RepDistiller) and mdistiller publish;
ResNet18 to ResNet152 also as torchvision. The first rule whose regular expression fits the start of our name says how
theirs starts; the rest of the name is the same.
"""

import re
import warnings
import zipfile
from collections.abc import Collection
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sakd_cli.config.networks import NETWORKS, brought, find_network
from sakd_cli.config.preprocessing import ImageSize
from sakd_cli.errors import UsageError
from sakd_cli.models import mobilenetv2
from sakd_cli.models.artifact import check_finite, fill_weights, ghost, read_tensors, shapes_of
from sakd_cli.models.staged import StagedModel

Rules = tuple[tuple[str, str], ...]

KEYS = ("model", "state_dict", "net", "student", "model_state_dict", "weights")  # where training scripts put them
OWN_NAMES: tuple[Rules, ...] = ((),)  # of a family without rules: a plug-in, a new one
COUNTER = "num_batches_tracked"  # PyTorch before 0.4.1 had none, and no result depends on it
ROOM = 64 * 1024**2  # bytes beside the weights: a memory bank of CRD has 50 MB
ALONE = "where you trust the file, save its weights alone: torch.save(model.state_dict(), FILE)"


def translate_name(name: str, rules: Rules) -> str:
    """What others call our tensor; our own name where no rule fits."""
    return next((re.sub(ours, theirs, name, count=1) for ours, theirs in rules if re.match(ours, name)), name)


def load_foreign(file: Path, architecture: str, classes: int, side: ImageSize = 32) -> StagedModel:
    """One of our networks with the weights of a foreign file, every tensor filled exactly once.

    A network of another library takes its tensors under that library's names; an auxiliary classifier is left out.

    Raises UsageError where it is no file of plain tensors, or not of this network; NonFiniteError where a weight is no
    number.
    """
    network = ghost(architecture, classes, side)
    ours = shapes_of(network)
    most = ROOM + 8 * sum(4 * torch.Size(shape).numel() for shape in ours.values())  # with momentum, doubles, a copy
    names = network.plain_names()
    kinds = {names[name]: tensor.dtype for name, tensor in network.state_dict().items()}
    known = brought(architecture) is not None
    integers = {name for name, kind in kinds.items() if known and not kind.is_floating_point}
    theirs = read_foreign(file, most, integers)
    if known:
        theirs = {name: tensor for name, tensor in theirs.items() if not name.lower().startswith("aux")}
    else:
        names = _closest(architecture, ours, theirs)
    missing = [names[name] for name in ours if names[name] not in theirs and not name.endswith(COUNTER)]
    left = sorted(theirs.keys() - set(names.values()))
    if missing or left:
        parts = [(missing, "missing"), (left, "left over")]
        both = "; ".join(f"{len(part)} tensors {what}: {_few(part)}" for part, what in parts if part)
        few = not 5 <= len(missing) + len(left) < 5000
        raise UsageError(f"{file}: is no {architecture}; {both}", hint=None if few else _advice(theirs))
    tensors = {}
    for name, shape in ours.items():
        tensor = theirs.get(names[name], torch.zeros(()))  # a missing counter
        there = tuple(tensor.shape)
        if there != shape:
            reason = f"{names[name]} has shape {_cross(there)}, {architecture} needs {_cross(shape)}"
            if name.startswith("head.") and there[1:] == shape[1:]:
                reason = f"is for {there[0]} classes, not for {classes}"
            raise UsageError(f"{file}: {reason}", hint=_advice(theirs))
        kind = kinds[names[name]] if names[name] in integers else torch.float32
        tensors[name] = tensor.to(torch.int64 if name.endswith(COUNTER) else kind)
    check_finite(file, {names[name]: tensor for name, tensor in tensors.items()})
    return fill_weights(network, tensors)


def read_foreign(file: Path, most: int, integers: Collection[str] = ()) -> dict[str, Tensor]:
    """The tensors of a state dict, bare or under one of `KEYS`, without `module.` in front. Raises UsageError.

    integers  names of those that need not be floating-point numbers
    """
    if not file.is_file():
        raise UsageError(f"{file}: no such file")
    if file.stat().st_size > most:
        raise UsageError(f"{file}: has {file.stat().st_size >> 20} MB, too many for this network", hint=ALONE)
    content: Any = read_tensors(file)[1] if file.suffix == ".safetensors" else _unpickled(file)
    if isinstance(content, dict) and not any(isinstance(value, Tensor) for value in content.values()):
        content = next((content[key] for key in KEYS if isinstance(content.get(key), dict)), content)
    if not isinstance(content, dict) or not content or not all(isinstance(key, str) for key in content):
        raise UsageError(f"{file}: holds no state dict, bare or under {', '.join(KEYS)}", hint=ALONE)
    while all(key.startswith("module.") for key in content):  # of DataParallel
        content = {key.removeprefix("module."): value for key, value in content.items()}
    for name, value in content.items():
        if not isinstance(value, Tensor):
            raise UsageError(f"{file}: {name[:40]!r} in its state dict is no tensor", hint=ALONE)
        counts = name in integers or name.endswith(COUNTER)
        kind = torch.is_floating_point(value) or (counts and not value.is_complex())
        if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized or not kind:
            raise UsageError(f"{file}: {name[:40]!r} is no plain tensor of floating-point numbers")
    return content


def _unpickled(file: Path) -> Any:
    """What a PyTorch file holds, if that is plain data and as large as it looks."""
    if zipfile.is_zipfile(file):
        try:
            with zipfile.ZipFile(file) as archive:
                members = archive.infolist()
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
            raise UsageError(f"{file}: damaged, its archive cannot be read") from None
        packed = any(member.compress_type != zipfile.ZIP_STORED for member in members)
        if packed or sum(member.file_size for member in members) > file.stat().st_size:
            raise UsageError(f"{file}: its members are compressed, which PyTorch never does; not opened")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a hostile file makes the unpickler raise anything; there is no second way
        wanted = re.search(r"GLOBAL ([\w.]{1,60})", str(error))
        what = f"asks for {wanted[1]}, more than plain tensors" if wanted else "damaged, or more than plain tensors"
        raise UsageError(f"{file}: {what}; it was not loaded", hint=ALONE) from None


def _closest(architecture: str, ours: dict[str, tuple[int, ...]], theirs: dict[str, Tensor]) -> dict[str, str]:
    """Our name -> their name, in the dialect that leaves the fewest tensors without a partner."""
    dialects = DIALECTS.get(find_network(architecture).family, OWN_NAMES)
    tables = [{name: translate_name(name, rules) for name in ours} for rules in dialects]
    return min(tables, key=lambda names: len(set(names.values()) ^ theirs.keys()))


def _advice(theirs: dict[str, Tensor]) -> str | None:
    """Which of our networks the tensors would fit, whatever the number of classes."""
    there = {name: tuple(tensor.shape) for name, tensor in theirs.items() if not name.endswith(COUNTER)}
    for network in NETWORKS.values():
        if not any(translate_name("head.weight", rules) in theirs for rules in DIALECTS.get(network.family, OWN_NAMES)):
            continue
        every = shapes_of(ghost(network.name, 1, 32))
        ours = {name: shape for name, shape in every.items() if not name.endswith(COUNTER)}
        names = _closest(network.name, ours, theirs)
        body = {names[name]: shape for name, shape in ours.items() if not name.startswith("head.")}
        heads = {names[name] for name in ours if name.startswith("head.")}
        if {name: shape for name, shape in there.items() if name not in heads} == body:
            classes = max((there[name][0] for name in heads if there.get(name)), default=0)
            return f"these are the weights of a {network.name} with {classes} classes"
    return None


def _few(names: list[str]) -> str:
    return ", ".join(name[:40] for name in names[:2]) + (" ..." if len(names) > 2 else "")


def _cross(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "()"


_STEM = ((r"stages\.0\.0\.", "conv1."), (r"stages\.0\.1\.", "bn1."))
_STEM_UNIT = ((r"stages\.0\.conv\.", "conv1."), (r"stages\.0\.bn\.", "bn1."))
_LAYERS = ((r"stages\.(\d)\.(\d+)\.", r"layer\1.\2."),)
_DOWNSAMPLE = ((r"stages\.(\d)\.(\d+)\.shortcut\.", r"layer\1.\2.downsample."),)
_FC, _LINEAR = ((r"head\.", "fc."),), ((r"head\.", "linear."),)

_WRN: Rules = (
    (r"stages\.0\.", "conv1."),
    (r"stages\.4\.0\.", "bn1."),
    (r"stages\.(\d)\.(\d+)\.shortcut\.", r"block\1.layer.\2.convShortcut."),
    (r"stages\.(\d)\.(\d+)\.", r"block\1.layer.\2."),
)

# Theirs counts the convolutions, BatchNorms and ReLUs of a group in one row.
_VGG: Rules = tuple(
    (rf"stages\.(\d)\.{block}\.{part}\.", rf"block\1.{3 * block + place}.")
    for block in range(4)
    for place, part in enumerate(("conv", "bn"))
)


def _mobile() -> Rules:
    """Theirs has a list of seven groups, ours four stages of one or two of them."""
    parts = {r"expand\.conv": 0, r"expand\.bn": 1, r"depthwise\.conv": 3, r"depthwise\.bn": 4}
    parts |= {r"linear\.0": 6, r"linear\.1": 7}
    rules = [(r"stages\.0\.conv\.", "conv1.0."), (r"stages\.0\.bn\.", "conv1.1.")]
    rules += [(r"stages\.5\.0\.conv\.", "conv2.0."), (r"stages\.5\.0\.bn\.", "conv2.1.")]
    theirs = 0
    for stage, groups in enumerate(mobilenetv2.STAGES, start=1):
        for first, group in zip(accumulate((g.blocks for g in groups), initial=0), groups, strict=False):
            for block in range(group.blocks):
                ours = rf"stages\.{stage}\.{first + block}\."
                rules += [(rf"{ours}{part}\.", f"blocks.{theirs}.{block}.conv.{n}.") for part, n in parts.items()]
            theirs += 1
    return tuple(rules)


def _numbered(*ours: str) -> Rules:
    """Parts of a unit that theirs calls conv1, bn1, conv2, bn2 and so on, in this order."""
    return tuple(
        (rf"stages\.([123])\.(\d+)\.{part}\.", rf"layer\1.\2.{('conv', 'bn')[place % 2]}{place // 2 + 1}.")
        for place, part in enumerate(ours)
    )


_SHUFFLE1 = _numbered(r"squeeze\.conv", r"squeeze\.bn", r"depthwise\.conv", r"depthwise\.bn", "conv", "bn")
_DOWN = _numbered(
    *(r"left\.0\.0", r"left\.0\.1", r"left\.1\.conv", r"left\.1\.bn", r"right\.0\.conv", r"right\.0\.bn"),
    *(r"right\.1\.0", r"right\.1\.1", r"right\.2\.conv", r"right\.2\.bn"),
)
_SPLIT = _numbered(r"inner\.0\.conv", r"inner\.0\.bn", r"inner\.1\.0", r"inner\.1\.1", "conv", "bn")
_SHUFFLE2 = (*_DOWN, *_SPLIT, (r"stages\.4\.0\.conv\.", "conv2."), (r"stages\.4\.0\.bn\.", "bn2."))

# Family -> the ways in which its tensors are named.
DIALECTS: dict[str, tuple[Rules, ...]] = {
    "resnet": ((*_STEM, *_DOWNSAMPLE, *_LAYERS, *_FC),),
    "resnet_imagenet": ((*_STEM, *_LAYERS, *_LINEAR), (*_STEM, *_DOWNSAMPLE, *_LAYERS, *_FC)),
    "wrn": ((*_WRN, *_FC),),
    "vgg": ((*_VGG, (r"head\.", "classifier.")),),
    "mobilenetv2": tuple((*_mobile(), (r"head\.", head)) for head in ("classifier.0.", "classifier.")),
    "shufflenetv1": ((*_STEM_UNIT, *_SHUFFLE1, *_LINEAR),),
    "shufflenetv2": ((*_STEM_UNIT, *_SHUFFLE2, *_LINEAR),),
}
