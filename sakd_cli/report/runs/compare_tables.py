"""Comparisons as text, as CSV and as curves"""

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from rich.console import RenderableType

from sakd_cli.config.base import written
from sakd_cli.documents.table import Comparison, Point, Versus
from sakd_cli.report.render.charts import SHARE, Chart, Lines, Series, zoom
from sakd_cli.report.render.format import (
    DASH,
    csv_text,
    difference,
    duration,
    fixed,
    mean_std,
    named,
    p_value,
    plain,
    whole,
)
from sakd_cli.report.render.sheet import Columns, Sheet, columns_of, left_out, table, thinned
from sakd_cli.report.runs.statistics import MOST_SEEDS, about_tests, interval

EPOCH_ROWS, MOST = 10, 8  # rows of curves; groups that stand beside each other as columns
FEW = 2  # groups up to which the training images have a curve too
VERDICT: Columns = {
    "95 %": lambda test: interval(test) or DASH,
    "p": lambda test: p_value(test.holm),
    "d": lambda test: fixed(test.effect, 2),
    "Seeds": lambda test: whole(len(test.seeds)),
    "Needed": lambda test: DASH if test.p is None else whole(test.needed) if test.needed else f"> {whole(MOST_SEEDS)}",
}
LOSS = "cross-entropy, nats"
FIELDS = ["run", "group", "method", "router", "seed", "epoch", "split", "top1", "top5", "loss"]


def comparison_tables(document: Comparison) -> list[RenderableType]:
    """Groups and verdicts first, then runs, settings and curves."""
    tables: list[RenderableType] = [_groups(document), *([_verdicts(document)] if document.comparisons else [])]
    if len(document.runs) > len(document.groups):
        tables.append(_runs(document))
    if len(document.groups) <= MOST:
        tables += [sheet for sheet in (_settings(document), _curves(document)) if sheet.rows]
    return tables


def _groups(document: Comparison) -> Sheet:
    teacher = _teacher_top1(document)
    notes = [] if teacher is None else [f"Teacher: top-1 {fixed(teacher, 2)} %."]
    notes += [*map(plain, document.doubles), *(answer.text for answer in document.answers)]
    columns = {
        "Group": lambda group: named(group.label) + " (not finished)" * (not group.seeds),
        "Seeds": lambda group: str(len(group.seeds)),
        "Top-1 %": lambda group: mean_std(group.top1),
        "95 % of the mean": lambda group: (
            DASH
            if group.top1 is None or group.top1.std is None
            else f"{fixed(group.top1.low, 2)} to {fixed(group.top1.high, 2)}"
        ),
        "Top-5 %": lambda group: mean_std(group.top5),
        "NLL": lambda group: mean_std(group.loss, 3),
    }
    title = "Last epoch on the test images, mean ± standard deviation over seeds"
    return table(title, document.groups, columns, notes)


def _verdicts(document: Comparison) -> Sheet:
    """Every test, a row each."""
    labels = [named(group.label) for group in document.groups]
    columns: Columns = {"Group": lambda versus: labels[versus.group], "Less": lambda versus: labels[versus.against]}
    of = [(group.top1.mean if group.top1 else None, set(group.seeds)) for group in document.groups]

    def shown(test: Versus) -> str:
        both = of[test.group], of[test.against]
        ours, theirs = (mean if seeds == set(test.seeds) else None for mean, seeds in both)
        return DASH if test.difference is None else difference(test.difference, ours, theirs)

    columns["Difference"] = shown
    columns |= VERDICT | {"Verdict": lambda versus: versus.verdict}
    tests = sum(test.p is not None for test in document.comparisons)
    notes = [about_tests(tests)]
    notes += [
        "d: difference over its standard deviation. Needed: seeds with which a paired t-test would see 0.5 points at "
        "80 % power, were that deviation the true one."
    ] * bool(tests)
    notes += [
        f"{labels[one.group]} against {labels[one.against]}: not under one budget: {', '.join(one.unequal)}."
        for one in document.comparisons
        if one.unequal
    ]
    return table(
        "Differences in top-1, in points", document.comparisons, columns, notes, text=("Group", "Less", "Verdict")
    )


def _runs(document: Comparison) -> Sheet:
    columns = {
        "Group": lambda run: named(document.groups[run.group].label) + " (not finished)" * (not run.finished),
        "Seed": lambda run: named(run.seed),
        "Top-1 %": lambda run: fixed(run.top1, 2),
        "Best %": lambda run: fixed(run.best.top1, 2),
        "NLL": lambda run: fixed(run.loss, 3),
        "Time": lambda run: duration(run.seconds),
    }
    return table("Runs", document.runs, columns, ["Best: the epoch that the validation set chose, on the test images."])


def _settings(document: Comparison) -> Sheet:
    """Settings that differ, by group (those of its first run); the seed stands elsewhere."""
    numbers = [run.group for run in document.runs]
    firsts = [numbers.index(k) for k in range(len(document.groups))]
    rows = [[row.key, *(row.values[first] for first in firsts)] for row in document.differences if row.key != "seed"]
    for row in rows:
        if row[0] == "code":  # SHA-256 and name of each file
            parts = [[str(line).partition("  ") for line in lines or ()] for lines in row[1:]]
            row[1:] = [", ".join(f"{path} ({digest[:12]})" for digest, _, path in some) for some in parts]
    headers = ["Key", *(group.label for group in document.groups)]
    cells = [[named(None if value is None else written(value)) for value in row] for row in rows]
    return Sheet("Settings that differ", headers, cells, text=len(headers))


def _curves(document: Comparison) -> Sheet:
    """Top-1 by epoch on the images that choose: of each group the mean over its runs that have come so far."""
    curves = [_by_epoch(document, k, "top1") for k in range(len(document.groups))]
    epochs = sorted({epoch for curve in curves for epoch in curve})
    shown = thinned(epochs, EPOCH_ROWS)
    rows = [[str(n), *(fixed(fmean(curve[n]), 2) if n in curve else DASH for curve in curves)] for n in shown]
    headers = ["Epoch", *(group.label for group in document.groups)]
    on = {named(point.selected_on) for run in document.runs for point in run.curve if point.selected_on}
    title = f"Top-1 % on the images that choose the best epoch ({' or '.join(sorted(on)) or DASH})"
    return Sheet(title, headers, rows, left_out(len(rows), len(epochs), "epochs"), text=0)


def epoch_table(title: str, curve: Sequence[Point], notes: Sequence[str] = ()) -> Sheet:
    """A row per epoch: loss and top-1 of the training images, and of those that choose the best epoch."""
    selected = named(next((point.selected_on for point in curve if point.selected_on), "validation")).capitalize()
    columns = columns_of(str, {"Epoch": "epoch"})
    columns |= columns_of(lambda value: fixed(value, 3), {"Training loss": "train_loss", f"{selected} loss": "loss"})
    top1 = {"Training top-1 %": "train_top1", f"{selected} top-1 %": "top1"}
    return table(title, curve, columns | columns_of(lambda value: fixed(value, 2), top1), notes, text=0)


def comparison_csv(document: Comparison) -> str:
    """One row per run and epoch (split train, and the one that selects), and one for the results on the test images."""
    rows: list[dict[str, Any]] = []
    for run in document.runs:
        own: dict[str, Any] = {"run": run.run, "group": document.groups[run.group].label}
        own |= {"method": run.method, "router": run.router, "seed": run.seed}
        for point in run.curve:
            row = own | {"epoch": point.epoch}
            rows.append(row | {"split": "train", "top1": point.train_top1, "loss": point.train_loss})
            rows.append(row | {"split": point.selected_on, "top1": point.top1, "loss": point.loss})
        if run.top1 is not None:
            results = {"top1": run.top1, "top5": run.top5, "loss": run.loss}
            rows.append(own | {"epoch": run.epochs, "split": "test"} | results)
    return csv_text(FIELDS, rows)


def curve_charts(document: Comparison) -> list[Chart]:
    """Top-1 and loss by epoch: of each group the mean over its runs, and the range of them as a band.

    On the validation set; of few groups on the training images as augmented, too; the teacher on the test images, where
    all runs have the same one.
    """
    few, several = len(document.groups) <= FEW, len(document.runs) > len(document.groups)
    selected = {point.selected_on for run in document.runs for point in run.curve} - {None}
    split = f"{selected.pop()} images" if len(selected) == 1 else "images that select"
    charts: list[Chart] = []
    for title, key, unit, limits in (("Accuracy", "top1", "top-1, %", SHARE), ("Loss", "loss", LOSS, None)):
        series = []
        for k, group in enumerate(document.groups):
            for kind, of, name in (("solid", key, split), ("dashed", f"train_{key}", "training images, augmented")):
                if (curve := _by_epoch(document, k, of)) and (few or kind == "solid"):
                    band = [(min(values), max(values)) for values in curve.values()] if several else []
                    label = f"{plain(group.label)}: {name}" if few else plain(group.label)
                    label = name if len(document.groups) == 1 else label
                    means = list(map(fmean, curve.values()))
                    series.append(Series(label, list(curve), means, k, "solid" if kind == "solid" else "dashed", band))
        if key == "top1" and (teacher := _teacher_top1(document)) is not None and series:
            ends = [min(series[0].x), max(series[0].x)]
            series.append(Series("teacher: test images", ends, [teacher, teacher], len(document.groups), "dotted"))
        note = (f"On {split}. " if not few else "") + "Line: mean of the seeds; band: their range." * several
        chart = Lines(f"{title} by epoch", "epoch", unit, series, limits, note)
        charts += zoom(chart) if limits else [chart]
    return charts


def _teacher_top1(document: Comparison) -> float | None:
    """The teacher's, where all runs have the same one."""
    found = {run.teacher_top1 for run in document.runs} - {None}
    return found.pop() if len(found) == 1 else None


def _by_epoch(document: Comparison, group: int, key: str) -> dict[int, list[float]]:
    found: dict[int, list[float]] = {}
    for point in (point for run in document.counted if run.group == group for point in run.curve):
        if (value := getattr(point, key)) is not None:
            found.setdefault(point.epoch, []).append(value)
    return dict(sorted(found.items()))
