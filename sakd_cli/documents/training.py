"""The documents of `sakd pretrain-teacher`, `distill`, `bench` and `import-weights` with `--json` as closed classes

Accuracies are in percent, losses mean cross-entropies in nats, times in the unit that a name ends in; what is not known
is null. A run's `summary.json` is a Summary without `run`.
"""

from typing import Any, Literal

from pydantic import Field

from sakd_cli.documents.spots import Figure, Part


class Scored(Part):
    """Figures of one epoch's network on the test images; best: also what chose it."""

    epoch: int
    top1: float
    top5: float
    loss: float
    split: str | None = None
    selected_on: str | None = None


class Taught(Part):
    """The teacher, measured anew on the test images."""

    network: str
    path: str
    sha256: str
    top1: float
    top5: float
    loss: float
    parameters: int
    macs: int


class Summary(Part):
    """`sakd pretrain-teacher --json` and `sakd distill --json`.

    seconds: of the main training; phases: its shares by what was done; friendly: as in `config.json` of a
    student-friendly teacher; ensemble: see report/ensemble.py; mixtures: as `dfa.json`, and the time of their search.
    """

    schema_: Literal["sakd.summary/1"] = Field(alias="schema")
    run: str | None = None
    task: str
    network: str
    dataset: str
    epochs: int
    images: int
    skipped_images: int | None = None
    protocol: str
    parameters: int
    macs: int
    device: str
    torch: str
    headline: Scored
    best: Scored
    seconds: float
    phases: dict[Literal["train", "evaluate", "save", "other"], float]
    teacher: Taught | None = None
    friendly: dict[str, Any] | None = None
    ensemble: dict[str, Any] | None = None
    mixtures: dict[str, Any] | None = None
    search_seconds: Figure = None
    survey_seconds: Figure = None


class Network(Part):
    """A network of the run; macs: multiply-accumulates for one image."""

    role: str
    name: str
    parameters: int
    macs: int


class PlannedSpot(Part):
    """A spot: stages, shapes of one sample's features there, adapters from student to teacher and back."""

    name: str
    kind: Literal["map", "embedding", "logits"]
    student: int
    teacher: int
    student_shape: list[int]
    teacher_shape: list[int]
    student_stage: int
    teacher_stage: int
    lift: str | None
    drop: str | None


class Plan(Part):
    """`--dry-run --json` of a training; trainable: parameters by group; batch: terms of the loss of one real batch."""

    schema_: Literal["sakd.plan/1"] = Field(alias="schema")
    networks: list[Network]
    spots: list[PlannedSpot]
    trainable: dict[str, int]
    images: int
    batch: dict[str, float]
    steps_per_epoch: int
    effective: dict[str, Any]
    device: str
    mixtures: dict[str, Any] | None = None


class TimedStep(Part):
    """One kind of step: median, least and most of its rounds; counted where it can be."""

    name: str
    about: str
    ms: float
    ms_low: float
    ms_high: float
    images_per_second: float
    gflop: Figure
    gflop_per_second: Figure
    operations: int | None
    synchronisations: int | None
    saved_bytes: int | None
    peak_bytes: int | None


class TimedRatio(Part):
    """Time of `above` over that of `below` within each round; busy: wall over CPU time; firm: the rounds agree."""

    above: str
    below: str
    median: float
    low: float
    high: float
    rounds: int
    busy: float
    firm: bool


class Headline(Part):
    """The ratio that may be quoted; null and why where the rounds scatter or the machine was busy."""

    above: str
    median: Figure
    refused: str | None


class PhaseShare(Part):
    """A part of our step."""

    name: str
    ms: float
    share: float


class Bench(Part):
    """`sakd bench --json`; environment and setup: as in `env.json`, and what was measured."""

    schema_: Literal["sakd.bench/1"] = Field(alias="schema")
    environment: dict[str, Any]
    setup: dict[str, Any]
    steps: list[TimedStep]
    ratios: list[TimedRatio]
    headline: Headline
    phases: list[PhaseShare]
    seconds_to_first_step: float
    scaling: dict[str, Any] | None
    compared: dict[str, Any] | None


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
