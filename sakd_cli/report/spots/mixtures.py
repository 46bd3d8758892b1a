"""What a run mixes of its teacher's blocks (`dfa.json`), as a table."""

from typing import Any

from sakd_cli.errors import UsageError
from sakd_cli.report.render.format import fixed, number, plain, share, whole, word
from sakd_cli.report.render.sheet import Column, Sheet
from sakd_cli.rundir import RunDir

RECORD, PICTURE = "dfa.json", "dfa.png"


def mixture_report(run: RunDir) -> dict[str, Any] | None:
    """The record of a run; None where there is none. Raises UsageError where it is damaged."""
    if not (run.path / RECORD).is_file():
        return None
    record = run.read_json(RECORD)
    try:
        for group in record["groups"]:
            if not group["alpha"] or any(number(value) is None for value in group["alpha"]):
                raise ValueError
    except (KeyError, TypeError, ValueError):
        raise UsageError(f"{plain(run.path / RECORD)}: missing or damaged") from None
    return record


def mixture_table(record: dict[str, Any]) -> Sheet:
    """A row per group: the share of each of its blocks, from the first to the last."""
    groups = record["groups"]
    columns = [Column("Stage", text=True), Column("Blocks"), Column("Share of each, in order", text=True)]
    columns += [Column("Largest"), Column("Entropy")]
    rows = [
        [
            word(group.get("name")),
            whole(len(group["alpha"])),
            " ".join(f"{share(value):>5}" for value in group["alpha"]),
            whole(group.get("largest")),
            fixed(group.get("entropy"), 2),
        ]
        for group in groups
    ]
    teacher, dataset, norm, weights = (word(record.get(key)) for key in ("teacher", "dataset", "norm", "weights"))
    notes = [f"{teacher} on {dataset} · {norm} · weights: {weights}"]
    notes.append("Largest: place of the block with the largest share; entropy: of the shares, in nats.")
    odd = [g for g in groups if isinstance(p := g.get("positions"), list) and p != list(range(1, len(p) + 1))]
    notes += [
        f"{word(g.get('name'))}: blocks {', '.join(map(str, g['positions']))}; others differ in width" for g in odd
    ]
    return Sheet("Mixtures of the teacher's blocks (%)", columns, rows, notes)
