"""Variational information distillation."""

import math
from typing import final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sakd_cli.config.methods import VIDConfig
from sakd_cli.distillers.distiller import SpotwiseDistiller, pooled_to_smaller, weighted_mean
from sakd_cli.models.spot import Spot

EPSILON = 1e-5  # smallest variance
FIRST_VARIANCE = 5.0


class Gaussian(nn.Module):
    """A Gaussian for the teacher's map given the student's: [N, C1, H, W] to mean [N, C2, H, W], variance [C2]."""

    def __init__(self, student: int, teacher: int) -> None:
        super().__init__()
        self.mean = nn.Sequential(
            nn.Conv2d(student, teacher, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(teacher, teacher, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(teacher, teacher, 1, bias=False),
        )
        self.log_scale = nn.Parameter(torch.full((teacher,), math.log(math.expm1(FIRST_VARIANCE - EPSILON))))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.mean(x), F.softplus(self.log_scale) + EPSILON


@final
class VID(SpotwiseDistiller):
    """The student's map tells as much as possible about the teacher's, at every stage.

    loss_k = mean over samples, channels and positions of ((m(s) - t)^2 / v + ln v) / 2
    m = three 1x1 convolutions with ReLU between;  v = ln(1 + exp(r)) + 1e-5 per channel, 5 at the start

    Ahn et al., "Variational Information Distillation for Knowledge Transfer", CVPR 2019, equations 5 and 6 without the
    constant; it may be negative. Maps of two sizes are pooled to the smaller.
    """

    def __init__(self, spots: tuple[Spot, ...], config: VIDConfig) -> None:
        super().__init__(spots)
        self.gaussians = nn.ModuleList([Gaussian(spot.student_shape[0], spot.teacher_shape[0]) for spot in spots])

    def spot_loss(self, k: int, student: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
        weight, student, teacher = self.selected(weight, student, teacher)
        s, t = pooled_to_smaller(student, teacher)
        mean, variance = self.gaussians[k](s)
        variance = variance[:, None, None]
        surprise = (mean - t).square() / variance + variance.log()
        return weighted_mean(surprise.flatten(1).mean(dim=1) / 2, weight)
