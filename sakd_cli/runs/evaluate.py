"""Score saved networks on the test images, by more than one number"""

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
    """What to score: a weights file or folder, the run that it comes from (if any), and the words about it.

    compelled  a teacher was asked for, so that it is an error if there is none
    """

    weights: Path
    run: RunDir | None
    layers: list[ConfigSource]
    compelled: bool = False


def scores(targets: Iterable[Target], reporter: Reporter) -> Iterator[dict[str, Any]]:
    """One document per target, of the schema `report/documents.py` calls Evaluation.

    Weights of no run are scored on the data set of their header. Raises UsageError on other classes.
    """
    loaded: dict[DataConfig, Images] = {}
    for target in targets:
        network = artifact.load(target.weights)
        named = ConfigSource("the weights' header", {"data": seen_in(network.card)})
        config: EvalConfig = resolve("eval", [named, *target.layers]).config
        words = config.data.model_copy(update={"validation": 0.0})
        images = loaded.setdefault(words, load_images(words)) if words not in loaded else loaded[words]
        match_normalization(network, images, str(target.weights))
        yield _score(target, network, config, images, reporter)


def seen_in(card: NetworkCard) -> dict[str, Any]:
    """The words for the images that a network was trained on, as far as its header knows them."""
    kind = DATASETS.get(card.dataset)
    return {"name": card.dataset} | ({"size": card.side} if kind and "size" in kind.model_fields else {})


def _score(target: Target, network: Artifact, config: EvalConfig, images: Images, reporter: Reporter) -> dict[str, Any]:
    device, dataset, run = pick_device(config.device), images.dataset, target.run
    teacher = _teacher(target, config, images, reporter)
    branches = branches_of(target.weights, network)
    mode = resolve_mode(Runtime(), device)
    model = mode.to_memory_format(network.model.to(device)).eval()
    batches = EvalLoader(dataset.test, dataset, device=device, batch_size=config.batch_size)
    unfinished = " of a run that is not finished" if run and not run.finished else ""
    heard = [model] if teacher is None else [model, mode.to_memory_format(teacher[1].model.to(device)).eval()]
    *answers, labels = _answers(heard, followed(batches, reporter, f"scoring {target.weights}{unfinished}"))
    pairs, mistaken = confusions(answers[0].logits, labels, dataset.classes)
    figures, rows = _figures(model, answers[0], labels, batches.batch_size, images)
    about = None
    if teacher is not None:
        theirs, taught = _figures(teacher[1].model, answers[1], labels, batches.batch_size, images)
        about = {"network": teacher[1].model.name, "path": str(teacher[0]), "sha256": teacher[1].sha256} | theirs
        about["agreement"] = agreement(answers[0], answers[1], labels)
        rows = [row | {"teacher_top1": row_of["top1"]} for row, row_of in zip(rows, taught, strict=True)]
    batch, seconds = min(config.timing_batch, config.batch_size), config.timing_seconds
    named = {"weights": str(target.weights), "sha256": network.sha256, "network": model.name, "dataset": dataset.name}
    rows = [row | {"mistaken_for": wrong} for row, wrong in zip(rows, mistaken, strict=True)]
    known = described(named, run, len(labels), figures | {"device": str(device)}, rows)
    return {
        "schema": "sakd.eval/2",
        **known,
        "memory": {"batch": batch, "bytes": peak_memory(model, images.side, batch)},
        "speed": speed(model, images.side, device, batch=batch, seconds=seconds) if seconds else None,
        "teacher": about,
        **({"branches": branch_rows(model, branches.to(device), batches)} if branches is not None else {}),
        "confusions": pairs,
    }


def described(
    named: dict[str, Any], run: RunDir | None, images: int, figures: dict[str, Any], classes: list[dict[str, Any]]
) -> dict[str, Any]:
    """What every document of `sakd eval --json` has. named: weights, sha256, network, dataset."""
    return {
        "run": str(run.path) if run else None,
        "finished": run.finished if run else None,
        **named,
        "split": "test",
        "images": images,
        **figures,
        "classes": classes,
    }


def class_rows(scores: Scores, classes: Sequence[str]) -> list[dict[str, Any]]:
    """Images and top-1 of each class, by name."""
    per_class = zip(classes, scores.images_of_class, scores.top1_of_class, strict=True)
    return [{"name": name, "images": count, "top1": top1} for name, count, top1 in per_class]


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
        if target.compelled:
            raise
        reporter.warn(f"not compared with its teacher: {error.message}")
        return None
    return path, teacher


@torch.inference_mode()
def _answers(networks: list[StagedModel], batches: Iterable[tuple[Tensor, Tensor]]) -> list[Any]:
    """Each network's Answers to all images, then the labels [N]; everything stays on the device."""
    heard: list[list[Answers]] = [[] for _ in networks]
    labels = []
    for images, truth in batches:
        for network, answers in zip(networks, heard, strict=True):
            embedding = network.run(images, 0, len(network.stages))
            answers.append(Answers(network.head(embedding).float(), embedding.float()))
        labels.append(truth)
    whole = [Answers(*(torch.cat(parts) for parts in zip(*answers, strict=True))) for answers in heard]
    return [*whole, torch.cat(labels)]


def _figures(
    model: StagedModel, answers: Answers, labels: Tensor, batch_size: int, images: Images
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A network's own figures, overall and by class."""
    classes = images.dataset.classes
    # In the batches of an evaluation in training: sums are rounded alike, and the figures are equal to the last bit.
    parts = zip(answers.logits.split(batch_size), labels.split(batch_size), strict=True)
    found = score_logits(parts, len(classes))
    quality = found.headline() | calibration(answers.logits, labels)
    return quality | cost(model, images.side)._asdict(), class_rows(found, classes)


def followed(batches: EvalLoader, reporter: Reporter, title: str) -> Iterator[tuple[Tensor, Tensor]]:
    """The same batches, with the reporter told of each."""
    reporter.begin(title, len(batches))
    try:
        for step, batch in enumerate(batches, start=1):
            yield batch
            reporter.advance(step)
    finally:
        reporter.end()
