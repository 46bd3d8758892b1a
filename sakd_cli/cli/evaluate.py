"""`sakd eval`: how good a trained network is."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from sakd_cli.cli.console import ConsoleReporter, emit, show
from sakd_cli.cli.options import Values, with_options
from sakd_cli.config.resolve import config_sources
from sakd_cli.documents.evaluation import EnsembleEvaluation, Evaluations
from sakd_cli.errors import UsageError
from sakd_cli.report.render import plots
from sakd_cli.runs.locate import check_teacher, library_or_path, runs_dir_of, what_to_score

SplitName = Literal["train", "val", "test", "all"]
Targets = Annotated[
    list[Path] | None,
    typer.Argument(
        metavar="RUN", help="Run directories, folders with a model.safetensors, or such files. Default: newest run."
    ),
]


@with_options("eval")
def evaluate(
    options: Values,
    json: bool,
    quiet: bool,
    early_exit: bool,
    always_on: bool,
    curve: bool,
    plot: Path | None,
    confusion: Path | None,
    eval_split: SplitName | None,
    targets: Targets = None,
) -> None:
    """Evaluate trained networks on the test images: accuracy, calibration, classes, speed, their teacher.

    --split takes other images of the run. --data-root with any folder of labelled pictures scores all of it, unless it
    holds the test images of the run itself.

    A student with residual students is evaluated as an ensemble, with exits and the cost/accuracy curve.

    Examples:

        sakd eval runs/20261121-120000-distill-... runs/20261121-130000-distill-... --json

        sakd eval runs/20261121-130000-distill-...-residual --early-exit --curve --plot curve.png
    """
    if early_exit and always_on:
        raise UsageError("--early-exit and --always-on exclude each other")
    if plot is not None:
        if len(targets or ()) > 1:
            raise UsageError("--plot draws the curve of one network")
        plots.checked(plot)
    if confusion is not None:
        _check_matrix(confusion, alone=len(targets or ()) < 2 and not (early_exit or always_on or curve or plot))
    given = config_sources(options)
    runs_dir = runs_dir_of(given)
    found = [what_to_score(library_or_path(target, given), runs_dir) for target in targets or (None,)]
    forced = early_exit or always_on or curve or plot is not None
    teacher = options["teacher"] or None
    check_teacher(found, forced=forced, teacher=teacher)
    from sakd_cli.runs.evaluate import evaluate_all

    kinds: dict[str, Any] = {"as_ensembles": forced, "early": not always_on, "curve": curve or plot is not None}
    kinds |= {"split": eval_split, "teacher_required": teacher is not None, "matrix": confusion is not None}
    results = evaluate_all(found, given, ConsoleReporter(quiet=quiet), **kinds)
    if plot is not None:
        result = results[0]
        assert isinstance(result, EnsembleEvaluation)
        label = "thresholds in use" if result.ensemble.early_exit else "all members for every image"
        from sakd_cli.report.evaluation.ensemble import exit_chart

        chart = exit_chart(result.ensemble.curve or [], result.ensemble, result.top1, label)
        plots.write(plots.figure_of([chart]), plot)
    from sakd_cli.report.evaluation.tables import score_tables, write_matrix

    if confusion is not None:
        write_matrix(results[0], confusion)
    if json:
        emit(results[0] if len(results) == 1 else Evaluations(evaluations=results))
        return
    show(*score_tables(results))


def _check_matrix(path: Path, *, alone: bool) -> None:
    """Raise UsageError where no confusion matrix can be written there."""
    if not alone:
        raise UsageError("--confusion writes the matrix of one plain network")
    if path.suffix.lower() != ".csv":
        plots.checked(path, "--confusion")
