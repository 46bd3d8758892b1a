"""ResNets (He et al., CVPR 2016) for small images, as in the CRD benchmark (Tian et al., ICLR 2020).

CIFAR ResNets (section 4.2), depth = 6n + 2: three groups of n basic blocks at strides 1, 2, 4. We differ from the
original in the projection shortcut (1x1 convolution and BatchNorm) where it pads with zeros; so do all peers.

Networks of four groups (table 1), made for ImageNet: the stem is 3x3 at stride 1 without max-pooling, where theirs is
7x7 at stride 2 with it. The stride of a bottleneck sits in its 3x3 convolution. Stage outputs are after the ReLU.

Wide ResNets (Zagoruyko and Komodakis, BMVC 2016), depth = 6n + 4: three groups of n pre-activation blocks at strides 1,
2, 4, widths 16w, 32w, 64w, no dropout. The stem has no BatchNorm and stage outputs are the raw sums, so they are
signed; the last BatchNorm and ReLU stand in front of the pooling.
"""

from collections.abc import Iterable, Sequence
from typing import cast, final

from torch import Tensor, nn
from torch.nn import functional as F

from sakd_cli.models.layers import GlobalPool, ReluBlock, conv3x3, grouped_network, init_fan_out, projection
from sakd_cli.models.staged import Affine, Mark, Preactivation, StagedModel

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
    """A CIFAR ResNet of depth 6n+2; `widths` are those of the stem and the three groups."""
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


class PreActivationBlock(nn.Module):
    """x + conv(relu(bn(conv(relu(bn(x)))))); where the width changes, the 1x1 shortcut sees the activated input."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = conv3x3(inputs, outputs, stride)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = conv3x3(outputs, outputs)
        self.shortcut = None if inputs == outputs else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.behind_norm(x, self.bn1(x))

    def behind_norm(self, x: Tensor, normed: Tensor) -> Tensor:
        """The rest of the block, `normed` being its first BatchNorm's output."""
        activated = F.relu(normed)
        residual = self.conv2(F.relu(self.bn2(self.conv1(activated))))
        return residual + (x if self.shortcut is None else self.shortcut(activated))


def _after_next_norm(stages: Iterable[nn.Module], x: Tensor, mark: Mark) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs of all stages, and of each group what the next BatchNorm makes of it (each BatchNorm runs once)."""
    stem, *groups, pool = (cast(nn.Sequential, stage) for stage in stages)
    outputs: list[Tensor] = [stem(x)]
    compared = [outputs[0]]  # the stem has no version of its own: the first group's norm is not counted as one
    for place, group in enumerate(groups):
        first, *rest = group
        first = cast(PreActivationBlock, first)
        normed = first.bn1(outputs[-1])
        if place:
            normed = mark(place, normed)
            compared.append(normed)
        x = first.behind_norm(outputs[-1], normed)
        for block in rest:
            x = block(x)
        outputs.append(x)
    norm, *rest = pool
    x = mark(len(groups), norm(outputs[-1]))
    compared.append(x)
    for module in rest:
        x = module(x)
    return [*outputs, x], [*compared, x]


def _next_norms(stages: Iterable[nn.Module]) -> list[list[nn.BatchNorm2d]]:
    """The BatchNorm behind each block of each group: the next block's first; behind the very last, the pooling's."""
    _, *groups, pool = (cast(nn.Sequential, stage) for stage in stages)
    norms = [cast(PreActivationBlock, block).bn1 for group in groups for block in group][1:]
    later = iter([*norms, cast(nn.BatchNorm2d, pool[0])])
    return [[next(later) for _ in group] for group in groups]


AFTER_NEXT_NORM = Preactivation(
    run=_after_next_norm,
    affines=lambda stages: [(norms[-1].weight, norms[-1].bias) for norms in _next_norms(stages)],
    behind=_next_norms,
)


def build_wide(name: str, num_classes: int, *, depth: int, width: int) -> StagedModel:
    """A wide ResNet of depth 6n+4."""
    widths = (16, 16 * width, 32 * width, 64 * width)
    model = grouped_network(
        name,
        "wrn",
        num_classes,
        widths,
        ((depth - 4) // 6,) * 3,
        conv3x3(3, 16),
        PreActivationBlock,
        signed=True,
        pool=lambda: nn.Sequential(nn.BatchNorm2d(widths[3]), nn.ReLU(), GlobalPool()),
        preactivation=AFTER_NEXT_NORM,
    )
    init_fan_out(model)
    return model
