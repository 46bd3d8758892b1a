"""`sakd sweep --dry-run`: how many runs there are, their hours on this device and their bytes; nothing is written"""

import shutil
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING

from sakd_cli.config.training import RunConfig
from sakd_cli.documents.sweep import PlannedRuns, Skipped, SweepPlan
from sakd_cli.engine.reporter import Reporter
from sakd_cli.files import nearest_folder
from sakd_cli.report.sweep.tables import HOUR
from sakd_cli.sweep.scheduler import ScheduledRun, Scheduler, State

if TYPE_CHECKING:
    from sakd_cli.runs.forecast import Forecast


def plan(name: str, scheduler: Scheduler, skipped: Mapping[str, str], seconds: float, reporter: Reporter) -> SweepPlan:
    """Steps are timed for about so many seconds."""
    from sakd_cli.engine.runtime import pick_device
    from sakd_cli.runs.forecast import forecast

    kinds: dict[str, list[ScheduledRun]] = {}
    entries, controls = list[ScheduledRun](), set[str]()
    for entry in scheduler.entries.values():
        if (control := entry.member.control) in controls:
            continue  # one run for all methods
        controls |= {control} if control else set()
        entries.append(entry)
        kinds.setdefault(entry.member.cell, []).append(entry)
    to_do = {kind: [entry for entry in same if entry.state is not State.done] for kind, same in kinds.items()}
    configs = {kind: same[0].member.config for kind, same in to_do.items() if same}
    reporter.say(f"timing steps of {len(configs)} kinds of runs, for about {seconds:g} s")
    found = forecast(_spread_out(configs, to_do), seconds)
    rows = [_planned(kind, len(same), len(to_do[kind]), found.get(kind)) for kind, same in kinds.items()]
    hours = [row.hours for row in rows]
    return SweepPlan(
        name=name,
        device=str(pick_device(entries[0].member.config.device)),
        runs=len(entries),
        finished=sum(entry.state is State.done for entry in entries),
        in_progress=sum(entry.state is not State.done and entry.run is not None for entry in entries),
        failed=sum(entry.state is State.failed for entry in entries),
        hours=None if None in hours else sum(filter(None, hours)),
        bytes=sum(row.run_bytes * row.to_do for row in rows),
        free_bytes=shutil.disk_usage(nearest_folder(scheduler.folder)).free,
        skipped=[Skipped(what=what, reason=reason) for what, reason in skipped.items()],
        rows=rows,
    )


def _planned(kind: str, runs: int, to_do: int, one: "Forecast | None") -> PlannedRuns:
    if one is None:  # all of them are done
        return PlannedRuns(
            what=kind, runs=runs, to_do=0, steps=0, step_seconds=None, measured=False, hours=0.0, run_bytes=0
        )
    hours = None if one.step_seconds is None else one.step_seconds * one.steps * to_do / HOUR
    forecast = {key: value for key, value in one._asdict().items() if key in PlannedRuns.model_fields}
    return PlannedRuns(what=kind, runs=runs, to_do=to_do, hours=hours, **forecast)


def _spread_out(configs: Mapping[str, RunConfig], entries: Mapping[str, list[ScheduledRun]]) -> dict[str, RunConfig]:
    """Pair after pair in turn, so that each has something timed before the time is up."""
    met = Counter[tuple[str, str] | None]()
    turns = dict[str, int]()
    for kind in configs:
        pair = entries[kind][0].member.pair
        turns[kind], met[pair] = met[pair], met[pair] + 1
    return {kind: configs[kind] for kind in sorted(configs, key=lambda kind: turns[kind])}
