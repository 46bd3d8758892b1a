"""The literal published step of `sakd_cli/bench` for more methods, by the losses of `plain_losses.py`."""

import copy
from typing import Any

from plain_losses import PLAIN, smaller
from torch import Tensor, nn
from torch.nn import functional as F

from sakd_cli.bench.literal import PUBLISHED, LiteralRouting
from sakd_cli.models.staged import StagedModel
from sakd_cli.tasks.distill import DistillTask


class FromPlain(nn.Module):
    """A loss of `plain_losses.py` at one spot, with the layers of a copy of our distiller."""

    def __init__(self, method: str, ours: nn.Module, k: int) -> None:
        super().__init__()
        self.method, self.plain, self.ours, self.k = method, PLAIN[method], ours, k

    def forward(self, s: Tensor, t: Tensor, rows: Tensor, contrast: Tensor | None) -> Tensor:
        ((s, t),) = self.plain.before(self.ours, [(s, t)])
        return LOSSES.get(self.method, self.plain.loss)(self.ours, self.k, s[rows], t[rows], rows, rows)


def selectivity(d: Any, k: int, s: Tensor, t: Tensor, labels: Tensor, index: Tensor) -> Tensor:
    """NST's loss by products, which the FLOP counter sees, as it does ours."""
    s, t = (F.normalize(x.flatten(2), dim=2) for x in smaller(s, t))
    return sum(f * ((a @ b.mT) ** 2).mean() for f, a, b in ((1, t, t), (1, s, s), (-2, s, t)))


LOSSES = {"nst": selectivity}


def published(task: DistillTask, method: str) -> LiteralRouting:
    """The published step of a task of the adaptive router; what warms up is frozen as it is."""
    teacher: StagedModel = task.teacher_features.network
    if task.feature_distiller is None or type(task.feature_distiller) in PUBLISHED:
        return LiteralRouting(task, teacher)
    if task.distillers.warmup is not None:
        task.distillers.warmup.requires_grad_(False)
    ours = copy.deepcopy(task.feature_distiller)
    return LiteralRouting(task, teacher, [FromPlain(method, ours, k) for k in range(len(task.spots) - 1)])
