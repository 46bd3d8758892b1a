"""What a sweep has found, as tables, as Markdown and as CSV"""

import csv
import io
from collections.abc import Iterator
from typing import Any

from rich.console import RenderableType

from sakd_cli.config.routers import CLASSICAL
from sakd_cli.report.render.format import DASH, fixed, plain, points, whole, word
from sakd_cli.report.render.sheet import Column, Sheet
from sakd_cli.report.sweep.published import EPOCHS

FIELDS = ["teacher", "student", "method", "router", "seeds", "top1", "std", "low", "high", "best", "published"]
FIELDS += ["gain", "gain_low", "gain_high", "p", "verdict", "published_gain"]
TITLE = "Top-1 %, last epoch on the test images, mean ± standard deviation over seeds (number of seeds)"


def sweep_tables(document: dict[str, Any]) -> list[RenderableType]:
    """The figures, then what failed."""
    headers, rows = _grid(document)
    columns = [Column(header, text=k < 2) for k, header in enumerate(headers)]
    tables: list[RenderableType] = [Sheet(f"{document['name']}: {TITLE}", columns, rows, list(_notes(document)))]
    failed = [[run["key"], word(run["error"])] for run in document["runs"] if run["state"] in ("failed", "blocked")]
    if failed:
        tables.append(Sheet("Failed", [Column("Run", text=True), Column("Error", text=True)], failed))
    return tables


def sweep_markdown(document: dict[str, Any]) -> str:
    """The same as a document in Markdown."""
    headers, rows = _grid(document)
    lines = [f"# {document['name']}", "", f"{TITLE}.", ""]
    lines += [_line(headers), _line(["---", "---", *["---:"] * (len(headers) - 2)]), *map(_line, rows), ""]
    lines += [f"- {note}" for note in _notes(document)]
    failed = [run for run in document["runs"] if run["state"] in ("failed", "blocked")]
    lines += [f"- {run['key']}: {run['state']}, {word(run['error'])}" for run in failed]
    return "\n".join(lines) + "\n"


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(plain(cell).replace("|", "\\|") for cell in cells) + " |"


def sweep_csv(document: dict[str, Any]) -> str:
    """One row per cell: a method under a router for a pair, its gain over the always-on one beside it."""
    text = io.StringIO()
    writer = csv.DictWriter(text, FIELDS, lineterminator="\n")
    writer.writeheader()
    for cell in document["cells"]:
        pair, top1 = document["pairs"][cell["pair"]], cell["top1"] or {}
        row = {key: pair[key] for key in ("teacher", "student")}
        row |= {key: cell[key] for key in ("method", "router", "published")} | {"seeds": len(cell["seeds"])}
        row |= {"top1": top1.get("mean"), "std": top1.get("std"), "low": top1.get("low"), "high": top1.get("high")}
        row["best"] = (cell["best"] or {}).get("mean")
        if (gain := _gain(document, cell, CLASSICAL)) is not None:
            row |= {"gain": gain["difference"], "gain_low": gain["low"], "gain_high": gain["high"], "p": gain["p"]}
            row |= {"verdict": gain["verdict"], "published_gain": gain["published"]}
        writer.writerow(row)
    return text.getvalue()


def _grid(document: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headers and rows: networks alone, then each method with its routers, their gains, the published figures."""
    pairs = document["pairs"]
    headers = ["Method", "Router", *(f"{pair['teacher']} → {pair['student']}" for pair in pairs)]
    told = [pair["published"] or {} for pair in pairs] if any(pair["published"] for pair in pairs) else []
    rows = [["teacher", "", *(fixed(pair["teacher_top1"], 2) for pair in pairs)]]
    rows += [["", "published", *(fixed(one.get("teacher"), 2) for one in told)]] if told else []
    if any(run["role"] == "alone" for run in document["runs"]):
        rows.append(["alone", "", *(_spread(pair["alone"], len(pair["alone_seeds"])) for pair in pairs)])
        rows += [["", "published", *(fixed(one.get("alone"), 2) for one in told)]] if told else []
    for method in dict.fromkeys(cell["method"] for cell in document["cells"]):
        rows += _rows_of(method, document)
    return headers, rows


def _rows_of(method: str, document: dict[str, Any]) -> Iterator[list[str]]:
    own = [cell for cell in document["cells"] if cell["method"] == method]
    numbers = range(len(document["pairs"]))
    name = method
    for router in sorted({cell["router"] for cell in own}, key=lambda r: (r != CLASSICAL, r)):
        by_pair = {cell["pair"]: cell for cell in own if cell["router"] == router}
        found = [by_pair.get(k) for k in numbers]
        yield [name, router, *(_spread(cell["top1"], len(cell["seeds"])) if cell else DASH for cell in found)]
        name = ""
        if any(cell and cell["published"] is not None for cell in found):
            yield ["", f"{router}, published", *(fixed(cell and cell["published"], 2) for cell in found)]
    gains = [gain for gain in document["gains"] if gain["method"] == method]
    for router, against in dict.fromkeys((gain["router"], gain["against"]) for gain in gains):
        there = {g["pair"]: g for g in gains if (g["router"], g["against"]) == (router, against)}
        yield ["", f"{router} − {against}", *(_gained(there.get(k)) for k in numbers)]
        if any(gain["published"] is not None for gain in there.values()):
            told = [there[k]["published"] if k in there else None for k in numbers]
            yield ["", "the same, published", *(DASH if value is None else points(value, 2) for value in told)]


def _gain(document: dict[str, Any], cell: dict[str, Any], against: str) -> dict[str, Any] | None:
    keys = ("pair", "method", "router")
    same = [g for g in document["gains"] if g["against"] == against and all(g[key] == cell[key] for key in keys)]
    return same[0] if same else None


def _spread(figure: dict[str, Any] | None, seeds: int) -> str:
    if figure is None:
        return DASH
    spread = "" if figure["std"] is None else f" ± {fixed(figure['std'], 2)}"
    return f"{fixed(figure['mean'], 2)}{spread} ({seeds})"


def _gained(gain: dict[str, Any] | None) -> str:
    if gain is None or gain["difference"] is None:
        return DASH
    return points(gain["difference"], 2) + ("" if gain["p"] is None else f", p {fixed(gain['p'], 3)}")


def _notes(document: dict[str, Any]) -> Iterator[str]:
    left = [f"{count} {state}" for state, count in document["counts"].items() if count and state != "done"]
    yield (
        f"{document['counts']['done']} of {len(document['runs'])} runs done" + "".join(f", {one}" for one in left) + "."
    )
    for entry in document["overall"]:
        yield (
            f"{entry['router']} over {entry['against']}: above 0 in {entry['above']} of {entry['cells']} cells, "
            f"below in {entry['below']}; mean {points(entry['mean'], 2)} points."
        )
    tests = sum(gain["p"] is not None for gain in document["gains"])
    claimed = [gain for gain in document["gains"] if gain["verdict"] in ("better", "worse")]
    if tests:
        yield (
            f"Gains are paired by seed; p of a paired t-test, not corrected for being {tests} "
            f"({len(claimed)} below 0.05; by chance alone about {fixed(0.05 * tests, 1)})."
        )
    if any(gain["verdict"] == "few seeds" for gain in document["gains"]):
        yield "A gain without p has fewer than three seeds (or no spread): nothing is claimed of it."
    yield from (f"Skipped: {one['what']}: {one['reason']}" for one in document["skipped"])
    if (told := document["published"]) is not None:
        epochs = sorted({run["epochs"] for run in document["runs"] if run["role"] == "student"})
        shorter = "" if epochs == [EPOCHS] else f" Ours trained {', '.join(map(str, epochs))} epochs: not comparable."
        yield f"Published: {told['source']}; {told['sure']}.{shorter}"
        yield from told["notes"]


def plan_tables(plan: dict[str, Any]) -> list[RenderableType]:
    """What is to be done, and what it costs."""
    names = ("Runs", "Number", "To do", "Steps", "s/step", "Hours", "MB each")
    rows = [
        [
            row["what"],
            str(row["runs"]),
            str(row["to_do"]),
            whole(row["steps"]) if row["to_do"] else DASH,
            DASH if row["step_seconds"] is None else f"{'' if row['measured'] else '~'}{row['step_seconds']:.3g}",
            fixed(row["hours"], 2),
            fixed(row["run_bytes"] / 1e6, 1) if row["to_do"] else DASH,
        ]
        for row in plan["rows"]
    ]
    measured = sum(row["measured"] for row in plan["rows"])
    asked = sum(row["to_do"] > 0 for row in plan["rows"])
    notes = [
        f"{plan['runs']} runs: {plan['finished']} finished, {plan['begun']} begun, {plan['failed']} failed before.",
        f"{fixed(plan['hours'], 1)} hours of {plan['device']} for the training steps, one run after another; "
        "evaluation and stages before the main one come on top.",
        f"{measured} of {asked} kinds of runs were timed just now; ~: reckoned from those by multiply-accumulates.",
        f"{fixed(plan['bytes'] / 1e9, 2)} GB of disk, {fixed(plan['free_bytes'] / 1e9, 2)} GB free.",
        *(f"Skipped: {one['what']}: {one['reason']}" for one in plan["skipped"]),
    ]
    columns = [Column(name, text=k == 0) for k, name in enumerate(names)]
    return [Sheet(f"{plan['name']}: dry run, nothing written", columns, rows, notes)]
