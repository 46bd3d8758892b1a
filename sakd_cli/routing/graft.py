"""The multi-path network, in which each sample changes over where its gate says so, and the loss of its router."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sakd_cli import distributed
from sakd_cli.batch import Batch
from sakd_cli.models.adapters import adapter
from sakd_cli.models.spot import Spot
from sakd_cli.models.staged import Features

Run = Callable[[Tensor, int, int], Tensor]
Terms = tuple[Tensor, dict[str, Tensor]]  # a loss, and what is told of it by name


def mix(gate: Tensor, student: Tensor, teacher: Tensor) -> Tensor:
    """(1 - a) student + a teacher, per sample: gate [N], the others [N, ...]; exact where a is 0 or 1."""
    a = gate.to(student.dtype).view(-1, *[1] * (student.dim() - 1))
    return torch.lerp(student, teacher.to(student.dtype), a)


def split_by_path(gate: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows by path, from gates [N, S] of 0 and 1; the host reads how many there are.

    Those with the teacher's logits; of the others, those with the student at some spot, and all that followed
    the teacher up to the last.
    """
    teachers, followed = gate[:, -1] > 0, gate[:, :-1].amin(dim=1) > 0
    students, followers = ~teachers & ~followed, ~teachers & followed
    return teachers.nonzero()[:, 0], students.nonzero()[:, 0], followers.nonzero()[:, 0]


class Graft(nn.Module):
    """Routed logits o from images and gates a (Song et al., IEEE TIP 2022, multi-path routing network).

    p, q = student's and teacher's activation at spot k
    u_t = (1 - a_k) to_teacher(p) + a_k q,   u_s = (1 - a_k) p + a_k to_student(q)
    Of networks with tokens p and q are the whole value, class token and all; the adapters see and give its map only
    (`Layout`), so that a sample that stays in its network stays exact.
    o   = (1 - a_K) student's logits + a_K teacher's logits

    Same values and router gradients as published, less work: the teacher up to the first spot
    is taken from its plain pass, the student up to there needs no graph, and neither network's weights get a gradient
    here. Adapters are trained, in training mode and on the whole batch. The networks are not submodules: they belong to
    others and are given as functions `run(x, start, stop)` in evaluation mode without weight gradients.

    dynamic_shapes  behind the last feature spot either network is differentiated for those samples alone whose logits
            are its own, and the teacher is not run for others that followed it so far: their logits are its plain ones.
            Exact, since what is left out would be multiplied by 0. The shapes depend on the gates, which the host must
            read: good on a CPU, bad on a GPU and for a compiler.
    """

    def __init__(
        self, spots: Sequence[Spot], run_student: Run, run_teacher: Run, *, dynamic_shapes: bool = False
    ) -> None:
        super().__init__()
        self.spots = tuple(spots)
        self.run_student = run_student
        self.run_teacher = run_teacher
        self.dynamic_shapes = dynamic_shapes
        self.to_teacher = nn.ModuleList([adapter(spot.student_shape, spot.teacher_shape) for spot in self.spots[:-1]])
        self.to_student = nn.ModuleList([adapter(spot.teacher_shape, spot.student_shape) for spot in self.spots[:-1]])

    def forward(self, images: Tensor, teacher: Features, gate: Tensor) -> Tensor:
        """images [N, 3, H, W], the teacher's plain features, gate [N, S] to routed logits [N, classes]."""
        *gates, last = gate.unbind(dim=1)  # one launch backward for all of them
        if not self.to_teacher:
            with torch.no_grad():
                alone = self.run_student(images, 0, self.spots[-1].student + 1)
            return mix(last, alone, teacher.logits)
        to_s, to_t = self._to_last_part(images, (teacher.raw or teacher.stages)[self.spots[0].teacher], gates)
        if not self.dynamic_shapes:
            return mix(last, self._student_end(to_s), self._teacher_end(to_t))
        teachers, students, followers = split_by_path(gate.detach())
        ls, lt = self._student_end(to_s[torch.cat([students, followers])]), self._teacher_end(to_t[teachers])
        with torch.no_grad():
            ls_of_teachers, lt_of_students = self._student_end(to_s[teachers]), self._teacher_end(to_t[students])
        lt = torch.cat([lt, lt_of_students, teacher.logits[followers].to(lt.dtype)])
        order = torch.cat([teachers, students, followers])
        routed = mix(last[order], torch.cat([ls_of_teachers, ls]), lt)
        return torch.empty_like(routed).index_copy(0, order, routed)

    def _to_last_part(self, images: Tensor, q: Tensor, gates: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """What the last parts of student and teacher get; q: the teacher's plain activation at the first spot."""
        to_s = to_t = images
        at_s = at_t = 0
        for k, (spot, up, down) in enumerate(zip(self.spots[:-1], self.to_teacher, self.to_student, strict=True)):
            if k == 0:
                with torch.no_grad():
                    p = self.run_student(to_s, 0, spot.student + 1)
            else:
                p = self.run_student(to_s, at_s, spot.student + 1)
                q = self.run_teacher(to_t, at_t, spot.teacher + 1)
            at_s, at_t = spot.student + 1, spot.teacher + 1
            ours, theirs = spot.student_layout, spot.teacher_layout
            lifted = theirs.from_map(up(ours.to_map(p, spot.student_shape)))
            dropped = ours.from_map(down(theirs.to_map(q, spot.teacher_shape)))
            to_t, to_s = mix(gates[k], lifted, q), mix(gates[k], p, dropped)
        return to_s, to_t

    def _student_end(self, x: Tensor) -> Tensor:
        return self._end(self.run_student, x, self.spots[-2].student, self.spots[-1].student)

    def _teacher_end(self, x: Tensor) -> Tensor:
        return self._end(self.run_teacher, x, self.spots[-2].teacher, self.spots[-1].teacher)

    def _end(self, run: Run, x: Tensor, start: int, stop: int) -> Tensor:
        """Logits of what stage `start` gave. Without samples no network is run, but the gradient is 0, not none."""
        if len(x):
            return run(x, start + 1, stop + 1)
        (classes,) = self.spots[-1].student_shape
        return x.flatten(1).sum(dim=1, keepdim=True).expand(0, classes)


def router_loss(
    routed: Tensor,
    batch: Batch,
    student_ce: Tensor,
    gate: Tensor,
    *,
    gamma: float,
    min_teacher_fraction: float,
    criterion: Callable[[Tensor, Batch], Tensor],
) -> Terms:
    """c CE(routed) + max(0, fraction N - number of samples with the teacher's logits) (Song et al., IEEE TIP 2022).

    c = gamma where the routed network is worse than the student alone, 1/gamma where it is better, 1 where equal. The
    comparison carries no gradient; the count is neither scaled by c nor by 1/N. routed [N, classes], gate [N, S].
    Comparison and count are of the whole batch where several processes share it. CE is `criterion`, as the student's.
    Beside it what happened, without gradient: flags of 0 or 1, cross-entropies of the routed network and the student.
    """
    ce = criterion(routed, batch)
    routed_ce, alone = distributed.all_reduce_mean(ce, batch), distributed.all_reduce_mean(student_ce, batch)
    raised, lowered = routed_ce > alone, routed_ce < alone
    one = torch.ones_like(ce)
    factor = torch.where(raised, one * gamma, torch.where(lowered, one / gamma, one)).detach()
    missing = min_teacher_fraction * batch.size - distributed.all_reduce_sum_with_grad(gate[:, -1].sum(), batch)
    active = (missing > 0).detach()
    penalty = F.relu(missing) if batch.part == 1 else F.relu(missing) / batch.part  # no mean: parts add up to it
    flags = {"router_loss_scaled_up": raised, "router_loss_scaled_down": lowered, "count_penalty_active": active}
    events = {name: flag.to(ce.dtype) for name, flag in flags.items()}
    return factor * ce + penalty, events | {"routed_ce": routed_ce, "student_ce": alone}
