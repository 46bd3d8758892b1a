"""`sakd distill`."""

import shlex
import sys
from pathlib import Path

from sakd_cli.cli.compare import print_comparison
from sakd_cli.cli.console import ConsoleReporter, emit, show
from sakd_cli.cli.options import Values, with_options
from sakd_cli.config.training import DistillConfig
from sakd_cli.documents.training import Plan, Summary
from sakd_cli.rundir import ResumePlan, RunDir
from sakd_cli.runs.locate import locate_inputs
from sakd_cli.runs.resume import AUTO, resolve_command
from sakd_cli.sweep.series import series, train_series, wants_series


@with_options("distill")
def distill(options: Values, dry_run: bool, json: bool, quiet: bool) -> None:
    """Train a student from a teacher, deciding per sample and step where it learns.

    Examples:

        sakd distill --preset quickstart

        sakd distill --teacher wrn40_2 --student wrn16_2 --with-control --seeds 3 --epochs 60
    """
    reporter = ConsoleReporter(quiet=quiet)
    config, plan = resolve_command("distill", options)
    configs = series(config, options)
    several = wants_series(options) and not dry_run
    if not several and plan.finished and plan.resume:
        _draw_mixtures(plan.resume, reporter)
        print_result(plan.summary, json=json)
        return
    config = locate_inputs(config)  # whatever is missing is reported before torch is loaded
    from sakd_cli.runs import launch

    again = shlex.join(["sakd", *sys.argv[1:], *([] if options["resume"] else ["--resume", AUTO])])
    launcher = launch.Launcher(reporter, bool(options["resume"]), again, reporter.heeding_signals)

    def train(config: DistillConfig, plan: ResumePlan) -> Summary:
        summary = launcher.train(config, plan, again if several else None)
        _draw_mixtures(RunDir(Path(str(summary.run))), reporter)
        return summary

    if several:
        runs = train_series(configs, train, launcher, parallel=options["parallel"], again=again)
        print_comparison(runs, json=json, baseline=options["baseline"])
    else:
        print_result(launch.dry_run(config) if dry_run else train(config, plan), json=json)


def _draw_mixtures(run: RunDir, reporter: ConsoleReporter) -> None:
    """Draw the mixtures of the teacher's blocks that the run found, if it has any."""
    from sakd_cli.report.spots.log import MIXTURES_PLOT, read_mixtures

    if (record := read_mixtures(run)) is None:
        return
    from sakd_cli.report.render import plots
    from sakd_cli.report.spots.charts import mixture_chart

    if plots.available(lambda reason: reporter.say(f"no {MIXTURES_PLOT}: {reason}")):
        plots.write(plots.figure_of([mixture_chart(record)]), run.path / MIXTURES_PLOT)


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
        show(*(f"warning: {text}\n" for text in result.warnings))
        show(f"dry run: one batch tried on {result.device} ({losses}), nothing written")
        return
    show(summary_table(result))
    if result.teacher:
        show(*spot_tables(spots_document(RunDir(Path(str(result.run)))), top=3))
    if result.ensemble:
        show(ensemble_summary(result.ensemble))
    show(f"run: {result.run}")
