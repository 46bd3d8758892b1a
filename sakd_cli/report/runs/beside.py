"""Runs in the same folder that a run can be compared with: its controls and other seeds, and what they say of it"""

from collections.abc import Mapping
from typing import Any

from sakd_cli.config.identity import LOCATIONS, is_plain
from sakd_cli.config.resolve import flat
from sakd_cli.errors import UsageError
from sakd_cli.report.runs.compare import compare
from sakd_cli.rundir import RunDir
from sakd_cli.runindex import all_settings

FREE = ("router.", "seed", "method.balance", "effective.")  # by which a control, or another seed, differs
DISTILLATION = ("method.", "teacher.", "stage_map")  # what does not matter where nothing is distilled


def beside(run: RunDir) -> list[RunDir]:
    """The run, and the finished ones of its folder that differ from it in router, balance or seed alone."""

    def kept(settings: Mapping[str, Any], free: tuple[str, ...]) -> dict[str, Any]:
        return {key: settings[key] for key in settings if key not in LOCATIONS and not key.startswith(free)}

    own, found = flat(run.config), [run]
    for path, settings in sorted(all_settings(run.path.absolute().parent).items()):
        other, folder = flat(settings or {}), RunDir(path.parent)
        free = (*FREE, *DISTILLATION) if is_plain(other) else FREE
        if path.parent != run.path.absolute() and kept(own, free) == kept(other, free) and folder.finished:
            found.append(folder)
    return found


def helped(run: RunDir) -> list[str]:
    """What the runs beside a run say of its routing, in sentences; none where they answer nothing."""
    if len(found := beside(run)) == 1:
        return []
    try:
        compared = compare(found)
    except UsageError:  # one of the others is damaged
        return []
    own = compared.groups[compared.runs[0].group].label
    return [one.text for one in reversed(compared.answers) if one.ours == own]
