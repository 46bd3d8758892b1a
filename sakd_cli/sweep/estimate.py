"""`sakd sweep --dry-run`: how many runs there are, their hours on this device and their bytes; nothing is written"""

import shutil
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sakd_cli.config.grid import Member
from sakd_cli.config.training import RunConfig
from sakd_cli.sweep.scheduler import ScheduledRun, Scheduler, State

if TYPE_CHECKING:
    from sakd_cli.engine.reporter import Reporter

HOUR = 3600.0


def plan(
    name: str, scheduler: Scheduler, skipped: Mapping[str, str], seconds: float, reporter: "Reporter"
) -> dict[str, Any]:
    """The document `SweepPlan`; steps are timed for about so many seconds."""
    from sakd_cli.engine.runtime import pick_device
    from sakd_cli.runs.forecast import forecast

    kinds: dict[str, list[ScheduledRun]] = {}
    for entry in scheduler.entries.values():
        kinds.setdefault(_kind(entry.member), []).append(entry)
    to_do = {kind: [entry for entry in same if entry.state is not State.done] for kind, same in kinds.items()}
    configs = {kind: same[0].member.config for kind, same in to_do.items() if same}
    reporter.say(f"timing steps of {len(configs)} kinds of runs, for about {seconds:g} s")
    found = forecast(_spread_out(configs, to_do), seconds)
    rows = list[dict[str, Any]]()
    for kind, same in kinds.items():
        one, left = found.get(kind), len(to_do[kind])
        hours = one.step_seconds * one.steps * left / HOUR if one and one.step_seconds is not None else None
        rows.append(
            {
                "what": kind,
                "runs": len(same),
                "to_do": left,
                "steps": one.steps if one else 0,
                "step_seconds": one.step_seconds if one else None,
                "measured": bool(one and one.measured),
                "hours": hours if left else 0.0,
                "run_bytes": one.run_bytes if one else 0,
            }
        )
    entries = list(scheduler.entries.values())
    there = next(path for path in [scheduler.folder, *scheduler.folder.absolute().parents] if path.exists())
    unknown = any(row["hours"] is None for row in rows)
    return {
        "schema": "sakd.sweep-plan/1",
        "name": name,
        "device": str(pick_device(entries[0].member.config.device)),
        "runs": len(entries),
        "finished": sum(entry.state is State.done for entry in entries),
        "begun": sum(entry.state is not State.done and entry.run is not None for entry in entries),
        "failed": sum(entry.state is State.failed for entry in entries),
        "hours": None if unknown else sum(row["hours"] or 0.0 for row in rows),
        "bytes": sum(row["run_bytes"] * row["to_do"] for row in rows),
        "free_bytes": shutil.disk_usage(there).free,
        "skipped": [{"what": what, "reason": reason} for what, reason in skipped.items()],
        "rows": rows,
    }


def _spread_out(configs: Mapping[str, RunConfig], entries: Mapping[str, list[ScheduledRun]]) -> dict[str, RunConfig]:
    """Pair after pair in turn, so that each has something timed before the time is up."""
    met = Counter[tuple[str, str] | None]()
    turns = dict[str, int]()
    for kind in configs:
        pair = entries[kind][0].member.pair
        turns[kind], met[pair] = met[pair], met[pair] + 1
    return {kind: configs[kind] for kind in sorted(configs, key=lambda kind: turns[kind])}


def _kind(member: Member) -> str:
    """Runs of one kind differ in their seed only."""
    return member.key.partition(" seed ")[0]
