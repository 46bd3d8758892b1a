"""The documents of `sakd sweep` with `--json`"""

from typing import Literal

from sakd_cli.documents.base import Answer, Document, Number, PairedTest, Part, SeedStatistics

RunState = Literal["done", "running", "waiting", "failed", "blocked"]


class SweepRun(Part):
    """One run. already_done: finished when the command began; resumed: from a checkpoint; top1, loss: last epoch.

    method: with the dose, where it is not the method's own (`fitnet x10`, `fitnet auto`); validation_top1: last epoch,
    of the images that choose the best one; matched: key of the run whose rates its coins have.
    """

    key: str
    role: Literal["teacher", "baseline", "student"]
    teacher: str | None
    student: str
    method: str | None
    router: str | None
    seed: int
    epochs: int
    state: RunState
    already_done: bool
    resumed: bool
    error: str | None = None
    run: str | None = None
    top1: Number = None
    best_top1: Number = None
    validation_top1: Number = None
    matched: str | None = None
    loss: Number = None
    seconds: Number = None
    teacher_top1: Number = None


class PublishedPair(Part):
    """Published top-1 of the pair's networks without distillation."""

    teacher: Number
    baseline: Number


class SweepPair(Part):
    """A pair: top-1 of the teacher, and of the student from scratch (baseline) over its seeds."""

    teacher: str
    student: str
    teacher_top1: Number
    baseline_seeds: list[int]
    baseline: SeedStatistics | None
    published: PublishedPair | None


class SweepCell(Part):
    """A method under a router for pair number `pair`; best: of the epoch that the validation set chose."""

    pair: int
    method: str
    router: str
    seeds: list[int]
    top1: SeedStatistics | None
    best: SeedStatistics | None
    published: Number


class Gain(PairedTest):
    """Cell of `router` less that of `against`, of the same pair and, where no other is said there, method."""

    pair: int
    method: str
    router: str
    against: str
    published: Number


class MeanGain(Part):
    """Gains of a router over another in all cells that have both: how many are above 0 and below, and their mean."""

    router: str
    against: str
    cells: int
    above: int
    below: int
    mean: float


class Provenance(Part):
    """Where the published figures come from, and how far they can be trusted."""

    source: str
    provenance: str
    notes: list[str]


class Skipped(Part):
    """A part of the grid that is left out, and why."""

    what: str
    reason: str


class SweepDocument(Document):
    """`sakd sweep FILE --json`. tests: how many there are in gains and answers together, which p is corrected for.

    baseline: words of the cells that all others are compared with in gains; null: as the questions want it.
    """

    schema_: Literal["sakd.sweep/3"] = "sakd.sweep/3"
    name: str
    level: float
    baseline: str | None = None
    counts: dict[RunState, int]
    pairs: list[SweepPair]
    cells: list[SweepCell]
    gains: list[Gain]
    mean_gains: list[MeanGain]
    answers: list[Answer]
    tests: int
    skipped: list[Skipped]
    published: Provenance | None
    runs: list[SweepRun]


class PlannedRuns(Part):
    """Runs of one kind: how many are to do of how many, seconds of a step (measured, or by multiply-accumulates)."""

    what: str
    runs: int
    to_do: int
    steps: int
    step_seconds: Number
    measured: bool
    hours: Number
    run_bytes: int


class SweepPlan(Document):
    """`sakd sweep FILE --dry-run --json`: what is to be done; hours of the device are those of the training steps."""

    schema_: Literal["sakd.sweep-plan/2"] = "sakd.sweep-plan/2"
    name: str
    device: str
    runs: int
    finished: int
    in_progress: int
    failed: int
    hours: Number
    bytes: int
    free_bytes: int
    skipped: list[Skipped]
    rows: list[PlannedRuns]
