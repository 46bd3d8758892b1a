"""Probabilistic knowledge transfer."""

from typing import final

import torch
from torch import Tensor

from sakd_cli.distillers.distiller import SpotwiseDistiller

EPSILON = 1e-7  # added to lengths and probabilities, as published


def neighbours(x: Tensor, weight: Tensor) -> Tensor:
    """Probability of each sample to be a neighbour of another: [N, D] to [N, N], rows sum to 1.

    Columns of samples with weight 0 are 0.
    """
    unit = x / (torch.linalg.vector_norm(x, dim=1, keepdim=True) + EPSILON)
    near = (unit @ unit.T + 1) / 2 * weight[None, :]
    total = near.sum(dim=1, keepdim=True)
    return near / torch.where(total > 0, total, torch.ones_like(total))


@final
class PKT(SpotwiseDistiller):
    """The probabilities that samples of a batch are neighbours are the same for student and teacher.

    loss = mean_ij p_ij(t) ln((p_ij(t) + e) / (p_ij(s) + e)),  p_ij = (cos_ij + 1) / sum_j (cos_ij + 1),  e = 1e-7

    Passalis and Tefas, "Learning Deep Representations with Probabilistic Knowledge Transfer", ECCV 2018, equations 4 to
    6 with the cosine kernel. The mean runs over all n^2 pairs. With a selection of n of N samples only chosen columns
    and rows count, and the loss is multiplied by n/N: divided by n N.
    """

    scope = "batch"

    def spot_loss(self, k: int, student: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
        p_s, p_t = (neighbours(x.flatten(1), weight) for x in (student, teacher))
        terms = p_t * ((p_t + EPSILON) / (p_s + EPSILON)).log()
        return (terms * weight[:, None]).sum() / (weight.sum().clamp(min=1.0) * len(weight))
