"""What a run mixes of its teacher's blocks (`dfa.json`), as a table and as a picture. Plain data in, no torch."""

import importlib.util
from pathlib import Path
from typing import Any

from sakd_cli.errors import UsageError
from sakd_cli.report.figures import fixed, number, plain, share, whole, word
from sakd_cli.report.sheet import Column, Sheet
from sakd_cli.rundir import RunDir

RECORD, PICTURE = "dfa.json", "dfa.png"
LEGIBLE = 12  # blocks beside each other that have room for a number in the picture


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


def can_draw() -> bool:
    """Whether the library for pictures is there (`pip install 'sakd[plots]'`)."""
    return importlib.util.find_spec("matplotlib") is not None


def draw_mixtures(record: dict[str, Any], path: Path) -> None:
    """Draw the shares as a heat map, groups by blocks, into a PNG file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [group["alpha"] for group in record["groups"]]
    most = max(map(len, rows))
    figure = Figure(figsize=(1.8 + 0.55 * max(most, 4), 1.4 + 0.5 * len(rows)), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    padded = [[*(100 * value for value in row), *[float("nan")] * (most - len(row))] for row in rows]
    image = axes.imshow(padded, cmap="Blues", vmin=0, vmax=100 * max(map(max, rows)), aspect="auto")
    if most <= LEGIBLE:
        for y, row in enumerate(rows):
            for x, value in enumerate(row):
                colour = "white" if 100 * value > 0.6 * image.get_clim()[1] else "black"
                axes.text(x, y, share(value), ha="center", va="center", fontsize=8, color=colour)
    step = -(-most // LEGIBLE)
    axes.set_xticks(range(0, most, step), [str(1 + x) for x in range(0, most, step)])
    axes.set_yticks(range(len(rows)), [word(group.get("name")) for group in record["groups"]])
    axes.set_xlabel("block")
    axes.set_title(f"{word(record.get('teacher'))} on {word(record.get('dataset'))}", fontsize=9)
    figure.colorbar(image, label="share (%)")
    figure.savefig(path)
