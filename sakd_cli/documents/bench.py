"""The document of `sakd bench`"""

from typing import Any, Literal

from pydantic import Field

from sakd_cli.documents.base import Number as Figure
from sakd_cli.documents.base import Part


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
