"""Early exits of an ensemble: uncertainty of logits, and thresholds fitted on validation images (Li et al., ResKD).

A sample exits at the first stage n whose uncertainty is at most thresholds[n]; after the last stage all do.
"""

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from sakd_cli.config.training import ResidualConfig

NEVER = -1.0  # below every uncertainty


def entropy(logits: Tensor) -> Tensor:
    """Entropy of softmax(z) in units of log K."""
    log = F.log_softmax(logits, dim=-1)
    return -(log.exp() * log).sum(dim=-1) / math.log(logits.shape[-1])


def maxprob(logits: Tensor) -> Tensor:
    """One less the largest class probability."""
    return 1 - logits.softmax(dim=-1).amax(dim=-1)


def margin(logits: Tensor) -> Tensor:
    """One less the difference of the two largest class probabilities."""
    first, second = logits.softmax(dim=-1).topk(2, dim=-1).values.unbind(dim=-1)
    return 1 - (first - second)


def energy(logits: Tensor) -> Tensor:
    """Minus log-sum-exp of the logits, scaled by its range on validation images."""
    return -logits.logsumexp(dim=-1)


MEASURES: dict[str, Callable[[Tensor], Tensor]] = {
    "entropy": entropy,
    "maxprob": maxprob,
    "margin": margin,
    "energy": energy,
}
RANGES = {"entropy": (0.0, 1.0), "maxprob": (0.0, 1.0), "margin": (0.0, 1.0)}


class Exits(NamedTuple):
    """uncertainty: its name; scale: what counts as 0 and as 1; thresholds: one per stage but the last."""

    uncertainty: str
    scale: tuple[float, float]
    thresholds: tuple[float, ...]

    def uncertainties(self, logits: Tensor) -> Tensor:
        """Logits [..., K] to uncertainties [...] in [0, 1]."""
        low, high = self.scale
        return ((MEASURES[self.uncertainty](logits.float()) - low) / max(high - low, 1e-12)).clamp(0, 1)

    def exit_stage(self, stages: Tensor) -> Tensor:
        """Logits after each stage [M+1, N, K] to the stage [N] at which each sample leaves."""
        return exit_stage(self.uncertainties(stages[:-1]), self.thresholds)


def exit_stage(uncertainties: Tensor, thresholds: Sequence[float]) -> Tensor:
    """Uncertainties [M, N] after all stages but the last to the stage [N], 0 .. M, at which each sample leaves."""
    limits = uncertainties.new_tensor(thresholds)[:, None]
    return (~(uncertainties <= limits)).long().cumprod(dim=0).sum(dim=0)


def fit(config: ResidualConfig, stages: Tensor, labels: Tensor, macs: Sequence[int], teacher_macs: int | None) -> Exits:
    """Thresholds by `config.rule` from logits after each stage, [M+1, N, K], of images that were not trained on.

    macs: of each member; teacher_macs: what a budget is a fraction of (None: of all members together).
    """
    scale = RANGES.get(config.uncertainty)
    if scale is None:
        values = MEASURES[config.uncertainty](stages.float())
        scale = float(values.min()), float(values.max())
    exits = Exits(config.uncertainty, scale, ())
    uncertainties = exits.uncertainties(stages[:-1])
    match config.rule:
        case "agreement":
            predictions = stages.argmax(dim=-1)
            changed = (predictions[:-1] != predictions[-1:]).double()
            found = _stage_by_stage(uncertainties, changed, config.delta)
        case "accuracy":
            right = (stages.argmax(dim=-1) == labels).double()
            found = _stage_by_stage(uncertainties, right[-1:] - right[:-1], config.delta)
        case "fixed":
            found = [config.theta] * len(uncertainties)
        case "budget":
            found = [_within(config.budget * (teacher_macs or sum(macs)), uncertainties, macs)] * len(uncertainties)
    return exits._replace(thresholds=tuple(found))


def _stage_by_stage(uncertainties: Tensor, losses: Tensor, delta: float) -> list[float]:
    """Per stage the threshold that lets most of those who reach it leave at a mean loss of at most `delta`."""
    reached = torch.ones(uncertainties.shape[1], dtype=torch.bool, device=uncertainties.device)
    found = []
    for uncertainty, loss in zip(uncertainties, losses, strict=True):
        found.append(_longest_prefix(uncertainty[reached], loss[reached], delta))
        reached = reached & (uncertainty > found[-1])
    return found


def _longest_prefix(uncertainty: Tensor, loss: Tensor, delta: float) -> float:
    """The last uncertainty of the longest prefix, the surest first, that holds the bound; equal ones go together."""
    ranked, order = uncertainty.sort(stable=True)
    mean = loss[order].cumsum(0) / torch.arange(1, len(order) + 1, device=loss.device)
    ends = torch.ones_like(ranked, dtype=torch.bool)
    ends[:-1] = ranked[1:] != ranked[:-1]
    fits = (ends & (mean <= delta)).nonzero()
    return float(ranked[fits[-1]]) if len(fits) else NEVER


def _within(limit: float, uncertainties: Tensor, macs: Sequence[int]) -> float:
    """The smallest shared threshold with a mean cost of at most `limit`; where none is, the one that all leave at."""
    candidates = [NEVER, *uncertainties.unique().tolist()]

    def fits(theta: float) -> bool:
        return mean_macs(exit_stage(uncertainties, [theta] * len(uncertainties)), macs) <= limit

    place = bisect_left(candidates, True, key=fits)
    return float(candidates[min(place, len(candidates) - 1)])


def mean_macs(left: Tensor, macs: Sequence[int]) -> float:
    """Mean multiply-accumulates per sample, from the stage [N] at which each left and the MACs of each member."""
    return float(torch.tensor(macs, dtype=torch.float64).cumsum(0)[left.cpu()].mean())
