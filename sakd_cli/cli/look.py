"""`sakd eval`: how good a trained network is."""

from pathlib import Path
from typing import Annotated

import typer

from sakd_cli.cli import options as o
from sakd_cli.cli.console import Talk, emit, show
from sakd_cli.config.layers import Layer, resolve
from sakd_cli.errors import UsageError
from sakd_cli.rundir import RunDir, newest_run

EvalTarget = Annotated[
    Path | None,
    typer.Argument(help="Run directory, folder with a model.safetensors, or that file. Default: newest run."),
]


def evaluate(
    ctx: typer.Context,
    target: EvalTarget = None,
    dataset: o.Dataset = None,
    data_root: o.DataRoot = None,
    preset: o.Preset = None,
    config: o.Config = None,
    set_: o.Set = None,
    runs_dir: o.RunsDir = None,
    device: o.Device = None,
    json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Score a trained network on the test images: top-1, top-5, loss, per class, size and cost.

    Examples:

        sakd eval

        sakd eval runs/20261121-120000-distill-... --data-root ~/data --json
    """
    given = o.layers(ctx.params)
    weights, run = _what_to_score(target, resolve("eval", given).config.runs_dir)
    trained_on = [Layer("the run's config", {"data": data})] if run and (data := run.config.get("data")) else []
    from sakd_cli.tasks.score import score

    result = score(weights, run, [*trained_on, *given], Talk(quiet=quiet))
    if json:
        emit(result)
        return
    from sakd_cli.report.tables import evaluation_tables

    show(*evaluation_tables(result))


def _what_to_score(target: Path | None, runs_dir: Path) -> tuple[Path, RunDir | None]:
    """The weights, and the run they come from (None for a file of no run)."""
    if target is None:
        found = newest_run(runs_dir, {}, finished=False, delivered=True)
        if found is None:
            raise UsageError(f"no run with a trained network in {runs_dir}", hint="name a run or a weights file")
        target = found.path
    if not target.exists():
        raise UsageError(f"{target}: no such file or directory")
    if (target / "config.yaml").is_file():
        run = RunDir(target)
        if run.deliverable is None:
            raise UsageError(f"{target}: this run has not saved a network yet")
        return run.deliverable, run
    folder = target.resolve() if target.is_dir() else target.resolve().parent
    above = [RunDir(parent) for parent in folder.parents[:2] if (parent / "config.yaml").is_file()]
    return target, above[0] if above else None
