"""Wide ResNets (Zagoruyko and Komodakis, BMVC 2016), pre-activation, no dropout.

depth = 6n + 4: three groups of n blocks at strides 1, 2, 4, widths 16w, 32w, 64w. The stem has no BatchNorm and stage
outputs are the raw sums, so they are signed; the last BatchNorm and ReLU stand in front of the pooling.
"""

from collections.abc import Iterable
from typing import cast

from torch import Tensor, nn
from torch.nn import functional as F

from sakd_cli.models.layers import GlobalPool, conv3x3, grouped_network, init_fan_out
from sakd_cli.models.staged import Mark, Preactivation, StagedModel


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


def build(name: str, num_classes: int, *, depth: int, width: int) -> StagedModel:
    if depth < 10 or (depth - 4) % 6:
        raise ValueError(f"depth of a wide ResNet is 6n+4, not {depth}")
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
