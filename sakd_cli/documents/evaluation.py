"""The documents of `sakd eval`, `compare`, `report`, `export` with `--json` as closed classes; see `sakd show schema`

Accuracies (top1, top5) and shares called so are in percent, losses are mean cross-entropies in nats (the negative
log-likelihood), what is not known is null.
"""

from typing import Any, Literal

from pydantic import BaseModel, Field

from sakd_cli.documents.spots import Figure, Mean, Part, SpotsDocument
from sakd_cli.documents.sweep import SweepDocument, SweepPlan
from sakd_cli.documents.training import Bench, Imported, Plan, Summary


class Quality(Part):
    """A network's own figures on the test images.

    brier: mean squared distance of the probabilities from the one-hot label, 0 to 2; ece: expected calibration error in
    15 bins, 0 to 1; macs: multiply-accumulates for one image.
    """

    top1: float
    top5: float
    loss: float
    brier: float
    ece: float
    parameters: int
    macs: int


class Agreement(Part):
    """Student and teacher on the same images.

    top1: % with the same first answer; kl: KL(teacher || student) in nats; cka: linear CKA of the pooled vectors, 0 to
    1; counts of images: inherited (both wrong; of these same_answer with the same wrong class), corrected (only the
    teacher is wrong), new (only the student is wrong).
    """

    top1: float
    kl: float
    cka: Figure
    inherited: int
    same_answer: int
    corrected: int
    new: int


class Teacher(Quality):
    """The teacher's own figures, measured in the same pass."""

    network: str
    path: str
    sha256: str
    agreement: Agreement


class Spread(Part):
    """`runs` timed forward passes of `batch` images: median and quartiles."""

    batch: int
    runs: int
    median: float
    low: float
    high: float


class Speed(Part):
    """latency in milliseconds, throughput in images per second; memory: the GPU allocator's peak in bytes."""

    device: str
    threads: int
    latency: Spread
    throughput: Spread
    memory: int | None


class Memory(Part):
    """Most bytes of tensors alive at once in a forward pass of `batch` images, counted, the same on every machine."""

    batch: int
    bytes: int


class Branch(Part):
    """A student branch that a student-friendly teacher was trained with."""

    student: str
    behind: str
    transform: str
    parameters: int
    macs: int
    top1: float
    top5: float
    loss: float


class Mistake(Part):
    """How many images of a class were taken for another; share of the class's images, 0 to 1."""

    class_: str = Field(alias="class")
    taken_for: str
    images: int
    share: float


class ClassRow(Part):
    """One class: null where it has no image; mistaken_for: its most frequent wrong answer."""

    name: str
    images: int
    top1: Figure
    teacher_top1: Figure = None
    mistaken_for: Mistake | None


class Evaluation(Quality):
    """`sakd eval RUN --json`; loss is the negative log-likelihood. teacher: null where none is known or to be found."""

    schema_: Literal["sakd.eval/2"] = Field(alias="schema")
    weights: str
    run: str | None
    finished: bool | None
    sha256: str
    network: str
    dataset: str
    split: str
    images: int
    device: str
    memory: Memory
    speed: Speed | None
    teacher: Teacher | None
    branches: list[Branch] | None = None
    confusions: list[Mistake]
    classes: list[ClassRow]


class EnsembleClass(Part):
    """One class; macs: mean per image."""

    name: str
    images: int
    top1: Figure
    macs: Figure


class EnsembleTeacher(Part):
    """Whose cost that of an ensemble is a share of; null where it is not known."""

    network: str | None
    macs: int | None


class SweepPoint(Part):
    """Accuracy and cost under one threshold for all stages (null: nobody leaves early); agreement: % as of all."""

    theta: Figure
    top1: float
    agreement: float
    exits: list[int]
    macs: float
    cost: Figure
    hull: bool


class EnsembleFacts(Part):
    """A student with its residual students: who they are, who leaves where (-1: nobody), at what mean cost."""

    early: bool
    members: list[str]
    member_macs: list[int]
    teacher: EnsembleTeacher
    rule: str
    delta: float
    theta: float
    budget: float
    uncertainty: str
    thresholds: list[float]
    exits: list[int]
    macs: float
    cost: Figure
    sweep: list[SweepPoint] | None


class EnsembleEvaluation(Part):
    """`sakd eval --json` of an ensemble, or with --adaptive, --always-on, --sweep or --plot. macs: mean per image."""

    schema_: Literal["sakd.ensemble/1"] = Field(alias="schema")
    weights: str
    run: str | None
    finished: bool | None
    sha256: str
    network: str
    dataset: str
    split: str
    images: int
    device: str
    top1: float
    top5: float
    loss: float
    parameters: int
    macs: float
    ensemble: EnsembleFacts
    classes: list[EnsembleClass]


class Evaluations(Part):
    """`sakd eval RUN RUN ... --json`."""

    schema_: Literal["sakd.evals/1"] = Field(alias="schema")
    evaluations: list[Evaluation | EnsembleEvaluation]


class Best(Part):
    """The epoch that the selection images chose, and its top-1 on the test images."""

    epoch: Figure
    top1: Figure


class Point(Part):
    """One epoch: means over the training images as augmented (loss: cross-entropy); top1, loss: on selection."""

    epoch: int
    train_loss: Figure
    train_top1: Figure
    selected_on: str | None
    top1: Figure
    loss: Figure


class RunRow(Part):
    """One run; top1, top5, loss: last epoch on the test images, null while it is not finished; group: an index."""

    run: str
    finished: bool
    task: str | None
    network: str | None
    dataset: str | None
    method: str | None
    router: str | None
    seed: int | None
    epochs: int | None
    top1: Figure
    top5: Figure
    loss: Figure
    best: Best
    seconds: Figure
    teacher_top1: Figure
    curve: list[Point]
    group: int


class Difference(Part):
    """A word of the config that is not the same everywhere; one value per run."""

    key: str
    values: list[Any]


class Group(Part):
    """Runs that differ in the seed only; distilled: whether anything was."""

    label: str
    distilled: bool
    seeds: list[int]
    top1: Mean | None
    top5: Mean | None
    loss: Mean | None


class Versus(Part):
    """Group `group` less group `against` in top-1 points, paired by seed: mean, its interval, p of a paired t-test.

    few seeds: below three, or all differences equal. unequal: words beside the distillation that differ.
    """

    group: int
    against: int
    seeds: list[int]
    difference: Figure
    low: Figure
    high: Figure
    p: Figure
    verdict: Literal["better", "worse", "noise", "few seeds", "unknown"]
    unequal: list[str]
    text: str


class Comparison(Part):
    """`sakd compare RUN... --json`, and what `sakd distill --with-control`, `--routers` or `--seeds` prints."""

    schema_: Literal["sakd.compare/1"] = Field(alias="schema")
    level: float
    runs: list[RunRow]
    differences: list[Difference]
    groups: list[Group]
    comparisons: list[Versus]


class Report(Part):
    """`sakd report RUN --json`: the files that were written, the page first, and the titles of its sections."""

    schema_: Literal["sakd.report/1"] = Field(alias="schema")
    run: str
    written: list[str]
    sections: list[str]


class Check(Part):
    """The file's outputs held against the network's: largest difference of a logit, equal answers in percent.

    real: on test images of its data set; otherwise on noise, as the data set was not at hand
    """

    images: int
    difference: float
    same_answer: float
    real: bool


class Latency(Part):
    """Milliseconds for one image on the CPU: of the network in PyTorch and of the file."""

    threads: int
    network: Spread
    file: Spread


class Export(Part):
    """`sakd export RUN --json`. input: pixels (between 0 and 1) or normalised (by mean and std)."""

    schema_: Literal["sakd.export/1"] = Field(alias="schema")
    folder: str
    format: str
    file: str
    bytes: int
    sha256: str
    network: str
    dataset: str
    classes: int
    input: Literal["pixels", "normalised"]
    check: Check
    latency: Latency | None


class DataPart(Part):
    """Training or test images; least, most: images of a class."""

    folder: str
    images: int
    classes: int
    least: int
    most: int


class DataFinding(Part):
    """One thing that is wrong with a data set, and where.

    kind: missing, empty-class, single-class, case, classes-differ, loop, count, unreadable
    """

    kind: str
    path: str
    text: str


class DataCheck(Part):
    """`sakd data check DIR --json`; read: files that were decoded. Nothing is wrong where `findings` is empty."""

    schema_: Literal["sakd.data-check/1"] = Field(alias="schema")
    dataset: str
    root: str | None
    classes: int
    parts: list[DataPart]
    read: int
    findings: list[DataFinding]


DOCUMENTS: dict[str, type[BaseModel]] = {
    "summary": Summary,
    "plan": Plan,
    "eval": Evaluation,
    "ensemble": EnsembleEvaluation,
    "evals": Evaluations,
    "compare": Comparison,
    "report": Report,
    "export": Export,
    "spots": SpotsDocument,
    "data": DataCheck,
    "sweep": SweepDocument,
    "sweep-plan": SweepPlan,
    "bench": Bench,
    "import": Imported,
}
