"""VGG with BatchNorm (Simonyan and Zisserman, ICLR 2015), in the depths and the small head of the CRD benchmark.

Five groups of 3x3 convolutions. We differ from the original in what stands around them: each group pools what it gets
instead of what it gives, so that stage outputs are after the last ReLU and before the pooling; the fourth pooling is
left out where its input is less than 8 high; the head is one linear layer behind a global mean.
"""

from typing import final

from torch import Tensor, nn
from torch.nn import functional as F

from sakd_cli.models.layers import BEFORE_LAST_ACTIVATION, GlobalPool, ReluBlock, init_small_head
from sakd_cli.models.staged import Affine, StagedModel, StageInfo

WIDTHS = (64, 128, 256, 512, 512)
# Below this height the last group does not pool its input; it stands behind three poolings.
MIN_HEIGHT = 8


class PoolIfHigh(nn.Module):
    """2x2 max-pooling of maps at least MIN_HEIGHT high; smaller ones pass as they are."""

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool2d(x, 2) if x.shape[2] >= MIN_HEIGHT else x


@final
class VGGBlock(ReluBlock):
    """relu(bn(conv(pool(x)))), a 3x3 convolution with bias: [N, C, H, W] to [N, C', H', W'] as the pooling gives."""

    def __init__(self, inputs: int, outputs: int, pool: nn.Module) -> None:
        super().__init__()
        self.pool = pool
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.bn = nn.BatchNorm2d(outputs)

    def before_relu(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(self.pool(x)))

    def affine(self) -> Affine:
        return self.bn.weight, self.bn.bias


def build(name: str, num_classes: int, *, convolutions: tuple[int, int, int, int, int]) -> StagedModel:
    stem, *groups = (WIDTHS[group : group + 1] * count for group, count in enumerate(convolutions))
    infos = [StageInfo("stem", stem[0], 1)]
    infos += [StageInfo(f"stage{k}", blocks[0], 1 << k, blocks=blocks) for k, blocks in enumerate(groups[:3], start=1)]
    infos.append(StageInfo("stage4", WIDTHS[4], 8, halved_from=8 * MIN_HEIGHT, blocks=groups[3]))
    pools: list[nn.Module] = [nn.Identity(), *(nn.MaxPool2d(2) for _ in range(3)), PoolIfHigh()]
    stages: list[tuple[StageInfo, nn.Module]] = []
    inputs = 3
    for info, pool, count in zip(infos, pools, convolutions, strict=True):
        blocks = [VGGBlock(inputs, info.channels, pool)]
        blocks += [VGGBlock(info.channels, info.channels, nn.Identity()) for _ in range(count - 1)]
        stages.append((info, nn.Sequential(*blocks)))
        inputs = info.channels
    stages.append((StageInfo("pool", inputs, 0), GlobalPool()))
    model = StagedModel(name, "vgg", stages, num_classes, BEFORE_LAST_ACTIVATION)
    init_small_head(model)
    return model
