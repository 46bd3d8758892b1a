"""MobileNetV2 (Sandler et al., CVPR 2018) as the distillation benchmarks build it for small images.

Stage outputs are those of the linear bottlenecks, so they are signed and have no pre-activation version. We differ from
the original in ReLU instead of ReLU6, in an expansion convolution even where the factor is 1, in stride 1 of the
24-wide group, and in widths rounded down to whole numbers instead of multiples of 8.
"""

from typing import NamedTuple

from torch import Tensor, nn

from sakd_cli.models.layers import ConvUnit, GlobalPool, init_small_head
from sakd_cli.models.staged import StagedModel, StageInfo

STEM, EMBEDDING = 32, 1280


class Group(NamedTuple):
    """Width at factor 1, number of blocks, stride of the first one, expansion."""

    width: int
    blocks: int
    stride: int
    expansion: int


# Table 2 of the paper, cut into the four spatial stages.
STAGES = (
    (Group(16, 1, 1, 1), Group(24, 2, 1, 6)),
    (Group(32, 3, 2, 6),),
    (Group(64, 4, 2, 6), Group(96, 3, 1, 6)),
    (Group(160, 3, 2, 6), Group(320, 1, 1, 6)),
)


class InvertedResidual(nn.Module):
    """1x1 to `expansion` times the width, depthwise 3x3, linear 1x1; plus x where the shape stays."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = inputs * expansion
        self.expand = ConvUnit(inputs, inner, 1)
        self.depthwise = ConvUnit(inner, inner, 3, stride, groups=inner)
        self.linear = nn.Sequential(nn.Conv2d(inner, outputs, 1, bias=False), nn.BatchNorm2d(outputs))
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        out = self.linear(self.depthwise(self.expand(x)))
        return x + out if self.residual else out


def build(name: str, num_classes: int, *, width: float) -> StagedModel:
    """A MobileNetV2 whose groups are `width` times as wide; the pooled vector stays 1280 wide."""
    inputs, stride = int(STEM * width), 2
    stages: list[tuple[StageInfo, nn.Module]] = [(StageInfo("stem", inputs, stride), ConvUnit(3, inputs, 3, 2))]
    for number, groups in enumerate(STAGES, start=1):
        blocks, widths = [], list[int]()
        for group in groups:
            outputs = int(group.width * width)
            blocks.append(InvertedResidual(inputs, outputs, group.stride, group.expansion))
            blocks += [InvertedResidual(outputs, outputs, 1, group.expansion) for _ in range(group.blocks - 1)]
            widths += [outputs] * group.blocks
            inputs, stride = outputs, stride * group.stride
        info = StageInfo(f"stage{number}", inputs, stride, signed=True, blocks=tuple(widths))
        stages.append((info, nn.Sequential(*blocks)))
    stages.append((StageInfo("pool", EMBEDDING, 0), nn.Sequential(ConvUnit(inputs, EMBEDDING, 1), GlobalPool())))
    model = StagedModel(name, "mobilenetv2", stages, num_classes, None)
    init_small_head(model)
    return model
