"""Predictions as lines of text and as CSV"""

from typing import Any

from sakd_cli.documents.evaluation import Prediction, Predictions
from sakd_cli.report.render.format import csv_text


def predictions_text(document: Predictions) -> str:
    """A line for each picture: its classes with their probabilities in percent."""
    return "\n".join(f"{one.file}: {_answer(one)}" for one in document.predictions)


def _answer(one: Prediction) -> str:
    if one.error is not None:
        return f"not read ({one.error})"
    classes = ", ".join(f"{answer.class_} {100 * answer.probability:.1f} %" for answer in one.classes)
    return classes if one.exit is None else f"{classes} (left after stage {one.exit})"


def predictions_csv(document: Predictions) -> str:
    """A row for each picture: file, error, exit, then class and probability, the likeliest first."""
    most = max(len(one.classes) for one in document.predictions)
    fields = [f"{name}_{place}" for place in range(1, most + 1) for name in ("class", "probability")]
    return csv_text(["file", "error", "exit", *fields], map(_row, document.predictions))


def _row(one: Prediction) -> dict[str, Any]:
    row: dict[str, Any] = {"file": one.file, "error": one.error, "exit": one.exit}
    for place, answer in enumerate(one.classes, start=1):
        row |= {f"class_{place}": answer.class_, f"probability_{place}": answer.probability}
    return row
