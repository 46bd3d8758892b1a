"""The commands that train one network: `sakd distill`, `sakd pretrain-teacher`, any further training procedure."""

import shlex
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from typing import Annotated

import typer

from sakd_cli.cli.console import ConsoleReporter, emit, show
from sakd_cli.cli.options import Values, completion, with_options
from sakd_cli.cli.results import print_comparison
from sakd_cli.config.base import summary
from sakd_cli.config.keys import keys_of
from sakd_cli.config.training import PROCEDURES
from sakd_cli.documents.training import Plan, Summary
from sakd_cli.report.evaluation import ensemble_summary
from sakd_cli.report.runs.compare import compare
from sakd_cli.report.runs.page import plan_table, summary_table
from sakd_cli.report.spots.log import spots_document
from sakd_cli.report.spots.tables import spot_tables
from sakd_cli.rundir import RunDir
from sakd_cli.runs.resume import AUTO
from sakd_cli.sweep.series import train_command

Model = Annotated[
    str | None, typer.Argument(help="Network to train, as in `sakd list models`.", autocompletion=completion("models"))
]


@with_options("distill")
def distill(options: Values, json: bool, quiet: bool) -> None:
    """Train a student from a teacher, deciding per sample and step where it learns.

    Examples:

        sakd distill --preset quickstart

        sakd distill --teacher wrn40_2 --student wrn16_2 --with-control --seeds 3 --epochs 60
    """
    again = shlex.join(["sakd", *sys.argv[1:], *([] if options["resume"] else ["--resume", AUTO])])
    _train("distill", options, json=json, quiet=quiet, again=again)


@with_options("pretrain-teacher")
def pretrain_teacher(options: Values, json: bool, quiet: bool, model: Model = None) -> None:
    """Train one network with cross-entropy: a teacher, or a student from scratch.

    Examples:

        sakd pretrain-teacher wrn40_2 --dataset cifar100

        sakd pretrain-teacher wrn40_2 --student-friendly wrn16_2
    """
    _train("pretrain", options, json=json, quiet=quiet)


def command_of(task: str) -> Callable[..., None]:
    """The command of a training procedure that has none of its own: the options of the keys that its config has."""

    @with_options("pretrain-teacher", keys_of(task))
    def command(options: Values, json: bool, quiet: bool, model: Model = None) -> None:
        _train(task, options, json=json, quiet=quiet)

    command.__doc__ = summary(PROCEDURES[task].config)
    return command


def _train(task: str, options: Values, *, json: bool, quiet: bool, again: str = "") -> None:
    """Train with progress on the terminal; `again`: the command that continues several runs that were stopped."""
    reporter = ConsoleReporter(quiet=quiet)
    with redirect_stdout(sys.stderr):  # what own code prints; stdout is for the data
        found = train_command(task, options, reporter, again, guard=reporter.heeding_signals)
    if isinstance(found, list):
        print_comparison(compare(found, options["baseline"]), json=json)
    elif json:
        emit(found)
    elif isinstance(found, Plan):
        _show_plan(found)
    else:
        _show_summary(found)


def _show_plan(plan: Plan) -> None:
    losses = ", ".join(f"{name} {value:.4g}" for name, value in plan.batch.items())
    values = "".join(f"\n  {key}: {value}" for key, value in plan.effective.items())
    show(plan_table(plan), f"Effective settings:{values}\n")
    show(*(f"warning: {text}\n" for text in plan.warnings))
    show(f"dry run: one batch tried on {plan.device} ({losses}), nothing written")


def _show_summary(found: Summary) -> None:
    show(summary_table(found))
    if found.teacher:
        show(*spot_tables(spots_document(RunDir(found.folder)), top=3))
    if found.ensemble:
        show(ensemble_summary(found.ensemble))
    show(f"run: {found.run}")
