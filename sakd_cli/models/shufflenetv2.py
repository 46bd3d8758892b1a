"""ShuffleNet V2 (Ma et al., ECCV 2018), as the distillation benchmarks build it for small images.

Three groups of units at strides 2, 4, 8; stage outputs are after the ReLU and the shuffle. We differ from the original
in the stem (1x1 at stride 1, no pooling). The widths are the paper's (table 5); at 2x the benchmarks begin with 224
where it has 244.
"""

from typing import final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sakd_cli.models.layers import BEFORE_LAST_ACTIVATION, ActivatedBlock, ConvUnit, GlobalPool, shuffle
from sakd_cli.models.staged import Affine, StagedModel, StageInfo

STEM = 24
# Units of stride 1 behind the one of stride 2.
SPLIT_UNITS = (3, 7, 3)


@final
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

    def pair(self, x: Tensor) -> tuple[Tensor, Tensor]:
        passed, signed = self._halves(x)
        return torch.cat([passed, signed], 1), shuffle(torch.cat([passed, F.relu(signed)], 1), 2)

    def affine(self) -> Affine:
        return F.pad(self.bn.weight, (self.passing, 0)), F.pad(self.bn.bias, (self.passing, 0))

    def _halves(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x[:, : self.passing], self.bn(self.conv(self.inner(x[:, self.passing :])))


def _depthwise(channels: int, stride: int) -> nn.Sequential:
    conv = nn.Conv2d(channels, channels, 3, stride, 1, groups=channels, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(channels))


def build(name: str, num_classes: int, *, widths: tuple[int, int, int], embedding: int) -> StagedModel:
    """A ShuffleNet V2; `widths` are those of the three groups, `embedding` that of the pooled vector."""
    stages: list[tuple[StageInfo, nn.Module]] = [(StageInfo("stem", STEM, 1), ConvUnit(3, STEM, 1))]
    inputs = STEM
    for number, (outputs, units) in enumerate(zip(widths, SPLIT_UNITS, strict=True), start=1):
        made = [DownUnit(inputs, outputs), *(SplitUnit(outputs) for _ in range(units))]
        info = StageInfo(f"stage{number}", outputs, 1 << number, blocks=(outputs,) * len(made))
        stages.append((info, nn.Sequential(*made)))
        inputs = outputs
    stages.append((StageInfo("pool", embedding, 0), nn.Sequential(ConvUnit(inputs, embedding, 1), GlobalPool())))
    return StagedModel(name, "shufflenetv2", stages, num_classes, BEFORE_LAST_ACTIVATION)
