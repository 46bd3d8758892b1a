"""The multi-path network: both networks run stage by stage, and each sample changes over where its gate says so."""

from collections.abc import Callable, Sequence
from typing import final

import torch
from torch import Tensor, nn

from sakd_cli.models.adapters import adapter
from sakd_cli.models.spot import Spot
from sakd_cli.models.staged import Features

Run = Callable[[Tensor, int, int], Tensor]


@final
class Graft(nn.Module):
    """Routed logits o from images and gates a (sakd spec, section 1.3).

    p, q = student's and teacher's activation at spot k
    u_t = (1 - a_k) lift(p) + a_k q,   u_s = (1 - a_k) p + a_k drop(q)
    o   = (1 - a_K) student's logits + a_K teacher's logits

    Same values and router gradients as published, less work (sakd spec, section 7.2): the teacher up to the first spot
    is taken from its plain pass, the student up to there needs no graph, and neither network's weights get a gradient
    here. Adapters are trained, in training mode and on the whole batch. The networks are not submodules: they belong to
    others and are given as functions `run(x, start, stop)` in evaluation mode without weight gradients.
    """

    def __init__(self, spots: Sequence[Spot], run_student: Run, run_teacher: Run) -> None:
        super().__init__()
        self.spots = tuple(spots)
        self.run_student = run_student
        self.run_teacher = run_teacher
        self.lifts = nn.ModuleList([adapter(spot.student_shape, spot.teacher_shape) for spot in self.spots[:-1]])
        self.drops = nn.ModuleList([adapter(spot.teacher_shape, spot.student_shape) for spot in self.spots[:-1]])

    def forward(self, images: Tensor, teacher: Features, gate: Tensor) -> Tensor:
        """images [N, 3, H, W], the teacher's plain features, gate [N, S] to routed logits [N, classes]."""
        *features, logits = self.spots
        at_s = at_t = 0
        to_s, to_t = images, images
        for k, (spot, lift, drop) in enumerate(zip(features, self.lifts, self.drops, strict=True)):
            if k == 0:
                with torch.no_grad():
                    p = self.run_student(to_s, 0, spot.student + 1)
                q = teacher.stages[spot.teacher]
            else:
                p = self.run_student(to_s, at_s, spot.student + 1)
                q = self.run_teacher(to_t, at_t, spot.teacher + 1)
            at_s, at_t = spot.student + 1, spot.teacher + 1
            a = gate[:, k].view(-1, *[1] * (p.dim() - 1))
            to_t = (1 - a) * lift(p) + a * q
            to_s = (1 - a) * p + a * drop(q)
        if features:
            ls = self.run_student(to_s, at_s, logits.student + 1)
            lt = self.run_teacher(to_t, at_t, logits.teacher + 1)
        else:
            with torch.no_grad():
                ls, lt = self.run_student(images, 0, logits.student + 1), teacher.logits
        a = gate[:, -1:]
        return (1 - a) * ls + a * lt
