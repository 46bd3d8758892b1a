"""The documents of `sakd sweep` with `--json` as closed classes"""

from typing import Literal

from pydantic import Field

from sakd_cli.documents.base import Number as Figure
from sakd_cli.documents.base import Part
from sakd_cli.documents.base import SeedStatistics as Mean


class SweepRun(Part):
    """One run. before: was finished when the command began; resumed: went on from a checkpoint; top1: last epoch."""

    key: str
    role: Literal["teacher", "alone", "student"]
    teacher: str | None
    student: str
    method: str | None
    router: str | None
    seed: int
    epochs: int
    state: Literal["waiting", "running", "done", "failed", "blocked"]
    before: bool
    resumed: bool
    error: str | None
    run: str | None
    top1: Figure
    best_top1: Figure
    loss: Figure
    seconds: Figure
    teacher_top1: Figure


class PublishedPair(Part):
    """Published top-1 of the pair's networks without distillation."""

    teacher: Figure
    alone: Figure


class SweepPair(Part):
    """A pair: the teacher's top-1 and the student's without a teacher, over its seeds."""

    teacher: str
    student: str
    teacher_top1: Figure
    alone_seeds: list[int]
    alone: Mean | None
    published: PublishedPair | None


class SweepCell(Part):
    """A method under a router for pair number `pair`; best: of the epoch that the selection images chose."""

    pair: int
    method: str
    router: str
    seeds: list[int]
    top1: Mean | None
    best: Mean | None
    published: Figure


class Gain(Part):
    """Points of `router` over `against`, paired by seed: mean, its 95 % interval, p of a paired t-test.

    few seeds: below three, or all differences equal; then nothing is claimed.
    """

    pair: int
    method: str
    router: str
    against: str
    seeds: list[int]
    difference: Figure
    low: Figure
    high: Figure
    p: Figure
    verdict: Literal["better", "worse", "noise", "few seeds", "unknown"]
    published: Figure


class Overall(Part):
    """Gains of a router over another in all cells that have both: how many are above 0 and below, and their mean."""

    router: str
    against: str
    cells: int
    above: int
    below: int
    mean: float


class Source(Part):
    """Whose the published figures are, and how far they can be trusted."""

    source: str
    sure: str
    notes: list[str]


class Skipped(Part):
    """A part of the grid that cannot be."""

    what: str
    reason: str


class SweepDocument(Part):
    """`sakd sweep FILE --json`."""

    schema_: Literal["sakd.sweep/1"] = Field(alias="schema")
    name: str
    level: float
    counts: dict[str, int]
    pairs: list[SweepPair]
    cells: list[SweepCell]
    gains: list[Gain]
    overall: list[Overall]
    skipped: list[Skipped]
    published: Source | None
    runs: list[SweepRun]


class PlanRow(Part):
    """Runs of one kind: how many are to do of how many, seconds of a step (measured, or by multiply-accumulates)."""

    what: str
    runs: int
    to_do: int
    steps: int
    step_seconds: Figure
    measured: bool
    hours: Figure
    run_bytes: int


class SweepPlan(Part):
    """`sakd sweep FILE --dry-run --json`: what is to be done; hours of the device are those of the training steps."""

    schema_: Literal["sakd.sweep-plan/1"] = Field(alias="schema")
    name: str
    device: str
    runs: int
    finished: int
    begun: int
    failed: int
    hours: Figure
    bytes: int
    free_bytes: int
    skipped: list[Skipped]
    rows: list[PlanRow]
