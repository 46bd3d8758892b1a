"""Several teachers of one student: how much each counts for a sample, and what a step reads of all."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from sakd_cli import distributed
from sakd_cli.batch import Batch
from sakd_cli.engine.task import SpotUse
from sakd_cli.models.spot import Spot
from sakd_cli.models.staged import Features
from sakd_cli.routing.router import Decision


class TeamFeatures(NamedTuple):
    """What a step reads of each teacher's plain pass, for `Batch.precomputed`."""

    of: tuple[Features, ...]

    def map(self, change: Callable[[Tensor], Tensor]) -> "TeamFeatures":
        return TeamFeatures(tuple(one.map(change) for one in self.of))


def mean(logits: list[Tensor], labels: Tensor, noise: Tensor) -> Tensor:
    """1/T each. For softened logits this is the gradient towards the mean of the teachers' probabilities."""
    return logits[0].new_full((len(logits), len(labels)), 1 / len(logits))


def confidence(logits: list[Tensor], labels: Tensor, noise: Tensor) -> Tensor:
    """(1 - exp(CE_t) / sum_j exp(CE_j)) / (T - 1), CE_t = the cross-entropy of teacher t on the sample.

    Zhang, Chen, Wang, "Confidence-Aware Multi-Teacher Knowledge Distillation" (CA-MKD), ICASSP 2022, equations 2 and 3.
    There a feature has weights of its own, by the teacher's classifier on the student's feature; here it has these.
    """
    wrong = torch.stack([F.cross_entropy(one, labels, reduction="none") for one in logits])
    return (1 - wrong.softmax(dim=0)) / (len(logits) - 1)


def draw(logits: list[Tensor], labels: Tensor, noise: Tensor) -> Tensor:
    """All of one teacher, which is drawn for the step: by the first sample of the whole batch."""
    chosen = (distributed.all_reduce_sum(noise[0, -1] * distributed.is_main_process()) * len(logits)).floor()
    of_each = torch.arange(len(logits), device=noise.device) == chosen
    return of_each.to(logits[0].dtype)[:, None].expand(-1, len(labels))


Combine = Callable[[list[Tensor], Tensor, Tensor], Tensor]
COMBINE: dict[str, Combine] = {"mean": mean, "confidence": confidence, "draw": draw}


def used(
    decisions: Sequence[Decision], events: dict[str, Tensor], lengths: Tensor, kept: Tensor | None = None
) -> SpotUse:
    """Of the spots of all teachers, one after another: their weights at a spot add up to what is distilled there.

    kept  [S, N] of a single teacher, whose every weight is 1: where a hint is kept in the backward pass that is to come
    """
    weights = [decision.weight for decision in decisions] if kept is None else [kept]
    chances = [decision.probability for decision in decisions if decision.probability is not None]
    many = lengths.repeat(len(decisions), 1) if len(decisions) > 1 else lengths
    return SpotUse(together(weights), together(chances) if chances else None, events, many)


def together(rows: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(rows)) if len(rows) > 1 else rows[0]


def of_all(features: Features, spots: tuple[Spot, ...], batch: Batch) -> Features:
    """The logits and what the spots need of the stages, of all processes' samples; the other stages as they are."""
    places = {place for spot in spots for place in (spot.student, spot.teacher)}
    stages = [distributed.all_gather(x, batch) if k in places else x for k, x in enumerate(features.stages)]
    return Features(tuple(stages), distributed.all_gather(features.logits, batch))
