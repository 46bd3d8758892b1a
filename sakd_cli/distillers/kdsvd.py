"""Knowledge distillation by singular value decomposition."""

import math
from itertools import pairwise
from typing import final

import torch
from torch import Tensor
from torch.nn import functional as F

from sakd_cli.batch import Batch
from sakd_cli.config.methods import KDSVDConfig
from sakd_cli.distillers.distiller import Distiller, require_equal_channels, weighted_mean
from sakd_cli.distillers.eigen import Resolvent, by_lapack, by_powers
from sakd_cli.errors import UsageError
from sakd_cli.models.spot import Spot
from sakd_cli.models.staged import Features

WIDTH = 8  # of the radial basis, as published


def main_directions(x: Tensor, count: int, *, lapack: bool = False) -> tuple[Tensor, Tensor]:
    """The first right singular vectors of (positions x channels), and singular values.

    [N, C, H, W] to [N, C, R] and [N, R], R = min(count, C, H W). The vectors have a gradient, the values have none. A
    vector whose singular value is 0 (to rounding) is 0. With `lapack` the host waits for the device.

    The gradient is dv_i = sum over j != i of v_j (v_j^T dM v_i) / (l_i - l_j), M = A^T A with eigenvalues l, where a
    pair with l_i = l_j (to rounding) is left out: there it does not exist. PyTorch's own divides 0 by 0 as soon as
    two singular values are 0, as they are in every map with dead channels, though it needs no such pair.
    """
    a = x.flatten(2).transpose(1, 2)
    with torch.no_grad():
        # Of the smaller of A^T A and A A^T: faster than a singular value decomposition, and equal to rounding.
        tall, rounding = a.shape[1] >= a.shape[2], torch.finfo(x.dtype).eps * max(a.shape[1:])
        squares, vectors, rest = (by_lapack if lapack else by_powers)(a.mT @ a if tall else a @ a.mT, count)
        own, floor = squares[:, None, :count], squares[:, :1, None] * rounding
        v = vectors if tall else a.mT @ vectors * _inverse(squares[:, None], floor).sqrt()
        first = v[..., :count] * (own > floor)
    if not x.requires_grad:
        return first, own[:, 0].sqrt()
    turned = a.mT @ (a @ first)
    turned = turned - turned.detach()  # 0, with the gradient of M v
    among = v.mT @ turned
    left, to_null = turned - v @ among, _inverse(own, floor)
    if rest is not None:  # of the other vectors
        reach = own[:, 0] * _inverse(floor[:, 0], torch.zeros_like(floor[:, 0]))
        given = rest, to_null[:, 0], reach, int(-math.log2(rounding))
        if tall:
            left = Resolvent.apply(left, *given)
        else:  # (l - A^T A)^-1 = (1 + A^T (l - A A^T)^-1 A) / l
            left = left + a.detach().mT @ (Resolvent.apply(a.detach() @ left, *given) * to_null)
    among = among * _inverse(own - squares[:, :, None], floor)
    return first + v @ among + left * to_null, own[:, 0].sqrt()


def _inverse(gap: Tensor, floor: Tensor) -> Tensor:
    """1 / gap; 0 where it is not above its floor."""
    there = gap.abs() > floor
    return torch.where(there, 1 / torch.where(there, gap, torch.ones_like(gap)), torch.zeros_like(gap))


def oriented(v: Tensor) -> Tensor:
    """Each vector with the sign that makes its largest entry positive: [N, C, R]."""
    largest = v.gather(1, v.abs().argmax(dim=1, keepdim=True))
    return torch.where(largest < 0, -v, v)


def matched(student: Tensor, teacher: Tensor) -> Tensor:
    """For each of the teacher's vectors [N, C, K] that of the student's [N, C, R] of largest |cosine|, turned to it."""
    cosines = teacher.mT @ student.detach()
    best = cosines.abs().argmax(dim=2)
    found = student.gather(2, best[:, None, :].expand_as(teacher))
    return torch.where(cosines.gather(2, best[:, :, None]).mT < 0, -found, found)


def table(before: Tensor, after: Tensor) -> Tensor:
    """Radial basis of all differences of entries of two stages' vectors: [N, A, K] and [N, B, K] to [N, A, B, K]."""
    return torch.exp(-(before[:, :, None] - after[:, None, :]).square() / WIDTH)


@final
class KDSVD(Distiller):
    """The main directions of the map change from stage to stage as the teacher's do.

    loss_k = mean over samples of the sum of (T(s_k-1, s_k) - T(t_k-1, t_k))^2,  k = 1 .. K-1;  loss_0 = 0
    T(f, g)_ijr = exp(-(u_ir(f) - u_jr(g))^2 / 8),  u = singular vectors over channels times the teacher's singular
    values, these scaled to length 1

    Lee, Kim, Song, "Self-supervised Knowledge Distillation using Singular Value Decomposition", ECCV 2018, section 3,
    as the CRD benchmark has it: 1 vector of the teacher, of the student's first 4 the one of largest |cosine|. Maps
    [N, C, H, W] with equal channels. Stages k-1 and k count for the samples chosen at both: weight w_(k-1) w_k.

    A singular vector has no sign of its own, and the loss depends on that of a stage against the next. We make the
    largest entry positive (behind a ReLU the first vector is all of one sign, so this is the natural choice; of a
    signed map it jumps where two entries tie). Public code takes what its library returns, so figures differ from it
    and between machines. Where singular values coincide the vectors are arbitrary within their space: the value then
    depends on the library, and those parts of the gradient are left out. With `runtime.shapes: dynamic` (a CPU's
    default) LAPACK finds the vectors; with static shapes products of matrices do, and no host waits for them.
    """

    def __init__(self, spots: tuple[Spot, ...], config: KDSVDConfig) -> None:
        super().__init__(spots)
        self.count, self.extra = config.directions, config.extra
        if len(spots) < 2:
            raise UsageError("method kdsvd: relates each stage to the next, and here is one stage only")
        require_equal_channels("kdsvd", spots)

    def forward(self, student: Features, teacher: Features, weight: Tensor, batch: Batch) -> Tensor:
        ours, theirs = [], []
        for s, t in self.pairs(student, teacher):
            v_t, values = main_directions(t, self.count, lapack=self.dynamic_shapes)
            v_t, scale = oriented(v_t), F.normalize(values, dim=1)[:, None]
            v_s, _ = main_directions(s, self.count + self.extra, lapack=self.dynamic_shapes)
            ours.append(matched(v_s, v_t) * scale)
            theirs.append(v_t * scale)
        losses = [torch.zeros_like(weight[0, 0])]
        changes = zip(pairwise(ours), pairwise(theirs), pairwise(weight), strict=True)
        for our_two, their_two, (w_before, w) in changes:
            difference = table(*our_two) - table(*their_two)
            losses.append(weighted_mean(difference.square().flatten(1).sum(dim=1), w_before * w))
        return torch.stack(losses)
