"""Eigenvectors of positive semidefinite matrices: by LAPACK, or by products of matrices for which no host waits."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

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
