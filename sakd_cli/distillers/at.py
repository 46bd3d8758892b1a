"""Attention transfer."""

from typing import final

import torch
from torch import Tensor
from torch.nn import functional as F

from sakd_cli.batch import Batch
from sakd_cli.config.methods import ATConfig
from sakd_cli.distillers.distiller import Distiller, pooled_to_smaller, weighted_mean
from sakd_cli.models.spot import Spot
from sakd_cli.models.staged import Features


def attention(x: Tensor, power: int) -> Tensor:
    """Mean over channels of the map to a power, scaled to length 1: [N, C, H, W] to [N, HW]."""
    return F.normalize(x.pow(power).mean(dim=1).flatten(1), dim=1)


@final
class AT(Distiller):
    """The student looks where the teacher looks, at every stage.

    loss_k = mean over samples and positions of (a(s) - a(t))^2,  a(f) = normalised mean over channels of f^p

    Zagoruyko and Komodakis, "Paying More Attention to Attention", ICLR 2017, equation 2, p = 2 by default, with the
    mean of squares of the CRD benchmark in place of the norm. Maps of two sizes are pooled to the smaller.
    """

    def __init__(self, spots: tuple[Spot, ...], config: ATConfig) -> None:
        super().__init__(spots)
        self.power = config.power

    def forward(self, student: Features, teacher: Features, weight: Tensor, batch: Batch) -> Tensor:
        losses = []
        for (s, t), w in zip(self.pairs(student, teacher), weight, strict=True):
            s, t = pooled_to_smaller(s, t)
            difference = attention(s, self.power) - attention(t, self.power)
            losses.append(weighted_mean(difference.square().mean(dim=1), w))
        return torch.stack(losses)
