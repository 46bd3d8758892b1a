"""Relational knowledge distillation."""

from typing import final

import torch
from torch import Tensor
from torch.nn import functional as F

from sakd_cli.config.methods import RKDConfig
from sakd_cli.distillers.distiller import SpotwiseDistiller

FLOOR = 1e-12  # of squared distances and of lengths, as published


def distances(x: Tensor, pair: Tensor) -> Tensor:
    """Euclidean distances between all samples over their mean: [N, D] to [N, N].

    pair [N, N] weighs what the mean is taken over; the diagonal of `pair` is 0, and what lies outside is not used.
    """
    square = x.square().sum(dim=1)
    squared = (square[:, None] + square[None, :] - 2 * x @ x.T).clamp(min=FLOOR)
    found = squared.sqrt()
    total, count = (found * pair).sum(), pair.sum()
    mean = torch.where(count > 0, total / count.clamp(min=FLOOR), torch.ones_like(total))
    return found / mean


def angles(x: Tensor) -> Tensor:
    """Cosine of the angle at sample i between the ways to j and to k: [N, D] to [N, N, N]."""
    ways = x[None, :, :] - x[:, None, :]
    length = torch.linalg.vector_norm(ways, dim=2, keepdim=True)
    # Two equal samples have no way between them: 0, with a gradient that stays finite.
    units = ways / torch.where(length > FLOOR, length, torch.ones_like(length))
    return torch.bmm(units, units.transpose(1, 2))


@final
class RKD(SpotwiseDistiller):
    """Distances and angles between the samples of a batch are the same for student and teacher.

    loss = a mean_ij h(d_ij(s), d_ij(t)) + b mean_ijk h(cos_ijk(s), cos_ijk(t)),  h = smooth L1 (Huber, delta 1)
    d = Euclidean distance over its mean in the batch;  cos_ijk = angle at i between j and k;  a = 25, b = 50

    Park, Kim, Lu, Cho, "Relational Knowledge Distillation", CVPR 2019, equations 5, 6 and 8 to 10. The means run over
    all n^2 and n^3 entries, degenerate ones included. With n of N samples chosen, pairs and triples of chosen ones
    count, and the loss is multiplied by n/N; below two it is 0 (the published code gives NaN).
    """

    scope = "batch"
    config: RKDConfig

    def spot_loss(self, k: int, student: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
        s, t = student.flatten(1), teacher.flatten(1)
        chosen, size = weight.sum().clamp(min=1.0), len(weight)
        both = weight[:, None] * weight[None, :]
        pair = both * (1 - torch.eye(size, dtype=weight.dtype, device=weight.device))
        apart = F.smooth_l1_loss(distances(s, pair), distances(t, pair), reduction="none") * pair
        turned = F.smooth_l1_loss(angles(s), angles(t), reduction="none") * (both[:, :, None] * weight)
        loss = self.config.distance * apart.sum() / (chosen * size)
        return loss + self.config.angle * turned.sum() / (chosen.square() * size)
