"""What a run mixes of its teacher's blocks (`dfa.json`), as a table."""

from sakd_cli.documents.mixtures import Mixtures
from sakd_cli.files import read_document
from sakd_cli.report.render.format import fixed, fraction, whole, word
from sakd_cli.report.render.sheet import Column, Sheet
from sakd_cli.rundir import RunDir

RECORD, PICTURE = "dfa.json", "dfa.png"


def read_mixtures(run: RunDir) -> Mixtures | None:
    """The record of a run; None where there is none. Raises UsageError where it is damaged."""
    path = run.path / RECORD
    return read_document(path, Mixtures) if path.is_file() else None


def mixture_table(record: Mixtures) -> Sheet:
    """A row per group: the weight of each of its blocks, from the first to the last."""
    columns = [Column("Stage", text=True), Column("Blocks"), Column("Weight of each, in order", text=True)]
    columns += [Column("Largest"), Column("Entropy")]
    rows = [
        [
            word(group.name),
            whole(len(group.alpha)),
            " ".join(f"{fraction(value):>5}" for value in group.alpha),
            whole(group.largest),
            fixed(group.entropy, 2),
        ]
        for group in record.groups
    ]
    source = f"{word(record.norm)} · weights: {word(record.weights)}"
    notes = [f"{word(record.teacher)} on {word(record.dataset)} · {source}"]
    notes.append("Largest: place of the block with the largest weight; entropy: of the weights, in nats.")
    notes += [
        f"{word(group.name)}: blocks {', '.join(map(str, group.positions))}; others differ in width"
        for group in record.groups
        if group.positions != list(range(1, len(group.positions) + 1))
    ]
    return Sheet("Mixtures of the teacher's blocks (%)", columns, rows, notes)
