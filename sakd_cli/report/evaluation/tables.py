"""Evaluations as text: one network in full, or several side by side; predictions as text and as CSV"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import RenderableType

from sakd_cli.documents.evaluation import Branch, EnsembleEvaluation, Evaluation, Prediction, Predictions, Quartiles
from sakd_cli.report.evaluation.ensemble import ensemble_tables
from sakd_cli.report.render import plots
from sakd_cli.report.render.charts import Heat
from sakd_cli.report.render.format import DASH, bar, csv_text, fixed, fraction, large, named, whole
from sakd_cli.report.render.sheet import BAR, Columns, Sheet, both_ends, columns_of, table
from sakd_cli.writing import write_aside

EXTREMES = 10  # best and worst classes ...
ALL_CLASSES = 25  # ... unless there are no more than this
PAIRS = 8  # confusions shown
NAMES = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
EXPLAINED = ["ECE: expected calibration error in 15 bins. Times: median and quartiles, after a warm-up."]
OF_TEACHER = "Both wrong, teacher only wrong, student only wrong: images by whose answer is wrong."
TAKEN = "  disturbed: cores that others used"
DISTURBED = "Disturbed: other programs took cores that were wanted here, so these times are too slow."
SCORES: Columns = columns_of(lambda top: fixed(top, 2), {"Top-1 %": "top1", "Top-5 %": "top5"})
SCORES["Loss"] = lambda one: fixed(one.loss, 3)
COSTS = columns_of(large, {"Parameters": "parameters", "MACs": "macs"})
AnyEvaluation = Evaluation | EnsembleEvaluation
Cells = dict[str, str]


def score_tables(results: Sequence[AnyEvaluation]) -> list[RenderableType]:
    """What `sakd eval --json` holds, for one target or for several."""
    if len(results) > 1:
        return [_side_by_side(results)]
    result = results[0]
    first, *others = evaluation_tables(result)
    exits = ensemble_tables(result) if isinstance(result, EnsembleEvaluation) else []
    return [first, _details(result), *others, *_confusions(result), *exits]


def _calibration(result: AnyEvaluation) -> Cells:
    figures = {"NLL, nats": fixed(result.loss, 3)}
    figures |= {"Brier score": fixed(result.brier, 4), "ECE": fixed(result.ece, 4)}
    if (means := result.averages) is not None:
        for name in ("precision", "recall", "f1"):
            both = (fixed(getattr(means, f"{name}_{kind}"), 2) for kind in ("macro", "weighted"))
            figures[f"{name.capitalize()} %, macro | weighted"] = " | ".join(both)
        figures["Balanced accuracy %"] = fixed(means.balanced_accuracy, 2)
        figures["ROC-AUC %, one against the others"] = fixed(means.auroc, 2)
    return figures


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
        cells |= {"  threads": whole(speed.threads)}
        if speed.disturbed:
            cells |= {TAKEN: f"{fixed(speed.busy, 1)} of {whole(speed.cores)}"}
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
        "Linear CKA of the pooled features": fixed(found.cka, 3),
        "Both wrong": whole(found.both_wrong),
        "  of these the same wrong answer": whole(found.same_wrong_answer),
        "Teacher only wrong": whole(found.teacher_only_wrong),
        "Student only wrong": whole(found.student_only_wrong),
    }


def _rows(columns: Sequence[Cells]) -> list[list[str]]:
    """One row per label of any column."""
    labels = dict.fromkeys(label for cells in columns for label in cells)
    return [[label, *(cells.get(label, DASH) for cells in columns)] for label in labels]


def _notes(results: Sequence[AnyEvaluation]) -> list[str]:
    known = {label for result in results for label in _speed(result) | _teacher(result)}
    return [*EXPLAINED, *[DISTURBED] * (TAKEN in known), *[OF_TEACHER] * ("Both wrong" in known)]


def _details(result: AnyEvaluation) -> Sheet:
    notes = _notes([result])
    if isinstance(result, Evaluation) and result.teacher:
        notes = [*notes, f"Teacher: {named(result.teacher.network)} from {named(result.teacher.path)}"]
    rows = _rows([_calibration(result) | _speed(result) | _teacher(result)])
    return Sheet("More than accuracy", ("", named(result.network)), rows, notes)


def _side_by_side(results: Sequence[AnyEvaluation]) -> Sheet:
    names = [NAMES[place] if len(results) <= len(NAMES) else str(place + 1) for place in range(len(results))]
    cells = [
        {"Network": named(result.network), "Data": named(result.dataset), "Split": named(result.split)}
        | {"Images": whole(result.images)}
        | {"Top-1 %": fixed(result.top1, 2), "Top-5 %": fixed(result.top5, 2)}
        | _calibration(result)
        | {"Parameters": large(result.parameters), "MACs": large(result.macs)}
        | _speed(result)
        | _teacher(result)
        for result in results
    ]
    sets = {(result.dataset, result.split, result.images) for result in results}
    other = ["Not on the same images: these figures cannot be compared."] * (len(sets) > 1)
    legend = [*other, *(f"{name}: {named(result.weights)}" for name, result in zip(names, results, strict=True))]
    return Sheet("Evaluation", ["", *names], _rows(cells), [*_notes(results), *legend])


def _confusions(result: AnyEvaluation) -> list[RenderableType]:
    columns = columns_of(named, {"Class": "class_", "Predicted as": "predicted_as"})
    columns |= columns_of(whole, {"Images": "images"}) | columns_of(fraction, {"% of class": "fraction"})
    pairs = result.confusions[:PAIRS]
    return [table("Most frequent confusions", pairs, columns, text=2)] if pairs else []


def matrix_chart(result: AnyEvaluation) -> Heat:
    """The confusion matrix, each row as a share of its class's images."""
    names = [named(entry.name) for entry in result.classes]
    rows = result.confusion_matrix or []
    cells: list[list[float | None]] = [[100 * n / sum(row) if sum(row) else None for n in row] for row in rows]
    ends = "0 % of the class", "100 %"
    title = f"Predicted as (columns) by class: {named(result.network)} on {named(result.dataset)}"
    return Heat(title, names, names, cells, 100.0, ends, numbers=len(names) <= 20)


def write_matrix(result: AnyEvaluation, path: Path) -> None:
    """The full confusion matrix as CSV, or as a picture."""
    if path.suffix.lower() != ".csv":
        plots.write(plots.figure_of([matrix_chart(result)]), path)
        return
    names = [entry.name for entry in result.classes]
    heads = [f"predicted {name}" for name in names]
    rows = zip(names, result.confusion_matrix or [], strict=True)
    table = csv_text(["class", *heads], ({"class": name} | dict(zip(heads, row, strict=True)) for name, row in rows))
    write_aside(path, table.encode())


def evaluation_tables(result: AnyEvaluation) -> list[RenderableType]:
    """The metrics, the branches of a student-friendly teacher, and the classes."""
    columns = columns_of(named, {"Network": "network", "Data": "dataset", "Split": "split"})
    columns |= columns_of(whole, {"Images": "images"}) | SCORES | COSTS
    tables: list[RenderableType] = [table("Evaluation", [result], columns, text=3)]
    if isinstance(result, Evaluation) and result.branches:
        tables.append(branch_table(result.branches))
    known = sorted(((one.top1, one) for one in result.classes if one.top1 is not None), key=lambda pair: -pair[0])
    if not known:
        return tables
    ranked = [
        [str(rank), named(one.name), whole(one.images), fixed(top1, 1), bar(top1 / 100, BAR)]
        for rank, (top1, one) in enumerate(known, start=1)
    ]
    shown, left_out = both_ends(ranked, EXTREMES if len(ranked) > ALL_CLASSES else len(ranked))
    notes, empty = [], len(result.classes) - len(known)
    if left_out:
        notes.append(f"The {EXTREMES} best and the {EXTREMES} worst of {len(ranked)} classes; all of them: --json")
    if empty:
        notes.append(f"{empty} of {len(result.classes)} classes have no image here.")
    return [*tables, Sheet("By class", ("#", "Class", "Images", "Top-1 %", ""), shown, notes, text=["Class"])]


def branch_table(branches: Sequence[Branch]) -> Sheet:
    """Where each student branch of a student-friendly teacher hangs, how good it is, what it costs."""
    columns = columns_of(named, {"Student": "student", "Behind": "behind", "Transform": "transform"}) | SCORES | COSTS
    macs = large(sum(branch.macs for branch in branches))
    note = f"They add {macs} MACs per image and pass to the training, nothing to the teacher's use."
    return table("Student branches", branches, columns, [note], text=3)


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
    return csv_text(["file", "error", "exit", *fields], map(_prediction_row, document.predictions))


def _prediction_row(one: Prediction) -> dict[str, Any]:
    row: dict[str, Any] = {"file": one.file, "error": one.error, "exit": one.exit}
    for place, answer in enumerate(one.classes, start=1):
        row |= {f"class_{place}": answer.class_, f"probability_{place}": answer.probability}
    return row
