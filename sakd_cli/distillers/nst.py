"""Neuron selectivity transfer."""

from typing import final

import torch
from torch import Tensor
from torch.nn import functional as F

from sakd_cli.distillers.distiller import SpotwiseDistiller, pooled_to_smaller, weighted_mean


def neurons(x: Tensor) -> Tensor:
    """Every channel as a vector over positions, scaled to length 1: [N, C, H, W] to [N, C, HW]."""
    return F.normalize(x.flatten(2), dim=2)


def kernel_mean(a: Tensor, b: Tensor) -> Tensor:
    """Mean of (u v)^2 over all pairs of channels of a sample: [N, C, D] and [N, E, D] to [N]."""
    return torch.bmm(a, b.transpose(1, 2)).square().mean(dim=(1, 2))


@final
class NST(SpotwiseDistiller):
    """The student's channels are distributed over positions as the teacher's are, at every stage.

    loss_k = mean over samples of k(t, t) + k(s, s) - 2 k(s, t),  k = mean over pairs of channels of (u v)^2

    Huang and Wang, "Like What You Like: Knowledge Distill via Neuron Selectivity Transfer", arXiv 1707.01219, equation
    8 with the polynomial kernel of degree 2, offset 0. Maps of two sizes are pooled to the smaller. One product per
    kernel, where the published form makes a tensor of all pairs and positions.
    """

    def spot_loss(self, k: int, student: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
        weight, student, teacher = self.selected(weight, student, teacher)
        s, t = map(neurons, pooled_to_smaller(student, teacher))
        return weighted_mean(kernel_mean(t, t) + kernel_mean(s, s) - 2 * kernel_mean(s, t), weight)
