"""What the router is trained for (Song et al., IEEE TIP 2022, router objective)."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from sakd_cli import distributed
from sakd_cli.batch import Batch


class RouterLoss(NamedTuple):
    """What is minimised; without gradient: cross-entropy of the routed network and of the student, flags of 0 or 1."""

    loss: Tensor
    ce: Tensor
    student_ce: Tensor
    raised: Tensor
    lowered: Tensor
    count_active: Tensor


def router_loss(
    routed: Tensor, batch: Batch, student_ce: Tensor, gate: Tensor, *, gamma: float, min_teacher_fraction: float
) -> RouterLoss:
    """c CE(routed) + max(0, fraction N - number of samples with the teacher's logits).

    c = gamma where the routed network is worse than the student alone, 1/gamma where it is better, 1 where equal. The
    comparison carries no gradient; the count is neither scaled by c nor by 1/N. routed [N, classes], gate [N, S].
    Comparison and count are of the whole batch where several processes share it.
    """
    ce = F.cross_entropy(routed, batch.labels)
    routed_ce, alone = distributed.all_reduce_mean(ce, batch), distributed.all_reduce_mean(student_ce, batch)
    raised, lowered = routed_ce > alone, routed_ce < alone
    one = torch.ones_like(ce)
    factor = torch.where(raised, one * gamma, torch.where(lowered, one / gamma, one)).detach()
    missing = min_teacher_fraction * batch.size - distributed.all_reduce_sum_with_grad(gate[:, -1].sum(), batch)
    active = (missing > 0).detach()
    return RouterLoss(
        factor * ce + F.relu(missing), routed_ce, alone, *(flag.to(ce.dtype) for flag in (raised, lowered, active))
    )
