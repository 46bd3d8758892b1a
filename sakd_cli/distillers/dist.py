"""Distillation from a stronger teacher."""

from typing import final

import torch
from torch import Tensor
from torch.nn import functional as F

from sakd_cli.batch import Batch
from sakd_cli.config.methods import DISTConfig
from sakd_cli.distillers.distiller import Distiller, weighted_mean
from sakd_cli.models.staged import Features

EPSILON = 1e-8  # added to the product of lengths


def cosine(a: Tensor, b: Tensor, dim: int) -> Tensor:
    """Inner product over the product of lengths along `dim`."""
    lengths = torch.linalg.vector_norm(a, dim=dim) * torch.linalg.vector_norm(b, dim=dim)
    return (a * b).sum(dim=dim) / (lengths + EPSILON)


@final
class DIST(Distiller):
    """The student's class probabilities correlate with the teacher's, per sample and per class over the batch.

    loss = T^2 (b mean_i (1 - r(q_i., p_i.)) + c mean_k (1 - r(q_.k, p_.k))),  r = Pearson correlation
    p = softmax(t/T), q = softmax(s/T);  b = c = 1, T = 1

    Huang et al., "Knowledge Distillation from A Stronger Teacher", NeurIPS 2022, equations 9 to 11. With a selection
    the correlation per class runs over the chosen samples, times n/N. It replaces KD at the logit spot.
    """

    scope = "batch"
    config: DISTConfig

    def forward(self, student: Features, teacher: Features, weight: Tensor, batch: Batch) -> Tensor:
        q = F.softmax(student.logits / self.config.temperature, dim=1)
        p = F.softmax(teacher.logits.detach() / self.config.temperature, dim=1)
        w, n = weight[0][:, None], weight[0].sum()
        of_sample = cosine(q - q.mean(dim=1, keepdim=True), p - p.mean(dim=1, keepdim=True), 1)
        mean_q, mean_p = ((x * w).sum(dim=0) / n.clamp(min=1.0) for x in (q, p))
        of_class = cosine(w * (q - mean_q), w * (p - mean_p), 0)
        loss = self.config.inter * weighted_mean(1 - of_sample, weight[0])
        loss = loss + self.config.intra * (1 - of_class).mean() * n / len(w)
        return (self.config.temperature**2 * loss)[None]
