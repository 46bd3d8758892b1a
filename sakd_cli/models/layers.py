"""Pieces that several families are made of, and how groups of blocks become a network."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import pairwise
from typing import cast

from torch import Tensor, nn
from torch.nn import functional as F

from sakd_cli.models.staged import Affine, Mark, Preactivation, StagedModel, StageInfo

MarkHere = Callable[[Tensor], Tensor]  # a `Mark` at one stage, on what is in front of the activation


class ActivatedBlock(nn.Module, ABC):
    """A block that ends in an activation."""

    @abstractmethod
    def pair(self, x: Tensor, mark: MarkHere) -> tuple[Tensor, Tensor]:
        """The output in front of the last activation, and the output, as `forward` gives it. Both are of one shape."""

    @abstractmethod
    def affine(self) -> Affine:
        """Weight and bias of the last BatchNorm in front of that activation; 0 for channels that pass it by."""


class ReluBlock(ActivatedBlock, ABC):
    """A block whose last operation is a ReLU."""

    @abstractmethod
    def before_relu(self, x: Tensor) -> Tensor:
        """The output in front of that ReLU."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.before_relu(x))

    def pair(self, x: Tensor, mark: MarkHere) -> tuple[Tensor, Tensor]:
        signed = mark(self.before_relu(x))
        return signed, F.relu(signed)


class ConvUnit(nn.Module):
    """relu(bn(conv(x))) or bn(conv(x)), without bias: [N, C, H, W] to [N, C', H/stride, W/stride]."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1, *, relu: bool = True
    ) -> None:
        super().__init__()
        self.relu = relu
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.bn(self.conv(x))
        return F.relu(normed) if self.relu else normed


class GlobalPool(nn.Module):
    """Mean over all positions: [N, C, H, W] to [N, C]."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=(2, 3))


def conv3x3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)


def projection(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    """Shortcut of a residual block: nothing where the shape stays, else 1x1 convolution and BatchNorm."""
    if stride == 1 and inputs == outputs:
        return nn.Sequential()
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))


def shuffle(x: Tensor, groups: int) -> Tensor:
    """Interleave the channels of `groups` equal groups; the shape stays."""
    n, c, h, w = x.shape
    return x.view(n, groups, c // groups, h, w).transpose(1, 2).reshape(n, c, h, w)


def _run_before_last_activation(
    stages: Iterable[nn.Module], x: Tensor, mark: Mark
) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs of all stages, and those in front of each group's last activation (of stem and pool: the same)."""
    stem, *groups, pool = stages
    outputs = [stem(x)]
    before = [outputs[0]]
    for place, group in enumerate(groups, start=1):
        *blocks, last = cast(nn.Sequential, group)
        x = outputs[-1]
        for block in blocks:
            x = block(x)
        signed, x = cast(ActivatedBlock, last).pair(x, partial(mark, place))
        outputs.append(x)
        before.append(signed)
    pooled = pool(outputs[-1])
    return [*outputs, pooled], [*before, pooled]


# For families whose groups consist of ActivatedBlocks.
BEFORE_LAST_ACTIVATION = Preactivation(
    run=_run_before_last_activation,
    affines=lambda stages: [cast(ActivatedBlock, cast(nn.Sequential, g)[-1]).affine() for g in list(stages)[1:-1]],
)


def grouped_network(
    name: str,
    family: str,
    num_classes: int,
    widths: Sequence[int],
    counts: Sequence[int],
    stem: nn.Module,
    block: Callable[[int, int, int], nn.Module],
    *,
    stride: int = 1,
    signed: bool = False,
    pool: Callable[[], nn.Module] = GlobalPool,
    embedding: int | None = None,
    preactivation: Preactivation = BEFORE_LAST_ACTIVATION,
) -> StagedModel:
    """A stem, groups of blocks, each at twice the stride of the one before, and a pooling stage.

    widths     of the stem and the groups; counts: blocks of each group
    block      makes one for an input width, an output width and a stride, which is 1 but for the first of a group
    stride     of the first group, 1 or 2; signed: whether stem and groups end without a ReLU
    embedding  width of the pooled vector; None: that of the last group
    """
    stages: list[tuple[StageInfo, nn.Module]] = [(StageInfo("stem", widths[0], 1, signed=signed), stem)]
    for group, ((inputs, outputs), count) in enumerate(zip(pairwise(widths), counts, strict=True)):
        first = block(inputs, outputs, 2 if group else stride)
        blocks = nn.Sequential(first, *(block(outputs, outputs, 1) for _ in range(count - 1)))
        info = StageInfo(f"stage{group + 1}", outputs, stride << group, signed=signed, blocks=(outputs,) * count)
        stages.append((info, blocks))
    stages.append((StageInfo("pool", embedding or widths[-1], 0), pool()))
    return StagedModel(name, family, stages, num_classes, preactivation)


def init_fan_out(model: nn.Module) -> None:
    """Convolutions normal with variance 2 / (k^2 C_out), biases zero (wide ResNets of the CRD benchmark)."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
            nn.init.normal_(module.weight, 0.0, math.sqrt(2.0 / fan_out))
        if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


def init_small_head(model: nn.Module) -> None:
    """As `init_fan_out`, and linear layers normal with standard deviation 0.01 (VGG, MobileNetV2 of the benchmark)."""
    init_fan_out(model)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, 0.0, 0.01)
