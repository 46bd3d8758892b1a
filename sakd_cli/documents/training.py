"""What a training leaves behind (`summary.json`) and what `--dry-run` says of it

Accuracies are in percent, losses mean cross-entropies in nats, times in seconds; what is not known is null.
"""

from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from sakd_cli.documents.base import Document, Number, Part
from sakd_cli.documents.evaluation import Branch, ExitMetrics, ExitPoint, ExitRule, Metrics


class MixtureGroup(Part):
    """One stage of the teacher. alpha: the weight of each of its blocks, in order; positions: which blocks, from 1.

    largest: position of the block with the largest weight; entropy: of the weights, in nats.
    """

    exact: ClassVar[frozenset[str]] = frozenset({"alpha", "beta"})  # a run can begin with them
    index: int
    name: str
    blocks: int
    positions: list[int]
    beta: list[float] | None
    alpha: list[float]
    largest: int
    entropy: float


class Mixtures(Document):
    """The mixtures and where they come from. search: the settings of the search, null where there was none."""

    schema_: Literal["sakd.dfa/1"] = "sakd.dfa/1"
    sakd: str
    weights: str
    teacher: str
    dataset: str
    norm: str
    distance: str
    seed: int
    search: dict[str, Any] | None
    groups: list[MixtureGroup]


class EpochMetrics(Metrics):
    """One epoch's network on the test images; selected_on: the images that chose it, null for the last epoch."""

    epoch: int
    split: str = "test"
    selected_on: str | None = None


class TrainingTeacher(Metrics):
    """The teacher, measured anew on the test images."""

    network: str
    path: str
    sha256: str
    parameters: int
    macs: int


class FriendlyTraining(Part):
    """How a student-friendly teacher was trained: as `friendly.*`, and what its branches cost and reach."""

    students: list[str]
    lambda_t: float
    lambda_kl: float
    lambda_ce: float
    tau: float
    kl: str
    share_branches: bool
    detach_target: bool
    detach_features: bool
    training_macs: int
    branches: list[Branch]


class Energies(Part):
    """Relative energy of what the logits lack after each stage, on two splits."""

    calibration: list[float]
    train: list[float]


class EnsembleTeacher(Part):
    """Whose logits the residual students complete."""

    architecture: str
    sha256: str
    macs: int


class EnsembleTraining(Part):
    """A student with its residual students. rule: how the thresholds were fitted, on `calibration_images`.

    early, all: on the test images with early exits, and with all members for every image; stage_top1: after each stage
    that was trained; dropped: 1 where the last stage was dropped; stopped: why no further one came.
    """

    members: list[str]
    member_macs: list[int]
    thresholds: list[float]
    early: ExitMetrics
    all: ExitMetrics
    curve: list[ExitPoint]
    rule: ExitRule
    energies: Energies
    dropped: int
    stopped: str
    teacher: EnsembleTeacher
    calibration_images: int
    stage_top1: list[float]


class ClassBalance(Part):
    """A class of a run that balances them: training images, how often an epoch shows one of them, weight in the loss.

    top1: of the last epoch, on the test images.
    """

    class_: str
    images: int
    shown: float
    weight: float
    top1: Number


class LogEnd(Part):
    """How long a log of a run is; its digest: d(n) = SHA-256 of d(n - 1) and line n without its end, d(0) is empty."""

    bytes: int
    sha256: str


class Summary(Document):
    """`sakd pretrain-teacher --json`, `sakd distill --json`, and `summary.json` of a run (there, run is null).

    last, best: the last epoch (the reported result) and the one that the validation set chose; trained: the last one's
    weights as they were trained, where others are delivered (train.ema, train.batchnorm); seconds: of the main
    training; phases: fractions of them; extended: the numbers of epochs that it was to have before it was extended;
    classes: where a run balances them; more_teachers: where there are several;
    logs: where `metrics.jsonl` and the others ended; files: SHA-256 of what else readers take figures or weights from.
    """

    schema_: Literal["sakd.summary/2"] = "sakd.summary/2"
    run: str | None = None
    task: str
    network: str
    dataset: str
    epochs: int
    images: int
    skipped_images: int
    protocol: str
    parameters: int
    macs: int
    device: str
    torch: str
    last: EpochMetrics
    best: EpochMetrics
    trained: EpochMetrics | None = None
    seconds: float
    phases: dict[Literal["train", "evaluate", "save", "other"], float]
    teacher: TrainingTeacher | None = None
    more_teachers: list[TrainingTeacher] = Field(default_factory=list)
    friendly: FriendlyTraining | None = None
    ensemble: EnsembleTraining | None = None
    mixtures: Mixtures | None = None
    search_seconds: Number = None
    survey_seconds: Number = None
    extended: list[int] = Field(default_factory=list)
    classes: list[ClassBalance] = Field(default_factory=list)
    logs: dict[str, LogEnd] = Field(default_factory=dict)
    files: dict[str, str] = Field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """The run's; only `summary.json` itself does not say it."""
        return Path(str(self.run))


class PlannedNetwork(Part):
    """A network of the run; path: where a teacher's weights lie."""

    role: str
    name: str
    parameters: int
    macs: int
    path: str | None = None


class PlannedSpot(Part):
    """A spot: stages, shapes of one sample's features there, and the adapters between them."""

    name: str
    kind: Literal["map", "embedding", "logits"]
    student_shape: list[int]
    teacher_shape: list[int]
    student_stage: int
    teacher_stage: int
    student_to_teacher: str | None
    teacher_to_student: str | None


class Plan(Document):
    """`--dry-run --json` of a training; trainable: parameters by group; batch: terms of the loss of one real batch."""

    schema_: Literal["sakd.plan/2"] = "sakd.plan/2"
    networks: list[PlannedNetwork]
    spots: list[PlannedSpot]
    trainable: dict[str, int]
    images: int
    batch: dict[str, float]
    steps_per_epoch: int
    effective: dict[str, Any]
    warnings: list[str]
    device: str
    mixtures: Mixtures | None = None
