"""Knowledge distillation by softened logits."""

from typing import final

from torch import Tensor
from torch.nn import functional as F

from sakd_cli.batch import Batch
from sakd_cli.config.method import MethodConfig
from sakd_cli.distillers.distiller import Distiller, weighted_mean
from sakd_cli.models.spot import Spot
from sakd_cli.models.staged import Features


def softened_kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 KL(softmax(t/T) || softmax(s/T)) per sample: logits [N, C] each, result [N]."""
    log_s = F.log_softmax(student / temperature, dim=1)
    log_t = F.log_softmax(teacher / temperature, dim=1)
    return temperature**2 * (log_t.exp() * (log_t - log_s)).sum(dim=1)


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
