"""What `sakd bench` found, as tables."""

from rich.console import RenderableType

from sakd_cli.documents.bench import Bench
from sakd_cli.report.render.format import DASH, fixed, fraction, large, named, whole
from sakd_cli.report.render.sheet import Sheet, columns_of, table

# Of a ratio, by whether it is slow and whether it has regressed.
VERDICT = {(False, False): "", (True, False): "slower: measure again", (True, True): "slower twice in a row"}


def bench_tables(found: Bench) -> list[RenderableType]:
    """Steps, phases, and, where they were measured, one axis and the comparison with an earlier result."""
    columns = columns_of(named, {"Phase": "name"}) | columns_of(_tenths, {"ms": "ms"})
    columns |= columns_of(fraction, {"%": "fraction"})
    tables: list[RenderableType] = [_steps(found), table("Our step by phase", found.phases, columns)]
    if found.scaling is not None:
        columns = columns_of(named, {named(found.scaling.axis): "value"})
        columns |= columns_of(_tenths, {"adaptive ms": "ms", "kd ms": "kd_ms"})
        columns["adaptive / kd"] = lambda point: fixed(point.ratio, 2)
        tables.append(table("Scaling", found.scaling.points, columns))
    if (compared := found.comparison) is not None:
        rows = [
            [named(one.name), fixed(one.base, 2), fixed(one.now, 2), VERDICT[one.slow, one.regressed]]
            for one in compared.ratios
        ]
        rows += [[f"{named(r.name)} {r.counter}", large(r.before), large(r.now), "has risen"] for r in compared.risen]
        note = "Regressed." if compared.regressed else "No regression."
        tables.append(Sheet("Since the earlier result", ("Over adaptive", "then", "now", "Verdict"), rows, [note]))
    result = found.reported
    said = f"none ({result.reason})" if result.reason else fixed(result.median, 2)
    return [*tables, f"{result.above} / adaptive: {said}"]


def _steps(found: Bench) -> Sheet:
    setup, where = found.setup, found.environment
    ratios = {ratio.above: fixed(ratio.median, 2) for ratio in found.ratios}
    columns = columns_of(named, {"Step": "name"}) | columns_of(_tenths, {"ms": "ms"})
    columns["min-max"] = lambda step: f"{fixed(step.ms_low, 1)}-{fixed(step.ms_high, 1)}"
    columns |= columns_of(whole, {"images/s": "images_per_second"})
    columns["/ adaptive"] = lambda step: ratios.get(step.name, "1")
    columns["GFLOP"] = lambda step: fixed(step.gflop, 2)
    columns |= columns_of(_tenths, {"/s": "gflop_per_second"}) | columns_of(whole, {"syncs": "synchronisations"})
    columns |= columns_of(_bytes, {"saved": "saved_bytes", "peak": "peak_bytes"})
    notes = [f"{named(step.name)}: {named(step.about)}" for step in found.steps]
    notes += [
        f"{named(setup.teacher)} → {named(setup.student)}, batch {setup.batch} of {setup.side} pixels, "
        f"rounds: {setup.rounds}; random weights, half of the samples at the teacher.",
        f"{named(where['cpu'])} ({', '.join(where['cpu_flags'])}), {where['threads']} thread, load "
        f"{fixed(where['load'], 1)}, {named(where['device'])} ({named(where['mode'])}), torch {named(where['torch'])}; "
        f"first step after {fixed(found.seconds_to_first_step, 1)} s, process at most "
        f"{_bytes(where['process_peak_bytes'])}.",
    ]
    return table("Cost of a step", found.steps, columns, notes)


def _tenths(value: float | None) -> str:
    return fixed(value, 1)


def _bytes(value: int | None) -> str:
    return DASH if value is None else f"{large(value)}B"
