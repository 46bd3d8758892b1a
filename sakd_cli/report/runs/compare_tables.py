"""Comparisons as text and as CSV"""

import csv
import io
from typing import Any

from rich.console import RenderableType

from sakd_cli.report.render.format import DASH, duration, fixed, word
from sakd_cli.report.render.sheet import Column, Sheet, thinned

EPOCH_ROWS, MOST = 10, 8  # rows of curves; groups that stand beside each other as columns
FIELDS = ["run", "group", "method", "router", "seed", "epoch", "split", "top1", "top5", "loss"]


def comparison_tables(document: dict[str, Any]) -> list[RenderableType]:
    """What `compare` returns: groups and verdicts first, then runs, words and curves."""
    tables: list[RenderableType] = [_groups(document)]
    if len(document["runs"]) > len(document["groups"]):
        tables.append(_runs(document))
    tables += [sheet for sheet in (_words(document), _curves(document)) if sheet.rows]
    return tables


def _groups(document: dict[str, Any]) -> Sheet:
    columns = [Column("Group", text=True), Column("Seeds"), Column("Top-1 %"), Column("95 % of the mean")]
    columns += [Column("Top-5 %"), Column("NLL")]
    rows = [
        [
            word(group["label"]),
            str(len(group["seeds"])),
            _spread(group["top1"], 2),
            _interval(group["top1"]),
            _spread(group["top5"], 2),
            _spread(group["loss"], 3),
        ]
        for group in document["groups"]
    ]
    taught = {row["teacher_top1"] for row in document["runs"]} - {None}
    notes = [f"Teacher: top-1 {fixed(taught.pop(), 2)} %."] if len(taught) == 1 else []
    told = [entry["text"] for entry in document["comparisons"]]
    tested = sum(entry["p"] is not None for entry in document["comparisons"])
    if tested > 1:
        told.append(f"Paired t-tests, not corrected for being {tested}.")
    return Sheet("Last epoch on the test images, mean ± standard deviation over seeds", columns, rows, [*notes, *told])


def _spread(figure: dict[str, Any] | None, digits: int) -> str:
    if figure is None:
        return DASH
    spread = "" if figure["std"] is None else f" ± {fixed(figure['std'], digits)}"
    return fixed(figure["mean"], digits) + spread


def _interval(figure: dict[str, Any] | None) -> str:
    known = figure is not None and figure["std"] is not None
    return f"{fixed(figure['low'], 2)} to {fixed(figure['high'], 2)}" if figure and known else DASH


def _runs(document: dict[str, Any]) -> Sheet:
    columns = [Column("Group", text=True), *(Column(name) for name in ("Seed", "Top-1 %", "Best %", "NLL", "Time"))]
    rows = [
        [
            word(document["groups"][row["group"]]["label"]) + ("" if row["finished"] else " (not finished)"),
            word(row["seed"]),
            fixed(row["top1"], 2),
            fixed(row["best"]["top1"], 2),
            fixed(row["loss"], 3),
            duration(row["seconds"]),
        ]
        for row in document["runs"]
    ]
    return Sheet("Runs", columns, rows, ["Best: the epoch that the selection images chose, on the test images."])


def _words(document: dict[str, Any]) -> Sheet:
    """Config that differ, by group where all its runs agree on them; the seed stands elsewhere."""
    groups = document["groups"]
    firsts = [next(n for n, row in enumerate(document["runs"]) if row["group"] == k) for k in range(len(groups))]
    rows = [
        [word(entry["key"]), *(word(entry["values"][first]) for first in firsts)]
        for entry in document["differences"]
        if entry["key"] != "seed"
    ]
    columns = [Column("Word", text=True), *(Column(word(group["label"]), text=True) for group in groups)]
    return Sheet("Config that differ", columns, rows if len(groups) <= MOST else [])


def _curves(document: dict[str, Any]) -> Sheet:
    """Top-1 on the images that select, by epoch: of each group the mean over its runs that came so far."""
    groups = range(len(document["groups"]))
    found: dict[int, dict[int, list[float]]] = {}
    for row in document["runs"]:
        for point in row["curve"]:
            if point["top1"] is not None:
                found.setdefault(point["epoch"], {}).setdefault(row["group"], []).append(point["top1"])
    rows = [
        [str(epoch), *(fixed(sum(v) / len(v), 2) if (v := found[epoch].get(k)) else DASH for k in groups)]
        for epoch in thinned(sorted(found), EPOCH_ROWS)
    ]
    columns = [Column("Epoch"), *(Column(word(group["label"])) for group in document["groups"])]
    left_out = f"{len(rows)} of {len(found)} epochs are shown; all of them: --json"
    notes = [left_out] if len(rows) < len(found) else []
    return Sheet(
        "Top-1 % on the images that choose the best epoch", columns, rows if len(groups) <= MOST else [], notes
    )


def comparison_csv(document: dict[str, Any]) -> str:
    """One row per run and epoch (split train, and the one that selects), and one for the final test figures."""
    text = io.StringIO()
    writer = csv.DictWriter(text, FIELDS, lineterminator="\n")
    writer.writeheader()
    for run in document["runs"]:
        own = {key: run[key] for key in ("run", "method", "router", "seed")}
        own["group"] = document["groups"][run["group"]]["label"]
        for point in run["curve"]:
            trained = {"split": "train", "top1": point["train_top1"], "loss": point["train_loss"]}
            judged = {"split": point["selected_on"], "top1": point["top1"], "loss": point["loss"]}
            for row in (trained, judged):
                writer.writerow(own | {"epoch": point["epoch"]} | row)
        if run["top1"] is not None:
            writer.writerow(
                own | {"epoch": run["epochs"], "split": "test"} | {k: run[k] for k in ("top1", "top5", "loss")}
            )
    return text.getvalue()
