"""Evaluations as text: one network in full, or several side by side; predictions as text and as CSV

And a student with its residual students: stage by stage, where images leave, and the cost/accuracy curve.
"""

from collections.abc import Sequence
from math import ceil, floor
from pathlib import Path
from typing import Any

from rich.console import RenderableType

from sakd_cli.documents import evaluation as doc
from sakd_cli.documents.training import EnsembleTraining
from sakd_cli.report.render import plots
from sakd_cli.report.render.charts import Heat, Lines, Series
from sakd_cli.report.render.format import DASH, bar, csv_text, fixed, fraction, large, named, printable, whole
from sakd_cli.report.render.sheet import Columns, Sheet, both_ends, columns_of, table
from sakd_cli.writing import write_aside

EXTREMES = 10  # best and worst classes ...
ALL_CLASSES = 25  # ... unless there are no more than this
PAIRS = 8  # confusions shown
NAMES = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
TIMES = "Times: median and quartiles, after a warm-up."
OF_TEACHER = "Both wrong, teacher only wrong, student only wrong: images by whose answer is wrong."
TAKEN = "  disturbed: cores that others used"
DISTURBED = "Disturbed: other programs took cores that were wanted here, so these times are too slow."
SCORES: Columns = columns_of(lambda top: fixed(top, 2), {"Top-1 %": "top1", "Top-5 %": "top5"})
SCORES["Loss"] = lambda one: fixed(one.loss, 3)
COSTS = columns_of(large, {"Parameters": "parameters", "MACs": "macs"})
AnyEvaluation = doc.Evaluation | doc.EnsembleEvaluation
Cells = dict[str, str]
Place = tuple[float, float]  # in a chart: x, y


def score_tables(results: Sequence[AnyEvaluation]) -> list[RenderableType]:
    """What `sakd eval --json` holds, for one target or for several."""
    if len(results) > 1:
        return [_side_by_side(results)]
    result = results[0]
    first, *others = evaluation_tables(result)
    exits = ensemble_tables(result) if isinstance(result, doc.EnsembleEvaluation) else []
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


def _timed(times: doc.Quartiles, digits: int) -> str:
    """`2.31 (2.28 to 2.40)`: median and quartiles."""
    median, low, high = (fixed(value, digits) for value in (times.median, times.low, times.high))
    return f"{median} ({low} to {high})"


def _mebibytes(value: int) -> str:
    return fixed(value / 2**20, 1)


def _speed(result: AnyEvaluation) -> Cells:
    if isinstance(result, doc.EnsembleEvaluation):
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
    if isinstance(result, doc.EnsembleEvaluation) or result.teacher is None:
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
    notes = {"Images/s": TIMES, TAKEN: DISTURBED, "Both wrong": OF_TEACHER}
    return ["ECE: expected calibration error in 15 bins.", *(note for label, note in notes.items() if label in known)]


def _details(result: AnyEvaluation) -> Sheet:
    notes = _notes([result])
    if isinstance(result, doc.Evaluation) and result.teacher:
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
    if isinstance(result, doc.Evaluation) and result.branches:
        tables.append(branch_table(result.branches))
    known = sorted(((one.top1, one) for one in result.classes if one.top1 is not None), key=lambda pair: -pair[0])
    if not known:
        return tables
    ranked = [
        [str(rank), named(one.name), whole(one.images), fixed(top1, 1), bar(top1 / 100)]
        for rank, (top1, one) in enumerate(known, start=1)
    ]
    shown, left_out = both_ends(ranked, EXTREMES if len(ranked) > ALL_CLASSES else len(ranked))
    notes, empty = [], len(result.classes) - len(known)
    if left_out:
        notes.append(f"The {EXTREMES} best and the {EXTREMES} worst of {len(ranked)} classes; all of them: --json")
    if empty:
        notes.append(f"{empty} of {len(result.classes)} classes have no image here.")
    return [*tables, Sheet("By class", ("#", "Class", "Images", "Top-1 %", ""), shown, notes, text=["Class"])]


def branch_table(branches: Sequence[doc.Branch]) -> Sheet:
    """Where each student branch of a student-friendly teacher hangs, how good it is, what it costs."""
    columns = columns_of(named, {"Student": "student", "Behind": "behind", "Transform": "transform"}) | SCORES | COSTS
    macs = large(sum(branch.macs for branch in branches))
    note = f"They add {macs} MACs per image and pass to the training, nothing to the teacher's use."
    return table("Student branches", branches, columns, [note], text=3)


def predictions_text(document: doc.Predictions) -> str:
    """A line for each picture: its classes with their probabilities in percent."""
    return "\n".join(printable(f"{one.file}: {_answer(one)}") for one in document.predictions)


def _answer(one: doc.Prediction) -> str:
    if one.error is not None:
        return f"not read ({one.error})"
    classes = ", ".join(f"{answer.class_} {100 * answer.probability:.1f} %" for answer in one.classes)
    return classes if one.exit is None else f"{classes} (left after stage {one.exit})"


def predictions_csv(document: doc.Predictions) -> str:
    """A row for each picture: file, error, exit, then class and probability, the likeliest first."""
    most = max(len(one.classes) for one in document.predictions)
    fields = [f"{name}_{place}" for place in range(1, most + 1) for name in ("class", "probability")]
    return csv_text(["file", "error", "exit", *fields], map(_prediction_row, document.predictions))


def _prediction_row(one: doc.Prediction) -> dict[str, Any]:
    row: dict[str, Any] = {"file": one.file, "error": one.error, "exit": one.exit}
    for place, answer in enumerate(one.classes, start=1):
        row |= {f"class_{place}": answer.class_, f"probability_{place}": answer.probability}
    return row


def ensemble_tables(result: doc.EnsembleEvaluation) -> list[RenderableType]:
    """What stands under `ensemble` in the document of `sakd eval`."""
    found = result.ensemble
    return [_stages(found, found.exits, [_cost_note(found)]), *([curve_table(found.curve)] if found.curve else [])]


def ensemble_summary(found: EnsembleTraining) -> RenderableType:
    """What stands under `ensemble` in `summary.json`."""
    notes = [
        f"{label}: top-1 {fixed(side.top1, 2, ' %')} at {fraction(side.cost)} % of the teacher's MACs."
        for label, side in (("Early exits", found.early), ("All members for every image", found.all))
    ]
    dropped = ", the last one was dropped" if found.dropped else ""
    notes += [
        f"No further residual student: {named(found.stopped)}{dropped}.",
        "Energy: mean square of what the logits lack, as a fraction of the teacher's, on the calibration images; on "
        "train: on the training images; top-1 and exits: on the test images.",
    ]
    return _stages(found, found.early.exits, notes)


def _stages(found: doc.EnsembleExits | EnsembleTraining, exits: Sequence[int], notes: list[str]) -> Sheet:
    """One row per member: cost so far, accuracy and energy after it (in a summary), threshold, images that leave."""
    trained = found if isinstance(found, EnsembleTraining) else None
    rows, total, teacher, images = [], 0, found.teacher.macs, sum(exits)
    for place, (name, macs) in enumerate(zip(found.members, found.member_macs, strict=True)):
        total += macs
        row = [whole(place), named(name), large(macs), fraction(total / teacher if teacher else None)]
        if trained:
            energies = (trained.energies.calibration, trained.energies.train)
            row += [fixed(trained.stage_top1[place], 2), *(fixed(values[place], 3) for values in energies)]
        limit = [*found.thresholds, None][place]
        # Below 0 lies no uncertainty.
        row.append("never" if limit is not None and limit < 0 else fixed(limit, 3))
        rows.append([*row, whole(exits[place]), fraction(exits[place] / images if images else None)])
    measured = ["Top-1 %", "Energy", "on train"] if trained else []
    headers = ["Stage", "Network", "MACs", "Cost so far %", *measured, "Threshold", "Exit", "Exit %"]
    return Sheet("Student and residual students", headers, rows, notes, text=["Network"])


def _cost_note(found: doc.EnsembleExits) -> str:
    teacher = found.teacher.macs
    how = f"rule {named(found.rule)}" if found.early_exit else "every image goes to the end"
    text = f"Mean cost {large(found.macs)} MACs per image ({how})"
    if found.cost is None or not teacher:
        return f"{text}; the teacher is not known."
    least = found.member_macs[0] / teacher
    over = f" Warning: the budget, {fraction(found.budget)} %, is less than the student alone costs."
    return (
        f"{text}: {fraction(found.cost)} % of the teacher's; the student alone {fraction(least)} %, "
        f"all members {fraction(sum(found.member_macs) / teacher)} %."
        + over
        * (found.early_exit and found.rule == "budget" and least > found.budget)
    )


def exit_chart(
    curve: Sequence[doc.ExitPoint], used: doc.ExitCosts, top1: float, label: str, stages: Sequence[Place] = ()
) -> Lines:
    """Top-1 over mean cost of an ensemble: every shared threshold, the Pareto front, and what is in use (`used`).

    stages  (cost as in the curve, top-1) where every image goes on to that stage, from the student alone to all
    """

    def cost(point: doc.ExitCosts) -> float:
        return 100 * point.cost if point.cost is not None else 1e-6 * point.macs

    best = sorted((cost(point), point.top1) for point in curve if point.pareto)
    series = [
        Series("one threshold for all stages", list(map(cost, curve)), [point.top1 for point in curve], 0, "marks"),
        Series("Pareto front", [x for x, _ in best], [y for _, y in best], 1),
        Series(label, [cost(used)], [top1], 3, "marks"),
    ]
    if stages:
        name = "every image up to each stage"
        series.append(Series(name, [x for x, _ in stages], [y for _, y in stages], 2, "dashed"))
    unit = "million MACs" if used.cost is None else "% of the teacher's MACs"
    shown = [top1, *(point.top1 for point in curve), *(y for _, y in stages)]
    limits = max(0.0, floor(min(shown)) - 1.0), min(100.0, ceil(max(shown)) + 1.0)
    note = "Test images. Each point is a threshold: images that are less certain go on to the next student. "
    note += f"Zoom: the upright axis shows {limits[0]:g} to {limits[1]:g} % only, the other one the costs that occur."
    return Lines("Accuracy and cost", f"mean cost per image, {unit}", "top-1, %", series, limits, note)


def exit_chart_of(result: doc.EnsembleEvaluation | doc.Evaluation) -> Lines:
    """The curve of an evaluation that was asked for one."""
    assert isinstance(result, doc.EnsembleEvaluation)
    found = result.ensemble
    label = "thresholds in use" if found.early_exit else "all members for every image"
    return exit_chart(found.curve or [], found, result.top1, label)


def curve_table(points: Sequence[doc.ExitPoint]) -> Sheet:
    """Accuracy and cost over all thresholds."""
    known = any(point.cost is not None for point in points)
    columns = {
        "Threshold": lambda point: fixed(point.theta, 3),
        "Cost %" if known else "MACs": lambda point: fraction(point.cost) if known else large(point.macs),
        "Top-1 %": lambda point: fixed(point.top1, 2),
        "Agree %": lambda point: fixed(point.agreement, 1),
        "Exit at the end %": lambda point: fraction(point.exits[-1] / max(sum(point.exits), 1)),
        "Pareto": lambda point: "*" * point.pareto,
    }
    title = "Accuracy and cost over one threshold for all stages"
    return table(title, points, columns, ["*: on the Pareto front."], text=0)
