"""What `sakd eval` and `sakd predict` print with `--json`: of one network, of an ensemble, of several, of pictures

Accuracies (top1, top5) are in percent, fractions in [0, 1], losses are mean cross-entropies in nats (the negative
log-likelihood), macs are multiply-accumulates for one image; what is not known is null.
"""

from typing import Literal

from sakd_cli.documents.base import Document, Number, Part


class Metrics(Part):
    """The three metrics that every network has."""

    top1: float
    top5: float
    loss: float


class Averages(Part):
    """Means over the classes, in percent: macro counts each alike, weighted each by its images.

    balanced_accuracy: mean recall of the classes that have images; auroc: area under the ROC curve of each class
    against the others, mean over the classes where there are both, 0 to 100; null where there are none.
    """

    precision_macro: float
    recall_macro: float
    f1_macro: float
    precision_weighted: float
    recall_weighted: float
    f1_weighted: float
    balanced_accuracy: float
    auroc: Number


class Judged(Metrics):
    """What can be read from answers to the test images.

    brier: mean squared distance of the probabilities from the one-hot label, 0 to 2; ece: expected calibration error in
    15 bins, 0 to 1; averages: null in documents of earlier versions.
    """

    brier: float
    ece: float
    averages: Averages | None = None


class Quality(Judged):
    """A network's own metrics on the test images."""

    parameters: int
    macs: int


class Agreement(Part):
    """Student and teacher on the same images.

    top1: % with the same first answer; kl: KL(teacher || student) in nats; cka: linear CKA of the pooled vectors, 0 to
    1; counts of images: both_wrong, of these same_wrong_answer; teacher_only_wrong, student_only_wrong.
    """

    top1: float
    kl: float
    cka: Number
    both_wrong: int
    same_wrong_answer: int
    teacher_only_wrong: int
    student_only_wrong: int


class TeacherQuality(Quality):
    """The teacher's own metrics, measured in the same pass."""

    network: str
    path: str
    sha256: str
    agreement: Agreement


class Quartiles(Part):
    """`runs` timed forward passes of `batch` images: median and quartiles."""

    batch: int
    runs: int
    median: float
    low: float
    high: float


class Speed(Part):
    """latency in milliseconds, throughput in images per second; memory: the GPU allocator's peak in bytes.

    busy: cores that other programs used meanwhile, null where that is not known, of `cores` of the machine; where these
    are more than it had to spare, the figures are of a busy machine, and too slow.
    """

    device: str
    threads: int
    latency: Quartiles
    throughput: Quartiles
    memory: int | None
    busy: Number = None
    cores: int | None = None

    @property
    def disturbed(self) -> bool:
        """Whether other programs took cores that this one wanted."""
        return self.busy is not None and self.cores is not None and self.threads + self.busy > self.cores + 0.25


class Memory(Part):
    """Most bytes of tensors alive at once in a forward pass of `batch` images, counted, the same on every machine."""

    batch: int
    bytes: int


class Branch(Part):
    """A student branch that a student-friendly teacher was trained with; its metrics are null in a plan."""

    student: str
    behind: str
    transform: str
    parameters: int
    macs: int
    top1: Number = None
    top5: Number = None
    loss: Number = None


class Confusion(Part):
    """How many images of a class were predicted as another; fraction of the class's images."""

    class_: str
    predicted_as: str
    images: int
    fraction: float


class ClassBase(Part):
    """One class: top1 (its recall) is null where it has no image; confused_with: its most frequent wrong answer.

    precision, f1: in percent; precision is null where it is never predicted.
    """

    name: str
    images: int
    top1: Number
    precision: Number = None
    f1: Number = None
    confused_with: Confusion | None


class ClassMetrics(ClassBase):
    """One class, and its top-1 by the teacher."""

    teacher_top1: Number = None


class EvaluationBase(Document):
    """What was evaluated: run and finished are null for weights of no run.

    split: train, val, test, or all of a folder; trained_on: how many of the images were trained on, null: not known.
    confusion_matrix: images of each class (row) by predicted class, with --confusion; else null.
    """

    weights: str
    run: str | None
    finished: bool | None
    sha256: str
    network: str
    dataset: str
    split: str = "test"
    images: int
    trained_on: int | None = None
    device: str
    confusions: list[Confusion]
    confusion_matrix: list[list[int]] | None = None


class Evaluation(Quality, EvaluationBase):
    """`sakd eval RUN --json`. teacher: null where none is known or to be found; branches: of a student-friendly one."""

    schema_: Literal["sakd.eval/3"] = "sakd.eval/3"
    memory: Memory
    speed: Speed | None
    teacher: TeacherQuality | None
    branches: list[Branch] | None
    classes: list[ClassMetrics]


class ExitCosts(Part):
    """exits: images that left after each stage; macs: mean per image; cost: that as a fraction of the teacher's."""

    exits: list[int]
    macs: float
    cost: Number


class ExitPoint(ExitCosts):
    """Metrics and cost under one threshold for all stages (null: no image leaves early).

    agreement: % of the images with the answer of all members; pareto: no other points, or mixtures of two, are better
    and as cheap.
    """

    theta: Number
    top1: float
    agreement: float
    pareto: bool


class ExitMetrics(Metrics, ExitCosts):
    """An ensemble on the test images, with or without early exits."""


class ExitTeacher(Part):
    """Whose cost that of an ensemble is a fraction of; null where it is not known."""

    network: str | None
    macs: int | None


class ExitRule(Part):
    """How the thresholds were fitted, as `residual.*`."""

    rule: str
    delta: float
    theta: float
    budget: float
    uncertainty: str


class EnsembleExits(ExitRule, ExitCosts):
    """A student with its residual students: who they are, and which images leave where.

    early_exit: whether images could leave early; thresholds: one per stage but the last, -1: no image leaves there;
    curve: the dearest point first, null where it was not computed.
    """

    early_exit: bool
    members: list[str]
    member_macs: list[int]
    teacher: ExitTeacher
    thresholds: list[float]
    curve: list[ExitPoint] | None


class EnsembleClassMetrics(ClassBase):
    """One class; macs: mean per image."""

    macs: Number


class EnsembleEvaluation(Judged, EvaluationBase):
    """`sakd eval --json` of an ensemble, or with one of its options. parameters: of all members; macs: mean."""

    schema_: Literal["sakd.ensemble/2"] = "sakd.ensemble/2"
    parameters: int
    macs: float
    ensemble: EnsembleExits
    classes: list[EnsembleClassMetrics]


class Evaluations(Document):
    """`sakd eval RUN RUN ... --json`."""

    schema_: Literal["sakd.evals/2"] = "sakd.evals/2"
    evaluations: list[Evaluation | EnsembleEvaluation]


class ClassProbability(Part):
    """A class and its softmax probability, 0 to 1."""

    class_: str
    probability: float


class Prediction(Part):
    """One picture: its classes, the likeliest first; none, and the reason, where it could not be read.

    exit: of residual students the stage, from 0, after which the image left; null without such students.
    """

    file: str
    classes: list[ClassProbability]
    exit: int | None = None
    error: str | None = None


class Predictions(Document):
    """`sakd predict NETWORK PATH... --json`; failed: pictures that could not be read; seconds: with reading them."""

    schema_: Literal["sakd.predict/1"] = "sakd.predict/1"
    weights: str
    sha256: str
    network: str
    dataset: str
    device: str
    images: int
    failed: int
    seconds: float
    images_per_second: Number
    predictions: list[Prediction]
