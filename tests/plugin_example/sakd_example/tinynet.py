"""A network of three convolutions."""

from torch import Tensor, nn

from sakd_cli.api import StagedModel, StageInfo


class Pooled(nn.Module):
    """A map [N, C, H, W] to its mean [N, C]."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


def build(name: str, num_classes: int) -> StagedModel:
    """Widths 8, 16, 32 at strides 1, 2, 4."""
    stages: list[tuple[StageInfo, nn.Module]] = []
    before, stride = 3, 1
    for place, width in enumerate((8, 16, 32)):
        step = 1 if place == 0 else 2
        stride *= step
        convolution = nn.Conv2d(before, width, 3, stride=step, padding=1, bias=False)
        layers = nn.Sequential(convolution, nn.BatchNorm2d(width), nn.ReLU())
        stages.append((StageInfo(f"stage{place}", width, stride), layers))
        before = width
    stages.append((StageInfo("pooled", before, 0), Pooled()))
    return StagedModel(name=name, family="tinynet", stages=stages, num_classes=num_classes, preactivation=None)
