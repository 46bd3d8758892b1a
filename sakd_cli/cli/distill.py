"""`sakd pretrain-teacher` and `sakd distill`."""

import shlex
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import typer

from sakd_cli.cli import options as o
from sakd_cli.cli.compare import compared
from sakd_cli.cli.console import ConsoleReporter, emit, show
from sakd_cli.config.training import DistillConfig, TeacherConfig
from sakd_cli.rundir import ResumePlan, RunDir
from sakd_cli.runs.locate import find_teacher, is_missing
from sakd_cli.runs.resume import AUTO, resolve_command
from sakd_cli.sweep.series import is_series, series, train_all, train_together


def pretrain_teacher(
    ctx: typer.Context,
    model: o.ModelArgument = None,
    student_friendly: o.StudentFriendly = None,
    head: o.Head = None,
    dataset: o.Dataset = None,
    data_root: o.DataRoot = None,
    holdout: o.Holdout = None,
    epochs: o.Epochs = None,
    batch_size: o.BatchSize = None,
    seed: o.Seed = None,
    preset: o.Preset = None,
    config: o.ConfigFile = None,
    set_: o.Set = None,
    runs_dir: o.RunsDir = None,
    run_dir: o.RunFolder = None,
    resume: o.Resume = None,
    overwrite: o.Overwrite = False,
    device: o.Device = None,
    precision: o.Precision = None,
    compile: o.Compile = None,
    deterministic: o.Deterministic = None,
    sync_batchnorm: o.SyncBatchNorm = None,
    log: o.Log = None,
    dry_run: o.DryRun = False,
    json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Train one network with cross-entropy: a teacher, or a student alone.

    Examples:

        sakd pretrain-teacher wrn40_2 --dataset cifar100

        sakd pretrain-teacher wrn40_2 --student-friendly wrn16_2
    """
    words, intent = resolve_command("pretrain", ctx.params)
    if intent.finished:
        _finish(intent.summary(), dry_run=False, json=json)
        return
    from sakd_cli.runs.launch import Session, tried

    if dry_run:
        _finish(tried(words), dry_run=True, json=json)
        return
    talk = ConsoleReporter(quiet=quiet)
    where, summary = Session(talk, guard=talk.heeding_signals).pretrained(words, intent)
    _finish({"run": str(where.path)} | summary, dry_run=False, json=json)


def distill(
    ctx: typer.Context,
    teacher: o.Teacher = None,
    teacher_weights: o.TeacherWeights = None,
    student: o.Student = None,
    method: o.Method = None,
    dfa_weights: o.DfaWeights = None,
    router: o.Router = None,
    residual_students: o.ResidualStudents = None,
    pretrain: o.Pretrain = None,
    teacher_bank: o.TeacherCache = None,
    allow_teacher_mismatch: o.AllowTeacherMismatch = None,
    with_control: o.WithControl = False,
    routers: o.Routers = None,
    seeds: o.Seeds = None,
    together: o.Together = False,
    head: o.Head = None,
    dataset: o.Dataset = None,
    data_root: o.DataRoot = None,
    holdout: o.Holdout = None,
    epochs: o.Epochs = None,
    batch_size: o.BatchSize = None,
    seed: o.Seed = None,
    preset: o.Preset = None,
    config: o.ConfigFile = None,
    set_: o.Set = None,
    runs_dir: o.RunsDir = None,
    run_dir: o.RunFolder = None,
    resume: o.Resume = None,
    overwrite: o.Overwrite = False,
    device: o.Device = None,
    precision: o.Precision = None,
    compile: o.Compile = None,
    deterministic: o.Deterministic = None,
    sync_batchnorm: o.SyncBatchNorm = None,
    gather: o.Gather = None,
    log: o.Log = None,
    dry_run: o.DryRun = False,
    json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Train a student from a teacher, deciding per sample and step where it learns.

    Examples:

        sakd distill --preset quickstart

        sakd distill --teacher wrn40_2 --student wrn16_2 --with-control --seeds 3 --epochs 60
    """
    _distil(ctx.params, json=json)


def _distil(params: Mapping[str, Any], *, json: bool) -> None:
    talk, dry_run, resume = ConsoleReporter(quiet=params["quiet"]), params["dry_run"], params["resume"]
    words, intent = resolve_command("distill", params)
    several, many = series(words, params), is_series(params) and not dry_run
    if not many and intent.finished and intent.resume:
        _picture(intent.resume, talk)
        _finish(intent.summary(), dry_run=False, json=json)
        return
    is_missing(words)  # said before torch is loaded
    from sakd_cli.runs.launch import Session, tried

    session = Session(talk, bool(resume), again := _this_again(resume), talk.heeding_signals)
    if many:
        compared(_several(several, session, again, together=params["together"]), json=json)
    else:
        _finish(tried(words) if dry_run else _distilled(words, intent, session), dry_run=dry_run, json=json)


def _several(members: list[DistillConfig], session: Any, again: str, *, together: bool) -> list[RunDir]:
    """A series, one after another or at once."""
    if together:
        chosen = _pinned_teacher(members[0], session)
        return train_together(members, chosen, session.reporter, resume=session.resume, again=again)
    return train_all(members, partial(_distilled, session=session, again=again), resume=session.resume)


def _pinned_teacher(words: DistillConfig, session: Any) -> TeacherConfig:
    """The teacher as it is now, trained first where that is asked for: several processes must mean the same one."""
    session.with_teacher(words)
    path = find_teacher(words)
    assert path is not None
    return words.teacher.model_copy(update={"weights": path.resolve()})


def _this_again(resume: str | None) -> str:
    """The command line that goes on with what this one did."""
    return shlex.join(["sakd", *sys.argv[1:], *([] if resume else ["--resume", AUTO])])


def _distilled(words: DistillConfig, intent: ResumePlan, session: Any, again: str | None = None) -> dict[str, Any]:
    where, summary = session.distilled(words, intent, again)
    _picture(where, session.reporter)
    return {"run": str(where.path)} | summary


def _picture(run: RunDir, talk: ConsoleReporter) -> None:
    """What the run mixed of its teacher's blocks, drawn, where it did."""
    from sakd_cli.report.spots.mixtures import PICTURE, mixture_report

    if (record := mixture_report(run)) is None:
        return
    from sakd_cli.report.render import plots

    if plots.available(lambda told: talk.say(f"no {PICTURE}: {told}")):
        plots.write(plots.mixture_map(record), run.path / PICTURE)


def _finish(result: dict[str, Any], *, dry_run: bool, json: bool) -> None:
    if json:
        emit(result)
        return
    from sakd_cli.report.evaluation.ensemble import ensemble_summary
    from sakd_cli.report.runs.tables import spot_plan_table, spot_tables, summary_table
    from sakd_cli.report.spots.log import spot_report

    if dry_run:
        losses = ", ".join(f"{name} {value:.4g}" for name, value in result["batch"].items())
        show(spot_plan_table(result), f"dry run: one batch tried on {result['device']} ({losses}), nothing written")
        return
    show(summary_table(result))
    if result["task"] == "distill":
        show(*spot_tables(spot_report(RunDir(Path(result["run"]))), top=3))
    if told := result.get("ensemble"):
        show(ensemble_summary(told))
    show(f"run: {result['run']}")
