"""Gumbel-Softmax with the exact straight-through estimator (sakd spec, section 1.2)."""

import torch
from torch import Tensor

EPSILON = 1e-20  # keeps both logarithms finite for u = 0 and u = 1


def gumbel(uniform: Tensor) -> Tensor:
    """Standard Gumbel noise from numbers uniform in [0, 1), same shape."""
    return -torch.log(-torch.log(uniform + EPSILON) + EPSILON)


def straight_through(scores: Tensor, uniform: Tensor, tau: float) -> Tensor:
    """Draw teacher (1) or student (0): scores and noise [N, S, 2], teacher's score first, to gates [N, S].

    Forward exactly 0 or 1, and 1 with probability sigmoid(teacher - student) whatever tau is; backward the gradient of
    softmax((scores + noise) / tau). Jang et al., ICLR 2017; the published code computes (hard - y) + y, which can be
    off by one rounding unit, ours is hard + (y - y).
    """
    noisy = scores + gumbel(uniform)
    soft = torch.softmax(noisy / tau, dim=-1)[..., 0]
    hard = (noisy[..., 0] >= noisy[..., 1]).to(soft.dtype)  # a tie goes to the teacher, as argmax would have it
    return hard + (soft - soft.detach())
