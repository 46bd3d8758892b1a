"""One run, built and ready: what `build.py` makes of settings, and everything above it works on."""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sakd_cli.config.code import changed
from sakd_cli.config.datasets import FilesConfig, ShapesConfig
from sakd_cli.config.effective import effective, router_start, steps_of_run, steps_per_epoch
from sakd_cli.config.networks import of_one_family
from sakd_cli.config.options import PROTOCOLS
from sakd_cli.config.preprocessing import height_width, size_text
from sakd_cli.config.resolve import flat
from sakd_cli.config.training import DistillConfig, RunConfig
from sakd_cli.documents.training import ClassBalance, PlannedNetwork, PlannedSpot
from sakd_cli.engine.runtime import Mode
from sakd_cli.engine.task import Task
from sakd_cli.models.artifact import Artifact, NetworkCard
from sakd_cli.models.cost import Cost
from sakd_cli.models.spot import Spot
from sakd_cli.models.staged import StagedModel
from sakd_cli.runs.images import Images
from sakd_cli.runs.teachers import Teacher
from sakd_cli.tasks.criterion import class_weights
from sakd_cli.tasks.distill import DistillTask


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
    teachers: tuple[Teacher, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def teacher(self) -> Artifact | None:
        """The network to learn from, the first of several; None where nothing is distilled."""
        return self.teachers[0].network if self.teachers else None

    @property
    def card(self) -> NetworkCard:
        """How the delivered network introduces itself."""
        return NetworkCard.of(self.network.name, self.images.dataset, self.images.side)

    @property
    def steps(self) -> int:
        """Of all epochs."""
        return steps_of_run(self.config, len(self.images.shown))

    @property
    def protocol(self) -> str:
        """Which images choose the best epoch, and whether all is as published (`--protocol`)."""
        chosen = (
            "best epoch chosen on the data set's own validation images"
            if self.images.dataset.val
            else f"best epoch chosen on {100 * self.config.data.validation:g} % of the training images, held out"
            if self.images.held_out
            else "best epoch chosen on the test set (the literature's habit: optimistic)"
        )
        settings = flat(self.config.model_dump(mode="json"))
        if all(settings.get(key, value) == value for key, value in PROTOCOLS["published"].items()):
            return f"published, seed {self.config.seed}: the papers report the best epoch, not the last one; {chosen}"
        return f"the reported result is the last epoch on the test set; {chosen}"


def warnings_of(job: Job) -> list[str]:
    """What is worth knowing before hours are spent: about the images, and of a router that cannot act."""
    notes = [*job.images.dataset.notes, *job.notes, *changed(job.config.code or ())]
    if skipped := job.images.dataset.skipped:
        notes.append(f"files that could not be read and are left out: {skipped} (sakd data check names them)")
    if isinstance(job.config.data, ShapesConfig) and job.config.data.root is not None:
        notes.append("data.root: shapes is drawn and reads no folder (--dataset imagefolder does)")
    side, pixels = job.images.side, math.prod(height_width(job.images.side))
    if pixels > 64**2 and not job.network.infos[0].size and job.network.infos[0].stride == 1:
        notes.append(
            f"{job.network.name} is made for images of 32 pixels; those of "
            f"{side if isinstance(side, int) else size_text(side)} take {pixels / 32**2:.0f} times as long "
            "(--set data.size=64)"
        )
    card = job.teacher.card.preprocessing if job.teacher else None
    if card is not None and isinstance(data := job.config.data, FilesConfig):  # a size of its own is meant
        sized = card.model_copy(update=data.seen.model_dump(include={"size", "resize"}))
        notes += data.seen.differences(sized, "the teacher's card")
    if isinstance(job.config, DistillConfig) and job.config.learned and job.teacher:
        one_family = of_one_family(job.config.student, job.teacher.model.name)
        steps = steps_per_epoch(len(job.images.shown), job.config.train.batch_size)
        notes += filter(None, [router_start(job.config, one_family=one_family, steps=steps).note])
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


def label_of(job: Job, more: Iterable[str]) -> str:
    """What the folder of a new run is called, behind its date."""
    settings = job.config.model_dump()
    parts = [settings["task"], job.network.name, job.images.dataset.name]
    if job.teacher:
        parts[1:1] = [job.teacher.model.name]
        parts += [settings["method"]["name"], settings["router"]["name"]]
    parts += filter(None, more)
    parts += [f"seed{job.config.seed}"] if job.config.seed else []
    return re.sub(r"[/:]", ".", "-".join(parts))  # torchvision/resnet18, my.nets:small


def effective_values(job: Job) -> dict[str, Any]:
    """What the settings that the config leaves open came to."""
    teacher = job.teacher.model.name if job.teacher else None
    return effective(job.config, teacher=teacher, counts=(len(job.images.shown), len(job.images.held_out or ())))


def planned_networks(job: Job) -> list[PlannedNetwork]:
    """The networks of the main training, the teacher first."""
    found = [("teacher", one.network.model.name, one.cost, one.path) for one in job.teachers]
    found.append(("student" if job.teachers else "network", job.network.name, job.cost, None))
    return [
        PlannedNetwork(role=role, name=name, path=None if path is None else str(path), **cost._asdict())
        for role, name, cost, path in found
    ]


def planned_spots(job: Job) -> list[PlannedSpot]:
    """The spots with their stages, shapes and adapters."""
    members = job.task.members if isinstance(job.task, DistillTask) else []
    spots = []
    for place, spot in enumerate(job.spots):
        of, k = divmod(place, len(job.spots) // max(len(members), 1))
        adapted = members[of].graft if members and spot.kind != "logits" else None
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
