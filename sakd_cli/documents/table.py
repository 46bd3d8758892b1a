"""The documents of `sakd eval`, `compare`, `report`, `export` with `--json` as closed classes; see `sakd show schema`

Accuracies (top1, top5) and shares called so are in percent, losses are mean cross-entropies in nats (the negative
log-likelihood), what is not known is null.
"""

from typing import Any, Literal

from pydantic import BaseModel, Field

from sakd_cli.documents.base import Number as Figure
from sakd_cli.documents.base import Part
from sakd_cli.documents.base import SeedStatistics as Mean
from sakd_cli.documents.bench import Bench
from sakd_cli.documents.evaluation import EnsembleEvaluation, Evaluation, Evaluations
from sakd_cli.documents.evaluation import Quartiles as Spread
from sakd_cli.documents.spots import SpotsDocument
from sakd_cli.documents.sweep import SweepDocument, SweepPlan
from sakd_cli.documents.training import Plan, Summary


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


class Source(Part):
    """The file that weights were read from."""

    file: str
    sha256: str


class Imported(Part):
    """`sakd import-weights --json`; figures are null where the data set's files were not at hand."""

    schema_: Literal["sakd.import/1"] = Field(alias="schema")
    folder: str
    network: str
    dataset: str
    classes: int
    top1: Figure
    top5: Figure
    loss: Figure
    images: int
    split: str | None = None
    imported: Source


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
