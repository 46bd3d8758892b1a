"""A peer's step beside ours, from a local checkout: nothing of it is here, and nothing is fetched."""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sakd_cli.bench.steps import Setup, Step
from sakd_cli.errors import UsageError


def load_peer_step(path: Path, entry: str, setup: Setup) -> Step:
    """The step that `module:function` of the folder makes of the settings below: called without arguments, one step.

    settings  teacher, student, method: names as ours; batch, side, classes: numbers; device: as torch has it
    Raises UsageError where that does not load or does not run.
    """
    if not path.is_dir():
        raise UsageError(f"--peer {path}: no such folder")
    module, colon, function = entry.partition(":")
    if not (module and colon and function):
        raise UsageError(f"--peer-entry {entry}: must be module:function, such as sakd_peer:step")
    settings = {
        "teacher": setup.config.teacher.source,
        "student": setup.config.student,
        "method": setup.config.method.name,
        "batch": setup.size,
        "side": setup.side,
        "classes": setup.classes,
        "device": str(setup.device),
    }
    call = _import_step(path.resolve(), module, function, settings, f"--peer {path}: {entry}")
    return Step("peer", f"{path.resolve().name}, {entry}", call)


def _import_step(path: Path, module: str, function: str, settings: dict[str, Any], where: str) -> Callable[[], object]:
    """The checkout's folder stays in the search path: its code may import more while it runs."""
    hint = f"its {function} gets a dict (teacher, student, method, batch, side, classes, device) and gives a callable"
    sys.path.insert(0, str(path))
    try:
        found = importlib.import_module(module)
        call = getattr(found, function)(settings)
        call()
    except (Exception, SystemExit) as error:  # whatever foreign code may do
        sys.path.remove(str(path))
        raise UsageError(f"{where} does not load ({type(error).__name__}: {error})", hint) from None
    step: Callable[[], object] = call
    return step
