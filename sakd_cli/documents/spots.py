"""What `sakd inspect-spots --json` prints, and the two records of a run that it is made from

Fractions and probabilities lie in [0, 1], accuracies (top1) are in percent, losses are mean cross-entropies in nats,
entropies in bits. Lists with one entry per spot are in the order of `overall`. What is not known is null.
"""

from typing import Literal

from pydantic import Field, model_validator

from sakd_cli.documents.base import Document, Number, Part
from sakd_cli.documents.training import Mixtures

EXTREMES = 12  # images at each end of a spot; a run saves the pixels of as many
Split = Literal["train", "validation", "test"]
STEP_MEANS = ("router_loss_scaled_up", "router_loss_scaled_down", "count_penalty_active", "routed_ce", "student_ce")


class EpochSteps(Part):
    """Fractions of an epoch's steps, and two mean cross-entropies; null for routers without a routed pass.

    router_loss_scaled_up, _down: the router's loss was multiplied, divided by gamma; empty_selection: no sample was
    selected at the spot.
    """

    epoch: int
    samples: int = Field(ge=0)
    router_loss_scaled_up: Number
    router_loss_scaled_down: Number
    count_penalty_active: Number
    routed_ce: Number
    student_ce: Number
    empty_selection: list[Number]


class SpotInEpoch(Part):
    """One spot in one epoch: fraction of the samples distilled there, of each class too; mean routing probability.

    gradient_ratio: length of the distillation's gradient at the student's feature over that of the task's, both root
    mean squares over the epoch's steps and before any balancing; null where nothing was distilled or measured.
    """

    name: str
    kind: str
    fraction: Number
    probability: Number
    by_class: list[Number]
    gradient_ratio: Number = None


class TrackedImage(Part):
    """One training image: index in the data set's own split; visits and, per spot, distillations up to this epoch."""

    index: int
    visits: float
    distilled: list[float]


class EpochRecord(EpochSteps):
    """One line of `spots.jsonl`. tracked: the images of `tracked_places`; empty in records of earlier versions."""

    spots: list[SpotInEpoch] = Field(min_length=1)
    tracked: list[TrackedImage] = Field(default_factory=list)

    @model_validator(mode="after")
    def _complete(self) -> "EpochRecord":
        lengths = {len(self.empty_selection), *(len(image.distilled) for image in self.tracked)}
        if lengths != {len(self.spots)}:
            raise ValueError("empty_selection or tracked has another number of spots")
        return self


class SpotTotal(Part):
    """One spot in training: fraction of the samples distilled there, over all epochs and in single ones.

    probability: mean teacher-routing probability in the last epoch; null for routers without a policy.
    gradient_ratio: geometric mean over the epochs.
    """

    name: str
    kind: str
    fraction: Number
    first: Number
    last: Number
    min: Number
    max: Number
    probability: Number
    gradient_ratio: Number


class EpochFractions(EpochSteps):
    """One epoch: fraction of the samples distilled, mean teacher-routing probability and gradient ratio, per spot."""

    fraction: list[Number]
    probability: list[Number]
    gradient_ratio: list[Number]


class ClassDeviation(Part):
    """One class: its mean at each spot less that of all images."""

    name: str
    deviation: list[Number]

    @property
    def peak(self) -> Number:
        """The deviation that is largest in size, with its sign; None where no image of the class was seen."""
        return max((one for one in self.deviation if one is not None), key=abs, default=None)


class ClassFractions(ClassDeviation):
    """One class in training: mean over the epochs of the fraction distilled, per spot."""

    fraction: list[Number]


class SpotPlace(Part):
    """A spot, its stages, the shapes of one sample's feature maps there, and the adapters between them."""

    name: str
    kind: str
    student_stage: str | None = None
    teacher_stage: str | None = None
    student_shape: list[int] | None = None
    teacher_shape: list[int] | None = None
    student_to_teacher: str | None = None
    teacher_to_student: str | None = None


class SpotStatistics(SpotPlace):
    """One spot over the images: the value's mean, the mean of one sample, fraction above 0.5, entropy, quantiles.

    by_image: of the variance of the decisions, the share that knowing the image explains, var(p) / (m (1 - m)) with m
    the mean of p: 0 for a coin of one rate, 1 where every image is decided; null where all are distilled or none.
    """

    mean: float
    sampled: float
    above_half: float
    entropy: float
    p05: float
    p50: float
    p95: float
    by_image: Number = None


class ImageGroup(Part):
    """Some images: how many, mean value at each spot, top-1 of both networks on them."""

    images: int
    mean: list[Number]
    student_top1: Number
    teacher_top1: Number


class ClassGroup(ImageGroup, ClassDeviation):
    """The images of one class."""


class Classes(Part):
    """correlation: Pearson's, per spot, between a class's mean value and the student's top-1; correlation_p: its p."""

    correlation: list[Number]
    correlation_p: list[Number]
    rows: list[ClassGroup]


class Decile(ImageGroup):
    """A tenth of the images in order of a measure; `from` and `to` are its first and last value of it."""

    from_: float
    to: float


class Correctness(Part):
    """The images on which the student is correct or wrong, and the teacher is correct or wrong."""

    student_correct: bool
    teacher_correct: bool
    images: int
    mean: list[Number]

    @property
    def name(self) -> str:
        """`student correct, teacher wrong`."""
        student, teacher = ("correct" if yes else "wrong" for yes in (self.student_correct, self.teacher_correct))
        return f"student {student}, teacher {teacher}"


class AgreementGroup(Part):
    """Images by whether both networks give one answer, and who is right; error: standard error of each mean."""

    name: str
    images: int
    mean: list[Number]
    error: list[Number]


class Difficulty(Part):
    """By deciles of the student's cross-entropy and of the teacher's confidence (largest probability)."""

    by_student_loss: list[Decile]
    by_teacher_confidence: list[Decile]
    by_correctness: list[Correctness]
    by_agreement: list[AgreementGroup] = Field(default_factory=list)


class RoutingPath(Part):
    """A path such as TTS (a letter per spot, T = teacher) and its expected fraction of the images."""

    path: str
    fraction: float


class ExtremeImage(Part):
    """One image: index in the data set's own split, value at the spot, its class and what both networks predict.

    file: its path below the data set's folder; null where it is in no file of its own
    """

    index: int
    file: str | None = None
    value: float
    label: str | None = None
    student_prediction: str | None = None
    teacher_prediction: str | None = None
    student_loss: Number = None
    teacher_confidence: Number = None


class SpotExtremes(Part):
    """The images with the highest and the lowest value at a spot."""

    spot: str
    highest: list[ExtremeImage]
    lowest: list[ExtremeImage]

    @property
    def spread(self) -> float:
        """From the lowest value, as they are shown, to the highest."""
        known = [round(image.value, 3) for image in (*self.highest, *self.lowest)]
        return max(known, default=0.0) - min(known, default=0.0)


class PathExamples(Part):
    """The images for which a path is the most probable: how many, and those for which it is so most clearly."""

    path: str
    images: int
    examples: list[ExtremeImage]


class Score(Part):
    """Top-1 and loss on the test images."""

    top1: float
    loss: float


class SampledScore(Score):
    """Means over several samples of all gates; top1_std: standard deviation of top-1 over them."""

    draws: int
    top1_std: float


class ReliabilityBin(Part):
    """Images whose largest probability lies in one of equal intervals: its mean there, and the fraction right."""

    images: int
    confidence: Number
    correct: Number


class RoutedNetwork(Part):
    """The routed network on the test images, beside both networks alone; null without a multi-path network.

    reliability: of both networks alone, from the least confident images to the most; empty where it was not recorded
    """

    images: int
    student: Score
    teacher: Score
    sampled: SampledScore | None = None
    all_student: Score | None = None
    all_teacher: Score | None = None
    student_reliability: list[ReliabilityBin] = Field(default_factory=list)
    teacher_reliability: list[ReliabilityBin] = Field(default_factory=list)


class SurveyHeader(Part):
    """The header of `survey.safetensors`. digest: SHA-256 of its columns, since safetensors has no checksum."""

    format: Literal["sakd.survey/3"] = "sakd.survey/3"
    split: Split
    dataset: str
    classes: list[str]
    spots: list[SpotPlace]
    complement: bool
    routed: RoutedNetwork
    digest: str


class SamplesHeader(Part):
    """The header of `samples.safetensors`. digest: as in `SurveyHeader`."""

    format: Literal["sakd.samples/1"] = "sakd.samples/1"
    digest: str


class Measured(Part):
    """What the trained router decides for each image.

    source      survey: saved at the end of the run; live: just now; samples: only how often each image was distilled
    value       what "mean" is a mean of: the teacher-routing probability, a sample of it (--sample), or the rate at
                which an image was distilled; null: this router has none for these images
    seed        of the samples
    complement  the losses distilled those that were routed to the student
    """

    source: Literal["survey", "live", "samples"]
    value: Literal["probability", "draw", "rate"] | None
    seed: int
    split: Split
    dataset: str | None
    images: int
    complement: bool
    notes: list[str]
    spots: list[SpotStatistics]
    classes: Classes | None
    difficulty: Difficulty | None
    paths: list[RoutingPath] | None
    extremes: list[SpotExtremes]
    path_examples: list[PathExamples] = Field(default_factory=list)
    routed: RoutedNetwork | None


class ProbedSpot(Part):
    """What distilling single images at a spot would do for held-out images (`inspect-spots --probe`).

    product      of an image's distillation gradient with the gradient of the held-out images' cross-entropy
    helps        fraction of the images whose product is positive
    mean         of the products, over their standard deviation
    reliability  of an image's product: correlation of those with two halves of the held-out images (where
                 it is positive, for their double length by Spearman-Brown)
    explained    R² of a regression of the product on embeddings and losses, on images it was not fitted to
    chosen_loss  mean loss of what the router chooses, over the mean loss of all images
    class_share  share of the variance of the router's decisions that lies between the classes
    settled      epoch from which on the fraction distilled there stays within 0.02 of its last value
    """

    name: str
    kind: str
    helps: float
    mean: Number
    reliability: Number
    explained: Number
    chosen_loss: Number
    class_share: Number
    settled: int | None


class Probe(Part):
    """Training images that were probed, without augmentation, and the images that were held out."""

    images: int
    held_out: int
    held_out_split: Literal["validation", "test"]
    seed: int
    spots: list[ProbedSpot]


class SpotsDocument(Document):
    """Where a run distilled: from its log, and (`measured`) by image, null for a run without a record by sample.

    balance: what the gradient ratio was set to in training, over all feature spots; 0: it was as it is told here.
    samples: an image counts once per epoch; teacher: its source, an architecture or a path; mixtures: `dfa.json` of
    the run, null where it has none; classes are in order of their largest deviation. saturated: a sentence with the
    cure where the router decided the same for all in every epoch; then nothing is measured by class or image.
    """

    schema_: Literal["sakd.spots/2"] = "sakd.spots/2"
    run: str
    method: str | None
    router: str | None
    balance: float
    teacher: str | None
    student: str | None
    dataset: str | None
    finished: bool
    saturated: str | None = None
    epochs: int
    samples: int
    overall: list[SpotTotal]
    by_epoch: list[EpochFractions]
    by_class: list[ClassFractions]
    mixtures: Mixtures | None
    measured: Measured | None
    probe: Probe | None = None
