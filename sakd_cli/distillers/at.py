"""Attention transfer."""

from typing import final

from torch import Tensor
from torch.nn import functional as F

from sakd_cli.config.methods import ATConfig
from sakd_cli.distillers.distiller import SpotwiseDistiller, pooled_to_smaller, weighted_mean


def attention(x: Tensor, power: int) -> Tensor:
    """Mean over channels of the map to a power, scaled to length 1: [N, C, H, W] to [N, HW].

    A sum instead of the mean: the scale cancels. And the product instead of `pow`, whose backward pass is five times
    as dear on a CPU.
    """
    energy = x * x if power == 2 else x.pow(power)
    return F.normalize(energy.sum(dim=1).flatten(1), dim=1)


@final
class AT(SpotwiseDistiller):
    """The student looks where the teacher looks, at every stage.

    loss_k = mean over samples and positions of (a(s) - a(t))^2,  a(f) = normalised mean over channels of f^p

    Zagoruyko and Komodakis, "Paying More Attention to Attention", ICLR 2017, equation 2, p = 2 by default, with the
    mean of squares of the CRD benchmark in place of the norm. Maps of two sizes are pooled to the smaller.
    """

    config: ATConfig

    def spot_loss(self, k: int, student: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
        s, t = (attention(x, self.config.power) for x in pooled_to_smaller(student, teacher))
        return weighted_mean((s - t).square().mean(dim=1), weight)
