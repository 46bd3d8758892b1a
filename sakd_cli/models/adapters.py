"""Modules that translate one network's feature into the shape of the other's (guide `methods`), and SimKD's network.

That (Chen et al., CVPR 2022) is a student's stages, a projector, a teacher's frozen pooling and head.
"""

import copy
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sakd_cli.config.preprocessing import ImageSize, height_width
from sakd_cli.models.layers import ConvUnit
from sakd_cli.models.staged import PLANES, Layout, Relayout, Shape, StagedModel, StageInfo


def mean_pool(x: Tensor, size: ImageSize) -> Tensor:
    """Means over a grid of windows, [N, C, H, W] to [N, C, *size]: `adaptive_avg_pool2d` to rounding.

    That one's gradient has no deterministic form on CUDA (`torch.use_deterministic_algorithms`). Where H and W are
    multiples of `size` the windows are equal; otherwise they overlap, and are sums by matrices.
    """
    height, width = x.shape[2:]
    high, wide = height_width(size)
    if height % high == 0 and width % wide == 0:
        return F.avg_pool2d(x, (height // high, width // wide))
    rows, columns = _windows(height, high, x), _windows(width, wide, x)
    return rows @ x @ columns.T / (rows.sum(dim=1)[:, None] * columns.sum(dim=1))


def _windows(length: int, side: int, like: Tensor) -> Tensor:
    """[side, length]: 1 where place j is in window i, floor(i length / side) <= j < (i + 1) length / side."""
    place, window = torch.arange(length, device=like.device), torch.arange(side, device=like.device)[:, None]
    inside = (place >= window * length // side) & (place * side < (window + 1) * length)
    return inside.to(like.dtype)


class ConvAdapter(nn.Module):
    """One convolution with bias, BatchNorm and, by default, ReLU: [N, C1, H1, W1] to [N, C2, H2, W2].

    Geometry by the heights, tested in this order: half -> 3x3 stride 2; double -> transposed 4x4 stride 2; smaller or
    equal -> kernel (1 + H1 - H2), 1x1 where equal; larger -> transposed with stride floor(H2 / H1). Where we differ:
    from H1 = 3 H2 on, which no published pair has, stride floor(H1 / H2) and no more kernel than that needs.
    """

    def __init__(self, source: Shape, target: Shape, *, relu: bool = True) -> None:
        super().__init__()
        (c1, h1, w1), (c2, h2, w2) = source, target
        up, kernel, stride, padding = h1 < h2, (3, 3), 2, 1
        if (2 * h1, 2 * w1) == (h2, w2):
            kernel = (4, 4)
        elif (h1, w1) != (2 * h2, 2 * w2):
            (h, w), (low, narrow) = ((h2, w2), (h1, w1)) if up else ((h1, w1), (h2, w2))
            stride, padding = h // low if up or h1 >= 3 * h2 else 1, 0
            kernel = (h - stride * (low - 1), w - stride * (narrow - 1))
        convolution = nn.ConvTranspose2d if up else nn.Conv2d
        self.conv = convolution(c1, c2, kernel, stride, padding)
        shape = f"{kernel[0]}x{kernel[1]}"
        self.geometry = f"up-conv {shape} x{stride}" if up else f"conv {shape}" + f" /{stride}" * (stride > 1)
        self.norm = nn.BatchNorm2d(c2)
        self.activation = nn.ReLU() if relu else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.norm(self.conv(x)))


class LinearAdapter(nn.Module):
    """One linear layer with bias: [N, C1] to [N, C2]."""

    geometry = "linear"

    def __init__(self, source: Shape, target: Shape) -> None:
        super().__init__()
        self.linear = nn.Linear(source[0], target[0])

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def adapter(source: Shape, target: Shape) -> ConvAdapter | LinearAdapter:
    """The routing adapter between two features: convolutional for maps, linear for pooled vectors; never identity."""
    return ConvAdapter(source, target) if len(source) == 3 else LinearAdapter(source, target)


class Transform(nn.Module):
    """A teacher's map as the input of a student branch (Park et al., NeurIPS 2021): [N, C1, H1, H1] to [N, C2, H2, H2].

    A `ConvAdapter` where one side is as long as the other or twice as long. Between sides 4, 8, ... times as long a
    chain of them, the width reached in the first; between all others mean pooling to H2, then 1x1. `layout`: of the
    student's stage, which the map is brought into.
    """

    def __init__(self, source: Shape, target: Shape, layout: Layout = PLANES) -> None:
        super().__init__()
        self.layout = layout
        (c1, h1, w1), (c2, h2, w2) = source, target
        longer, shorter = max(h1, h2), min(h1, h2)
        doublings, rest = (longer // shorter).bit_length() - 1, longer % shorter
        pooled = rest > 0 or longer != shorter << doublings or w1 * h2 != w2 * h1
        steps_apart = [0] if pooled else range(doublings, -1, -1)
        sizes = [(h2 << k, w2 << k) if h1 > h2 else (h2 >> k, w2 >> k) for k in steps_apart]
        shapes = [(c1, *sizes[0]), *((c2, *size) for size in sizes[1:] or sizes)]
        steps = [ConvAdapter(ours, theirs) for ours, theirs in pairwise(shapes)]
        self.steps = nn.Sequential(*([Relayout(partial(mean_pool, size=(h2, w2)))] if pooled else []), *steps)
        self.geometry = " ".join(["mean"] * pooled + [step.geometry for step in steps])

    def forward(self, x: Tensor) -> Tensor:
        return self.layout.from_map(self.steps(x))


class FrozenCopy(nn.Module):
    """A stage of another network, copied: never trained, and in evaluation mode whatever is asked for."""

    def __init__(self, stage: nn.Module) -> None:
        super().__init__()
        self.stage = copy.deepcopy(stage).requires_grad_(False)
        self.train()

    def train(self, mode: bool = True) -> "FrozenCopy":
        super().train(mode)
        self.stage.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.stage(x)


def projector(student: StageInfo, teacher: StageInfo, factor: int) -> tuple[StageInfo, nn.Sequential]:
    """From the student's last map to the teacher's: mean over squares where it is larger, then convolutions 1, 3, 1.

    Each has BatchNorm and ReLU; the last one no ReLU where the teacher's map is signed. The inner width is the
    teacher's over `factor`. [N, C_S, H, W] to [N, C_T, H/r, W/r], r = teacher's stride / student's, at least 1.
    """
    ratio = max(1, teacher.stride // student.stride)
    inner = max(1, teacher.channels // factor)
    size = None if student.size is None else (student.size[0] // ratio, student.size[1] // ratio)
    stride = student.stride * ratio
    info = StageInfo("projector", teacher.channels, stride, student.halved_from, teacher.signed, size=size)
    convolutions = [
        ConvUnit(student.channels, inner, 1),
        ConvUnit(inner, inner, 3),
        ConvUnit(inner, teacher.channels, 1, relu=not teacher.signed),
    ]
    to_map = partial(student.layout.to_map, shape=student.shape(0))
    before = [] if student.layout == PLANES else [Relayout(to_map)]
    return info, nn.Sequential(*before, *([nn.AvgPool2d(ratio)] if ratio > 1 else []), *convolutions)


def build_reused(
    name: str, num_classes: int, *, student: StagedModel, teacher: StagedModel, factor: int
) -> StagedModel:
    """The student (not copied) with a new projector and copies of the teacher's pooling stage and head."""
    *own, _ = zip(student.infos, student.stages, strict=True)
    added = projector(student.infos[-2], teacher.infos[-2], factor)
    layout = teacher.infos[-2].layout
    rest = teacher.stages[-1] if layout == PLANES else nn.Sequential(Relayout(layout.from_map), teacher.stages[-1])
    pool = teacher.infos[-1], FrozenCopy(rest)
    model = StagedModel(name, "reused", [*own, added, pool], num_classes, None)
    model.head.load_state_dict(teacher.head.state_dict())
    model.head.requires_grad_(False)
    return model
