"""Overhaul of feature distillation."""

import math
from typing import final

import torch
from torch import Tensor, nn

from sakd_cli.config.methods import OFDConfig
from sakd_cli.distillers.distiller import SpotwiseDistiller, pooled_to_smaller, weighted_mean
from sakd_cli.models.spot import Spot
from sakd_cli.models.staged import Affine

RARE = 0.001  # a channel that is negative no more often than this gets FAR standard deviations as its margin
FAR = -3.0


def margins(affine: Affine) -> Tensor:
    """E[x | x < 0], x normal with the BatchNorm's bias as mean and |weight| as standard deviation: [C] to [C].

    -3 |weight| where x < 0 is as rare as 0.001. Of a constant (weight 0): itself where it is negative, else 0.
    """
    weight, bias = (numbers.detach().cpu().double() for numbers in affine)
    deviation = weight.abs()
    mean = bias / torch.where(deviation > 0, deviation, torch.ones_like(deviation))  # in deviations
    negative = torch.special.erfc(mean / math.sqrt(2)) / 2
    density = torch.exp(-mean.square() / 2) / math.sqrt(2 * math.pi)
    usual = deviation * (mean - density / negative)
    found = torch.where(negative > RARE, usual, FAR * deviation)
    return torch.where(deviation > 0, found, bias.clamp(max=0)).to(affine[0])


def partial_distance(student: Tensor, teacher: Tensor, margin: Tensor) -> Tensor:
    """Sum over a sample of (s - max(t, m))^2, but where t <= 0 and s is low enough: [N, C, H, W], [C] to [N]."""
    wanted = torch.maximum(teacher, margin[:, None, None])
    counted = (teacher > 0) | (student > wanted)
    return ((student - wanted).square() * counted).flatten(1).sum(dim=1)


def connector(student: int, teacher: int) -> nn.Sequential:
    """1x1 convolution and BatchNorm; [N, C1, H, W] to [N, C2, H, W]."""
    convolution = nn.Conv2d(student, teacher, 1, bias=False)
    nn.init.normal_(convolution.weight, 0.0, math.sqrt(2 / teacher))
    return nn.Sequential(convolution, nn.BatchNorm2d(teacher))


@final
class OFD(SpotwiseDistiller):
    """The student's maps in front of their activation match the teacher's, wherever that is heard behind it.

    loss_k = 2^(k-K+1) mean over samples of the sum over elements of
             0 where t <= 0 and r(s) <= max(t, m),  else (r(s) - max(t, m))^2;  k = 0 .. K-1
    r = 1x1 convolution and BatchNorm;  m = E[x | x < 0] per channel, x normal as the teacher's BatchNorm says

    Heo, Kim, Yun, Park, Kwak, Choi, "A Comprehensive Overhaul of Feature Distillation", ICCV 2019, section 3 (margin
    ReLU, partial L2 distance). Maps [N, C, H, W], at every stage. The default `weight` is the authors' factor 1/1000.
    Beyond the paper: maps of two sizes are pooled to the smaller; channels that no BatchNorm stands in front of get
    margin 0. In residual blocks the margin is that of the last BatchNorm alone, without the shortcut, as in public
    code. The teacher stays in evaluation mode. Connectors see the whole batch, so that their BatchNorm does not depend
    on the selection. The published loss has no logit term: `--set method.kl_weight=0`.
    """

    def __init__(self, spots: tuple[Spot, ...], config: OFDConfig, norms: list[Affine]) -> None:
        """norms  of the teacher, in front of its activation at each spot."""
        super().__init__(spots, want="preactivations")
        self.connectors = nn.ModuleList([connector(spot.student_shape[0], spot.teacher_shape[0]) for spot in spots])
        for k, norm in enumerate(norms):
            self.register_buffer(f"margin{k}", margins(norm), persistent=False)  # the teacher's, not the run's

    def spot_loss(self, k: int, student: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
        s, t = pooled_to_smaller(self.connectors[k](student), teacher)
        distance = partial_distance(s, t, self.get_buffer(f"margin{k}"))
        return 2.0 ** (k - len(self.spots) + 1) * weighted_mean(distance, weight)
