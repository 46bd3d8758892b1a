"""`sakd pretrain-teacher` and `sakd distill`."""

import shlex
import sys
from functools import partial
from pathlib import Path
from typing import Any

import typer

from sakd_cli.cli import options as o
from sakd_cli.cli.console import Talk, emit, show
from sakd_cli.cli.intent import AUTO, twin, understood
from sakd_cli.cli.judge import compared
from sakd_cli.cli.series import is_series, series, train_all, train_together
from sakd_cli.config.run import DistillConfig, TeacherConfig
from sakd_cli.rundir import Intent, RunDir


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
    config: o.Config = None,
    set_: o.Set = None,
    runs_dir: o.RunsDir = None,
    run_dir: o.RunFolder = None,
    resume: o.Resume = None,
    overwrite: o.Overwrite = False,
    device: o.Device = None,
    precision: o.Precision = None,
    compile: o.Compile = None,
    deterministic: o.Deterministic = None,
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
    words, intent = understood("pretrain", ctx.params)
    if intent.finished:
        _finish(intent.summary(), dry_run=False, json=json)
        return
    talk = Talk(quiet=quiet)
    from sakd_cli.tasks import build, run

    job = build.pretraining(words)
    _finish(
        run.try_one_batch(job) if dry_run else _trained(job, intent, talk),
        dry_run=dry_run,
        json=json,
    )


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
    teacher_bank: o.TeacherBank = None,
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
    config: o.Config = None,
    set_: o.Set = None,
    runs_dir: o.RunsDir = None,
    run_dir: o.RunFolder = None,
    resume: o.Resume = None,
    overwrite: o.Overwrite = False,
    device: o.Device = None,
    precision: o.Precision = None,
    compile: o.Compile = None,
    deterministic: o.Deterministic = None,
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
    talk = Talk(quiet=quiet)
    words, intent = understood("distill", ctx.params)
    several = series(words, ctx.params)
    if is_series(ctx.params) and not dry_run:
        compared(_several(several, talk, resume, together=together), json=json)
    elif intent.finished and intent.resume:
        _picture(intent.resume, talk)
        _finish(intent.summary(), dry_run=False, json=json)
    else:
        result = _tried(words) if dry_run else _distilled(words, intent, talk, resume)
        _finish(result, dry_run=dry_run, json=json)


def _several(members: list[DistillConfig], talk: Talk, resume: str | None, *, together: bool) -> list[RunDir]:
    """A series, one after another or at once."""
    again = _this_again(resume)
    if together:
        chosen = _pinned_teacher(members[0], talk, resume)
        return train_together(members, chosen, talk, resume=bool(resume), again=again)
    train = partial(_distilled, talk=talk, resume=resume, again=again)
    return train_all(members, train, resume=bool(resume))


def _this_again(resume: str | None) -> str:
    """The command line that goes on with what this one did."""
    return shlex.join(["sakd", *sys.argv[1:], *([] if resume else ["--resume", AUTO])])


def _missing(words: DistillConfig) -> bool:
    """Whether the teacher is yet to be trained; raises UsageError where nobody asked for that."""
    from sakd_cli.tasks.teachers import find_teacher, no_teacher

    missing = find_teacher(words) is None
    if missing and not words.teacher.pretrain:
        raise no_teacher(words)
    return missing


def _tried(words: DistillConfig) -> dict[str, Any]:
    """The plan of a distillation and one batch of it, with an untrained teacher where it is yet to be trained."""
    missing = _missing(words)
    from sakd_cli.tasks import build, run

    return run.try_one_batch(build.distillation(words, build.untrained_teacher(words) if missing else None))


def _distilled(
    words: DistillConfig, intent: Intent, talk: Talk, resume: str | None, again: str | None = None
) -> dict[str, Any]:
    """One distillation, after its teacher's training where that is still to be done; `again` as for `_trained`."""
    _with_teacher(words, talk, resume)
    from sakd_cli.tasks import build

    return _trained(build.distillation(words), intent, talk, again)


def _with_teacher(words: DistillConfig, talk: Talk, resume: str | None) -> None:
    """Train the teacher first where that is asked for."""
    if not _missing(words):
        return
    from sakd_cli.tasks import build
    from sakd_cli.tasks.companions import companions_of

    # Whatever is wrong with the student's side is said before hours go into a teacher.
    for companion in companions_of(build.distillation(words, build.untrained_teacher(words))):
        companion.rehearse()
    talk.say(f"no finished {words.teacher.source} yet: training it first")
    first = build.teacher_config(words)
    _trained(build.pretraining(first), twin(first) if resume else Intent(), talk, _this_again(resume))


def _pinned_teacher(words: DistillConfig, talk: Talk, resume: str | None) -> TeacherConfig:
    """The teacher as it is now, trained first where that is asked for: several processes must mean the same one."""
    _with_teacher(words, talk, resume)
    from sakd_cli.tasks.teachers import find_teacher

    path = find_teacher(words)
    assert path is not None
    return words.teacher.model_copy(update={"weights": path.resolve()})


def _trained(job: Any, intent: Intent, talk: Talk, again: str | None = None) -> dict[str, Any]:
    """Train; `again` is the command that goes on after a stop, where it is not that of the run itself."""
    from sakd_cli.data.feeds import told
    from sakd_cli.tasks import run
    from sakd_cli.tasks.companions import companions_of

    companions = companions_of(job)
    for companion in companions:
        companion.rehearse()
    config = job.config
    talk.say(
        f"{job.network.name} on {config.data.name}: {len(job.images.train)} images, {config.train.epochs} epochs of "
        f"batches of {config.train.batch_size}, lr {job.task.groups()[0].lr:g}, seed {config.seed}, {job.device} "
        f"({job.mode})"
    )
    for notice in filter(None, (told(job.images.train), *(companion.notice for companion in companions))):
        talk.say(notice)
    if skipped := job.images.dataset.skipped:
        talk.warn(f"{skipped} files could not be read and are left out (sakd data check names them)")
    if job.teacher is not None:
        talk.say(f"teacher: {job.teacher.model.name} from {job.teacher_path}")
    with talk.heeding_signals():
        where, summary = run.carry_out(job, intent, talk, again)
        _picture(where, talk)
    return {"run": str(where.path)} | summary


def _picture(run: RunDir, talk: Talk) -> None:
    """What the run mixed of its teacher's blocks, drawn, where it did."""
    from sakd_cli.report.mixtures import PICTURE, mixture_report

    if (record := mixture_report(run)) is None:
        return
    from sakd_cli.report import plots

    if plots.available(lambda told: talk.say(f"no {PICTURE}: {told}")):
        plots.write(plots.mixture_map(record), run.path / PICTURE)


def _finish(result: dict[str, Any], *, dry_run: bool, json: bool) -> None:
    if json:
        emit(result)
        return
    from sakd_cli.report.ensemble import ensemble_summary
    from sakd_cli.report.spots import spot_report
    from sakd_cli.report.tables import spot_plan_table, spot_tables, summary_table

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
