"""Similarity-preserving distillation."""

from typing import final

from torch import Tensor
from torch.nn import functional as F

from sakd_cli.distillers.distiller import SpotwiseDistiller


def similarities(x: Tensor, weight: Tensor) -> Tensor:
    """Row-normalised Gram matrix of the batch, [N, N]; rows and columns of samples with weight 0 are 0."""
    flat = x.flatten(1)
    return F.normalize(weight[:, None] * (flat @ flat.T) * weight[None, :], dim=1)


@final
class SP(SpotwiseDistiller):
    """Samples that are alike for the teacher become alike for the student.

    loss = |G(s) - G(t)|_F^2 / n^2,  G(f) = f f^T with each row scaled to length 1

    Tung and Mori, "Similarity-Preserving Knowledge Distillation", ICCV 2019, equation 4. With a selection of n of N
    samples the matrices have those rows and columns only, and the loss is multiplied by n/N: divided by n N.
    """

    scope = "batch"

    def spot_loss(self, k: int, student: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
        difference = similarities(student, weight) - similarities(teacher, weight)
        return difference.square().sum() / (weight.sum().clamp(min=1.0) * len(weight))
