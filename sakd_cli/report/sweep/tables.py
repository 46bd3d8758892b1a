"""What a sweep has found, as tables, as Markdown and as CSV"""

from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import RenderableType

from sakd_cli.config.routers import CLASSICAL
from sakd_cli.documents.base import SeedStatistics
from sakd_cli.documents.sweep import Gain, SweepCell, SweepDocument, SweepPlan
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
    points,
    whole,
)
from sakd_cli.report.render.sheet import Sheet, table
from sakd_cli.report.runs.statistics import about_tests, interval
from sakd_cli.report.sweep.results import BASELINE, EPOCHS, shared_controls

FIELDS = ["teacher", "student", "method", "router", "seeds", "top1", "std", "low", "high", "best", "published"]
FIELDS += ["against", "gain", "gain_low", "gain_high", "p", "holm", "effect", "needed", "verdict", "published_gain"]
TITLE = (
    "Top-1 %, last epoch on the test images, mean ± standard deviation over seeds (95 % interval of the mean; seeds)"
)
FAILED = ("failed", "blocked")
HOUR = 3600.0  # seconds


def sweep_tables(document: SweepDocument) -> list[RenderableType]:
    """The results, then what failed."""
    headers, *rows = _grid(document)
    tables: list[RenderableType] = [Sheet(f"{document.name}: {TITLE}", headers, rows, [*_notes(document)], text=2)]
    if failed := [[run.key, named(run.error)] for run in document.runs if run.state in FAILED]:
        tables.append(Sheet("Failed", ("Run", "Error"), failed, text=2))
    return tables


def _time(hours: float | None) -> str:
    return duration(None if hours is None else HOUR * hours)


def sweep_markdown(document: SweepDocument) -> str:
    """The same as a document in Markdown."""
    headers, *rows = _grid(document)
    lines = [f"# {document.name}", "", f"{TITLE}.", ""]
    lines += [_line(headers), _line(["---", "---", *["---:"] * (len(headers) - 2)]), *map(_line, rows), ""]
    lines += [f"- {note}" for note in _notes(document)]
    lines += [f"- {run.key}: {run.state}, {named(run.error)}" for run in document.runs if run.state in FAILED]
    return "\n".join(lines) + "\n"


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(plain(cell).replace("|", "\\|") for cell in cells) + " |"


def sweep_csv(document: SweepDocument) -> str:
    """One row per cell: a method under a router for a pair; beside it its gain over `always`, or over the baseline."""
    rows: list[dict[str, Any]] = []
    wanted = [gain for gain in document.gains if document.baseline or gain.against == CLASSICAL]
    gains = {(gain.pair, gain.method, gain.router): gain for gain in wanted}
    for cell in document.cells:
        pair, gain = document.pairs[cell.pair], gains.get((cell.pair, cell.method, cell.router))
        row: dict[str, Any] = {"teacher": pair.teacher, "student": pair.student, "published": cell.published}
        row |= {"method": cell.method, "router": cell.router, "seeds": len(cell.seeds)}
        row |= {"best": cell.best.mean if cell.best else None} | (cell.top1.plain() if cell.top1 else {})
        row["top1"] = row.pop("mean", None)
        if gain is not None:
            row |= {key: getattr(gain, key) for key in ("against", "p", "holm", "effect", "needed", "verdict")}
            row |= {"gain": gain.difference, "gain_low": gain.low, "gain_high": gain.high}
            row["published_gain"] = gain.published
        rows.append(row)
    return csv_text(FIELDS, rows)


def _grid(document: SweepDocument) -> list[list[str]]:
    """Headers, then the networks without distillation, and each method with its routers and their gains."""
    pairs = document.pairs
    rows = [["Method", "Router", *(f"{pair.teacher} → {pair.student}" for pair in pairs)]]
    printed = [pair.published for pair in pairs] if any(pair.published for pair in pairs) else []
    rows.append(["teacher", "", *(fixed(pair.teacher_top1, 2) for pair in pairs)])
    rows += [["", "published", *(fixed(one and one.teacher, 2) for one in printed)]] if printed else []
    if any(run.role == BASELINE for run in document.runs):
        rows.append([BASELINE, "", *(_mean(pair.baseline, len(pair.baseline_seeds)) for pair in pairs)])
        rows += [["", "published", *(fixed(one and one.baseline, 2) for one in printed)]] if printed else []
    for method in dict.fromkeys([BASELINE, *(cell.method for cell in document.cells)]):
        rows += _rows_of(method, document)
    return rows


def _rows_of(method: str, document: SweepDocument) -> Iterator[list[str]]:
    cells = [cell for cell in document.cells if cell.method == method]
    gains = [gain for gain in document.gains if gain.method == method]
    numbers, name = range(len(document.pairs)), method
    for router in sorted({cell.router for cell in cells}, key=lambda r: (r != CLASSICAL, r)):
        by_pair = {cell.pair: cell for cell in cells if cell.router == router}
        there = [by_pair.get(k) for k in numbers]
        yield [name, router, *(DASH if cell is None else _mean(cell.top1, len(cell.seeds)) for cell in there)]
        name = ""
        if any(cell.published is not None for cell in by_pair.values()):
            yield ["", f"{router}, published", *(fixed(cell and cell.published, 2) for cell in there)]
    for router, against in dict.fromkeys((gain.router, gain.against) for gain in gains):
        of_pair = {gain.pair: gain for gain in gains if (gain.router, gain.against) == (router, against)}
        yield ["", f"{router or method} − {against}", *(_gain(of_pair.get(k), cells) for k in numbers)]
        if any(gain.published is not None for gain in of_pair.values()):
            printed = [of_pair[k].published if k in of_pair else None for k in numbers]
            yield ["", "the same, published", *(DASH if value is None else points(value, 2) for value in printed)]


def _mean(found: SeedStatistics | None, seeds: int) -> str:
    """`70.17 ± 0.17 (69.90 to 70.45; 4)`."""
    if found is None:
        return DASH
    interval = "" if found.low is None else f"{fixed(found.low, 2)} to {fixed(found.high, 2)}; "
    return f"{mean_std(found)} ({interval}{seeds})"


def _gain(gain: Gain | None, cells: Sequence[SweepCell]) -> str:
    if gain is None or gain.difference is None:
        return DASH
    known = "" if gain.p is None else f" ({interval(gain)}), p {p_value(gain.holm)}, {gain.verdict}"
    same = [one for one in cells if one.pair == gain.pair and set(one.seeds) == set(gain.seeds)]
    of = {one.router: one.top1.mean for one in same if one.top1}
    return difference(gain.difference, of.get(gain.router), of.get(gain.against)) + known


def _notes(document: SweepDocument) -> Iterator[str]:
    left = [f"{count} {state}" for state, count in document.counts.items() if count and state != "done"]
    yield ", ".join([f"{document.counts['done']} of {len(document.runs)} runs done", *left]) + "."
    for mean in document.mean_gains:
        yield (
            f"{mean.router or BASELINE} over {mean.against}: above 0 in {mean.above} of {mean.cells} cells, "
            f"below in {mean.below}; mean {points(mean.mean, 2)} points."
        )
    yield from (answer.text for answer in document.answers)
    if any(gain.p is not None for gain in document.gains):
        yield about_tests(document.tests)
    if any(gain.p is None for gain in document.gains):
        yield "A gain without p has fewer than two seeds (or no deviation): nothing is claimed of it."
    shared = [[key.partition(" seed ")[0] for key in keys] for keys in shared_controls(document.runs).values()]
    for cells in dict.fromkeys(", ".join(keys) for keys in shared):
        yield f"One run per seed, since nothing is distilled: {cells}."
    yield from (f"Skipped: {one.what}: {one.reason}" for one in document.skipped)
    if (printed := document.published) is not None:
        epochs = sorted({run.epochs for run in document.runs if run.role == "student"})
        shorter = "" if epochs == [EPOCHS] else f" Ours trained {', '.join(map(str, epochs))} epochs: not comparable."
        yield f"Published: {printed.source}; {printed.provenance}.{shorter}"
        yield from printed.notes


def plan_tables(plan: SweepPlan) -> list[RenderableType]:
    """What is to be done, and what it costs."""
    columns = {
        "Runs": lambda row: row.what,
        "Number": lambda row: str(row.runs),
        "To do": lambda row: str(row.to_do),
        "Steps": lambda row: whole(row.steps) if row.to_do else DASH,
        "s/step": lambda row: (
            DASH if row.step_seconds is None else f"{'' if row.measured else '~'}{row.step_seconds:.3g}"
        ),
        "Time": lambda row: _time(row.hours),
        "MB each": lambda row: fixed(row.run_bytes / 1e6, 1) if row.to_do else DASH,
    }
    measured, to_do = sum(row.measured for row in plan.rows), sum(row.to_do > 0 for row in plan.rows)
    notes = [
        f"Runs: {plan.runs}; {plan.finished} finished, {plan.in_progress} in progress, {plan.failed} failed before.",
        f"{_time(plan.hours)} of {plan.device} for the training steps, one run after another; "
        "evaluation and stages before the main one come on top.",
        f"{measured} of {to_do} kinds of runs were timed just now; ~: estimated from those by multiply-accumulates.",
        f"{fixed(plan.bytes / 1e9, 2)} GB of disk, {fixed(plan.free_bytes / 1e9, 2)} GB free.",
        *(f"Skipped: {one.what}: {one.reason}" for one in plan.skipped),
    ]
    return [table(f"{plan.name}: dry run, nothing written", plan.rows, columns, notes)]
