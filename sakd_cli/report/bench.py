"""What `sakd bench` found, as tables."""

from typing import Any

from rich.console import RenderableType

from sakd_cli.report.render.format import DASH, fixed, fraction, large, number, whole, word
from sakd_cli.report.render.sheet import Column, Sheet


def bench_tables(found: dict[str, Any]) -> list[RenderableType]:
    """Steps, phases, and, where they were asked for, one axis and the comparison with an earlier result."""
    tables: list[RenderableType] = [_steps(found), _phases(found)]
    if found["scaling"] is not None:
        tables.append(_scaling(found["scaling"]))
    if found["compared"] is not None:
        tables.append(_compared(found["compared"]))
    return [*tables, _headline(found["headline"])]


def _steps(found: dict[str, Any]) -> Sheet:
    setup, where = found["setup"], found["environment"]
    ratios = {line["above"]: line for line in found["ratios"]}
    headers = ("ms", "min-max", "images/s", "/ adaptive", "GFLOP", "/s", "syncs", "saved", "peak")
    columns = [Column("Step", text=True), *map(Column, headers)]
    rows = []
    for line in found["steps"]:
        span = f"{fixed(line['ms_low'], 1)}-{fixed(line['ms_high'], 1)}"
        ratio = fixed(ratios[line["name"]]["median"], 2) if line["name"] in ratios else "1"
        row = [word(line["name"]), fixed(line["ms"], 1), span, whole(line["images_per_second"]), ratio]
        row += [fixed(line["gflop"], 2), fixed(line["gflop_per_second"], 1), whole(line["synchronisations"])]
        rows.append([*row, _bytes(line["saved_bytes"]), _bytes(line["peak_bytes"])])
    notes = [f"{word(line['name'])}: {word(line['about'])}" for line in found["steps"]]
    notes += [
        f"{word(setup['teacher'])} → {word(setup['student'])}, batch {setup['batch']} of {setup['side']} pixels, "
        f"{setup['rounds']} rounds; random weights, half of the samples at the teacher.",
        f"{word(where['cpu'])} ({', '.join(where['cpu_flags'])}), {where['threads']} thread, load "
        f"{fixed(where['load'], 1)}, {word(where['device'])} ({word(where['mode'])}), torch {word(where['torch'])}; "
        f"first step after {fixed(found['seconds_to_first_step'], 1)} s, process at most "
        f"{_bytes(where['process_peak_bytes'])}.",
    ]
    return Sheet("Cost of a step", columns, rows, notes)


def _bytes(value: Any) -> str:
    return DASH if number(value) is None else f"{large(value)}B"


def _phases(found: dict[str, Any]) -> Sheet:
    rows = [[word(line["name"]), fixed(line["ms"], 1), fraction(line["share"])] for line in found["phases"]]
    return Sheet("Our step by phase", [Column("Phase", text=True), Column("ms"), Column("%")], rows)


def _scaling(found: dict[str, Any]) -> Sheet:
    columns = [Column(word(found["axis"]), text=True), Column("adaptive ms"), Column("kd ms"), Column("adaptive / kd")]
    rows = []
    for line in found["points"]:
        row = [word(line["value"]), fixed(line["ms"], 1), fixed(line["kd_ms"], 1), fixed(line["ratio"], 2)]
        rows.append(row)
    return Sheet("Scaling", columns, rows)


def _compared(found: dict[str, Any]) -> Sheet:
    columns = [Column("Over adaptive", text=True), Column("then"), Column("now"), Column("", text=True)]
    rows = [
        [word(line["name"]), fixed(line["base"], 2), fixed(line["now"], 2), _judgement(line)]
        for line in found["ratios"]
    ]
    rows += [
        [f"{word(line['name'])} {word(line['counter'])}", large(line["before"]), large(line["now"]), "has risen"]
        for line in found["risen"]
    ]
    return Sheet("Since the earlier result", columns, rows, ["Regressed." if found["regressed"] else "No regression."])


def _judgement(line: dict[str, Any]) -> str:
    if line["regressed"]:
        return "slower twice in a row"
    return "slower: measure again" if line["slow"] else ""


def _headline(found: dict[str, Any]) -> str:
    if found["refused"]:
        return f"no headline: {found['refused']}"
    return f"{found['above']} / adaptive: {fixed(found['median'], 2)}"
