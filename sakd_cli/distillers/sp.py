"""Similarity-preserving distillation."""

from typing import final

import torch
from torch import Tensor
from torch.nn import functional as F

from sakd_cli.batch import Batch
from sakd_cli.config.methods import SPConfig
from sakd_cli.distillers.distiller import Distiller
from sakd_cli.models.spot import Spot
from sakd_cli.models.staged import Features


def similarities(x: Tensor, weight: Tensor) -> Tensor:
    """Row-normalised Gram matrix of the batch, [N, N]; rows and columns of samples with weight 0 are 0."""
    flat = x.flatten(1)
    return F.normalize(weight[:, None] * (flat @ flat.T) * weight[None, :], dim=1)


@final
class SP(Distiller):
    """Samples that are alike for the teacher become alike for the student.

    loss = |G(s) - G(t)|_F^2 / n^2,  G(f) = f f^T with each row scaled to length 1

    Tung and Mori, "Similarity-Preserving Knowledge Distillation", ICCV 2019, equation 4. With a selection of n of N
    samples the matrices have those rows and columns only, and the loss is multiplied by n/N: divided by n N.
    """

    scope = "batch"

    def __init__(self, spots: tuple[Spot, ...], config: SPConfig) -> None:
        super().__init__(spots)

    def forward(self, student: Features, teacher: Features, weight: Tensor, batch: Batch) -> Tensor:
        losses = []
        for (s, t), w in zip(self.pairs(student, teacher), weight, strict=True):
            difference = similarities(s, w) - similarities(t, w)
            chosen = w.sum().clamp(min=1.0)
            losses.append(difference.square().sum() / (chosen * len(w)))
        return torch.stack(losses)
