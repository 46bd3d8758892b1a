"""Losses of the logits: softened probabilities, and what takes their place."""

from typing import final

import torch
from torch import Tensor
from torch.nn import functional as F

from sakd_cli.batch import Batch
from sakd_cli.config.method import MethodConfig
from sakd_cli.config.methods import DISTConfig, DKDConfig, LSConfig
from sakd_cli.distillers.distiller import Distiller, weighted_mean
from sakd_cli.models.spot import Spot
from sakd_cli.models.staged import Features


def softened_kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 KL(softmax(t/T) || softmax(s/T)) per sample: logits [N, C] each, result [N]."""
    log_s = F.log_softmax(student / temperature, dim=1)
    log_t = F.log_softmax(teacher / temperature, dim=1)
    return temperature**2 * divergence(log_s, log_t)


def divergence(log_s: Tensor, log_t: Tensor) -> Tensor:
    """KL(t || s) of each row, [N]."""
    return (log_t.exp() * (log_t - log_s)).sum(dim=1)


@final
class KD(Distiller):
    """The student's softened class probabilities match the teacher's.

    loss = T^2 mean_i sum_c p_ic ln(p_ic / q_ic),  p = softmax(t/T), q = softmax(s/T)

    Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", arXiv 1503.02531, section 2. The weight of
    the cross-entropy stays 1 (the CRD benchmark uses 0.1 / 0.9). `hard`: the cross-entropy with the class of the
    teacher's largest logit in place of it: Touvron et al., "Training data-efficient image transformers" (DeiT), ICML
    2021, equation 3, on the same head.
    """

    config: MethodConfig

    def __init__(self, spots: tuple[Spot, ...], config: MethodConfig) -> None:
        super().__init__(spots, config)
        self.hard: bool = getattr(config, "hard", False)  # other methods, too, have its logit loss

    def forward(self, student: Features, teacher: Features, weight: Tensor, batch: Batch) -> Tensor:
        if self.hard:
            answer = teacher.logits.argmax(dim=1)
            return weighted_mean(F.cross_entropy(student.logits, answer, reduction="none"), weight[0])[None]
        per_sample = softened_kl(student.logits, teacher.logits.detach(), self.config.temperature)
        return weighted_mean(per_sample, weight[0])[None]


FAR = 1000.0  # below every other logit by this much, a class has probability exactly 0 in any float


def target_or_not(logits: Tensor, target: Tensor) -> Tensor:
    """Log-probabilities of the target class and of all others together: logits, target (bool) [N, C] to [N, 2]."""
    logs = F.log_softmax(logits, dim=1)
    return torch.stack([torch.where(target, logs, 0.0).sum(dim=1), (logs - FAR * target).logsumexp(dim=1)], dim=1)


def among_others(logits: Tensor, target: Tensor) -> Tensor:
    """Log-probabilities of the classes that are not the target, given that it is none of it: [N, C]."""
    return F.log_softmax(logits - FAR * target, dim=1)


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


COSINE_EPSILON = 1e-8  # added to the product of lengths


def cosine(a: Tensor, b: Tensor, dim: int) -> Tensor:
    lengths = torch.linalg.vector_norm(a, dim=dim) * torch.linalg.vector_norm(b, dim=dim)
    return (a * b).sum(dim=dim) / (lengths + COSINE_EPSILON)


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
        # Of a mean only: their largest is 1, or the epsilon would count where all are small.
        w = (weight[0] / weight[0].amax().clamp(min=COSINE_EPSILON))[:, None]
        of_sample = cosine(q - q.mean(dim=1, keepdim=True), p - p.mean(dim=1, keepdim=True), 1)
        mean_q, mean_p = ((x * w).sum(dim=0) / w.sum().clamp(min=1.0) for x in (q, p))
        of_class = cosine(w.sqrt() * (q - mean_q), w.sqrt() * (p - mean_p), 0)
        loss = self.config.inter * weighted_mean(1 - of_sample, weight[0])
        loss = loss + self.config.intra * (1 - of_class).mean() * weight[0].mean()
        return (self.config.temperature**2 * loss)[None]


DEVIATION_EPSILON = 1e-7  # added to the standard deviation


def standardised(logits: Tensor) -> Tensor:
    """Each sample's logits with mean 0 and standard deviation 1 (over C - 1), [N, C]."""
    return (logits - logits.mean(dim=1, keepdim=True)) / (logits.std(dim=1, keepdim=True) + DEVIATION_EPSILON)


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
