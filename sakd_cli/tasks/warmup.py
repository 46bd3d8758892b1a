"""The stage in front of a distillation: a method's own warm-up, in the one training loop."""

from functools import partial
from typing import final

import torch

from sakd_cli.batch import Batch
from sakd_cli.distillers.distiller import Warmup
from sakd_cli.engine.runtime import Mode, to_fp32
from sakd_cli.engine.task import ParamGroup, StepOutput, Task
from sakd_cli.models.staged import StagedModel


@final
class WarmupTask(Task):
    """loss = sum of the warm-up's terms on the teacher's features and, where it is trained too, the student's."""

    has_unused_parameters = True

    def __init__(
        self,
        network: StagedModel,
        teacher: StagedModel,
        warmup: Warmup,
        *,
        lr: float,
        weight_decay: float,
        mode: Mode | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.warmup = warmup.requires_grad_(True)
        self.student_features = partial(network.features, want=warmup.want)
        self.teacher_features = partial(teacher.features, want=warmup.want)
        self.lr = lr
        self.weight_decay = weight_decay
        self.mode = mode or Mode()

    def groups(self) -> list[ParamGroup]:
        learners = [self.warmup, self.network] if self.warmup.trains_student else [self.warmup]
        # A head that the loss does not reach gets no gradient and must not be decayed either: SGD leaves it out.
        parameters = [parameter for module in learners for parameter in module.parameters()]
        return [ParamGroup("warmup", parameters, self.lr, self.weight_decay)]

    def forward(self, batch: Batch) -> StepOutput:
        with self.mode.networks(batch.images.device):
            with torch.no_grad():
                teacher = self.teacher_features(batch.images).map(to_fp32)
            student = self.student_features(batch.images).map(to_fp32) if self.warmup.trains_student else None
        loss = self.warmup(student, teacher).sum()
        return StepOutput(loss, None, {"loss": loss.detach()})
