"""The document of `sakd bench`"""

from typing import Any, Literal

from sakd_cli.documents.base import Document, Number, Part


class BenchSetup(Part):
    """What was measured: networks, method, images of a batch, their side in pixels, rounds timed and not counted."""

    teacher: str
    student: str
    method: str
    batch: int
    side: int
    images: int
    classes: int
    rounds: int
    warmup: int


class TimedStep(Part):
    """One kind of step: median, smallest and largest time of its rounds; counted where it can be."""

    name: str
    about: str
    ms: float
    ms_low: float
    ms_high: float
    images_per_second: float
    gflop: Number
    gflop_per_second: Number
    operations: int | None
    synchronisations: int | None
    saved_bytes: int | None
    peak_bytes: int | None


class TimedRatio(Part):
    """Time of `above` over that of `below` within each round; busy: wall over CPU time; stable: the rounds agree."""

    above: str
    below: str
    median: float
    low: float
    high: float
    rounds: int
    busy: float
    stable: bool


class ReportedRatio(Part):
    """The ratio that may be quoted; null and the reason where the rounds scatter or the machine was busy."""

    above: str
    median: Number
    reason: str | None


class PhaseTime(Part):
    """A part of our step."""

    name: str
    ms: float
    fraction: float


class ScalingPoint(Part):
    """One value of the axis: ms of our step and of plain distillation, and the ratio of the two."""

    value: int | str
    ms: float
    kd_ms: Number = None
    ratio: Number = None
    low: Number = None
    high: Number = None
    stable: bool | None = None


class Scaling(Part):
    """How the time of a step grows along one axis."""

    axis: str
    points: list[ScalingPoint]


class RatioChange(Part):
    """A ratio now; base: what it is compared with. slow: 15 % below it; regressed: in the earlier result already."""

    name: str
    base: float
    now: float
    slow: bool
    regressed: bool


class RisenCounter(Part):
    """A counter of a step that has risen."""

    name: str
    counter: str
    before: float
    now: float


class BenchComparison(Part):
    """Against an earlier result of the same machine and setup."""

    ratios: list[RatioChange]
    risen: list[RisenCounter]
    regressed: bool


class Bench(Document):
    """`sakd bench --json`; environment: as in `env.json`, and the processor."""

    schema_: Literal["sakd.bench/2"] = "sakd.bench/2"
    environment: dict[str, Any]
    setup: BenchSetup
    steps: list[TimedStep]
    ratios: list[TimedRatio]
    reported: ReportedRatio
    phases: list[PhaseTime]
    seconds_to_first_step: float
    scaling: Scaling | None = None
    comparison: BenchComparison | None = None
