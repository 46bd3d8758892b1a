"""`sakd eval`: how good a trained network is."""

from pathlib import Path
from typing import Annotated

import typer

from sakd_cli.cli import options as o
from sakd_cli.cli.console import Talk, emit, show
from sakd_cli.config.layers import Layer, resolve
from sakd_cli.errors import UsageError
from sakd_cli.report import plot as plots
from sakd_cli.rundir import RunDir, newest_run

EvalTarget = Annotated[
    Path | None,
    typer.Argument(help="Run directory, folder with a model.safetensors, or that file. Default: newest run."),
]
Adaptive = Annotated[
    bool, typer.Option("--adaptive", help="Images leave where they may (the default).", rich_help_panel="Ensemble")
]
AlwaysOn = Annotated[
    bool, typer.Option("--always-on", help="Every image goes through all members.", rich_help_panel="Ensemble")
]
Sweep = Annotated[
    bool, typer.Option("--sweep", help="Also accuracy and cost over all thresholds.", rich_help_panel="Ensemble")
]
Plot = Annotated[
    Path | None,
    typer.Option(metavar="FILE.png", help="Draw that curve; needs matplotlib.", rich_help_panel="Ensemble"),
]


def evaluate(
    ctx: typer.Context,
    target: EvalTarget = None,
    adaptive: Adaptive = False,
    always_on: AlwaysOn = False,
    sweep: Sweep = False,
    plot: Plot = None,
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
    """Score a trained network, or a student with its residual students, on the test images.

    Top-1, top-5, loss, per class, size and cost; of an ensemble also where images leave and the cost/accuracy curve.

    Examples:

        sakd eval runs/20261121-120000-distill-... --data-root ~/data --json

        sakd eval runs/20261121-130000-distill-...-residual --adaptive --sweep --plot curve.png
    """
    if adaptive and always_on:
        raise UsageError("--adaptive and --always-on exclude each other")
    if plot is not None:
        plots.check(plot)
    given = o.layers(ctx.params)
    weights, run = _what_to_score(target, resolve("eval", given).config.runs_dir)
    own = {key: words for key, words in run.config.items() if key in ("data", "residual")} if run else {}
    given, talk = [Layer("the run's config", own), *given], Talk(quiet=quiet)
    if adaptive or always_on or sweep or plot or _is_ensemble(weights):
        from sakd_cli.tasks.adaptive import score_ensemble

        result = score_ensemble(weights, run, given, talk, early=not always_on, curve=bool(sweep or plot))
    else:
        from sakd_cli.tasks.score import score

        result = score(weights, run, given, talk)
    if plot is not None:
        plots.draw(plot, result)
    if json:
        emit(result)
        return
    from sakd_cli.report.ensemble import ensemble_tables
    from sakd_cli.report.tables import evaluation_tables

    show(*evaluation_tables(result), *ensemble_tables(result))


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
        delivered = run.ensemble or run.deliverable
        if delivered is None:
            raise UsageError(f"{target}: this run has not saved a network yet")
        return delivered, run
    folder = target.resolve() if target.is_dir() else target.resolve().parent
    above = [RunDir(parent) for parent in folder.parents[:2] if (parent / "config.yaml").is_file()]
    return target, above[0] if above else None


def _is_ensemble(path: Path) -> bool:
    return (path / "ensemble.json").is_file() or path.name == "ensemble.json"
