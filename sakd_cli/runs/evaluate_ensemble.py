"""Evaluate an ensemble: images leave early or all go to the end, at what cost, and the curve between the two."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from sakd_cli.config.resolve import ConfigSource, resolve
from sakd_cli.config.training import EvalConfig
from sakd_cli.data.loader import EvalLoader
from sakd_cli.documents.evaluation import (
    EnsembleClassMetrics,
    EnsembleEvaluation,
    EnsembleExits,
    Evaluation,
    ExitTeacher,
)
from sakd_cli.engine.reporter import Reporter
from sakd_cli.engine.runtime import pick_device
from sakd_cli.errors import UsageError
from sakd_cli.evaluation.early_exit import evaluate_batches, exit_costs, exit_curve, never
from sakd_cli.models import artifact
from sakd_cli.models import ensemble as ensembles
from sakd_cli.models.artifact import Artifact
from sakd_cli.models.cost import cost
from sakd_cli.models.ensemble import INDEX, Ensemble, LoadedEnsemble
from sakd_cli.models.exits import RANGES, Exits, fit, mean_macs
from sakd_cli.models.staged import StagedModel
from sakd_cli.rundir import RunDir
from sakd_cli.runs.build import load_images, match_normalization
from sakd_cli.runs.evaluate import Target, evaluate_networks, followed, seen_in
from sakd_cli.runs.locate import is_ensemble, settings_of


def evaluate_ensemble(target: Target, reporter: Reporter, *, early: bool, curve: bool) -> EnsembleEvaluation:
    """`sakd eval` of an ensemble; a plain network is one without residual students.

    early: images leave where they may; else all go to the end. curve: with the curve over all thresholds.
    Raises UsageError on other classes, and where the thresholds are to be fitted anew and the run is not known.
    """
    opened = _opened(target.weights)
    rule = opened.about.get("rule", {})
    named = ConfigSource("the ensemble's config", {"data": seen_in(opened.card), "residual": rule})
    config: EvalConfig = resolve("eval", [named, *target.layers]).config
    device = pick_device(config.device)
    images = load_images(config.data.model_copy(update={"validation": 0.0}))
    for member in opened.ensemble.members:
        assert isinstance(member, StagedModel)
        match_normalization(Artifact(member, opened.card, opened.sha256), images, str(target.weights))
    whole, dataset, run = opened.ensemble.to(device), images.dataset, target.run
    costs = [cost(member, images.side) for member in whole.members]
    macs, teacher = [one.macs for one in costs], opened.about.get("teacher") or {}
    teacher_macs = teacher.get("macs")
    exits = opened.exits
    if exits.thresholds and config.residual.exits() != rule:
        exits = _refitted(whole, run, config, macs, teacher_macs, device)
    batches = EvalLoader(dataset.test, dataset, device=device, batch_size=config.batch_size)
    chosen, title = exits if early else never(exits), f"evaluating {target.weights}"
    scores, left = evaluate_batches(whole, chosen, followed(batches, reporter, title), len(dataset.classes))
    shown, labels = exit_costs(left, macs, teacher_macs), dataset.test.labels.cpu()
    names = [str(member.name) for member in whole.members]
    classes = []
    for place, name in enumerate(dataset.classes):
        count, of_class = scores.images_of_class[place], left[labels == place]
        mean = mean_macs(of_class, macs) if count else None
        classes.append(EnsembleClassMetrics(name=name, images=count, top1=scores.top1_of_class[place], macs=mean))
    return EnsembleEvaluation(
        weights=str(target.weights),
        run=str(run.path) if run else None,
        finished=run.finished if run else None,
        sha256=opened.sha256,
        network=" + ".join(names),
        dataset=dataset.name,
        images=scores.images,
        device=str(device),
        top1=scores.top1,
        top5=scores.top5,
        loss=scores.loss,
        parameters=sum(one.parameters for one in costs),
        macs=shown.macs,
        ensemble=EnsembleExits(
            **config.residual.exits(),
            **dict(shown),
            early_exit=early,
            members=names,
            member_macs=macs,
            teacher=ExitTeacher(network=teacher.get("architecture") or teacher.get("network"), macs=teacher_macs),
            thresholds=list(exits.thresholds),
            curve=exit_curve(whole, exits, batches, macs, teacher_macs) if curve else None,
        ),
        classes=classes,
    )


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
    """Thresholds for other settings, from the run's calibration images."""
    if run is None:
        raise UsageError("residual: other settings of the exits need the run of this ensemble", "name the run")
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


def evaluate_all(
    found: Sequence[tuple[Path, RunDir | None]],
    layers: Sequence[ConfigSource],
    reporter: Reporter,
    *,
    teacher_required: bool = False,
    as_ensembles: bool = False,
    early: bool = True,
    curve: bool = False,
) -> list[Evaluation | EnsembleEvaluation]:
    """One document of `sakd eval` for each of the weights and the runs that they come from.

    teacher_required  it is an error where the teacher is not to be found
    as_ensembles      plain networks are evaluated as ensembles of one
    early             whether images leave an ensemble early; curve: with the curve over all thresholds
    """
    pairs = []
    for weights, run in found:
        target = Target(weights, run, [*settings_of(run), *layers], teacher_required)
        pairs.append((target, as_ensembles or is_ensemble(weights)))
    networks = evaluate_networks((target for target, ensemble in pairs if not ensemble), reporter)
    return [
        evaluate_ensemble(target, reporter, early=early, curve=curve) if ensemble else next(networks)
        for target, ensemble in pairs
    ]
