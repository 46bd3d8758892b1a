"""Flow of solution procedure."""

from itertools import pairwise
from typing import final

import torch
from torch import Tensor

from sakd_cli.config.methods import FSPConfig
from sakd_cli.distillers.distiller import Warmup, pooled_to_smaller, require_equal_channels
from sakd_cli.models.spot import Spot
from sakd_cli.models.staged import Features


def flow(first: Tensor, second: Tensor) -> Tensor:
    """Inner products of the channels of two maps, mean over positions: [N, A, ..] and [N, B, ..] to [N, A, B]."""
    first, second = (x.flatten(2) for x in pooled_to_smaller(first, second))
    return torch.bmm(first, second.transpose(1, 2)) / first.shape[2]


@final
class FSP(Warmup):
    """The flow from each stage to the next, before the distillation proper, is the teacher's.

    loss_k = mean over samples and pairs of channels of (G_k(s) - G_k(t))^2,  G_k = f_k f_(k+1)^T / positions

    Yim, Joo, Bae, Kim, "A Gift from Knowledge Distillation", CVPR 2017, equations 1 and 2 with equal weights. Spots
    from the stem to the last map; the larger of two maps is pooled to the smaller. Both networks need equal channels.
    """

    def __init__(self, spots: tuple[Spot, ...], config: FSPConfig) -> None:
        super().__init__(spots, trains_student=True)
        require_equal_channels("fsp", spots)

    def forward(self, student: Features | None, teacher: Features) -> Tensor:
        assert student is not None
        ours = [student.stages[spot.student] for spot in self.spots]
        theirs = [teacher.stages[spot.teacher].detach() for spot in self.spots]
        flows = zip(pairwise(ours), pairwise(theirs), strict=True)
        return torch.stack([(flow(*s) - flow(*t)).square().mean() for s, t in flows])
