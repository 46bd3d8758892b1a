"""The router contract: WHERE to distil. Somebody's own router overrides `decide`; ours override `forward`."""

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sakd_cli.batch import Batch


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
    """Logits of both networks [N, classes], without gradient and in at least fp32, and labels [N].

    batch  that these are, in training: what says how they stand in the batch of all processes
    """

    teacher: Tensor
    student: Tensor
    labels: Tensor
    batch: Batch | None = None


class Seen(NamedTuple):
    """All that is known of a batch when it is decided where its N samples are distilled: copies, without a gradient.

    teacher, student  pooled vectors [N, C] of both networks; their logits [N, classes] and their cross-entropies [N];
                      `labels` [N] int64; an image without one has label -1 and loss 0
    epoch  counted from 1, a scalar on the device: a captured or compiled step reads it anew
    noise  [N, noise_width] uniform in [0, 1), the same when a run is resumed
    """

    teacher: Tensor
    student: Tensor
    teacher_logits: Tensor
    student_logits: Tensor
    teacher_loss: Tensor
    student_loss: Tensor
    labels: Tensor
    epoch: Tensor
    noise: Tensor


class Router(nn.Module, ABC):
    """Decides per sample and spot whether the student learns there. Subclasses are final."""

    noise_width: int = 0
    """Uniform numbers that the router needs per sample."""
    needs_answers: bool = False
    """Whether `forward` also gets the networks' `Answers`, as a fourth argument."""
    unmixed: str = ""
    """Why images cannot be mixed in pairs; empty: they can."""
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

    decides: bool = False
    """Whether it overrides `decide`."""
    spots: int = 0
    """Number of spots, the logits last, of a router that does."""

    def __init__(self, spots: int = 0) -> None:
        super().__init__()
        if spots:
            self.stand_at(spots)

    def __init_subclass__(cls, **more: Any) -> None:
        super().__init_subclass__(**more)
        if "decide" in vars(cls):
            cls.needs_answers = cls.decides = cls.soft = True  # its gates may be anything
            cls.forward = _decided  # type: ignore[assignment, method-assign]

    def stand_at(self, spots: int) -> None:
        """Let it know how many spots there are, and hold the epoch."""
        self.spots = spots
        self.epoch = nn.Buffer(torch.ones((), dtype=torch.int64), persistent=False)

    def begin_epoch(self, epoch: int) -> None:
        """Called before the first step of each epoch, counted from 1."""
        return

    def decide(self, seen: Seen) -> Tensor | Decision:
        """Weights [spots, N], or [N] for every spot, true or false or between 0 and 1; or a whole decision."""
        raise NotImplementedError

    @abstractmethod
    def forward(self, teacher: Tensor, student: Tensor, noise: Tensor) -> Decision:
        """Pooled vectors [N, C_T] and [N, C_S] without gradient, uniform noise [N, noise_width], to a decision."""


def _decided(router: Router, teacher: Tensor, student: Tensor, noise: Tensor, answers: Answers) -> Decision:
    """`forward` of a router that overrides `decide`."""
    logits = answers.teacher, answers.student
    first, second = (F.cross_entropy(one, answers.labels, reduction="none", ignore_index=-1) for one in logits)
    noise = noise[:, : router.noise_width]
    seen = Seen(teacher, student, *logits, first, second, answers.labels, router.epoch, noise)
    found = router.decide(Seen(*(tensor.clone() for tensor in seen)))  # somebody's code may write into what it gets
    if isinstance(found, Tensor):
        found = found.expand(router.spots, -1) if found.shape == answers.labels.shape else found
        found = Decision(found) if found.shape == (router.spots, len(answers.labels)) else found
    if not isinstance(found, Decision) or not isinstance(found.weight, Tensor) or found.weight.is_complex():
        return found  # type: ignore[return-value]  # whoever asked says what is wrong with it
    weight = found.weight.detach().to(student.dtype)
    weight = torch.where((weight >= 0) & (weight <= 1), weight, torch.nan)  # the step's guard stops there
    return found._replace(weight=weight)
