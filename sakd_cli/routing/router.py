"""The router contract: WHERE to distil."""

from abc import ABC, abstractmethod
from typing import NamedTuple

from torch import Tensor, nn


class Decision(NamedTuple):
    """What a router decides for one batch.

    weight       [S, N] in [0, 1], no gradient: drives the losses; the last row is the logit spot
    gate         [N, S], 1 = teacher, with gradient: drives the multi-path network; None: there is none
    probability  [S, N] teacher-routing probability, no gradient; None for routers without a policy
    """

    weight: Tensor
    gate: Tensor | None = None
    probability: Tensor | None = None


class Answers(NamedTuple):
    """Logits of both networks [N, classes], without gradient and in at least fp32, and labels [N]."""

    teacher: Tensor
    student: Tensor
    labels: Tensor


class Router(nn.Module, ABC):
    """Decides per sample and spot whether the student learns there. Subclasses are final."""

    noise_width: int = 0
    """Uniform numbers that the router needs per sample."""
    needs_answers: bool = False
    """Whether `forward` also gets the networks' `Answers`, as a fourth argument."""
    soft: bool = False
    """Whether gates lie between 0 and 1, so that a sample follows both networks."""
    agreement: bool = False
    """Whether a weight of 1 becomes 0 in the backward pass where a sample's two gradients disagree (`Doses`)."""
    meta: bool = False
    """Whether it learns from what each sample's distillation at each spot does for held-out images, by its gates."""
    rests: bool = False
    """Whether there are epochs in which some spots have weight 0 for every sample."""
    active: tuple[bool, ...] | None = None
    """Spots where a weight may differ from 0 in this epoch, where that is known: elsewhere no loss is computed."""

    def begin_epoch(self, epoch: int) -> None:
        """Called before the first step of each epoch, counted from 1."""
        return

    @abstractmethod
    def forward(self, teacher: Tensor, student: Tensor, noise: Tensor) -> Decision:
        """Pooled vectors [N, C_T] and [N, C_S] without gradient, uniform noise [N, noise_width], to a decision."""
