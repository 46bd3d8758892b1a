"""Evaluate saved networks and ensembles on the test images, by more than one number."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from sakd_cli.config.preprocessing import ImageSize
from sakd_cli.config.resolve import ConfigSource, resolve
from sakd_cli.config.training import EvalConfig
from sakd_cli.data.loader import EvalLoader, EvalPairs
from sakd_cli.data.sources import as_seen
from sakd_cli.documents import evaluation as doc
from sakd_cli.engine.evaluate import Scores, evaluate, score_logits
from sakd_cli.engine.reporter import Reporter, reporting
from sakd_cli.engine.runtime import exact_mode, pick_device
from sakd_cli.errors import UsageError
from sakd_cli.evaluation.early_exit import EarlyExit, exit_costs, exit_curve, never
from sakd_cli.evaluation.quality import Answers, agreement, averages, calibration, confusion_matrix, confusions
from sakd_cli.evaluation.speed import speed
from sakd_cli.files import folder_of, read_about
from sakd_cli.models import artifact
from sakd_cli.models import ensemble as ensembles
from sakd_cli.models.artifact import Artifact
from sakd_cli.models.cost import cost, peak_memory
from sakd_cli.models.ensemble import RANGES, Ensemble, Exits, LoadedEnsemble, fit, mean_macs
from sakd_cli.models.staged import StagedModel
from sakd_cli.rundir import RunDir
from sakd_cli.runs.branches import branch_rows, branches_of
from sakd_cli.runs.build import match_normalization
from sakd_cli.runs.images import Images, Scored, SplitName, Wanted, config_of, images_to_score, load_images
from sakd_cli.runs.initial_weights import load_teacher
from sakd_cli.runs.locate import find_teacher, is_ensemble, settings_of

Row = TypeVar("Row", bound=doc.ClassBase)


class Target(NamedTuple):
    """What to evaluate: a weights file or folder, the run that it comes from (if any), and its settings.

    teacher_required  it is an error where the teacher is not to be found
    wanted            which images
    """

    weights: Path
    run: RunDir | None
    layers: list[ConfigSource]
    teacher_required: bool = False
    wanted: Wanted = Wanted()


def evaluate_network(target: Target, reporter: Reporter, loaded: dict[str, Images]) -> doc.Evaluation:
    """`sakd eval` of a network; the images are those in `loaded`, or are put there.

    Weights of no run are evaluated on the data set of their header. Raises UsageError on other classes.
    """
    network = artifact.load(target.weights)
    config = config_of(network.card, target.layers, reporter)
    scored = images_to_score(target.weights, target.run, network.card, config, target.wanted, reporter, loaded)
    images = scored.images
    match_normalization(network, images, str(target.weights))
    device, dataset, run = pick_device(config.device), images.dataset, target.run
    teacher = _teacher(target, config, images, reporter)
    branches = branches_of(target.weights, network)
    mode = exact_mode(device)
    model = mode.to_memory_format(network.model.to(device)).eval()
    other = dataset.test if teacher is None else as_seen(dataset.test, teacher[1].card.preprocessing)
    batches = EvalPairs(dataset.test, other, dataset, device=device, batch_size=config.batch_size)
    unfinished = " of a run that is not finished" if run and not run.finished else ""
    networks = [model] if teacher is None else [model, mode.to_memory_format(teacher[1].model.to(device)).eval()]
    *answers, labels = _answers(networks, followed(batches, reporter, f"evaluating {target.weights}{unfinished}"))
    about, mistakes = _about(target, scored, device, answers[0].logits, labels)
    own, scores, of_class = _quality(model, answers[0], labels, batches.batch_size, images.side)
    quality: doc.TeacherQuality | None = None
    of_teacher: Sequence[float | None] = [None] * len(dataset.classes)
    if teacher is not None:
        theirs, teacher_scores, _ = _quality(teacher[1].model, answers[1], labels, batches.batch_size, other.side)
        of_teacher = teacher_scores.top1_of_class
        known: dict[str, Any] = {"network": teacher[1].model.name, "path": str(teacher[0]), "sha256": teacher[1].sha256}
        quality = doc.TeacherQuality(**dict(theirs), **known, agreement=agreement(answers[0], answers[1], labels))
    batch, seconds = min(config.timing_batch, config.batch_size), config.timing_seconds
    if seconds:
        reporter.say(f"timing it for {2 * seconds:g} s or more")
    plainly = EvalLoader(dataset.test, dataset, device=device, batch_size=config.batch_size)
    return doc.Evaluation(
        **about,
        **dict(own),
        sha256=network.sha256,
        network=model.name,
        memory=doc.Memory(batch=batch, bytes=peak_memory(model, images.side, batch)),
        speed=speed(model, images.side, device, batch=batch, seconds=seconds) if seconds else None,
        teacher=quality,
        branches=None if branches is None else branch_rows(model, branches.to(device), plainly),
        classes=_class_rows(doc.ClassMetrics, dataset.classes, scores, of_class, mistakes, teacher_top1=of_teacher),
    )


def _about(
    target: Target, scored: Scored, device: torch.device, logits: Tensor, labels: Tensor
) -> tuple[dict[str, Any], list[doc.Confusion | None]]:
    """What both documents say of an evaluation (`EvaluationBase`), and the most frequent mistake of each class."""
    run, dataset = target.run, scored.images.dataset
    pairs, mistakes = confusions(logits, labels, dataset.classes)
    about = {
        "weights": str(target.weights),
        "run": str(run.path) if run else None,
        "finished": run.finished if run else None,
        "dataset": dataset.name,
        "split": scored.split,
        "images": len(labels),
        "trained_on": scored.trained_on,
        "device": str(device),
        "confusions": pairs,
        "confusion_matrix": confusion_matrix(logits, labels).tolist() if target.wanted.matrix else None,
    }
    return about, mistakes


def _class_rows(
    kind: type[Row],
    names: Sequence[str],
    scores: Scores,
    of_class: Sequence[tuple[float | None, float | None]],
    mistakes: Sequence[doc.Confusion | None],
    **more: Sequence[float | None],
) -> list[Row]:
    columns = {"name": names, "images": scores.images_of_class, "top1": scores.top1_of_class}
    columns |= {"confused_with": mistakes, "precision": [p for p, _ in of_class], "f1": [f1 for _, f1 in of_class]}
    rows = zip(*(columns | more).values(), strict=True)
    return [kind(**dict(zip((*columns, *more), row, strict=True))) for row in rows]


def _teacher(target: Target, config: EvalConfig, images: Images, reporter: Reporter) -> tuple[Path, Artifact] | None:
    """The teacher that the settings name, and where it lies; None where they name none."""
    if config.teacher is None or config.teacher.logits is not None:
        return None
    try:
        if (path := find_teacher(config)) is None:
            raise UsageError(f"teacher: no finished {config.teacher.source} on {config.data.name} in {config.runs_dir}")
        teacher = load_teacher(config, path)
        if config.teacher.sha256 not in (None, teacher.sha256):
            raise UsageError(f"{path}: is not the teacher of this run (its SHA-256 differs)")
        side = teacher.card.side if teacher.card.preprocessing else images.side
        match_normalization(teacher, images, str(path), side=side)
    except UsageError as error:
        if target.teacher_required:
            raise
        reporter.warn(f"not compared with its teacher: {error.message}")
        return None
    return path, teacher


@torch.inference_mode()
def _answers(networks: list[StagedModel], batches: Iterable[tuple[tuple[Tensor, Tensor], Tensor]]) -> list[Any]:
    """Each network's Answers to all images as it sees them, then the labels [N]; everything stays on the device."""
    found: list[list[Answers]] = [[] for _ in networks]
    labels = []
    for shown, truth in batches:
        for network, images, answers in zip(networks, shown, found, strict=False):
            embedding = network.run(images, 0, len(network.stages))
            answers.append(Answers(network.head(embedding).float(), embedding.float()))
        labels.append(truth)
    whole = [Answers(*(torch.cat(parts) for parts in zip(*answers, strict=True))) for answers in found]
    return [*whole, torch.cat(labels)]


def _quality(
    model: StagedModel, answers: Answers, labels: Tensor, batch_size: int, side: ImageSize
) -> tuple[doc.Quality, Scores, list[tuple[float | None, float | None]]]:
    """A network's own metrics, its scores by class, and precision and F1 of each class."""
    # In the batches of an evaluation in training: sums are rounded alike, and the metrics are equal to the last bit.
    parts = zip(answers.logits.split(batch_size), labels.split(batch_size), strict=True)
    scores = score_logits(parts, answers.logits.shape[1], network=model)
    (brier, ece), costs = calibration(answers.logits, labels), cost(model, side)
    means, of_class = averages(answers.logits, labels)
    return doc.Quality(**scores.metrics(), brier=brier, ece=ece, averages=means, **costs._asdict()), scores, of_class


def followed(batches: EvalLoader | EvalPairs, reporter: Reporter, title: str) -> Iterator[Any]:
    """The same batches, reporting each."""
    with reporting(reporter, title, len(batches)):
        for step, batch in enumerate(batches, start=1):
            yield batch
            reporter.advance(step)


def evaluate_ensemble(target: Target, reporter: Reporter, *, early: bool, curve: bool) -> doc.EnsembleEvaluation:
    """`sakd eval` of an ensemble; a plain network is one without residual students.

    early: images leave where they may; else all go to the end. curve: with the curve over all thresholds.
    Raises UsageError on other classes, and where the thresholds are to be fitted anew and the run is not known.
    """
    saved = opened(target.weights)
    rule = saved.about.get("rule", {})
    config = config_of(saved.card, target.layers, reporter, {"residual": rule})
    device = pick_device(config.device)
    scored = images_to_score(target.weights, target.run, saved.card, config, target.wanted, reporter, {})
    images = scored.images
    for member in saved.ensemble.members:
        assert isinstance(member, StagedModel)
        match_normalization(Artifact(member, saved.card, saved.sha256), images, str(target.weights))
    exact_mode(device)
    whole, dataset, run = saved.ensemble.to(device), images.dataset, target.run
    costs = [cost(member, images.side) for member in whole.members]
    macs, teacher = [one.macs for one in costs], saved.about.get("teacher") or {}
    teacher_macs = teacher.get("macs")
    exits = saved.exits
    if exits.thresholds and config.residual.exits() != rule:
        exits = _refitted(whole, run, config, macs, teacher_macs, device)
    batches = EvalLoader(dataset.test, dataset, device=device, batch_size=config.batch_size)
    judge = EarlyExit(whole, exits if early else never(exits)).eval()
    scores = evaluate(judge, followed(batches, reporter, f"evaluating {target.weights}"), len(dataset.classes))
    left, logits, labels = torch.cat(judge.left).cpu(), torch.cat(judge.said), dataset.test.labels.to(device)
    shown, names = exit_costs(left, macs, teacher_macs), [str(member.name) for member in whole.members]
    of_classes = [left[labels.cpu() == place] for place in range(len(dataset.classes))]
    means = [mean_macs(stages, macs) if len(stages) else None for stages in of_classes]
    (brier, ece), (overall, of_class) = calibration(logits, labels), averages(logits, labels)
    about, mistakes = _about(target, scored, device, logits, labels)
    return doc.EnsembleEvaluation(
        **about,
        sha256=saved.sha256,
        network=" + ".join(names),
        **scores.metrics(),
        brier=brier,
        ece=ece,
        averages=overall,
        parameters=sum(one.parameters for one in costs),
        macs=shown.macs,
        ensemble=doc.EnsembleExits(
            **config.residual.exits(),
            **dict(shown),
            early_exit=early,
            members=names,
            member_macs=macs,
            teacher=doc.ExitTeacher(network=teacher.get("architecture") or teacher.get("network"), macs=teacher_macs),
            thresholds=list(exits.thresholds),
            curve=exit_curve(whole, exits, batches, macs, teacher_macs) if curve else None,
        ),
        classes=_class_rows(doc.EnsembleClassMetrics, dataset.classes, scores, of_class, mistakes, macs=means),
    )


def opened(target: Path) -> LoadedEnsemble:
    """An ensemble, or a plain network as one without residual students."""
    folder = folder_of(target)
    if is_ensemble(target):
        return ensembles.load(folder)
    plain = artifact.load(target)
    about = read_about(folder)  # empty for a file alone: its teacher is not known
    teacher = about.get("teacher") if about.get("sha256") == plain.sha256 else None
    about = {"teacher": teacher} if isinstance(teacher, dict) else {}
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
    split: SplitName | None = None,
    matrix: bool = False,
) -> list[doc.Evaluation | doc.EnsembleEvaluation]:
    """One document of `sakd eval` for each of the weights and the runs that they come from.

    teacher_required  it is an error where the teacher is not to be found
    as_ensembles      plain networks are evaluated as ensembles of one
    early             whether images leave an ensemble early; curve: with the curve over all thresholds
    split             which images; None: the test images, or all of a folder that `layers` name
    matrix            with the full confusion matrix
    """
    named = {key for one in layers if isinstance(data := one.values.get("data"), dict) for key in data}
    wanted = Wanted(split, bool({"root", "manifest"} & named), matrix)
    # A list that is named now counts from its own folder, not from the run's.
    given = [*[ConfigSource("its own folder", {"data": {"root": None}})] * ("manifest" in named), *layers]
    targets = [Target(weights, run, [*settings_of(run), *given], teacher_required, wanted) for weights, run in found]
    loaded: dict[str, Images] = {}
    return [
        evaluate_ensemble(target, reporter, early=early, curve=curve)
        if as_ensembles or is_ensemble(target.weights)
        else evaluate_network(target, reporter, loaded)
        for target in targets
    ]
