"""The model contract: a network is an ordered list of stages and a head, and can be run from any stage to any other.

Stage 0 is the stem, stages 1 .. L-2 give maps, stage L-1 gives the pooled vector, stage L is the head. Segments are
half-open: `run(run(x, 0, k), k, L + 1)` equals `forward(x)` for every k, bit for bit in evaluation mode.
"""

import copy
from collections.abc import Sequence
from typing import Literal, NamedTuple, final

from torch import Tensor, nn

Shape = tuple[int, ...]


class StageInfo(NamedTuple):
    """What a stage declares: its name, width, stride relative to the image (0 for a pooled vector)."""

    name: str
    channels: int
    stride: int

    @property
    def kind(self) -> Literal["map", "embedding"]:
        return "map" if self.stride else "embedding"

    def shape(self, side: int) -> Shape:
        """Shape of one sample's feature for a square image of `side` pixels: (C, H, W), or (C,) when pooled."""
        return (self.channels, side // self.stride, side // self.stride) if self.stride else (self.channels,)


class Features(NamedTuple):
    """One tensor per stage ([N, C, H, W], the last one [N, C]) and the logits [N, classes]."""

    stages: tuple[Tensor, ...]
    logits: Tensor

    @property
    def embedding(self) -> Tensor:
        """The pooled vector in front of the head, [N, C]."""
        return self.stages[-1]


@final
class StagedModel(nn.Module):
    """A classifier cut into stages. A family of networks only fills in stages, their infos and the head."""

    def __init__(
        self, *, name: str, family: str, stages: Sequence[tuple[StageInfo, nn.Module]], num_classes: int
    ) -> None:
        super().__init__()
        self.name = name
        self.family = family
        self.num_classes = num_classes
        self.infos = tuple(info for info, _ in stages)
        self.stages = nn.ModuleList([stage for _, stage in stages])
        self.head = nn.Linear(self.infos[-1].channels, num_classes)

    @property
    def map_stages(self) -> tuple[int, ...]:
        """Indices of the stages between stem and pooling, where maps can be distilled."""
        return tuple(range(1, len(self.infos) - 1))

    def forward(self, x: Tensor) -> Tensor:
        """Images [N, 3, H, W] to logits [N, classes]."""
        return self.run(x, 0, len(self.stages) + 1)

    def features(self, x: Tensor) -> Features:
        """Images [N, 3, H, W] to the output of every stage and the logits."""
        outputs = []
        for stage in self.stages:
            x = stage(x)
            outputs.append(x)
        return Features(tuple(outputs), self.head(x))

    def run(self, x: Tensor, start: int, stop: int) -> Tensor:
        """Run stages start .. stop-1; `x` is the output of stage start-1 (the images for start 0)."""
        for stage in self.stages[start:stop]:
            x = stage(x)
        return self.head(x) if stop > len(self.stages) else x


def frozen_view(model: StagedModel) -> StagedModel:
    """The same network in evaluation mode and without gradients, sharing every weight and buffer with `model`.

    What an optimizer or a BatchNorm changes in `model` is seen at once. Move `model` to its device first.
    """
    view = copy.deepcopy(model).requires_grad_(False).eval()
    for mine, theirs in zip(view.modules(), model.modules(), strict=True):
        for name, parameter in theirs.named_parameters(recurse=False):
            mine.register_parameter(name, nn.Parameter(parameter.detach(), requires_grad=False))
        for name, buffer in theirs.named_buffers(recurse=False):
            mine.register_buffer(name, buffer)
    return view
