"""ShuffleNet V1 (Zhang et al., CVPR 2018) with 3 groups, as the distillation benchmarks build it for small images.

Three groups of units at strides 2, 4, 8; stage outputs are after the ReLU. We differ from the original in the stem (1x1
at stride 1, no pooling). As there, the first unit has no grouping where it reads the 24 channels of the stem.
"""

from typing import final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sakd_cli.models.layers import BEFORE_LAST_ACTIVATION, ActivatedBlock, ConvUnit, GlobalPool, shuffle
from sakd_cli.models.staged import Affine, StagedModel, StageInfo

STEM = 24
GROUPS = 3
WIDTHS = (240, 480, 960)
UNITS = (4, 8, 4)


@final
class ShuffleUnit(ActivatedBlock):
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

    def forward(self, x: Tensor) -> Tensor:
        return self.pair(x)[1]

    def pair(self, x: Tensor) -> tuple[Tensor, Tensor]:
        branch = self.bn(self.conv(self.depthwise(shuffle(self.squeeze(x), self.groups))))
        joined = x + branch if self.stride == 1 else torch.cat([branch, F.avg_pool2d(x, 3, 2, 1)], 1)
        return joined, F.relu(joined)

    def affine(self) -> Affine:
        return F.pad(self.bn.weight, (0, self.passing)), F.pad(self.bn.bias, (0, self.passing))


def build(name: str, num_classes: int) -> StagedModel:
    """The network of the benchmarks; it has one size."""
    stages: list[tuple[StageInfo, nn.Module]] = [(StageInfo("stem", STEM, 1), ConvUnit(3, STEM, 1))]
    inputs = STEM
    for number, (outputs, units) in enumerate(zip(WIDTHS, UNITS, strict=True), start=1):
        made = [ShuffleUnit(inputs, outputs, 2), *(ShuffleUnit(outputs, outputs, 1) for _ in range(units - 1))]
        info = StageInfo(f"stage{number}", outputs, 1 << number, blocks=(outputs,) * len(made))
        stages.append((info, nn.Sequential(*made)))
        inputs = outputs
    stages.append((StageInfo("pool", inputs, 0), GlobalPool()))
    return StagedModel(name, "shufflenetv1", stages, num_classes, BEFORE_LAST_ACTIVATION)
