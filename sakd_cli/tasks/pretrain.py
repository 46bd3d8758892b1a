"""Ordinary training with cross-entropy: teachers, and students alone."""

from typing import final

from torch.nn import functional as F

from sakd_cli.batch import Batch
from sakd_cli.engine.runtime import Mode, to_fp32
from sakd_cli.engine.task import ParamGroup, StepOutput, Task
from sakd_cli.models.staged import StagedModel


@final
class PretrainTask(Task):
    """loss = CE(network(x), y)."""

    def __init__(self, network: StagedModel, *, lr: float, weight_decay: float, mode: Mode | None = None) -> None:
        super().__init__()
        self.network = network
        self.lr = lr
        self.weight_decay = weight_decay
        self.mode = mode or Mode()

    def groups(self) -> list[ParamGroup]:
        return [ParamGroup("network", list(self.network.parameters()), self.lr, self.weight_decay)]

    def forward(self, batch: Batch) -> StepOutput:
        with self.mode.networks(batch.images.device):
            logits = to_fp32(self.network(batch.images))
        loss = F.cross_entropy(logits, batch.labels)
        return StepOutput(loss, logits, {"loss": loss.detach()})
