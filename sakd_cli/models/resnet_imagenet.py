"""The four-group ResNets of He et al. (CVPR 2016, table 1) with a stem for small images, as in the CRD benchmark.

We differ from the original in the stem: 3x3 at stride 1 and no max-pooling, where ImageNet's is 7x7 at stride 2 with
pooling. The stride of a bottleneck sits in its 3x3 convolution. Stage outputs are after the ReLU.
"""

from typing import final

from torch import Tensor, nn
from torch.nn import functional as F

from sakd_cli.models.layers import ActivatedBlock, conv3x3, projection
from sakd_cli.models.resnet import BasicBlock, residual_network
from sakd_cli.models.staged import Affine, StagedModel

EXPANSION = 4


@final
class Bottleneck(ActivatedBlock):
    """relu(shortcut(x) + 1x1(3x3(1x1(x)))), a BatchNorm after each: [N, C, H, W] to [N, C', H/stride, W/stride]."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        inner = outputs // EXPANSION
        self.conv1 = nn.Conv2d(inputs, inner, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = conv3x3(inner, inner, stride)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = nn.Conv2d(inner, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.shortcut = projection(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        return self.pair(x)[1]

    def pair(self, x: Tensor) -> tuple[Tensor, Tensor]:
        residual = F.relu(self.bn1(self.conv1(x)))
        residual = F.relu(self.bn2(self.conv2(residual)))
        total = self.shortcut(x) + self.bn3(self.conv3(residual))
        return total, F.relu(total)

    def affine(self) -> Affine:
        return self.bn3.weight, self.bn3.bias


def build(name: str, num_classes: int, *, blocks: tuple[int, int, int, int], bottleneck: bool) -> StagedModel:
    """A ResNet of four groups with so many blocks each, at strides 1, 2, 4, 8."""
    block, expansion = (Bottleneck, EXPANSION) if bottleneck else (BasicBlock, 1)
    widths = 64, *((64 << group) * expansion for group in range(4))
    return residual_network(name, "resnet_imagenet", num_classes, block, widths, blocks)
