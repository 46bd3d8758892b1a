"""The base of every JSON document: a class that its maker constructs, closed, frozen, and without float noise."""

import json
from functools import cache
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, field_validator

DIGITS = 9  # significant digits of a number: all that a float32 can hold; 45.800000000000004 becomes 45.8
Number = float | None
Verdict = Literal["better", "worse", "not shown", "one seed", "unknown"]


def rounded(value: Any) -> Any:
    """The same with every float in it rounded to `DIGITS` significant digits; counts and texts stay."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, list | tuple):
        return type(value)(map(rounded, value))
    return {key: rounded(one) for key, one in value.items()} if isinstance(value, dict) else value


class Shown:
    """What a notebook shows on lines of their own, long lists and texts shortened."""

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        from rich.pretty import pretty_repr

        printer.text(pretty_repr(self, max_width=120, max_length=8, max_string=100))


class Part(Shown, BaseModel):
    """A part of a document. A field that Python has a keyword for ends in `_`; its JSON key does not.

    Fields of type `Any`, which hold settings or files of others, are passed on as they are; so are those in `exact`.
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        defer_build=True,  # most commands need few of them
        allow_inf_nan=False,
        populate_by_name=True,
        alias_generator=lambda name: name.removesuffix("_"),
    )
    exact: ClassVar[frozenset[str]] = frozenset()

    @field_validator("*")
    @classmethod
    def _rounded(cls, value: Any, info: Any) -> Any:
        return value if info.field_name in _passed_on(cls) else rounded(value)

    def plain(self) -> dict[str, Any]:
        return self.model_dump(mode="json", by_alias=True)


@cache
def _passed_on(kind: type[Part]) -> frozenset[str]:
    return kind.exact.union(key for key, field in kind.model_fields.items() if "typing.Any" in str(field.annotation))


class Document(Part):
    """What a command prints with `--json`, or a run keeps in a file."""

    schema_: str

    @property
    def text(self) -> str:
        return json.dumps(self.plain(), indent=2, allow_nan=False)


class SeedStatistics(Part):
    """Over seeds: mean, standard deviation of the sample, 95 % interval of the mean (Student's t)."""

    mean: float
    std: Number
    low: Number
    high: Number


class PairedTest(Part):
    """Differences in points of top-1, paired by seed: mean, its 95 % interval, p of a paired t-test.

    holm     p corrected for all tests of the document (Holm 1979); the verdict goes by it
    effect   mean over the standard deviation of the differences (Cohen's d)
    needed   seeds to find 0.5 points with a probability of 80 %, were that deviation the true one; null: above 10,000
    verdict  not shown: inconclusive, every effect in the interval is compatible; one seed: which cannot tell a
             difference from chance; unknown: no seed is finished in both

    Interval, p, effect and needed are null of fewer than two seeds, and where all have the same difference.
    """

    seeds: list[int]
    difference: Number = None
    low: Number = None
    high: Number = None
    p: Number = None
    holm: Number = None
    effect: Number = None
    needed: int | None = None
    verdict: Verdict


Question = Literal["help", "dose", "where"]


class Answer(PairedTest):
    """One of three questions: does distilling help, does a router give more than the dose, does where it distils add.

    ours, theirs: labels of what was compared; the test is one of those of the document.
    """

    question: Question
    ours: str
    theirs: str
    text: str
