"""ResNets (He et al., CVPR 2016) for small images, as in the CRD benchmark (Tian et al., ICLR 2020).

CIFAR ResNets (section 4.2), depth = 6n + 2: three groups of n basic blocks at strides 1, 2, 4. We differ from the
original in the projection shortcut (1x1 convolution and BatchNorm) where it pads with zeros; so do all peers.

Networks of four groups (table 1), made for ImageNet: the stem is 3x3 at stride 1 without max-pooling, where theirs is
7x7 at stride 2 with it. The stride of a bottleneck sits in its 3x3 convolution. Stage outputs are after the ReLU.
"""

from collections.abc import Sequence
from typing import final

from torch import Tensor, nn
from torch.nn import functional as F

from sakd_cli.models.layers import ReluBlock, conv3x3, grouped_network, projection
from sakd_cli.models.staged import Affine, StagedModel

EXPANSION = 4  # of a bottleneck


@final
class BasicBlock(ReluBlock):
    """relu(shortcut(x) + bn(conv(relu(bn(conv(x)))))), [N, C, H, W] to [N, C', H/stride, W/stride]."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv3x3(inputs, outputs, stride)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = conv3x3(outputs, outputs)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = projection(inputs, outputs, stride)

    def before_relu(self, x: Tensor) -> Tensor:
        residual = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return self.shortcut(x) + residual

    def affine(self) -> Affine:
        return self.bn2.weight, self.bn2.bias


@final
class Bottleneck(ReluBlock):
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

    def before_relu(self, x: Tensor) -> Tensor:
        residual = F.relu(self.bn1(self.conv1(x)))
        residual = F.relu(self.bn2(self.conv2(residual)))
        return self.shortcut(x) + self.bn3(self.conv3(residual))

    def affine(self) -> Affine:
        return self.bn3.weight, self.bn3.bias


def build(name: str, num_classes: int, *, depth: int, widths: tuple[int, ...] = (16, 16, 32, 64)) -> StagedModel:
    """A CIFAR ResNet; `widths` are those of the stem and the three groups."""
    if depth < 8 or (depth - 2) % 6:
        raise ValueError(f"depth of a CIFAR ResNet is 6n+2, not {depth}")
    return _network(name, "resnet", num_classes, widths, ((depth - 2) // 6,) * 3, BasicBlock)


def build_imagenet(name: str, num_classes: int, *, blocks: tuple[int, int, int, int], bottleneck: bool) -> StagedModel:
    """A ResNet of four groups with so many blocks each, at strides 1, 2, 4, 8."""
    block, expansion = (Bottleneck, EXPANSION) if bottleneck else (BasicBlock, 1)
    widths = 64, *((64 << group) * expansion for group in range(4))
    return _network(name, "resnet_imagenet", num_classes, widths, blocks, block)


def _network(
    name: str,
    family: str,
    num_classes: int,
    widths: Sequence[int],
    counts: Sequence[int],
    block: type[BasicBlock] | type[Bottleneck],
) -> StagedModel:
    stem = nn.Sequential(conv3x3(3, widths[0]), nn.BatchNorm2d(widths[0]), nn.ReLU())
    model = grouped_network(name, family, num_classes, widths, counts, stem, block)
    for module in model.modules():  # as in the CRD benchmark
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model
