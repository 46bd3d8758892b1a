"""ShuffleNet V1 (Zhang et al., CVPR 2018) with 3 groups and V2 (Ma et al., ECCV 2018), for small images.

As the distillation benchmarks build them: three groups of units at strides 2, 4, 8; stage outputs are after the ReLU
and, of V2, the shuffle. We differ from the originals in the stem (1x1 at stride 1, no pooling). As in the original V1,
its first unit has no grouping where it reads the 24 channels of the stem. The widths of V2 are the paper's (table 5);
at 2x the benchmarks begin with 224 where it has 244.
"""

from typing import final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sakd_cli.models.layers import ActivatedBlock, ConvUnit, GlobalPool, MarkHere, ReluBlock, grouped_network, shuffle
from sakd_cli.models.staged import Affine, StagedModel

STEM = 24
GROUPS = 3  # of V1's 1x1 convolutions
UNITS = (4, 8, 4)


@final
class ShuffleUnit(ReluBlock):
    """Grouped 1x1 to a quarter, shuffle, depthwise 3x3, grouped 1x1; then relu(x + that), at stride 1.

    At stride 2: relu of its channels and, behind them, those of the 3x3-mean of x.
    [N, C, H, W] to [N, C', H/stride, W/stride].
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.groups = 1 if inputs == STEM else GROUPS
        self.passing = inputs if stride == 2 else 0
        branch = outputs - self.passing
        inner = branch // 4
        self.squeeze = ConvUnit(inputs, inner, 1, groups=self.groups)
        self.depthwise = ConvUnit(inner, inner, 3, stride, groups=inner)
        self.conv = nn.Conv2d(inner, branch, 1, groups=GROUPS, bias=False)
        self.bn = nn.BatchNorm2d(branch)

    def before_relu(self, x: Tensor) -> Tensor:
        branch = self.bn(self.conv(self.depthwise(shuffle(self.squeeze(x), self.groups))))
        return x + branch if self.stride == 1 else torch.cat([branch, F.avg_pool2d(x, 3, 2, 1)], 1)

    def affine(self) -> Affine:
        return F.pad(self.bn.weight, (0, self.passing)), F.pad(self.bn.bias, (0, self.passing))


class DownUnit(nn.Module):
    """Two branches of half the outputs each, at stride 2, shuffled: [N, C, H, W] to [N, C', H/2, W/2]."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        half = outputs // 2
        self.left = nn.Sequential(_depthwise(inputs, 2), ConvUnit(inputs, half, 1))
        self.right = nn.Sequential(ConvUnit(inputs, half, 1), _depthwise(half, 2), ConvUnit(half, half, 1))

    def forward(self, x: Tensor) -> Tensor:
        return shuffle(torch.cat([self.left(x), self.right(x)], 1), 2)


@final
class SplitUnit(ActivatedBlock):
    """Half of the channels pass, the others go through 1x1, depthwise 3x3, 1x1; shuffled. The shape stays.

    In front of the activation the channels are not shuffled yet.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.passing = channels // 2
        self.inner = nn.Sequential(ConvUnit(self.passing, self.passing, 1), _depthwise(self.passing, 1))
        self.conv = nn.Conv2d(self.passing, self.passing, 1, bias=False)
        self.bn = nn.BatchNorm2d(self.passing)

    def forward(self, x: Tensor) -> Tensor:
        passed, signed = self._halves(x)
        return shuffle(torch.cat([passed, F.relu(signed)], 1), 2)

    def pair(self, x: Tensor, mark: MarkHere) -> tuple[Tensor, Tensor]:
        whole = mark(torch.cat(self._halves(x), 1))
        passed, signed = whole[:, : self.passing], whole[:, self.passing :]
        return whole, shuffle(torch.cat([passed, F.relu(signed)], 1), 2)

    def affine(self) -> Affine:
        return F.pad(self.bn.weight, (self.passing, 0)), F.pad(self.bn.bias, (self.passing, 0))

    def _halves(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x[:, : self.passing], self.bn(self.conv(self.inner(x[:, self.passing :])))


def _depthwise(channels: int, stride: int) -> nn.Sequential:
    conv = nn.Conv2d(channels, channels, 3, stride, 1, groups=channels, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(channels))


def build_v1(name: str, num_classes: int) -> StagedModel:
    """The ShuffleNet V1 of the benchmarks; it has one size."""
    stem, widths = ConvUnit(3, STEM, 1), (STEM, 240, 480, 960)
    return grouped_network(name, "shufflenetv1", num_classes, widths, UNITS, stem, ShuffleUnit, stride=2)


def build_v2(name: str, num_classes: int, *, widths: tuple[int, int, int], embedding: int) -> StagedModel:
    """A ShuffleNet V2; `widths` are those of the three groups, `embedding` that of the pooled vector."""

    def unit(inputs: int, outputs: int, stride: int) -> nn.Module:
        return DownUnit(inputs, outputs) if stride == 2 else SplitUnit(outputs)

    def pool() -> nn.Module:
        return nn.Sequential(ConvUnit(widths[-1], embedding, 1), GlobalPool())

    stem, sizes = ConvUnit(3, STEM, 1), (STEM, *widths)
    return grouped_network(
        name, "shufflenetv2", num_classes, sizes, UNITS, stem, unit, stride=2, pool=pool, embedding=embedding
    )
