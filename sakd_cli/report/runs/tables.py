"""Reports as text: each function turns plain data into rich renderables. Readable without colour and at 80 columns."""

from collections.abc import Sequence
from typing import Any

from rich.console import Group, RenderableType

from sakd_cli.report.render.format import (
    DASH,
    bar,
    deviation,
    duration,
    fixed,
    large,
    number,
    points,
    shape,
    share,
    whole,
    word,
)
from sakd_cli.report.render.sheet import MORE, Column, Sheet
from sakd_cli.report.spots.mixtures import mixture_table

EPOCH_ROWS = 20
DECIDED = 0.995  # probability of the teacher above which a router decides nothing
BAR = 10  # characters
EXTREMES = 10  # best and worst classes of an evaluation ...
ALL_CLASSES = 25  # ... unless there are no more than this


def spot_tables(report: dict[str, Any], *, top: int | None = 10) -> list[Sheet]:
    """What `spot_report` returns: overall, by epoch, and the `top` classes above and below the average; None: all."""
    tables = [_overall(report), _by_epoch(report, EPOCH_ROWS if top is not None else len(report["by_epoch"]))]
    known = [row for row in report["by_class"] if any(value is not None for value in row["deviation"])]
    if known and top != 0:
        tables.append(_by_class(report, known, top))
    if report.get("mixtures") is not None:
        tables.append(mixture_table(report["mixtures"]))
    return tables


def _overall(report: dict[str, Any]) -> Sheet:
    spots = report["overall"]
    with_policy = any(spot["probability"] is not None for spot in spots)
    columns = [Column("Spot", text=True), Column("Kind", text=True), Column("Share"), Column("", True, "cyan")]
    columns += [Column(header) for header in ("First", "Last", "Min", "Max")]
    rows = []
    for spot in spots:
        row = [word(spot["name"]), word(spot["kind"]), share(spot["share"]), bar(spot["share"], BAR)]
        row += [share(spot[key]) for key in ("first", "last", "min", "max")]
        rows.append([*row, fixed(spot["probability"], 2)] if with_policy else row)
    epochs = report["epochs"]
    notes = [
        f"{word(report['teacher'])} → {word(report['student'])} on {word(report['dataset'])} · "
        f"{word(report['method'])} · {word(report['router'])} router · {whole(epochs)} epoch{'s' * (epochs != 1)}"
        + ("" if report["finished"] else " so far"),
        "Share: over all epochs; first, last, min, max: of single epochs.",
    ]
    if with_policy:
        columns.append(Column("p"))
        notes[-1] = notes[-1][:-1] + "; p: the router's mean teacher probability in the last."
    if with_policy and all((spot["probability"] or 0) >= DECIDED for spot in spots):
        notes.append(
            "The router wants the teacher for everybody: its prior for networks of one family does in short runs. "
            "--set router.teacher_bias=0 --set router.lr=2e-4 lets it decide."
        )
    return Sheet("Samples taught at each spot (%)", columns, rows, notes)


def thinned(rows: Sequence[Any], most: int) -> list[Any]:
    """At most `most` rows, evenly spaced, the first and the last among them."""
    if len(rows) <= most:
        return list(rows)
    return [rows[round(step * (len(rows) - 1) / (most - 1))] for step in range(most)]


def _by_epoch(report: dict[str, Any], most: int) -> Sheet:
    epochs = report["by_epoch"]
    shown = thinned(epochs, most)
    # A column of nothing but dashes says only that the router has no such thing.
    terms = [
        (key, header, note)
        for key, header, note in (
            ("gamma_raised", "× γ", "× γ, ÷ γ: steps at which the router's loss was multiplied, divided by gamma."),
            ("gamma_lowered", "÷ γ", ""),
            ("count_active", "Count", "Count: steps with the count term active."),
        )
        if any(row[key] is not None for row in epochs)
    ]
    columns = [Column("Epoch"), *(Column(word(spot["name"])) for spot in report["overall"])]
    losses = [key for key in ("routed_ce", "student_ce") if any(row.get(key) is not None for row in epochs)]
    columns += [*(Column(header) for _, header, _ in terms), Column("Empty")]
    columns += [Column(header) for header in ("Routed", "Alone")[: len(losses)]]
    rows = [
        [
            whole(row["epoch"]),
            *(share(value) for value in row["share"]),
            *(share(row[key]) for key, _, _ in terms),
            share(max((value for value in row["empty"] if value is not None), default=None)),
            *(fixed(row.get(key), 2) for key in losses),
        ]
        for row in shown
    ]
    notes = [note for _, _, note in terms if note]
    several = len(report["overall"]) > 1
    notes.append("Empty: steps at which nobody was selected" + (", at the spot with the most." if several else "."))
    if losses:
        notes.append("Routed, alone: mean cross-entropy of the routed network and of the student alone.")
    if len(shown) < len(epochs):
        notes.append(f"{len(shown)} of {len(epochs)} epochs are shown; all of them: --json")
    return Sheet("By epoch (% of samples; right of the spots, % of steps)", columns, rows, notes)


def _peak(row: dict[str, Any]) -> float:
    """The deviation that is largest in size, with its sign."""
    return max((float(value) for value in row["deviation"] if value is not None), key=abs)


def _by_class(report: dict[str, Any], known: list[dict[str, Any]], top: int | None) -> Sheet:
    ranked = sorted(known, key=_peak, reverse=True)
    columns = [Column("#"), Column("Class", text=True), *(Column(word(spot["name"])) for spot in report["overall"])]
    cells = [
        [
            str(rank),
            word(row["name"]),
            # Six characters hold any deviation (−100.0), so that the shares stand under each other.
            *(f"{share(s)} {deviation(d):>6}" for s, d in zip(row["share"], row["deviation"], strict=True)),
        ]
        for rank, row in enumerate(ranked, start=1)
    ]
    notes = ["Mean over the epochs, then the difference from the spot's share in points."]
    if len(report["overall"]) > 1:
        notes.append("Ranked by the largest difference at any spot, from most above to most below.")
    shown, left_out = both_ends(cells, top)
    if left_out:
        notes.append(f"{len(shown) - 1} of {len(cells)} classes are shown; all of them: --json")
    return Sheet("By class (% of samples)", columns, shown, notes)


def both_ends(rows: list[list[str]], top: int | None) -> tuple[list[Sequence[str]], bool]:
    """The first and the last `top` rows (None: all), with a mark between them where rows are left out."""
    if top is None or len(rows) <= 2 * top:
        return list(rows), False
    return [*rows[:top], MORE, *rows[-top:]], True


def evaluation_tables(result: dict[str, Any]) -> list[RenderableType]:
    """One network measured on one split: the figures, then the classes it does best and worst."""
    columns = [Column("Network", text=True), Column("Data", text=True), Column("Split", text=True)]
    columns += [Column(header) for header in ("Images", "Top-1 %", "Top-5 %", "Loss", "Parameters", "MACs")]
    row = [word(result.get(key)) for key in ("network", "dataset", "split")]
    row += [whole(result.get("images")), fixed(result.get("top1"), 2), fixed(result.get("top5"), 2)]
    row += [fixed(result.get("loss"), 3), large(result.get("parameters")), large(result.get("macs"))]
    tables: list[RenderableType] = [Sheet("Evaluation", columns, [row])]
    if result.get("branches"):
        tables.append(_branch_table(result["branches"]))

    classes = result.get("classes") or []
    measured = sorted(
        (entry for entry in classes if number(entry.get("top1")) is not None),
        key=lambda entry: -float(entry["top1"]),
    )
    if not measured:
        return tables
    cells = [
        [
            str(rank),
            word(entry.get("name")),
            whole(entry.get("images")),
            fixed(entry["top1"], 1),
            bar(entry["top1"] / 100, BAR),
        ]
        for rank, entry in enumerate(measured, start=1)
    ]
    shown, left_out = both_ends(cells, EXTREMES if len(cells) > ALL_CLASSES else len(cells))
    notes = []
    if left_out:
        notes.append(f"The {EXTREMES} best and the {EXTREMES} worst of {len(cells)} classes; all of them: --json")
    if len(measured) < len(classes):
        notes.append(f"{len(classes) - len(measured)} of {len(classes)} classes have no image here.")
    headers = [Column("#"), Column("Class", text=True), Column("Images"), Column("Top-1 %"), Column("", True, "cyan")]
    return [*tables, Sheet("By class", headers, shown, notes)]


def summary_table(summary: dict[str, Any]) -> RenderableType:
    """How a run ended: the student's last epoch, its best one and the teacher side by side."""
    last, best = summary.get("headline") or {}, summary.get("best") or {}
    teacher = summary.get("teacher") or {}
    own = {key: summary.get(key) for key in ("network", "parameters", "macs")}
    who = "Student" if teacher else "Network"
    sides: list[tuple[str, dict[str, Any]]] = [(f"{who}, last epoch", own | last)]
    if best:
        sides.append((f"{who}, best epoch", own | best))
    if teacher:
        sides.append(("Teacher", teacher))
    rows = [["Network", *(word(side.get("network")) for _, side in sides)]]
    rows.append(["Epoch", *(whole(side.get("epoch")) for _, side in sides)])
    if best.get("selected_on") is not None:
        rows.append(["Chosen on", *(word(side.get("selected_on")) for _, side in sides)])
    for label, key, digits, unit in (("Top-1", "top1", 2, " %"), ("Top-5", "top5", 2, " %"), ("Loss", "loss", 3, "")):
        rows.append([label, *(fixed(side.get(key), digits, unit) for _, side in sides)])
    for label, key in (("Parameters", "parameters"), ("MACs", "macs")):
        rows.append([label, *(large(side.get(key)) for _, side in sides)])
    names = f"{word(teacher.get('network'))} → {word(own['network'])}" if teacher else word(own["network"])
    split = f" ({word(last['split'])})" if last.get("split") is not None else ""
    columns = [Column("", text=True), *(Column(header) for header, _ in sides)]
    sheet = Sheet(f"{names} on {word(summary.get('dataset'))}{split}", columns, rows, _summary_notes(summary))
    friendly = summary.get("friendly") or {}
    return Group(sheet, _branch_table(friendly["branches"])) if friendly.get("branches") else sheet


def _branch_table(rows: list[dict[str, Any]]) -> Sheet:
    """The student branches that a teacher was trained with: where they hang, how good they are, what they cost."""
    columns = [Column(header, text=True) for header in ("Student", "Behind", "Transform")]
    columns += [Column(header) for header in ("Top-1 %", "Top-5 %", "Loss", "Parameters", "MACs")]
    cells = [
        [
            *(word(row.get(key)) for key in ("student", "behind", "transform")),
            *(fixed(row.get(key), digits) for key, digits in (("top1", 2), ("top5", 2), ("loss", 3))),
            *(large(row.get(key)) for key in ("parameters", "macs")),
        ]
        for row in rows
    ]
    macs = sum(number(row.get("macs")) or 0 for row in rows)
    note = f"They add {large(macs)} MACs per image and pass to the training, nothing to the teacher's use."
    return Sheet("Student branches", columns, cells, [note])


def _summary_notes(summary: dict[str, Any]) -> list[str]:
    notes = []
    if summary.get("protocol"):
        text = word(summary["protocol"])
        notes.append(f"Protocol: {text}" + ("" if text.endswith(".") else "."))
    teacher = summary.get("teacher") or {}
    versus = []
    mine, theirs = number((summary.get("headline") or {}).get("top1")), number(teacher.get("top1"))
    if mine is not None and theirs is not None:
        versus.append(f"{points(mine - theirs, 2)} points top-1")
    for key, label in (("parameters", "parameters"), ("macs", "MACs")):
        small, big = number(summary.get(key)), number(teacher.get(key))
        if small is not None and big:
            versus.append(f"{fixed(100 * small / big, 0)} % of the {label}")
    if versus:
        notes.append(f"Student against teacher: {', '.join(versus)}.")
    if number(summary.get("seconds")) is not None:
        phases = summary.get("phases") or {}
        spent = [f"{word(name)} {fixed(100 * part, 0)} %" for name, part in phases.items() if number(part) is not None]
        epochs = number(summary.get("epochs"))
        over = "" if epochs is None else f" for {whole(epochs)} epoch{'s' * (epochs != 1)}"
        notes.append(f"Time: {duration(summary['seconds'])}{over}" + (f": {', '.join(spent)}." if spent else "."))
    if number(summary.get("search_seconds")) is not None:
        notes.append(f"Search for the mixtures before: {duration(summary['search_seconds'])}.")
    if teacher.get("sha256"):
        notes.append(f"Teacher weights: sha256 {word(teacher['sha256'])[:16]}")
    return notes


def spot_plan_table(plan: dict[str, Any]) -> RenderableType:
    """What a run would do (`--dry-run`): its networks, how much of them is trained, and its spots."""
    networks = [
        [word(entry.get("role")), word(entry.get("name")), large(entry.get("parameters")), large(entry.get("macs"))]
        for entry in plan.get("networks") or []
    ]
    # Counted by optimizer group: a student's group also holds what its distiller learns.
    trained = [f"{word(name)} {large(count)}" for name, count in (plan.get("trainable") or {}).items() if count]
    parts = Sheet(
        "Networks",
        [Column("Role", text=True), Column("Name", text=True), Column("Parameters"), Column("MACs")],
        networks,
        [f"Trained parameters: {', '.join(trained)}."] if trained else [],
    )
    headers = ("Spot", "Kind", "Student stage", "Student shape", "Teacher stage", "Teacher shape", "Lift", "Drop")
    rows = [
        [
            word(spot.get("name")),
            word(spot.get("kind")),
            word(spot.get("student_stage")),
            shape(spot.get("student_shape")),
            word(spot.get("teacher_stage")),
            shape(spot.get("teacher_shape")),
            word(spot.get("lift")),
            word(spot.get("drop")),
        ]
        for spot in plan.get("spots") or []
    ]
    adapted = any(spot.get("lift") is not None for spot in plan.get("spots") or [])
    notes = ["Lift: adapter from the student's channels to the teacher's; drop: the way back."] if adapted else []
    columns = [Column(header, text=not header.endswith("shape")) for header in headers]
    tables = [parts, Sheet("Spots", columns, rows, notes)] if rows else [parts]
    return Group(*tables, *([mixture_table(plan["mixtures"])] if plan.get("mixtures") else []))


def listing_table(title: str, rows: list[dict[str, Any]]) -> RenderableType:
    """Rows with whatever keys they have, a column each, in the order in which the keys come."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    if not keys:
        return Sheet(title, [], [], ["none"])
    columns = [
        Column(
            {"macs": "MACs"}.get(key, key.replace("_", " ").capitalize()),
            text=any(isinstance(row.get(key), str | bool | list | tuple) for row in rows),
        )
        for key in keys
    ]
    return Sheet(title, columns, [[_listed(key, row.get(key)) for key in keys] for row in rows])


def _listed(key: str, value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(word(part) for part in value) or DASH
    if isinstance(value, int):
        return large(value) if key in ("parameters", "macs") else str(value)
    if isinstance(value, float):
        return f"{value:g}"  # words of a config among them: 0.0005 must not become 0.00
    return word(value)
