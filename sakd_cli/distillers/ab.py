"""Activation boundaries."""

from typing import final

import torch
from torch import Tensor, nn

from sakd_cli.config.methods import ABConfig
from sakd_cli.distillers.distiller import Warmup
from sakd_cli.models.adapters import ConvAdapter
from sakd_cli.models.spot import Spot
from sakd_cli.models.staged import Features

SCALE = 3 / 1000  # of the sum over all elements of a sample, as in the CRD benchmark


@final
class AB(Warmup):
    """The student's neurons, before the distillation proper, are on and off where the teacher's are.

    loss_k = 0.003 2^(k-K+1) mean over samples of the sum over elements of
             (s + m)^2 where s > -m and t <= 0,  (s - m)^2 where s <= m and t > 0;  k = 0 .. K-1, m = 1

    Heo, Lee, Yun, Choi, "Knowledge Transfer via Distillation of Activation Boundaries Formed by Hidden Neurons", AAAI
    2019, equation 4. On maps in front of their activation. The student's passes a connector: the routing adapter
    without ReLU, or nothing where the shapes agree.
    """

    def __init__(self, spots: tuple[Spot, ...], config: ABConfig) -> None:
        super().__init__(spots, trains_student=True, want="preactivations")
        self.margin = config.margin
        shapes = [(spot.student_shape, spot.teacher_shape) for spot in spots]
        self.connectors = nn.ModuleList(
            [nn.Identity() if ours == theirs else ConvAdapter(ours, theirs, relu=False) for ours, theirs in shapes]
        )

    def forward(self, student: Features | None, teacher: Features) -> Tensor:
        assert student is not None
        losses = []
        for k, (spot, connector) in enumerate(zip(self.spots, self.connectors, strict=True)):
            s, t = connector(student.preactivations[spot.student]), teacher.preactivations[spot.teacher].detach()
            too_high = (s + self.margin).square() * ((s > -self.margin) & (t <= 0))
            too_low = (s - self.margin).square() * ((s <= self.margin) & (t > 0))
            depth = 2.0 ** (k - len(self.spots) + 1)
            losses.append(SCALE * depth * (too_high + too_low).sum() / len(s))
        return torch.stack(losses)
