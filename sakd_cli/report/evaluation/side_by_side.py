"""Evaluations as text: one network in full, or several side by side"""

from collections.abc import Callable
from typing import Any

from rich.console import RenderableType

from sakd_cli.report.evaluation.ensemble import ensemble_tables
from sakd_cli.report.render.format import fixed, large, whole, word
from sakd_cli.report.render.sheet import Column, Sheet
from sakd_cli.report.runs.tables import evaluation_tables

PAIRS = 8  # confusions shown
NAMES = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

Row = tuple[str, Callable[[dict[str, Any]], str]]


def score_tables(results: list[dict[str, Any]]) -> list[RenderableType]:
    """What `sakd eval --json` holds, for one target or for several."""
    if len(results) > 1:
        return [_side_by_side(results)]
    if results[0].get("ensemble"):
        return [*evaluation_tables(results[0]), *ensemble_tables(results[0])]
    first, *others = evaluation_tables(results[0])
    return [first, _details(results[0]), *others, *_confusions(results[0])]


def _of(*path: str) -> Callable[[dict[str, Any]], Any]:
    """Reads a figure that lies deeper in the document; None where anything on the way is missing."""

    def read(result: dict[str, Any]) -> Any:
        value: Any = result
        for part in path:
            value = value.get(part) if isinstance(value, dict) else None
        return value

    return read


def _figure(digits: int, *path: str) -> Callable[[dict[str, Any]], str]:
    read = _of(*path)
    return lambda result: fixed(read(result), digits)


def _count(*path: str) -> Callable[[dict[str, Any]], str]:
    read = _of(*path)
    return lambda result: whole(read(result))


def _timed(digits: int, *path: str) -> Callable[[dict[str, Any]], str]:
    """`2.31 (2.28 to 2.40)`: median and quartiles."""
    read = _of(*path)

    def say(result: dict[str, Any]) -> str:
        spread = read(result)
        if not spread:
            return fixed(None, 0)
        median, low, high = (fixed(spread.get(key), digits) for key in ("median", "low", "high"))
        return f"{median} ({low} to {high})"

    return say


def _memory(*path: str) -> Callable[[dict[str, Any]], str]:
    read = _of(*path)
    return lambda result: fixed(value / 2**20 if (value := read(result)) is not None else None, 1)


ACCURACY: list[Row] = [
    ("Top-1 %", _figure(2, "top1")),
    ("Top-5 %", _figure(2, "top5")),
]
OWN: list[Row] = [
    ("NLL, nats", _figure(3, "loss")),
    ("Brier score", _figure(4, "brier")),
    ("ECE", _figure(4, "ece")),
]
COST: list[Row] = [
    ("Parameters", lambda result: large(result.get("parameters"))),
    ("MACs", lambda result: large(result.get("macs"))),
]
SPEED: list[Row] = [
    ("Latency, ms, batch 1", _timed(2, "speed", "latency")),
    ("Images/s", _timed(0, "speed", "throughput")),
    ("  in batches of", _count("memory", "batch")),
    ("Tensors alive at most, MiB", _memory("memory", "bytes")),
    ("Allocator's peak, MiB", _memory("speed", "memory")),
]
TEACHER: list[Row] = [
    ("Teacher's top-1 %", _figure(2, "teacher", "top1")),
    ("Same answer as teacher, %", _figure(2, "teacher", "agreement", "top1")),
    ("KL from teacher, nats", _figure(3, "teacher", "agreement", "kl")),
    ("Linear CKA", _figure(3, "teacher", "agreement", "cka")),
    ("Errors inherited", _count("teacher", "agreement", "inherited")),
    ("  with the same answer", _count("teacher", "agreement", "same_answer")),
    ("Errors corrected", _count("teacher", "agreement", "corrected")),
    ("Errors new", _count("teacher", "agreement", "new")),
]
EXPLAINED = [
    "ECE: expected calibration error in 15 bins. Times: median and quartiles, after a warm-up.",
]
OF_TEACHER = "Errors: inherited from the teacher (both wrong), corrected (only it was wrong), new (it was right)."


def _rows(rows: list[Row], results: list[dict[str, Any]]) -> list[list[str]]:
    """The rows in which anything is known."""
    cells = [[name, *(read(result) for result in results)] for name, read in rows]
    unknown = fixed(None, 0)
    return [row for row in cells if any(cell != unknown for cell in row[1:])]


def _notes(results: list[dict[str, Any]]) -> list[str]:
    return [*EXPLAINED, OF_TEACHER] if any(result.get("teacher") for result in results) else EXPLAINED


def _details(result: dict[str, Any]) -> Sheet:
    teacher = result.get("teacher")
    columns = [Column("", text=True), Column(word(result.get("network")))]
    rows = _rows([*OWN, *SPEED, *TEACHER], [result])
    notes = _notes([result])
    if teacher:
        notes = [*notes, f"Teacher: {word(teacher.get('network'))} from {word(teacher.get('path'))}"]
    return Sheet("More than accuracy", columns, rows, notes)


def _side_by_side(results: list[dict[str, Any]]) -> Sheet:
    names = [NAMES[place] if len(results) <= len(NAMES) else str(place + 1) for place in range(len(results))]
    columns = [Column("", text=True), *(Column(name) for name in names)]
    about: list[Row] = [
        ("Network", lambda result: word(result.get("network"))),
        ("Data", lambda result: word(result.get("dataset"))),
    ]
    rows = _rows([*about, *ACCURACY, *OWN, *COST, *SPEED, *TEACHER], results)
    legend = [f"{name}: {word(result.get('weights'))}" for name, result in zip(names, results, strict=True)]
    return Sheet("Evaluation", columns, rows, [*_notes(results), *legend])


def _confusions(result: dict[str, Any]) -> list[RenderableType]:
    pairs = (result.get("confusions") or [])[:PAIRS]
    columns = [Column("Class", text=True), Column("Taken for", text=True), Column("Images"), Column("% of class")]
    rows = [
        [word(pair["class"]), word(pair["taken_for"]), whole(pair["images"]), fixed(100 * pair["share"], 1)]
        for pair in pairs
    ]
    return [Sheet("Most frequent confusions", columns, rows)] if rows else []
