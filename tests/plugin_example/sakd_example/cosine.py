"""Direction of the pooled vectors."""

from typing import final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sakd_cli.api import Batch, Distiller, Features, Spot
from sakd_cli.distillers.table import DistillerRow, pooled
from sakd_example.settings import CosineConfig


@final
class Cosine(Distiller):
    """Matches the direction of the teacher's pooled vector by a linear map of the student's: 1 - cos, per sample."""

    def __init__(self, spots: tuple[Spot, ...], config: CosineConfig) -> None:
        super().__init__(spots)
        self.adapters = nn.ModuleList([nn.Linear(s.student_shape[0], s.teacher_shape[0]) for s in spots])

    def forward(self, student: Features, teacher: Features, weight: Tensor, batch: Batch) -> Tensor:
        losses = [
            (w * (1 - F.cosine_similarity(adapter(ours), theirs))).mean()
            for adapter, (ours, theirs), w in zip(self.adapters, self.pairs(student, teacher), weight, strict=True)
        ]
        return torch.stack(losses)


COSINE = DistillerRow(Cosine, pooled)
