"""CIFAR ResNets (He et al., CVPR 2016, section 4.2), in the widths of the CRD benchmark (Tian et al., ICLR 2020).

depth = 6n + 2: three groups of n basic blocks at strides 1, 2, 4. Stage outputs are after the ReLU. We differ from the
original in the projection shortcut (1x1 convolution and BatchNorm) where it pads with zeros; so do all peers.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import final

from torch import Tensor, nn
from torch.nn import functional as F

from sakd_cli.models.layers import BEFORE_LAST_ACTIVATION, ActivatedBlock, GlobalPool, conv3x3, init_kaiming, projection
from sakd_cli.models.staged import Affine, StagedModel, StageInfo


@final
class BasicBlock(ActivatedBlock):
    """relu(shortcut(x) + bn(conv(relu(bn(conv(x)))))), [N, C, H, W] to [N, C', H/stride, W/stride]."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv3x3(inputs, outputs, stride)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = conv3x3(outputs, outputs)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = projection(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        return self.pair(x)[1]

    def pair(self, x: Tensor) -> tuple[Tensor, Tensor]:
        residual = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        total = self.shortcut(x) + residual
        return total, F.relu(total)

    def affine(self) -> Affine:
        return self.bn2.weight, self.bn2.bias


def build(name: str, num_classes: int, *, depth: int, widths: tuple[int, ...] = (16, 16, 32, 64)) -> StagedModel:
    """A CIFAR ResNet; `widths` are those of the stem and the three groups."""
    if depth < 8 or (depth - 2) % 6:
        raise ValueError(f"depth of a CIFAR ResNet is 6n+2, not {depth}")
    return residual_network(name, "resnet", num_classes, BasicBlock, widths, ((depth - 2) // 6,) * 3)


def residual_network(
    name: str,
    family: str,
    num_classes: int,
    block: Callable[[int, int, int], nn.Module],
    widths: Sequence[int],
    counts: Sequence[int],
) -> StagedModel:
    """A 3x3 stem and groups of so many blocks at strides 1, 2, 4, ...; `widths`: of the stem and the groups."""
    stem = nn.Sequential(conv3x3(3, widths[0]), nn.BatchNorm2d(widths[0]), nn.ReLU())
    stages: list[tuple[StageInfo, nn.Module]] = [(StageInfo("stem", widths[0], 1), stem)]
    for group, ((inputs, outputs), count) in enumerate(zip(pairwise(widths), counts, strict=True)):
        blocks = [block(inputs, outputs, 2 if group else 1), *(block(outputs, outputs, 1) for _ in range(count - 1))]
        info = StageInfo(f"stage{group + 1}", outputs, 1 << group, blocks=(outputs,) * count)
        stages.append((info, nn.Sequential(*blocks)))
    stages.append((StageInfo("pool", widths[-1], 0), GlobalPool()))
    model = StagedModel(name, family, stages, num_classes, BEFORE_LAST_ACTIVATION)
    init_kaiming(model)
    return model
