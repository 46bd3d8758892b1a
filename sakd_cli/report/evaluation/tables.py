"""One network measured on one split: its metrics, then the classes that it does best and worst"""

from collections.abc import Sequence

from rich.console import RenderableType

from sakd_cli.documents.evaluation import Branch, EnsembleEvaluation, Evaluation
from sakd_cli.report.render.format import bar, fixed, large, whole, word
from sakd_cli.report.render.sheet import BAR, Sheet, both_ends, table

EXTREMES = 10  # best and worst classes ...
ALL_CLASSES = 25  # ... unless there are no more than this


def evaluation_tables(result: Evaluation | EnsembleEvaluation) -> list[RenderableType]:
    """The metrics, the branches of a student-friendly teacher, and the classes."""
    columns = {
        "Network": lambda one: word(one.network),
        "Data": lambda one: word(one.dataset),
        "Split": lambda one: word(one.split),
        "Images": lambda one: whole(one.images),
        "Top-1 %": lambda one: fixed(one.top1, 2),
        "Top-5 %": lambda one: fixed(one.top5, 2),
        "Loss": lambda one: fixed(one.loss, 3),
        "Parameters": lambda one: large(one.parameters),
        "MACs": lambda one: large(one.macs),
    }
    tables: list[RenderableType] = [table("Evaluation", [result], columns, text=3)]
    if isinstance(result, Evaluation) and result.branches:
        tables.append(branch_table(result.branches))
    measured = sorted(
        ((entry.top1, entry.name, entry.images) for entry in result.classes if entry.top1 is not None),
        key=lambda entry: -entry[0],
    )
    if not measured:
        return tables
    cells = [
        [str(rank), word(name), whole(images), fixed(top1, 1), bar(top1 / 100, BAR)]
        for rank, (top1, name, images) in enumerate(measured, start=1)
    ]
    shown, left_out = both_ends(cells, EXTREMES if len(cells) > ALL_CLASSES else len(cells))
    notes, empty = [], len(result.classes) - len(measured)
    if left_out:
        notes.append(f"The {EXTREMES} best and the {EXTREMES} worst of {len(cells)} classes; all of them: --json")
    if empty:
        notes.append(f"{empty} of {len(result.classes)} classes have no image here.")
    return [*tables, Sheet("By class", ("#", "Class", "Images", "Top-1 %", ""), shown, notes, text=["Class"])]


def branch_table(branches: Sequence[Branch]) -> Sheet:
    """Where each student branch of a student-friendly teacher hangs, how good it is, what it costs."""
    columns = {
        "Student": lambda branch: word(branch.student),
        "Behind": lambda branch: word(branch.behind),
        "Transform": lambda branch: word(branch.transform),
        "Top-1 %": lambda branch: fixed(branch.top1, 2),
        "Top-5 %": lambda branch: fixed(branch.top5, 2),
        "Loss": lambda branch: fixed(branch.loss, 3),
        "Parameters": lambda branch: large(branch.parameters),
        "MACs": lambda branch: large(branch.macs),
    }
    macs = large(sum(branch.macs for branch in branches))
    note = f"They add {macs} MACs per image and pass to the training, nothing to the teacher's use."
    return table("Student branches", branches, columns, [note], text=3)
