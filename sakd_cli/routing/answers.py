"""Routers that look at what the networks answer: a weight per sample, the same at every spot."""

import math
from abc import ABC, abstractmethod
from typing import final

from torch import Tensor
from torch.nn import functional as F

from sakd_cli.routing.router import Answers, Decision, Router


class AnswerRouter(Router, ABC):
    """Weighs the samples by the logits of both networks and the labels."""

    needs_answers = True

    def __init__(self, spots: int) -> None:
        super().__init__()
        self.spots = spots

    @abstractmethod
    def weigh(self, answers: Answers) -> Tensor:
        """A weight in [0, 1] for every sample, [N], without gradient."""

    def forward(self, teacher: Tensor, student: Tensor, noise: Tensor, answers: Answers | None = None) -> Decision:
        assert answers is not None
        return Decision(self.weigh(answers).to(student.dtype).expand(self.spots, -1))


def of_mean(value: Tensor, cap: float) -> Tensor:
    """value [N] over its mean, clipped at `cap`, over which it is then in [0, 1]; `dose=selected-mean` makes it 1."""
    return (value / value.mean().clamp(min=1e-12)).clamp(max=cap) / cap


@final
class TeacherCorrect(AnswerRouter):
    """1 where the teacher's answer is the label, else 0: the other samples learn from their labels alone.

    Meng, Li, Zhao, Gong, "Conditional Teacher-Student Learning", ICASSP 2019. There the other samples' cross-entropy
    stands in for the softened loss; here it has its weight for all samples, as under every router.
    """

    unmixed = "asks whether the teacher's answer is the label"

    def weigh(self, answers: Answers) -> Tensor:
        return answers.teacher.argmax(dim=1) == answers.labels


@final
class Confidence(AnswerRouter):
    """w_i proportional to the teacher's largest probability, mean 1 over the batch, at most `cap`.

    w_i = min(cap, c_i / mean c) up to that mean,  c_i = max_c softmax(t_i)_c. This project's form of a common idea.
    """

    def __init__(self, spots: int, cap: float) -> None:
        super().__init__(spots)
        self.cap = cap

    def weigh(self, answers: Answers) -> Tensor:
        return of_mean(answers.teacher.softmax(dim=1).amax(dim=1), self.cap)


@final
class Entropy(AnswerRouter):
    """w_i proportional to the certainty of the teacher, mean 1 over the batch, at most `cap`.

    w_i = min(cap, e_i / mean e) up to that mean,  e_i = 1 - H(softmax(t_i)) / ln C. After Kwon, Na, Lee, Nam,
    "Adaptive Knowledge Distillation Based on Entropy", ICASSP 2020, who weigh teachers of a sample so, not samples.
    """

    def __init__(self, spots: int, cap: float) -> None:
        super().__init__(spots)
        self.cap = cap

    def weigh(self, answers: Answers) -> Tensor:
        log_p = answers.teacher.log_softmax(dim=1)
        entropy = -(log_p.exp() * log_p).sum(dim=1)
        return of_mean((1 - entropy / math.log(answers.teacher.shape[1])).clamp(min=0), self.cap)


@final
class WSLD(AnswerRouter):
    """w_i = 1 - exp(-CE(s_i, y_i) / CE(t_i, y_i)): less where the student is already as good as the teacher.

    Zhou, Song, Chen, Zhou, Wang, Yuan, Zhang, "Rethinking Soft Labels for Knowledge Distillation: A Bias-Variance
    Tradeoff Perspective", ICLR 2021, for the softened logits; here at every spot.
    """

    unmixed = "compares both networks on the one label"

    def weigh(self, answers: Answers) -> Tensor:
        student, teacher = (
            F.cross_entropy(logits, answers.labels, reduction="none") for logits in (answers.student, answers.teacher)
        )
        return 1 - (-student / teacher.clamp(min=1e-12)).exp()
