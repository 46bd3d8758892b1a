"""Knowledge distillation by singular value decomposition, by LAPACK or by products for which no host waits."""

import math
from itertools import pairwise
from typing import Any, NamedTuple, final

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from sakd_cli.batch import Batch
from sakd_cli.config.methods import KDSVDConfig
from sakd_cli.distillers.distiller import Distiller, require_equal_channels, weighted_mean
from sakd_cli.errors import UsageError
from sakd_cli.models.spot import Spot
from sakd_cli.models.staged import Features

SQUARINGS = 4  # before a power is scaled anew: of 128 equal eigenvalues of length 1 it leaves numbers of 1e-17


class Eigen(NamedTuple):
    """values [N, R], the largest first and none below 0, and vectors [N, n, R] of matrices [N, n, n].

    rest  [N, n, n] the matrices without the part of these vectors; None where there is none
    """

    values: Tensor
    vectors: Tensor
    rest: Tensor | None


def by_lapack(matrix: Tensor, count: int) -> Eigen:
    """All eigenvectors, whatever `count` is. The host waits for them."""
    values, vectors = torch.linalg.eigh(matrix)
    return Eigen(values.flip(1).clamp(min=0), vectors.flip(2), None)


def by_powers(matrix: Tensor, count: int) -> Eigen:
    """The first `count`, or all n if they are fewer. Shapes are fixed and nothing is read back.

    M, squared k times, is the projector on its first eigenvector as soon as 2^k times the relative gap to the second
    eigenvalue is large. We square until the smallest gap that the type can tell counts; then M goes on without it.
    """
    info, values, vectors = torch.finfo(matrix.dtype), [], []
    for _ in range(min(count, matrix.shape[1])):
        power = matrix
        for _ in range(round(-math.log2(info.eps) / SQUARINGS)):
            power = _scaled(power)
            for _ in range(SQUARINGS):
                power = power @ power
        # The projector's columns are all multiples of the vector; that of its largest entry is the longest.
        longest = power.diagonal(dim1=1, dim2=2).argmax(dim=1)[:, None, None]
        v = _scaled(power.gather(2, longest.expand(-1, matrix.shape[1], 1)))
        moved = matrix @ v
        value = v.mT @ moved
        part = moved - value / 2 * v
        matrix = matrix - part @ v.mT - v @ part.mT
        values.append(value[:, 0])
        vectors.append(v)
    return Eigen(torch.cat(values, dim=1).clamp(min=0), torch.cat(vectors, dim=2), matrix)


def _scaled(x: Tensor) -> Tensor:
    """Each matrix by its length; 0 stays 0."""
    length = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True)
    return x / length.clamp(min=torch.finfo(x.dtype).tiny)


class Resolvent(torch.autograd.Function):
    """z [N, n, R], which is 0, with the gradient of (1 - B / l_i)^-1 z_i, B [N, n, n] positive, l [N, R] above it.

    inverse  [N, R] 1 / l; 0 where there is no l
    reach    [N, R] l over the smallest l - b that counts: what B has closer to l is left out
    steps    the largest reach there can be, as a power of 2

    (1 - X)^-1 is the product of 1 + X^(2^k), and the sum of the X^k as far as it is taken, which is to `reach`. So
    much is done in the backward pass alone, and no power is kept for it.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, rest: Tensor, inverse: Tensor, reach: Tensor, steps: int) -> Tensor:
        ctx.save_for_backward(rest, inverse, reach)
        ctx.steps = steps
        return z.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rest, inverse, reach = ctx.saved_tensors
        x, y = rest[:, None] * inverse[:, :, None, None], gradient.mT[..., None]
        for k in range(ctx.steps):
            further = (reach >= 2 ** (k + 1))[:, :, None, None]
            y = torch.where(further, y + x @ y, y)
            x = torch.where(further, x @ x, x)
        y = y - x @ y  # nothing is left of what was too close
        return y[..., 0].mT, None, None, None, None


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
    [N, C, H, W] with equal channels. Stages k-1 and k count for the samples chosen at both: weight min(w_(k-1), w_k).

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
            losses.append(weighted_mean(difference.square().flatten(1).sum(dim=1), torch.minimum(w_before, w)))
        return torch.stack(losses)
