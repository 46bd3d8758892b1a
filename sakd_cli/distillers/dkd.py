"""Decoupled knowledge distillation."""

from typing import final

import torch
from torch import Tensor
from torch.nn import functional as F

from sakd_cli.batch import Batch
from sakd_cli.config.methods import DKDConfig
from sakd_cli.distillers.distiller import Distiller, weighted_mean
from sakd_cli.models.staged import Features

FAR = 1000.0  # below every other logit by this much, a class has probability exactly 0 in any float


def target_or_not(logits: Tensor, target: Tensor) -> Tensor:
    """Log-probabilities of the target class and of all others together: logits, target (bool) [N, C] to [N, 2]."""
    logs = F.log_softmax(logits, dim=1)
    return torch.stack([torch.where(target, logs, 0.0).sum(dim=1), (logs - FAR * target).logsumexp(dim=1)], dim=1)


def among_others(logits: Tensor, target: Tensor) -> Tensor:
    """Log-probabilities of the classes that are not the target, given that it is none of it: [N, C]."""
    return F.log_softmax(logits - FAR * target, dim=1)


def divergence(log_s: Tensor, log_t: Tensor) -> Tensor:
    """KL(t || s) of each row, [N]."""
    return (log_t.exp() * (log_t - log_s)).sum(dim=1)


@final
class DKD(Distiller):
    """Target against the rest, and the rest among themselves, match the teacher's, each with a weight of its own.

    loss = T^2 mean_i (a KL(b(t) || b(s)) + c KL(o(t) || o(s))),  probabilities softened by T
    b = (target, all others together);  o = softmax over the others only;  a = 1, c = 8, T = 4

    Zhao et al., "Decoupled Knowledge Distillation", CVPR 2022, equation 7. No warm-up factor min(epoch / 20, 1), which
    the authors' code has. It replaces KD at the logit spot.
    """

    config: DKDConfig

    def forward(self, student: Features, teacher: Features, weight: Tensor, batch: Batch) -> Tensor:
        s, t = student.logits / self.config.temperature, teacher.logits.detach() / self.config.temperature
        target = batch.labels[:, None] == torch.arange(s.shape[1], device=s.device)
        binary = divergence(target_or_not(s, target), target_or_not(t, target))
        others = divergence(among_others(s, target), among_others(t, target))
        per_sample = self.config.temperature**2 * (self.config.target * binary + self.config.others * others)
        return weighted_mean(per_sample, weight[0])[None]
