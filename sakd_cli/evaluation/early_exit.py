"""An ensemble whose images leave early or all go to the end: its metrics, its cost, and the curve between the two."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sakd_cli.documents.evaluation import ExitCosts, ExitMetrics, ExitPoint
from sakd_cli.engine.evaluate import Batches, evaluate
from sakd_cli.models.ensemble import NEVER, Ensemble, Exits, exit_stage, mean_macs

POINTS = 21  # of a curve


class EarlyExit(nn.Module):
    """An ensemble as a network whose images leave at different stages; `left` remembers where, `said` the logits."""

    def __init__(self, ensemble: Ensemble, exits: Exits) -> None:
        super().__init__()
        self.ensemble, self.exits = ensemble, exits
        self.left, self.said = list[Tensor](), list[Tensor]()

    def forward(self, images: Tensor) -> Tensor:
        """Images [N, 3, H, W] to logits [N, K]."""
        logits, left = self.ensemble.adaptive(images, self.exits)
        self.left.append(left)
        self.said.append(logits.float())
        return logits


def never(exits: Exits) -> Exits:
    """The same, with all images going to the end."""
    return exits._replace(thresholds=(NEVER,) * len(exits.thresholds))


def exit_costs(left: Tensor, macs: Sequence[int], teacher_macs: int | None) -> ExitCosts:
    """What the images cost, given the stage [N] at which each left and the cost of each member."""
    mean = mean_macs(left, macs)
    exits = torch.bincount(left, minlength=len(macs)).tolist()
    return ExitCosts(exits=exits, macs=mean, cost=mean / teacher_macs if teacher_macs else None)


def exit_metrics(
    ensemble: Ensemble, exits: Exits, batches: Batches, classes: int, macs: Sequence[int], teacher_macs: int | None
) -> ExitMetrics:
    early = EarlyExit(ensemble, exits).eval()
    scores = evaluate(early, batches, classes)
    costs = exit_costs(torch.cat(early.left).cpu(), macs, teacher_macs)
    return ExitMetrics(**scores.metrics(), **dict(costs))


@torch.inference_mode()
def exit_curve(
    ensemble: Ensemble, exits: Exits, batches: Batches, macs: Sequence[int], teacher_macs: int | None
) -> list[ExitPoint]:
    """Accuracy and cost over a shared threshold, from all members for every image to the first member alone.

    Thresholds are quantiles of the uncertainties on these images; labels are not used to choose them.
    """
    pairs = [(ensemble.stages(images), labels) for images, labels in batches]
    stages, labels = torch.cat([logits for logits, _ in pairs], dim=1), torch.cat([labels for _, labels in pairs])
    uncertainties, predictions = exits.uncertainties(stages[:-1]), stages.argmax(dim=-1)
    grid = [NEVER]
    if len(uncertainties):
        ranked = uncertainties.flatten().sort().values
        places = torch.linspace(0, len(ranked) - 1, POINTS - 1).long().tolist()
        grid += sorted({float(ranked[place]) for place in places})
    found: list[dict[str, Any]] = []
    for theta in grid:
        left = exit_stage(uncertainties, [theta] * len(uncertainties))
        answers = predictions.gather(0, left[None])[0]
        top1, agreement = (100 * float((answers == right).cpu().double().mean()) for right in (labels, predictions[-1]))
        point = {"theta": None if theta == NEVER else theta, "top1": top1, "agreement": agreement}
        found.append(point | dict(exit_costs(left.cpu(), macs, teacher_macs)))
    best = pareto([(point["macs"], point["top1"]) for point in found])
    return [ExitPoint(**point, pareto=place in best) for place, point in enumerate(found)]


def pareto(points: Sequence[tuple[float, float]]) -> set[int]:
    """Places of the points on the upper left hull of (cost, accuracy): each dearer one is better, gains falling."""
    front: list[int] = []
    for place in sorted(range(len(points)), key=lambda place: (points[place][0], -points[place][1])):
        cost, accuracy = points[place]
        if front and accuracy <= points[front[-1]][1]:
            continue
        while len(front) > 1:
            (x0, y0), (x1, y1) = points[front[-2]], points[front[-1]]
            if (y1 - y0) * (cost - x0) > (accuracy - y0) * (x1 - x0):
                break
            front.pop()
        front.append(place)
    return set(front)
