"""`sakd distill`."""

import shlex
import sys
from contextlib import redirect_stdout
from pathlib import Path

from sakd_cli.cli.compare import print_comparison
from sakd_cli.cli.console import ConsoleReporter, emit, show
from sakd_cli.cli.options import Values, with_options
from sakd_cli.documents.training import Plan, Summary
from sakd_cli.report.evaluation import ensemble_summary
from sakd_cli.report.runs.compare import compare as compare_runs
from sakd_cli.report.runs.page import plan_table, summary_table
from sakd_cli.report.spots.log import spots_document
from sakd_cli.report.spots.tables import spot_tables
from sakd_cli.rundir import RunDir
from sakd_cli.runs.resume import AUTO
from sakd_cli.sweep.series import train_command


@with_options("distill")
def distill(options: Values, json: bool, quiet: bool) -> None:
    """Train a student from a teacher, deciding per sample and step where it learns.

    Examples:

        sakd distill --preset quickstart

        sakd distill --teacher wrn40_2 --student wrn16_2 --with-control --seeds 3 --epochs 60
    """
    again = shlex.join(["sakd", *sys.argv[1:], *([] if options["resume"] else ["--resume", AUTO])])
    found = train("distill", options, quiet=quiet, again=again)
    if isinstance(found, list):
        print_comparison(compare_runs(found, options["baseline"]), json=json)
    else:
        print_result(found, json=json)


def train(task: str, options: Values, *, quiet: bool, again: str = "") -> Summary | Plan | list[RunDir]:
    """A training with progress on the terminal; `again`: the command that continues several runs that were stopped."""
    reporter = ConsoleReporter(quiet=quiet)
    with redirect_stdout(sys.stderr):  # what own code prints; stdout is for the data
        return train_command(task, options, reporter, again, guard=reporter.heeding_signals)


def print_result(result: Summary | Plan, *, json: bool) -> None:
    if json:
        emit(result)
        return
    if isinstance(result, Plan):
        losses = ", ".join(f"{name} {value:.4g}" for name, value in result.batch.items())
        values = "".join(f"\n  {key}: {value}" for key, value in result.effective.items())
        show(plan_table(result), f"Effective settings:{values}\n")
        show(*(f"warning: {text}\n" for text in result.warnings))
        show(f"dry run: one batch tried on {result.device} ({losses}), nothing written")
        return
    show(summary_table(result))
    if result.teacher:
        show(*spot_tables(spots_document(RunDir(Path(str(result.run)))), top=3))
    if result.ensemble:
        show(ensemble_summary(result.ensemble))
    show(f"run: {result.run}")
