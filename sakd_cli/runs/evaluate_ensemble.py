"""Score an ensemble: samples leave early or all go to the end, at what cost, and the curve between the two."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn

from sakd_cli.config.resolve import ConfigSource, resolve
from sakd_cli.config.training import EvalConfig
from sakd_cli.data.loader import EvalLoader
from sakd_cli.engine.evaluate import Scores, evaluate
from sakd_cli.engine.reporter import Reporter
from sakd_cli.engine.runtime import pick_device
from sakd_cli.errors import UsageError
from sakd_cli.models import artifact
from sakd_cli.models import ensemble as ensembles
from sakd_cli.models.artifact import Artifact
from sakd_cli.models.cost import cost
from sakd_cli.models.ensemble import INDEX, Ensemble, LoadedEnsemble
from sakd_cli.models.exits import NEVER, RANGES, Exits, fit, leaving, mean_macs
from sakd_cli.models.staged import StagedModel
from sakd_cli.rundir import RunDir
from sakd_cli.runs.build import load_images, match_normalization
from sakd_cli.runs.evaluate import Target, class_rows, described, followed, scores, seen_in
from sakd_cli.runs.locate import is_ensemble, words_of

POINTS = 21  # of a sweep
Batches = Iterable[tuple[Tensor, Tensor]]


@final
class EarlyExit(nn.Module):
    """An ensemble as a network whose samples leave at different stages; `left` remembers where, batch by batch."""

    def __init__(self, ensemble: Ensemble, exits: Exits) -> None:
        super().__init__()
        self.ensemble, self.exits = ensemble, exits
        self.left: list[Tensor] = []

    def forward(self, images: Tensor) -> Tensor:
        """Images [N, 3, H, W] to logits [N, K]."""
        logits, left = self.ensemble.adaptive(images, self.exits)
        self.left.append(left)
        return logits


class Passed(NamedTuple):
    """Scores, and the stage [N] at which each image left."""

    scores: Scores
    left: Tensor


def passed(ensemble: Ensemble, exits: Exits, batches: Batches, classes: int) -> Passed:
    """Run an ensemble in evaluation mode over batches; what is skipped is not computed."""
    early = EarlyExit(ensemble, exits).eval()
    scores = evaluate(early, batches, classes)
    return Passed(scores, torch.cat(early.left).cpu())


def never(exits: Exits) -> Exits:
    """All go to the end."""
    return exits._replace(thresholds=(NEVER,) * len(exits.thresholds))


def costs_of(left: Tensor, macs: Sequence[int], teacher_macs: int | None) -> dict[str, Any]:
    """exits: images that left at each stage; macs: mean per image; cost: that as a share of the teacher's, or None."""
    mean = mean_macs(left, macs)
    exits = torch.bincount(left, minlength=len(macs)).tolist()
    return {"exits": exits, "macs": mean, "cost": mean / teacher_macs if teacher_macs else None}


def figures_of(
    ensemble: Ensemble,
    exits: Exits,
    batches: Batches,
    classes: int,
    macs: Sequence[int],
    teacher_macs: int | None,
) -> dict[str, Any]:
    """How a run's ensemble does on the test images: leaving early (`early`), going to the end (`all`), and between."""
    sides = {}
    for name, chosen in (("early", exits), ("all", never(exits))):
        scores, left = passed(ensemble, chosen, batches, classes)
        sides[name] = scores.headline() | costs_of(left, macs, teacher_macs)
    networks = [getattr(member, "name", "") for member in ensemble.members]
    curve = sweep(ensemble, exits, batches, macs, teacher_macs)
    told = {"members": networks, "member_macs": list(macs), "thresholds": list(exits.thresholds)}
    return told | sides | {"sweep": curve}


@torch.inference_mode()
def sweep(
    ensemble: Ensemble, exits: Exits, batches: Batches, macs: Sequence[int], teacher_macs: int | None
) -> list[dict[str, Any]]:
    """Accuracy and cost over a shared threshold, from all members for everyone to the first member alone.

    The thresholds are quantiles of the uncertainties on these images; no label chooses them. theta None: never leave.
    agreement: images with the prediction of all members, in percent; hull: whether no mixture of others does better.
    """
    pairs = [(ensemble.stages(images), labels) for images, labels in batches]
    stages, labels = torch.cat([logits for logits, _ in pairs], dim=1), torch.cat([labels for _, labels in pairs])
    doubts, predictions = exits.doubt(stages[:-1]), stages.argmax(dim=-1)
    grid = [NEVER]
    if len(doubts):
        ranked = doubts.flatten().sort().values
        places = torch.linspace(0, len(ranked) - 1, POINTS - 1).long().tolist()
        grid += sorted({float(ranked[place]) for place in places})
    points = []
    for theta in grid:
        left = leaving(doubts, [theta] * len(doubts))
        answers = predictions.gather(0, left[None])[0]
        rates = {
            "top1": 100 * float((answers == labels).double().mean()),
            "agreement": 100 * float((answers == predictions[-1]).double().mean()),
        }
        shown = None if theta == NEVER else theta
        points.append({"theta": shown} | rates | costs_of(left.cpu(), macs, teacher_macs))
    best = hull([(point["macs"], point["top1"]) for point in points])
    return [point | {"hull": place in best} for place, point in enumerate(points)]


def hull(points: Sequence[tuple[float, float]]) -> set[int]:
    """Places of the points on the upper left hull of (cost, accuracy): each dearer one is better, gains falling."""
    kept: list[int] = []
    for place in sorted(range(len(points)), key=lambda place: (points[place][0], -points[place][1])):
        cost, accuracy = points[place]
        if kept and accuracy <= points[kept[-1]][1]:
            continue
        while len(kept) > 1:
            (x0, y0), (x1, y1) = points[kept[-2]], points[kept[-1]]
            if (y1 - y0) * (cost - x0) > (accuracy - y0) * (x1 - x0):
                break
            kept.pop()
        kept.append(place)
    return set(kept)


def score_ensemble(target: Target, reporter: Reporter, *, early: bool, curve: bool) -> dict[str, Any]:
    """`sakd eval` of an ensemble; a plain network is one without residual students. Keys: `report/ensemble.py`.

    early: samples leave where they may; else all go to the end. curve: with the sweep.
    Raises UsageError on other classes, and where the thresholds are to be fitted anew and the run is not known.
    """
    opened = _opened(target.weights)
    rule = opened.about.get("rule", {})
    named = ConfigSource("the ensemble's words", {"data": seen_in(opened.card), "residual": rule})
    config: EvalConfig = resolve("eval", [named, *target.layers]).config
    device = pick_device(config.device)
    images = load_images(config.data.model_copy(update={"validation": 0.0}))
    for member in opened.ensemble.members:
        assert isinstance(member, StagedModel)
        match_normalization(Artifact(member, opened.card, opened.sha256), images, str(target.weights))
    whole, dataset = opened.ensemble.to(device), images.dataset
    costs = [cost(member, images.side) for member in whole.members]
    macs, teacher = [one.macs for one in costs], opened.about.get("teacher") or {}
    teacher_macs = teacher.get("macs")
    exits = opened.exits
    if exits.thresholds and config.residual.exits() != rule:
        exits = _refitted(whole, target.run, config, macs, teacher_macs, device)
    batches = EvalLoader(dataset.test, dataset, device=device, batch_size=config.batch_size)
    chosen, title = exits if early else never(exits), f"scoring {target.weights}"
    scores, left = passed(whole, chosen, followed(batches, reporter, title), len(dataset.classes))
    shown = costs_of(left, macs, teacher_macs)
    names = [str(member.name) for member in whole.members]
    about = {"weights": str(target.weights), "sha256": opened.sha256, "network": " + ".join(names)}
    counted = {"parameters": sum(one.parameters for one in costs), "macs": shown["macs"], "device": str(device)}
    rows = class_rows(scores, dataset.classes)
    for place, row in enumerate(rows):
        of_class = left[dataset.test.labels.cpu() == place]
        row["macs"] = mean_macs(of_class, macs) if len(of_class) else None
    about["dataset"] = dataset.name
    told = {
        "early": early,
        "members": names,
        "member_macs": macs,
        "teacher": {"network": teacher.get("architecture") or teacher.get("network"), "macs": teacher_macs},
        **config.residual.exits(),
        "thresholds": list(exits.thresholds),
        **shown,
        "sweep": sweep(whole, exits, batches, macs, teacher_macs) if curve else None,
    }
    known = described(about, target.run, scores.images, scores.headline() | counted, rows)
    return {"schema": "sakd.ensemble/1", **known, "ensemble": told}


def _opened(target: Path) -> LoadedEnsemble:
    """An ensemble, or a plain network as one without residual students."""
    folder = target if target.is_dir() else target.parent
    if (folder / INDEX).is_file() and (target.is_dir() or target.name == INDEX):
        return ensembles.load(folder)
    plain = artifact.load(target)
    try:
        about = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        about = {"teacher": dict(about["teacher"])} if about["sha256"] == plain.sha256 else {}
    except (OSError, ValueError, KeyError, TypeError):
        about = {}  # a file alone: its teacher is not known
    exits = Exits("entropy", RANGES["entropy"], ())
    return LoadedEnsemble(Ensemble([plain.model]).eval(), plain.card, exits, about, plain.sha256)


def _refitted(
    ensemble: Ensemble,
    run: RunDir | None,
    config: EvalConfig,
    macs: Sequence[int],
    teacher_macs: int | None,
    device: torch.device,
) -> Exits:
    """Thresholds for other words, from the images that the run kept for this."""
    if run is None:
        raise UsageError("residual: other words for who leaves early need the run of this ensemble", "name the run")
    own = ConfigSource("the run's config", {key: run.config[key] for key in ("data", "residual") if key in run.config})
    trained = resolve("eval", [own]).config
    place = {"root": config.data.root, "download": config.data.download}
    images = load_images(trained.data.model_copy(update=place), trained.residual)
    if images.calibration is None:
        raise UsageError(f"{run.path}: kept no images to fit thresholds on")
    batches = EvalLoader(images.calibration, images.dataset, device=device)
    with torch.inference_mode():
        stages = torch.cat([ensemble.stages(x) for x, _ in batches], dim=1)
    return fit(config.residual, stages, images.calibration.labels.to(device), macs, teacher_macs)


def evaluations(
    found: Sequence[tuple[Path, RunDir | None]],
    layers: Sequence[ConfigSource],
    reporter: Reporter,
    *,
    compelled: bool = False,
    forced: bool = False,
    early: bool = True,
    curve: bool = False,
) -> list[dict[str, Any]]:
    """One document of `sakd eval` for each of the weights and the runs that they come from.

    compelled  a teacher was asked for; forced: all are ensembles, or it is an error
    early      whether samples leave an ensemble early; curve: sweep its thresholds too
    """
    pairs = []
    for weights, run in found:
        target = Target(weights, run, [*words_of(run), *layers], compelled)
        pairs.append((target, forced or is_ensemble(weights)))
    alone = scores((target for target, ensemble in pairs if not ensemble), reporter)
    return [
        score_ensemble(target, reporter, early=early, curve=curve) if ensemble else next(alone)
        for target, ensemble in pairs
    ]
