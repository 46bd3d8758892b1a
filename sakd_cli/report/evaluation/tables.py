"""One network measured on one split: its metrics, then the classes that it does best and worst"""

from collections.abc import Sequence

from rich.console import RenderableType

from sakd_cli.documents.evaluation import Branch, EnsembleEvaluation, Evaluation
from sakd_cli.report.render.format import bar, fixed, large, whole, word
from sakd_cli.report.render.sheet import BAR, Column, Sheet, both_ends, table

EXTREMES = 10  # best and worst classes ...
ALL_CLASSES = 25  # ... unless there are no more than this


def evaluation_tables(result: Evaluation | EnsembleEvaluation) -> list[RenderableType]:
    """The metrics, the branches of a student-friendly teacher, and the classes."""
    columns = [Column("Network", text=True), Column("Data", text=True), Column("Split", text=True)]
    columns += [Column(header) for header in ("Images", "Top-1 %", "Top-5 %", "Loss", "Parameters", "MACs")]
    row = [word(result.network), word(result.dataset), word(result.split), whole(result.images)]
    row += [fixed(result.top1, 2), fixed(result.top5, 2), fixed(result.loss, 3)]
    tables: list[RenderableType] = [
        Sheet("Evaluation", columns, [[*row, large(result.parameters), large(result.macs)]])
    ]
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
    headers = [Column("#"), Column("Class", text=True), Column("Images"), Column("Top-1 %"), Column("", True, "cyan")]
    return [*tables, Sheet("By class", headers, shown, notes)]


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
