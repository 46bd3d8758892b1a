"""`sakd runs`: which runs there are, and the removal of those that nothing needs"""

import sys
from pathlib import Path
from typing import Annotated

import typer

from sakd_cli import api
from sakd_cli.cli.console import emit, show
from sakd_cli.cli.options import Values, with_options
from sakd_cli.config.resolve import parse_assignment
from sakd_cli.documents.listing import RunEntries
from sakd_cli.errors import UsageError
from sakd_cli.report.runs.entries import entry_tables, remains, remove, why_kept
from sakd_cli.rundir import RunDir

Words = Annotated[list[str] | None, typer.Argument(metavar="[show|rm] [RUN...]", help="Show, or remove, these runs.")]
SHOW, REMOVE = "show", "rm"


@with_options("runs")
def runs(options: Values, json: bool, yes: bool, words: Words = None) -> None:
    """List runs, show some of them with their settings, or remove them.

    Examples:

        sakd runs --where method.name=fitnet --sort -top1

        sakd runs show runs/A

        sakd runs rm runs/A runs/B
    """
    action, *named = words or [""]
    if action not in ("", SHOW, REMOVE) or (action and not named):
        wrong = "which runs?" if action in (SHOW, REMOVE) else "is neither `show RUN...` nor `rm RUN...`"
        raise UsageError(f"sakd runs {action}: {wrong}", "sakd runs --help")
    if action == REMOVE:
        document = RunEntries(rows=[], removed=_remove([RunDir(Path(name)) for name in named], yes=yes))
    else:
        where = dict(parse_assignment("--where", text, "method.name=fitnet") for text in options["where"] or [])
        document = api.runs(*named, runs_dir=options["runs_dir"], where=where, sort=options["sort"])
    emit(document) if json else show(*entry_tables(document))


def _remove(chosen: list[RunDir], *, yes: bool) -> list[str]:
    """Remove these runs, all or none. UsageError where one is needed, or nobody says yes."""
    for run in chosen:
        if not run.path.exists() and remains(run):
            continue
        assert run.config
        if (kept := why_kept(run, {one.path.resolve() for one in chosen})) is not None:
            raise UsageError(f"{run.path}: is not removed, {kept}")
    if not yes:
        if not sys.stdin.isatty():
            raise UsageError(f"runs would be removed for ever: {len(chosen)}", "--yes removes them without a question")
        typer.confirm(f"Remove {', '.join(str(run.path) for run in chosen)} for ever?", abort=True)
    for run in chosen:
        remove(run)
    return [str(run.path) for run in chosen]
