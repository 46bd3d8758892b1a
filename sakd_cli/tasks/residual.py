"""A residual student learns what the sum of earlier students lacks: residual-guided distillation (ResKD).

Li, Li, Omar, Wu, Li, "ResKD: Residual-Guided Knowledge Distillation", IEEE TIP 30, 2021. The paper's recipe is not
public; in ours logits are summed and earlier members are frozen.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, Unpack, final

import torch
from torch import Tensor

from sakd_cli.batch import Batch
from sakd_cli.config.training import ResidualConfig
from sakd_cli.distillers.logits import softened_kl
from sakd_cli.engine.runtime import to_fp32
from sakd_cli.engine.task import StepOutput
from sakd_cli.models.staged import StagedModel
from sakd_cli.tasks.pretrain import Recipe, SingleRateTask

Logits = Callable[[Tensor], Tensor]


def centred(logits: Tensor) -> Tensor:
    """Logits [..., K] less their mean over the classes, which softmax does not see."""
    return logits - logits.mean(dim=-1, keepdim=True)


def relative_energy(teacher: Tensor, student: Tensor) -> float:
    """Mean square of what the student's centred logits [N, K] lack, as a share of that of the teacher's."""
    theirs = centred(teacher.cpu().double())
    return float((theirs - centred(student.cpu().double())).square().mean() / theirs.square().mean())


class Targets(NamedTuple):
    """Logits [N, K] of the teacher and of the base: all that a step reads of frozen networks."""

    teacher: Tensor
    base: Tensor

    def map(self, change: Callable[[Tensor], Tensor]) -> "Targets":
        return Targets(change(self.teacher), change(self.base))


class Sides(NamedTuple):
    """Logits [N, K]: the teacher's, the base's (without gradient both), the residual student's; logits to their CE."""

    teacher: Tensor
    base: Tensor
    own: Tensor
    ce: Callable[[Tensor], Tensor]


def kl(sides: Sides, settings: ResidualConfig) -> Tensor:
    """(1 - alpha) CE(z, y) + alpha T^2 KL(softmax(t/T) || softmax(z/T)) of the summed logits z."""
    summed = sides.base + sides.own
    missing = softened_kl(summed, sides.teacher, settings.temperature).mean()
    return (1 - settings.alpha) * sides.ce(summed) + settings.alpha * missing


def mse(sides: Sides, settings: ResidualConfig) -> Tensor:
    """Mean square of c(t) - c(z) - c(r), c centred: the residual itself as the target."""
    return (centred(sides.teacher) - centred(sides.base) - centred(sides.own)).square().mean()


LOSSES: dict[str, Callable[[Sides, ResidualConfig], Tensor]] = {"kl": kl, "mse": mse}


@final
class ResidualTask(SingleRateTask):
    """Train one residual student with one of LOSSES. `teacher` and `base` are frozen and in evaluation mode."""

    def __init__(
        self, network: StagedModel, teacher: Logits, base: Logits, settings: ResidualConfig, **recipe: Unpack[Recipe]
    ) -> None:
        super().__init__(network, {"student": [network]}, **recipe)
        self.teacher, self.base, self.settings = teacher, base, settings

    @torch.no_grad()
    def precompute(self, images: Tensor) -> Targets:
        """What a step reads of the frozen networks, for `Batch.precomputed`."""
        with self.mode.networks(images.device):
            return Targets(self.teacher(images), self.base(images))

    def outcome(self, batch: Batch) -> StepOutput:
        known = batch.precomputed
        teacher, base = (known if isinstance(known, Targets) else self.precompute(batch.images)).map(to_fp32)
        with self.mode.networks(batch.images.device):
            own = to_fp32(self.network(batch.images))
        sides = Sides(teacher, base, own, partial(self.criterion, batch=batch))
        loss = LOSSES[self.settings.loss](sides, self.settings)
        return StepOutput(loss, base + sides.own, {"loss": loss.detach()})
