"""The spot log of a training as tables: over all epochs, by epoch and by class"""

from typing import Any

from sakd_cli.report.render.format import bar, deviation, fixed, fraction, whole, word
from sakd_cli.report.render.sheet import BAR, Column, Sheet, both_ends, thinned
from sakd_cli.report.spots.mixtures import mixture_table

EPOCH_ROWS = 20
DECIDED = 0.995  # probability of the teacher above which a router decides nothing


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
        row = [word(spot["name"]), word(spot["kind"]), fraction(spot["share"]), bar(spot["share"], BAR)]
        row += [fraction(spot[key]) for key in ("first", "last", "min", "max")]
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
            *(fraction(value) for value in row["share"]),
            *(fraction(row[key]) for key, _, _ in terms),
            fraction(max((value for value in row["empty"] if value is not None), default=None)),
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
            *(f"{fraction(s)} {deviation(d):>6}" for s, d in zip(row["share"], row["deviation"], strict=True)),
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
