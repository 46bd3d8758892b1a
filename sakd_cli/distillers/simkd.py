"""Reused teacher classifier."""

from typing import final

from torch import Tensor

from sakd_cli.config.methods import SimKDConfig
from sakd_cli.config.networks import reusing
from sakd_cli.distillers.distiller import SpotwiseDistiller, pooled_to_smaller, weighted_mean
from sakd_cli.models import reused
from sakd_cli.models.staged import StagedModel


def reuse(config: SimKDConfig, student: StagedModel, teacher: StagedModel) -> StagedModel:
    """The network that learns: the student's stages, a projector, the teacher's pooling and head (`models.reused`)."""
    name = reusing(student.name, teacher.name, config.factor).name
    made = reused.build(name, teacher.num_classes, student=student, teacher=teacher, factor=config.factor)
    return made.to(next(student.parameters()).device)


@final
class SimKD(SpotwiseDistiller):
    """A projection of the student's last map matches the teacher's, and the teacher's own pooling and head classify it.

    loss = mean over samples, channels and positions of (P(s) - t)^2,  P = the network's last stage of maps

    Chen, Mei, Zhang, Wang, Feng, Chen, "Knowledge Distillation with the Reused Teacher Classifier", CVPR 2022, section
    3. The network delivered is not the plain student: it is named simkd2-STUDENT-TEACHER and ends in the projector and
    in copies of the teacher's pooling and head, which are never trained. Maps [N, C, H, W] of two sizes are pooled to
    the smaller, the student's in front of the projector. Defaults are those of the authors' script: this loss with
    factor 1, neither cross-entropy nor softened logits, factor 2 of the projector.

    Where the teacher's map is signed the projector has no last ReLU, which could not reach it; "pooling" is all that
    the teacher has behind its last map, such as MobileNetV2's last convolution (the authors reuse the last linear layer
    only, of teachers without such). Under a router the weight of a sample counts at the map and, with
    `--set method.kl_weight=1`, at the logits. The cross-entropy that a learned router is compared with is that of the
    delivered network. `never` leaves only the cross-entropy, and so needs `--set method.ce_weight=1`.
    """

    def spot_loss(self, k: int, student: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
        s, t = pooled_to_smaller(student, teacher)
        return weighted_mean((s - t).square().flatten(1).mean(dim=1), weight)
