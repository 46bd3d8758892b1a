"""The student branches of a student-friendly teacher, as a table"""

from collections.abc import Sequence

from sakd_cli.documents.evaluation import Branch
from sakd_cli.report.render.format import fixed, large, word
from sakd_cli.report.render.sheet import Column, Sheet


def branch_table(rows: Sequence[Branch]) -> Sheet:
    """Where each branch hangs, how good it is, what it costs."""
    columns = [Column(header, text=True) for header in ("Student", "Behind", "Transform")]
    columns += [Column(header) for header in ("Top-1 %", "Top-5 %", "Loss", "Parameters", "MACs")]
    cells = [
        [
            *(word(text) for text in (row.student, row.behind, row.transform)),
            *(fixed(value, digits) for value, digits in ((row.top1, 2), (row.top5, 2), (row.loss, 3))),
            *(large(count) for count in (row.parameters, row.macs)),
        ]
        for row in rows
    ]
    macs = large(sum(row.macs for row in rows))
    note = f"They add {macs} MACs per image and pass to the training, nothing to the teacher's use."
    return Sheet("Student branches", columns, cells, [note])
