"""How other programs name the tensors of our networks.

As the CIFAR teachers that the CRD benchmark (RepDistiller) and mdistiller publish; ResNet18 to ResNet152 also as
torchvision. The first rule whose regular expression fits the start of our name says how theirs starts; the rest of the
name is the same.
"""

import re
from collections.abc import Iterable
from itertools import accumulate

from sakd_cli.models import mobilenetv2

Rules = tuple[tuple[str, str], ...]


def translate_name(name: str, rules: Rules) -> str:
    """What others call our tensor; our own name where no rule fits."""
    return next((re.sub(ours, theirs, name, count=1) for ours, theirs in rules if re.match(ours, name)), name)


def tables(family: str, ours: Iterable[str]) -> list[dict[str, str]]:
    """Our names -> theirs, for each way in which a family's tensors are named; our own ones last."""
    return [{name: translate_name(name, rules) for name in ours} for rules in (*DIALECTS.get(family, ()), ())]


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
