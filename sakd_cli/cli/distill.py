"""`sakd distill`."""

import shlex
import sys
from pathlib import Path
from typing import Any

from sakd_cli.cli.compare import print_comparison
from sakd_cli.cli.console import ConsoleReporter, emit, show
from sakd_cli.cli.options import Values, with_options
from sakd_cli.config.training import DistillConfig
from sakd_cli.documents.training import Plan, Summary
from sakd_cli.rundir import ResumePlan, RunDir
from sakd_cli.runs.locate import locate_inputs
from sakd_cli.runs.resume import AUTO, resolve_command, resume_config
from sakd_cli.sweep.series import is_series, series, train_here, train_in_processes, train_series


@with_options("distill")
def distill(options: Values, dry_run: bool, json: bool, quiet: bool) -> None:
    """Train a student from a teacher, deciding per sample and step where it learns.

    Examples:

        sakd distill --preset quickstart

        sakd distill --teacher wrn40_2 --student wrn16_2 --with-control --seeds 3 --epochs 60
    """
    talk, resume = ConsoleReporter(quiet=quiet), options["resume"]
    words, intent = resolve_command("distill", options)
    several, many = series(words, options), is_series(options) and not dry_run
    if not many and intent.finished and intent.resume:
        _picture(intent.resume, talk)
        print_result(intent.summary, json=json)
        return
    words = locate_inputs(words)  # whatever is missing is reported before torch is loaded
    from sakd_cli.runs import launch

    launcher = launch.Launcher(talk, bool(resume), again := _this_again(resume), talk.heeding_signals)
    if many:
        print_comparison(_several(several, launcher, again, parallel=options["parallel"]), json=json)
    else:
        result = launch.dry_run(words) if dry_run else _distilled(words, intent, launcher)
        print_result(result, json=json)


def _several(members: list[DistillConfig], launcher: Any, again: str, *, parallel: bool) -> list[RunDir]:
    """A series, one after another or at once."""
    if not parallel:

        def train(config: DistillConfig, plan: ResumePlan) -> Summary:
            return _distilled(locate_inputs(config), plan, launcher, again)

        return train_series(members, train_here(train, resume=launcher.resume))
    # Several processes must mean the same teacher: the one that a run of theirs has begun with, or that of today.
    begun = [config.teacher for config, plan in map(resume_config, members) if plan.resume] if launcher.resume else []
    first = locate_inputs(members[0])
    teacher = first.teacher if first.teacher.weights else launcher.pretrain(first)[0].teacher
    quiet = launcher.reporter.quiet
    at_once = train_in_processes(launcher.reporter, quiet=quiet, resume=launcher.resume, resume_command=again)
    return train_series(members, at_once, parallel=True, teacher=[*begun, teacher][0])


def _this_again(resume: str | None) -> str:
    """The command line that goes on with what this one did."""
    return shlex.join(["sakd", *sys.argv[1:], *([] if resume else ["--resume", AUTO])])


def _distilled(words: DistillConfig, intent: ResumePlan, launcher: Any, again: str | None = None) -> Summary:
    summary: Summary = launcher.train(words, intent, again)
    _picture(RunDir(Path(str(summary.run))), launcher.reporter)
    return summary


def _picture(run: RunDir, talk: ConsoleReporter) -> None:
    """What the run mixed of its teacher's blocks, drawn, where it did."""
    from sakd_cli.report.spots.log import MIXTURES_PLOT, read_mixtures

    if (record := read_mixtures(run)) is None:
        return
    from sakd_cli.report.render import plots

    if plots.available(lambda told: talk.say(f"no {MIXTURES_PLOT}: {told}")):
        plots.write(plots.mixture_map(record), run.path / MIXTURES_PLOT)


def print_result(result: Summary | Plan, *, json: bool) -> None:
    if json:
        emit(result)
        return
    from sakd_cli.report.evaluation.ensemble import ensemble_summary
    from sakd_cli.report.runs.tables import plan_table, summary_table
    from sakd_cli.report.spots.log import spots_document
    from sakd_cli.report.spots.tables import spot_tables

    if isinstance(result, Plan):
        losses = ", ".join(f"{name} {value:.4g}" for name, value in result.batch.items())
        values = "".join(f"\n  {key}: {value}" for key, value in result.effective.items())
        show(plan_table(result), f"Effective settings:{values}\n")
        show(f"dry run: one batch tried on {result.device} ({losses}), nothing written")
        return
    show(summary_table(result))
    if result.teacher:
        show(*spot_tables(spots_document(RunDir(Path(str(result.run)))), top=3))
    if result.ensemble:
        show(ensemble_summary(result.ensemble))
    show(f"run: {result.run}")
