"""The documents of `sakd compare`, `report`, `export`, `import-weights`, `data check`, and all that there are

Accuracies (top1, top5) are in percent, losses are mean cross-entropies in nats (the negative log-likelihood), what is
not known is null.
"""

from typing import Any, Literal

from sakd_cli.documents.base import Answer, Document, Number, PairedTest, Part, SeedStatistics
from sakd_cli.documents.bench import Bench
from sakd_cli.documents.evaluation import EnsembleEvaluation, Evaluation, Evaluations, Predictions, Quartiles
from sakd_cli.documents.listing import Listing, RunEntries, ShownConfig, ShownMeaning, ShownMethod
from sakd_cli.documents.spots import SpotsDocument
from sakd_cli.documents.sweep import SweepDocument, SweepPlan
from sakd_cli.documents.training import Plan, Summary


class BestEpoch(Part):
    """The epoch that the validation set chose, and its top-1 on the test images."""

    epoch: int | None = None
    top1: Number = None


class Point(Part):
    """One epoch: means over the training images as augmented (loss: cross-entropy); top1, loss: on the validation set.

    selected_on: what that set is, the test images where there is no other.
    """

    epoch: int
    train_loss: Number = None
    train_top1: Number = None
    selected_on: str | None = None
    top1: Number = None
    loss: Number = None


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
    top1: Number = None
    top5: Number = None
    loss: Number = None
    best: BestEpoch = BestEpoch()
    seconds: Number = None
    teacher_top1: Number = None
    curve: list[Point]
    group: int


class Difference(Part):
    """A setting that is not the same everywhere; one value per run."""

    key: str
    values: list[Any]


class SeedGroup(Part):
    """Runs that differ in the seed only; distilled: whether anything was."""

    label: str
    distilled: bool
    seeds: list[int]
    top1: SeedStatistics | None
    top5: SeedStatistics | None
    loss: SeedStatistics | None


class Versus(PairedTest):
    """Group `group` less group `against`. unequal: settings beside the distillation that differ."""

    group: int
    against: int
    unequal: list[str]
    text: str


class Comparison(Document):
    """`sakd compare RUN... --json`, and what `sakd distill --with-control`, `--routers` or `--seeds` prints."""

    schema_: Literal["sakd.compare/3"] = "sakd.compare/3"
    level: float
    runs: list[RunRow]
    differences: list[Difference]
    groups: list[SeedGroup]
    comparisons: list[Versus]
    answers: list[Answer]

    @property
    def counted(self) -> list[RunRow]:
        """The runs that count: of several of a group and seed the last finished one, or the last."""
        found = {(run.group, run.seed): run for run in sorted(self.runs, key=lambda run: run.finished)}
        return [run for run in self.runs if found[run.group, run.seed] is run]

    @property
    def doubles(self) -> list[str]:
        """A sentence for each run that does not count, since another one has its seed."""
        counted = {(run.group, run.seed): run for run in self.counted}
        pairs = [(run, counted[run.group, run.seed]) for run in self.runs]
        return [
            f"Seed {other.seed} of {self.groups[run.group].label} counts once: {other.run}, not {run.run}"
            f"{' (not finished)' * (not run.finished)}."
            for run, other in pairs
            if run is not other
        ]


class Report(Document):
    """`sakd report RUN --json`: the files that were written, the page first, and the titles of its sections."""

    schema_: Literal["sakd.report/1"] = "sakd.report/1"
    run: str
    written: list[str]
    sections: list[str]


class Check(Part):
    """The file's outputs beside the network's. difference: largest of a logit; agreement: % of the same answers.

    real: on pictures, test images or those of a folder that was named; otherwise on noise, as none were at hand
    """

    images: int
    difference: float
    agreement: float
    real: bool


class Latency(Part):
    """On the CPU, of the network in PyTorch and of the file: milliseconds for one image, and images a second of 32."""

    threads: int
    network: Quartiles
    file: Quartiles
    network_throughput: Quartiles
    file_throughput: Quartiles


class Accuracy(Part):
    """Top-1 in percent on the same images: of the network in PyTorch and of the file."""

    images: int
    before: float
    after: float


class Export(Document):
    """`sakd export RUN --json`. input: pixels (between 0 and 1) or normalised (by mean and std).

    bytes: of all files of the network; network_bytes: of its tensors in PyTorch; accuracy: null where no labelled
    images were at hand; calibration: images that int8 was fitted on
    """

    schema_: Literal["sakd.export/3"] = "sakd.export/3"
    folder: str
    format: str
    precision: Literal["fp32", "fp16", "int8"]
    file: str
    bytes: int
    network_bytes: int
    sha256: str
    network: str
    dataset: str
    classes: int
    input: Literal["pixels", "normalised"]
    calibration: int
    check: Check
    accuracy: Accuracy | None
    latency: Latency | None


class DataPart(Part):
    """Training or test images; min, max: images of a class."""

    folder: str
    images: int
    classes: int
    min: int
    max: int


class DataFinding(Part):
    """One thing that is wrong with a data set, or worth knowing, and where.

    kind of a fault: missing, empty-class, single-class, case, classes-differ, unknown-class, loop, count, name,
    manifest, unreadable, duplicate; of a note: no-class, unlabelled, not-taken, name, turned, frames, strip, range,
    duplicate
    """

    kind: str
    path: str
    text: str


class DataCheck(Document):
    """`sakd data check DIR --json`; read: files that were decoded. Nothing is wrong where `findings` is empty.

    notes: what is no fault, but worth knowing
    """

    schema_: Literal["sakd.data-check/3"] = "sakd.data-check/3"
    dataset: str
    root: str | None
    classes: int
    parts: list[DataPart]
    read: int
    findings: list[DataFinding]
    notes: list[DataFinding]


class WeightsFile(Part):
    """The file that weights were read from; of a published teacher its name, and its published top-1 in percent."""

    file: str
    sha256: str
    release: str | None = None
    published_top1: Number = None


class Imported(Document):
    """`sakd import-weights --json`; metrics are null where the data set's files were not at hand."""

    schema_: Literal["sakd.import/1"] = "sakd.import/1"
    folder: str
    network: str
    dataset: str
    classes: int
    top1: Number = None
    top5: Number = None
    loss: Number = None
    images: int = 0
    split: str | None = None
    imported: WeightsFile


DOCUMENTS: dict[str, type[Document]] = {
    "summary": Summary,
    "plan": Plan,
    "eval": Evaluation,
    "ensemble": EnsembleEvaluation,
    "evals": Evaluations,
    "predict": Predictions,
    "compare": Comparison,
    "report": Report,
    "export": Export,
    "spots": SpotsDocument,
    "data": DataCheck,
    "sweep": SweepDocument,
    "sweep-plan": SweepPlan,
    "bench": Bench,
    "import": Imported,
    "list": Listing,
    "runs": RunEntries,
    "config": ShownConfig,
    "method": ShownMethod,
    "key": ShownMeaning,
}
