"""One run, built and ready: what `build.py` makes of settings, and everything above it works on."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sakd_cli.config.datasets import DataConfig, FilesConfig
from sakd_cli.config.effective import effective, router_start, steps_per_epoch
from sakd_cli.config.networks import find_network
from sakd_cli.config.preprocessing import ImageSize, Preprocessing, height_width, shown
from sakd_cli.config.routers import LearnedConfig
from sakd_cli.config.training import DistillConfig, RunConfig
from sakd_cli.data import fingerprint
from sakd_cli.data.dataset import Dataset, Split
from sakd_cli.data.files import Files
from sakd_cli.data.fingerprint import Fingerprint
from sakd_cli.data.sources import preload
from sakd_cli.documents.training import ClassBalance, PlannedNetwork, PlannedSpot
from sakd_cli.engine.runtime import Mode
from sakd_cli.engine.task import Task
from sakd_cli.models.artifact import Artifact, NetworkCard
from sakd_cli.models.cost import Cost
from sakd_cli.models.spot import Spot
from sakd_cli.models.staged import StagedModel
from sakd_cli.runs.locate import Claim
from sakd_cli.tasks.criterion import class_weights
from sakd_cli.tasks.distill import DistillTask


@dataclass(frozen=True)
class Images:
    """A data set cut into what trains, what chooses the best epoch (None: the test set does) and what tests.

    calibration   where there are residual students: decides when to stop and who leaves early
    """

    dataset: Dataset
    train: Split
    held_out: Split | None
    calibration: Split | None = None

    @property
    def parts(self) -> dict[str, Split]:
        """The parts that there are."""
        parts = {"train": self.train, "val": self.held_out, "calibration": self.calibration, "test": self.dataset.test}
        return {name: part for name, part in parts.items() if part is not None}

    @property
    def teacher_sees(self) -> Preprocessing | None:
        """As what a teacher sees the crops of the training images; None: as the student does."""
        return self.train.images.spec.also if isinstance(self.train.images, Files) else None

    @property
    def teacher_side(self) -> ImageSize:
        """Side of a teacher's images in training, or their height and width."""
        return self.side if self.teacher_sees is None else self.teacher_sees.size

    def fingerprint(self, config: DataConfig, begun: Path | None = None) -> Fingerprint:
        """Which images these are.

        begun  a run that goes on with them: DataError, naming the first differences, where it had others
        """
        then = None if begun is None else fingerprint.read(begun)
        mode = config.fingerprint if isinstance(config, FilesConfig) else "auto"
        now = fingerprint.of_images(self.dataset.classes, self.parts, then.mode if then else mode)
        if then is not None:
            hint = "put them back; if the folder has moved: --data-root DIR; or start a new run"
            fingerprint.require_none(fingerprint.differences(then, now), str(begun), hint)
        return now

    @property
    def side(self) -> ImageSize:
        """Side of the square images in pixels, or their height and width."""
        return self.train.side

    def preload(self) -> None:
        """Decode what is to be held in memory, before anything else. Raises DataError naming a file that is bad."""
        preload(self.train, scale=self.dataset.scale)
        for split in (self.held_out, self.calibration, self.dataset.test):
            if split is not None:
                preload(split)


@dataclass(frozen=True)
class Job:
    """One run, built and ready: its task, its images and what the reports say of it."""

    config: RunConfig
    device: torch.device
    mode: Mode
    images: Images
    task: Task
    network: StagedModel
    cost: Cost
    spots: tuple[Spot, ...] = ()
    teacher: Artifact | None = None
    teacher_path: Path | None = None
    teacher_claim: Claim | None = None
    teacher_cost: Cost | None = None
    notes: tuple[str, ...] = ()

    @property
    def card(self) -> NetworkCard:
        """How the delivered network introduces itself."""
        data = self.images.dataset
        return NetworkCard(self.network.name, data.name, data.classes, data.mean, data.std, self.images.side, data.seen)


def warnings_of(job: Job) -> list[str]:
    """What is worth knowing before hours are spent: about the images, and of a router that cannot act."""
    notes = [*job.images.dataset.notes, *job.notes]
    if skipped := job.images.dataset.skipped:
        notes.append(f"{skipped} files could not be read and are left out (sakd data check names them)")
    side, pixels = job.images.side, math.prod(height_width(job.images.side))
    if pixels > 64**2 and not job.network.infos[0].size and job.network.infos[0].stride == 1:
        notes.append(
            f"{job.network.name} is made for images of 32 pixels; those of "
            f"{side if isinstance(side, int) else shown(side)} take {pixels / 32**2:.0f} times as long "
            "(--set data.size=64)"
        )
    card = job.teacher.card.preprocessing if job.teacher else None
    if card is not None and isinstance(data := job.config.data, FilesConfig):  # a size of its own is meant
        sized = card.model_copy(update=data.seen.model_dump(include={"size", "resize"}))
        notes += data.seen.differences(sized, "the teacher's card")
    if isinstance(job.config, DistillConfig) and isinstance(job.config.router, LearnedConfig) and job.teacher:
        kin = find_network(job.config.student).kin == find_network(job.teacher.model.name).kin
        steps = steps_per_epoch(len(job.images.train), job.config.train.batch_size)
        notes += filter(None, [router_start(job.config, one_family=kin, steps=steps).note])
    return notes


def balance_of(job: Job, top1: Sequence[float | None]) -> list[ClassBalance]:
    """The classes of a run that balances them, by sampling or in its loss; top1: of each, in percent."""
    config, data, labels = job.config, job.images.dataset, job.images.train.labels.cpu()
    if config.data.balance is None and config.train.class_weights is None and not config.train.focal_gamma:
        return []
    labels, rates = labels[labels >= 0], torch.ones(len(labels)) if data.rates is None else data.rates(labels)
    images = torch.bincount(labels, minlength=len(data.classes))
    shown = torch.bincount(labels, rates[labels >= 0], len(data.classes)) / images.clamp(min=1)
    weights = class_weights(config.train.class_weights, labels, data.classes)
    weights = torch.ones(len(data.classes)) if weights is None else weights
    columns = data.classes, images.tolist(), shown.tolist(), weights.tolist(), top1
    return [ClassBalance(class_=a, images=b, shown=c, weight=d, top1=e) for a, b, c, d, e in zip(*columns, strict=True)]


def effective_values(job: Job) -> dict[str, Any]:
    """What the settings that the config leaves open came to."""
    teacher = job.teacher.model.name if job.teacher else None
    return effective(job.config, teacher=teacher, counts=(len(job.images.train), len(job.images.held_out or ())))


def planned_networks(job: Job) -> list[PlannedNetwork]:
    """The networks of the main training, the teacher first."""
    costs = [("student" if job.teacher else "network", job.network.name, job.cost)]
    if job.teacher and job.teacher_cost:
        costs.insert(0, ("teacher", job.teacher.model.name, job.teacher_cost))
    return [PlannedNetwork(role=role, name=name, **cost._asdict()) for role, name, cost in costs]


def planned_spots(job: Job) -> list[PlannedSpot]:
    """The spots with their stages, shapes and adapters."""
    graft = job.task.graft if isinstance(job.task, DistillTask) else None
    spots = []
    for k, spot in enumerate(job.spots):
        adapted = graft if spot.kind != "logits" else None
        planned = PlannedSpot(
            name=spot.name,
            kind=spot.kind,
            student_shape=list(spot.student_shape),
            teacher_shape=list(spot.teacher_shape),
            student_stage=spot.student,
            teacher_stage=spot.teacher,
            student_to_teacher=str(adapted.to_teacher[k].geometry) if adapted else None,
            teacher_to_student=str(adapted.to_student[k].geometry) if adapted else None,
        )
        spots.append(planned)
    return spots
