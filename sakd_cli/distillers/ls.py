"""Logit standardisation."""

from typing import final

from torch import Tensor

from sakd_cli.batch import Batch
from sakd_cli.config.methods import LSConfig
from sakd_cli.distillers.distiller import Distiller, weighted_mean
from sakd_cli.distillers.kd import softened_kl
from sakd_cli.models.staged import Features

EPSILON = 1e-7  # added to the standard deviation


def standardised(logits: Tensor) -> Tensor:
    """Each sample's logits with mean 0 and standard deviation 1 (over C - 1), [N, C]."""
    return (logits - logits.mean(dim=1, keepdim=True)) / (logits.std(dim=1, keepdim=True) + EPSILON)


@final
class LS(Distiller):
    """The student's softened class probabilities match the teacher's whatever the scale and offset of the logits.

    loss = T^2 mean_i KL(softmax(Z(t)/T) || softmax(Z(s)/T)),  Z(x) = (x - mean(x)) / std(x)

    Sun et al., "Logit Standardization in Knowledge Distillation", CVPR 2024, equations 10 and 11. The weight of the
    cross-entropy stays 1 (0.1 there, beside 9 for this loss).
    """

    config: LSConfig

    def forward(self, student: Features, teacher: Features, weight: Tensor, batch: Batch) -> Tensor:
        s, t = standardised(student.logits), standardised(teacher.logits.detach())
        return weighted_mean(softened_kl(s, t, self.config.temperature), weight[0])[None]
