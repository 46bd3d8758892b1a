"""Evaluations as text: one network in full, or several side by side"""

from collections.abc import Sequence

from rich.console import RenderableType

from sakd_cli.documents.evaluation import EnsembleEvaluation, Evaluation, Quartiles
from sakd_cli.report.evaluation.ensemble import ensemble_tables
from sakd_cli.report.evaluation.tables import evaluation_tables
from sakd_cli.report.render.format import fixed, fraction, large, whole, word
from sakd_cli.report.render.sheet import Sheet, table

PAIRS = 8  # confusions shown
NAMES = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
EXPLAINED = [
    "ECE: expected calibration error in 15 bins. Times: median and quartiles, after a warm-up.",
]
OF_TEACHER = "Both wrong, teacher only wrong, student only wrong: images by whose answer is wrong."
AnyEvaluation = Evaluation | EnsembleEvaluation
Cells = dict[str, str]


def score_tables(results: Sequence[AnyEvaluation]) -> list[RenderableType]:
    """What `sakd eval --json` holds, for one target or for several."""
    if len(results) > 1:
        return [_side_by_side(results)]
    result = results[0]
    if isinstance(result, EnsembleEvaluation):
        return [*evaluation_tables(result), *ensemble_tables(result)]
    first, *others = evaluation_tables(result)
    return [first, _details(result), *others, *_confusions(result)]


def _accuracy(result: AnyEvaluation) -> Cells:
    return {"Top-1 %": fixed(result.top1, 2), "Top-5 %": fixed(result.top5, 2)}


def _calibration(result: AnyEvaluation) -> Cells:
    cells = {"NLL, nats": fixed(result.loss, 3)}
    if isinstance(result, Evaluation):
        cells |= {"Brier score": fixed(result.brier, 4), "ECE": fixed(result.ece, 4)}
    return cells


def _cost(result: AnyEvaluation) -> Cells:
    return {"Parameters": large(result.parameters), "MACs": large(result.macs)}


def _timed(times: Quartiles, digits: int) -> str:
    """`2.31 (2.28 to 2.40)`: median and quartiles."""
    median, low, high = (fixed(value, digits) for value in (times.median, times.low, times.high))
    return f"{median} ({low} to {high})"


def _mebibytes(value: int) -> str:
    return fixed(value / 2**20, 1)


def _speed(result: AnyEvaluation) -> Cells:
    if isinstance(result, EnsembleEvaluation):
        return {}
    cells: Cells = {}
    speed = result.speed
    if speed is not None:
        cells |= {"Latency, ms, batch 1": _timed(speed.latency, 2), "Images/s": _timed(speed.throughput, 0)}
    cells |= {"  in batches of": whole(result.memory.batch)}
    cells |= {"Peak of live tensors, MiB": _mebibytes(result.memory.bytes)}
    return cells | ({"Allocator's peak, MiB": _mebibytes(speed.memory)} if speed and speed.memory is not None else {})


def _teacher(result: AnyEvaluation) -> Cells:
    if isinstance(result, EnsembleEvaluation) or result.teacher is None:
        return {}
    found = result.teacher.agreement
    return {
        "Teacher's top-1 %": fixed(result.teacher.top1, 2),
        "Same answer as teacher, %": fixed(found.top1, 2),
        "KL from teacher, nats": fixed(found.kl, 3),
        "Linear CKA": fixed(found.cka, 3),
        "Both wrong": whole(found.both_wrong),
        "  of these the same wrong answer": whole(found.same_wrong_answer),
        "Teacher only wrong": whole(found.teacher_only_wrong),
        "Student only wrong": whole(found.student_only_wrong),
    }


def _rows(columns: Sequence[Cells]) -> list[list[str]]:
    """One row per label of any column."""
    labels = dict.fromkeys(label for cells in columns for label in cells)
    return [[label, *(cells.get(label, fixed(None, 0)) for cells in columns)] for label in labels]


def _notes(results: Sequence[AnyEvaluation]) -> list[str]:
    return [*EXPLAINED, OF_TEACHER] if any(_teacher(result) for result in results) else EXPLAINED


def _details(result: Evaluation) -> Sheet:
    notes = _notes([result])
    if result.teacher:
        notes = [*notes, f"Teacher: {word(result.teacher.network)} from {word(result.teacher.path)}"]
    rows = _rows([_calibration(result) | _speed(result) | _teacher(result)])
    return Sheet("More than accuracy", ("", word(result.network)), rows, notes)


def _side_by_side(results: Sequence[AnyEvaluation]) -> Sheet:
    names = [NAMES[place] if len(results) <= len(NAMES) else str(place + 1) for place in range(len(results))]
    cells = [
        {"Network": word(result.network), "Data": word(result.dataset)}
        | _accuracy(result)
        | _calibration(result)
        | _cost(result)
        | _speed(result)
        | _teacher(result)
        for result in results
    ]
    legend = [f"{name}: {word(result.weights)}" for name, result in zip(names, results, strict=True)]
    return Sheet("Evaluation", ["", *names], _rows(cells), [*_notes(results), *legend])


def _confusions(result: Evaluation) -> list[RenderableType]:
    columns = {
        "Class": lambda pair: word(pair.class_),
        "Predicted as": lambda pair: word(pair.predicted_as),
        "Images": lambda pair: whole(pair.images),
        "% of class": lambda pair: fraction(pair.fraction),
    }
    pairs = result.confusions[:PAIRS]
    return [table("Most frequent confusions", pairs, columns, text=2)] if pairs else []
