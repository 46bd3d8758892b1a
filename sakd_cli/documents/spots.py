"""The document of `sakd inspect-spots --json` as closed classes, and its rows as CSV.

`SpotsDocument.model_json_schema()` is the JSON schema. Shares and probabilities lie in [0, 1], accuracies (top1) are in
percent, losses are mean cross-entropies in nats, entropies in bits. Lists with one entry per spot are in the order of
`overall`. What is not known is null.
"""

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field

from sakd_cli.documents.base import Part
from sakd_cli.documents.mixtures import Mixtures

Share = float | None
Figure = float | None


class Overall(Part):
    """One spot in the log of the training: share of samples taught there, over all epochs and in single ones."""

    name: str
    kind: str
    share: Share
    first: Share
    last: Share
    min: Share
    max: Share
    probability: Share


class Epoch(Part):
    """One epoch of the log; gamma_* and count_active are shares of its steps, *_ce its mean cross-entropies."""

    epoch: int
    samples: int
    share: list[Share]
    probability: list[Share]
    gamma_raised: Share
    gamma_lowered: Share
    count_active: Share
    routed_ce: float | None
    student_ce: float | None
    empty: list[Share]


class TaughtClass(Part):
    """One class of the log: mean share over the epochs, and its difference from the spot's overall share."""

    name: str
    share: list[Share]
    deviation: list[Share]


class SpotRow(Part):
    """One spot over the images measured: the value's mean, one draw's mean, share above 0.5, entropy, quantiles."""

    name: str
    kind: str
    student_stage: str | None
    teacher_stage: str | None
    student_shape: list[int] | None
    teacher_shape: list[int] | None
    student_to_teacher: str | None
    teacher_to_student: str | None
    mean: float
    drawn: float
    above_half: float
    entropy: float
    p05: float
    p50: float
    p95: float


class Group(Part):
    """Some images: how many, mean value at each spot, top-1 of both networks on them."""

    images: int
    mean: list[Share]
    student_top1: float | None
    teacher_top1: float | None


class ClassRow(Group):
    """One class; deviation of its mean from that of all images."""

    name: str
    deviation: list[Share]


class Classes(Part):
    """correlation: Pearson's, per spot, between a class's mean value and the student's top-1 on it."""

    correlation: list[float | None]
    rows: list[ClassRow]


class Bin(Group):
    """A tenth of the images in order of a measure; `from` and `to` are its first and last value of it."""

    from_: float = Field(alias="from")
    to: float


class Cell(Part):
    """One cell of the table student right or wrong x teacher right or wrong."""

    student_right: bool
    teacher_right: bool
    images: int
    mean: list[Share]


class Difficulty(Part):
    """By deciles of the student's cross-entropy and of the teacher's largest probability, and by who is right."""

    by_student_loss: list[Bin]
    by_teacher_confidence: list[Bin]
    right_wrong: list[Cell]


class Path(Part):
    """A path such as TTS (a letter per spot, T = teacher) and its expected share."""

    path: str
    share: float


class Extreme(Part):
    """One image: place in the data set's own split, value at the spot, what it is and what both make of it."""

    index: int
    value: float
    label: str | None
    student_prediction: str | None
    teacher_prediction: str | None
    student_loss: float | None
    teacher_confidence: float | None


class Extremes(Part):
    """The images with the highest and the lowest value at a spot."""

    spot: str
    highest: list[Extreme]
    lowest: list[Extreme]


class Score(Part):
    """Top-1 and loss on the test images."""

    top1: float
    loss: float


class Sampled(Score):
    """Means over several draws of all gates; spread: standard deviation of top-1 over them."""

    draws: int
    spread: float


class Routed(Part):
    """The routed network on the test images, beside both networks alone; null without a multi-path network."""

    images: int
    student: Score
    teacher: Score
    sampled: Sampled | None
    all_student: Score | None
    all_teacher: Score | None


class Measured(Part):
    """What the trained router makes of each image.

    source      survey: kept at the end of the run; live: just now; samples: only how often each image was taught
    value       what "mean" is a mean of: the teacher's probability, a draw from it (--sample), or the rate at which an
                image was taught; null: this router has none for these images
    seed        of the draws
    complement  the losses taught those who were routed to the student
    """

    source: Literal["survey", "live", "samples"]
    value: Literal["probability", "draw", "rate"] | None
    seed: int
    split: Literal["train", "validation", "test"]
    dataset: str | None
    images: int
    complement: bool
    notes: list[str]
    spots: list[SpotRow]
    classes: Classes | None
    difficulty: Difficulty | None
    paths: list[Path] | None
    extremes: list[Extremes]
    routed: Routed | None


class SpotsDocument(Part):
    """`spots.py` makes all but `measured` from the log; `measured` is null for a run that kept nothing by sample.

    mixtures   the `dfa.json` of the run as it stands; null where it has none
    """

    schema_: Literal["sakd.spots/1"] = Field(alias="schema")
    run: str
    method: str | None
    router: str | None
    teacher: str | None
    student: str | None
    dataset: str | None
    finished: bool
    epochs: int
    samples: int
    overall: list[Overall]
    by_epoch: list[Epoch]
    by_class: list[TaughtClass]
    mixtures: Mixtures | None
    measured: Measured | None


Row = tuple[str, str, str, str, Any]
CSV_HEADER = ("table", "item", "spot", "measure", "value")


def csv_rows(document: dict[str, Any]) -> Iterator[Row]:
    """The document as one long table with the columns of `CSV_HEADER`; one figure a row, empty where it is null.

    table    overall, epoch, class_taught, spot, class, student_loss, teacher_confidence, right_wrong, path, highest,
             lowest, routed: the lists of the document in that order
    item     which epoch, class, bin (from 1), path, image (its index), network; empty for tables by spot
    spot     name of the spot; empty where the figure belongs to none
    measure  key of the figure in the document
    """
    names = [spot["name"] for spot in document["overall"]]
    for spot in document["overall"]:
        yield from _figures("overall", "", spot, names, spot["name"])
    for row in document["by_epoch"]:
        yield from _figures("epoch", row["epoch"], row, names)
    for row in document["by_class"]:
        yield from _figures("class_taught", row["name"], row, names)
    measured = document["measured"] or {}
    for spot in measured.get("spots", []):
        yield from _figures("spot", "", spot, names, spot["name"])
    classes, difficulty = measured.get("classes") or {}, measured.get("difficulty") or {}
    for name, figure in zip(names, classes.get("correlation", []), strict=False):
        yield "class", "", name, "correlation", figure
    for row in classes.get("rows", []):
        yield from _figures("class", row["name"], row, names)
    for table in ("student_loss", "teacher_confidence"):
        for number, row in enumerate(difficulty.get(f"by_{table}", []), start=1):
            yield from _figures(table, number, row, names)
    for row in difficulty.get("right_wrong", []):
        yield from _figures("right_wrong", cell_name(row), row, names)
    for row in measured.get("paths") or []:
        yield from _figures("path", row["path"], row, names)
    for spot in measured.get("extremes", []):
        for end in ("highest", "lowest"):
            for row in spot[end]:
                yield from _figures(end, row["index"], row, names, spot["spot"])
    for network, row in (measured.get("routed") or {}).items():
        if isinstance(row, dict):
            yield from _figures("routed", network, row, names)


def cell_name(row: dict[str, Any]) -> str:
    """`student right, teacher wrong`."""
    return ", ".join(f"{who} {'right' if row[f'{who}_right'] else 'wrong'}" for who in ("student", "teacher"))


def _figures(table: str, item: Any, row: dict[str, Any], names: list[str], spot: str = "") -> Iterator[Row]:
    for measure, value in row.items():
        if measure in ("mean", "share", "deviation", "probability", "empty") and isinstance(value, list):
            for name, figure in zip(names, value, strict=True):
                yield table, str(item), name, measure, figure
        elif isinstance(value, int | float) and not isinstance(value, bool) and measure not in ("epoch", "index"):
            yield table, str(item), spot, measure, value
