"""Evaluate saved networks on the test images, by more than one number"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sakd_cli.config.datasets import DATASETS, DataConfig
from sakd_cli.config.resolve import ConfigSource, resolve
from sakd_cli.config.training import EvalConfig, Runtime
from sakd_cli.data.dataset import Dataset
from sakd_cli.data.loader import EvalLoader
from sakd_cli.documents.evaluation import ClassMetrics, Evaluation, Memory, Quality, TeacherQuality
from sakd_cli.engine.evaluate import Scores, evaluate, score_logits
from sakd_cli.engine.reporter import Reporter
from sakd_cli.engine.runtime import pick_device, resolve_mode
from sakd_cli.errors import UsageError
from sakd_cli.evaluation.quality import Answers, agreement, calibration, confusions
from sakd_cli.evaluation.speed import speed
from sakd_cli.models import artifact
from sakd_cli.models.artifact import Artifact, NetworkCard
from sakd_cli.models.cost import cost, peak_memory
from sakd_cli.models.staged import StagedModel
from sakd_cli.rundir import RunDir
from sakd_cli.runs.branches import branch_rows, branches_of
from sakd_cli.runs.build import load_images, match_normalization
from sakd_cli.runs.initial_weights import load_teacher
from sakd_cli.runs.job import Images
from sakd_cli.runs.locate import find_teacher


class Target(NamedTuple):
    """What to evaluate: a weights file or folder, the run that it comes from (if any), and its settings.

    teacher_required  it is an error where the teacher is not to be found
    """

    weights: Path
    run: RunDir | None
    layers: list[ConfigSource]
    teacher_required: bool = False


def evaluate_networks(targets: Iterable[Target], reporter: Reporter) -> Iterator[Evaluation]:
    """One document per target.

    Weights of no run are evaluated on the data set of their header. Raises UsageError on other classes.
    """
    loaded: dict[DataConfig, Images] = {}
    for target in targets:
        network = artifact.load(target.weights)
        named = ConfigSource("the weights' header", {"data": seen_in(network.card)})
        config: EvalConfig = resolve("eval", [named, *target.layers]).config
        words = config.data.model_copy(update={"validation": 0.0})
        images = loaded.setdefault(words, load_images(words)) if words not in loaded else loaded[words]
        match_normalization(network, images, str(target.weights))
        yield _evaluate(target, network, config, images, reporter)


def seen_in(card: NetworkCard) -> dict[str, Any]:
    """The words for the images that a network was trained on, as far as its header knows them."""
    kind = DATASETS.get(card.dataset)
    return {"name": card.dataset} | ({"size": card.side} if kind and "size" in kind.model_fields else {})


def _evaluate(target: Target, network: Artifact, config: EvalConfig, images: Images, reporter: Reporter) -> Evaluation:
    device, dataset, run = pick_device(config.device), images.dataset, target.run
    teacher = _teacher(target, config, images, reporter)
    branches = branches_of(target.weights, network)
    mode = resolve_mode(Runtime(), device)
    model = mode.to_memory_format(network.model.to(device)).eval()
    batches = EvalLoader(dataset.test, dataset, device=device, batch_size=config.batch_size)
    unfinished = " of a run that is not finished" if run and not run.finished else ""
    networks = [model] if teacher is None else [model, mode.to_memory_format(teacher[1].model.to(device)).eval()]
    *answers, labels = _answers(networks, followed(batches, reporter, f"evaluating {target.weights}{unfinished}"))
    pairs, mistakes = confusions(answers[0].logits, labels, dataset.classes)
    own, scores = _quality(model, answers[0], labels, batches.batch_size, images)
    quality: TeacherQuality | None = None
    of_teacher: Sequence[float | None] = [None] * len(dataset.classes)
    if teacher is not None:
        theirs, teacher_scores = _quality(teacher[1].model, answers[1], labels, batches.batch_size, images)
        of_teacher = teacher_scores.top1_of_class
        quality = TeacherQuality(
            **dict(theirs),
            network=teacher[1].model.name,
            path=str(teacher[0]),
            sha256=teacher[1].sha256,
            agreement=agreement(answers[0], answers[1], labels),
        )
    batch, seconds = min(config.timing_batch, config.batch_size), config.timing_seconds
    rows = zip(dataset.classes, scores.images_of_class, scores.top1_of_class, of_teacher, mistakes, strict=True)
    return Evaluation(
        **dict(own),
        weights=str(target.weights),
        run=str(run.path) if run else None,
        finished=run.finished if run else None,
        sha256=network.sha256,
        network=model.name,
        dataset=dataset.name,
        images=len(labels),
        device=str(device),
        memory=Memory(batch=batch, bytes=peak_memory(model, images.side, batch)),
        speed=speed(model, images.side, device, batch=batch, seconds=seconds) if seconds else None,
        teacher=quality,
        branches=None if branches is None else branch_rows(model, branches.to(device), batches),
        confusions=pairs,
        classes=[
            ClassMetrics(name=name, images=count, top1=top1, teacher_top1=teacher_top1, confused_with=mistake)
            for name, count, top1, teacher_top1, mistake in rows
        ],
    )


def test_scores(model: StagedModel, dataset: Dataset, device: torch.device, reporter: Reporter, title: str) -> Scores:
    """Figures of a network that is on `device`, on all test images."""
    batches = EvalLoader(dataset.test, dataset, device=device)
    return evaluate(model, followed(batches, reporter, title), len(dataset.classes))


def _teacher(target: Target, config: EvalConfig, images: Images, reporter: Reporter) -> tuple[Path, Artifact] | None:
    """The teacher that the words name, and where it lies; None where they name none."""
    if config.teacher is None:
        return None
    try:
        path = find_teacher(config)
        if path is None:
            source = config.teacher.source
            raise UsageError(f"teacher: no finished {source} on {config.data.name} in {config.runs_dir}")
        teacher = load_teacher(config, path)
        if config.teacher.sha256 not in (None, teacher.sha256):
            raise UsageError(f"{path}: is not the teacher of this run (its SHA-256 differs)")
        match_normalization(teacher, images, str(path))
    except UsageError as error:
        if target.teacher_required:
            raise
        reporter.warn(f"not compared with its teacher: {error.message}")
        return None
    return path, teacher


@torch.inference_mode()
def _answers(networks: list[StagedModel], batches: Iterable[tuple[Tensor, Tensor]]) -> list[Any]:
    """Each network's Answers to all images, then the labels [N]; everything stays on the device."""
    found: list[list[Answers]] = [[] for _ in networks]
    labels = []
    for images, truth in batches:
        for network, answers in zip(networks, found, strict=True):
            embedding = network.run(images, 0, len(network.stages))
            answers.append(Answers(network.head(embedding).float(), embedding.float()))
        labels.append(truth)
    whole = [Answers(*(torch.cat(parts) for parts in zip(*answers, strict=True))) for answers in found]
    return [*whole, torch.cat(labels)]


def _quality(
    model: StagedModel, answers: Answers, labels: Tensor, batch_size: int, images: Images
) -> tuple[Quality, Scores]:
    """A network's own metrics, and its scores by class."""
    # In the batches of an evaluation in training: sums are rounded alike, and the metrics are equal to the last bit.
    parts = zip(answers.logits.split(batch_size), labels.split(batch_size), strict=True)
    scores = score_logits(parts, len(images.dataset.classes))
    (brier, ece), costs = calibration(answers.logits, labels), cost(model, images.side)
    return Quality(
        top1=scores.top1,
        top5=scores.top5,
        loss=scores.loss,
        brier=brier,
        ece=ece,
        parameters=costs.parameters,
        macs=costs.macs,
    ), scores


def followed(batches: EvalLoader, reporter: Reporter, title: str) -> Iterator[tuple[Tensor, Tensor]]:
    """The same batches, with the reporter told of each."""
    reporter.begin(title, len(batches))
    try:
        for step, batch in enumerate(batches, start=1):
            yield batch
            reporter.advance(step)
    finally:
        reporter.end()
