"""Several distillations under one budget: a run and its controls, every router, several seeds"""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sakd_cli.config import code
from sakd_cli.config.base import of_file, once, own_name
from sakd_cli.config.grid import LEARNED, Member, Role, in_order_of_need
from sakd_cli.config.method import AUTO as BALANCED
from sakd_cli.config.resolve import ConfigSource, resolve
from sakd_cli.config.routers import CLASSICAL, MATCHED, PLAIN, ROUTERS, RandomMatchedConfig
from sakd_cli.config.training import DistillConfig, RunConfig
from sakd_cli.documents.training import Plan, Summary
from sakd_cli.engine.reporter import Reporter
from sakd_cli.errors import UsageError, unknown
from sakd_cli.files import opened
from sakd_cli.report.spots.charts import draw_mixtures
from sakd_cli.rundir import RunDir
from sakd_cli.runs.locate import locate_inputs
from sakd_cli.runs.own import keep_teacher
from sakd_cli.runs.resume import AUTO, ResumePlan, resolve_command, resume_config
from sakd_cli.sweep.executor import InProcessExecutor, Job, LocalExecutor
from sakd_cli.sweep.reuse import RunIndex
from sakd_cli.sweep.scheduler import ScheduledRun, Scheduler, State, received_signals
from sakd_cli.torchrun import is_console_process, require_single_process

if TYPE_CHECKING:
    from sakd_cli.runs.launch import Launcher

ALL = "all"
MOST = 10_000  # seeds
PAUSE = 0.05  # seconds between two looks at the processes


def series(config: DistillConfig, params: Mapping[str, Any]) -> list[DistillConfig]:
    """What `--routers`, `--with-control` and `--seeds` make of a config: members that share all but router and seed.

    Seed by seed, and of each seed the learned router first, whose rates another may match. The controls are what a
    claim needs: coins of the router's rates, always, always at the balanced dose, never.

    Raises UsageError for options that do not go together, before anything is trained.
    """
    if params["parallel"]:
        require_single_process("--parallel")
    if (params["seeds"] or 1) > MOST:
        raise UsageError(f"--seeds {params['seeds']}: a series has at most {MOST} runs")
    names = _routers(config, params)
    variants = [(name, False) for name in names]
    if params["with_control"] and not config.method.balance:
        variants.insert(-1, (CLASSICAL, True))
    _check_baseline(params, config, variants)
    seeds = range(config.seed, config.seed + (params["seeds"] or 1))
    members = [_member(config, name, seed, balanced) for seed in seeds for name, balanced in variants]
    if params["parallel"] and not wants_series(params):
        raise UsageError("--parallel runs a series at once: it goes with --seeds, --with-control or --routers")
    if len(members) > 1:
        if params["run_dir"] is not None or params["overwrite"]:
            raise UsageError("--run-dir and --overwrite name one run; a series makes several", hint="--runs-dir DIR")
        if params["resume"] not in (None, AUTO):
            raise UsageError("--resume RUN resumes one run; a series needs --resume auto")
    return members


def _check_baseline(params: Mapping[str, Any], config: DistillConfig, variants: Sequence[tuple[str, bool]]) -> None:
    """Raise UsageError for a `--baseline` that no group of the series will have, or every one, before it is trained."""
    if (baseline := params.get("baseline")) is None:
        return
    if not wants_series(params):
        raise UsageError("--baseline is for what a series compares: --seeds, --with-control or --routers")
    labels = [[config.method.name, router, *["balanced"] * balanced] for router, balanced in variants]
    found = sum({*baseline.split()} <= {*label} for label in labels)
    if not found or found == len(labels) > 1:
        which, hint = "is every group" if found else "no group", ", ".join(map(" ".join, labels))
        raise UsageError(f"--baseline {baseline!r}: {which} of this series", f"words of one of: {hint}")


def wants_series(params: Mapping[str, Any]) -> bool:
    """Whether more than the run itself was asked for."""
    return bool(params["routers"] or params["with_control"] or (params["seeds"] or 1) > 1)


def _routers(config: DistillConfig, params: Mapping[str, Any]) -> list[str]:
    own, asked = config.router.name, params["routers"]
    if asked is None:
        coins = [MATCHED] if config.router.selects else []
        return list(dict.fromkeys([own, *coins, CLASSICAL, PLAIN])) if params["with_control"] else [own]
    if params["router"] is not None or params["with_control"]:
        raise UsageError("--routers says which routers run; it goes with neither --router nor --with-control")
    asked = asked.split(",") if isinstance(asked, str) else asked or [""]
    names = list(once(tuple(own_name(name, ROUTERS) or name for name in asked)))
    code.trust(*filter(of_file, names))
    names = list(ROUTERS) if names == [ALL] else names
    for name in names:
        if name not in ROUTERS:
            raise UsageError(f"--routers: {unknown('router', name, [*ROUTERS, ALL])}")
    ranked = in_order_of_need(names)
    there = config.router.model_dump().get("run") or any(ROUTERS[name].selects for name in names)
    if MATCHED in ranked and not there:
        raise UsageError(f"--routers: {MATCHED} matches the rates of {LEARNED}, or of another that selects: add it")
    return ranked


def _member(config: DistillConfig, router: str, seed: int, balanced: bool = False) -> DistillConfig:
    """The same settings with that router, seed and dose; what the old router has and the new one has not is dropped."""
    changed: dict[str, Any] = {"seed": seed} | ({} if config.router.name == router else {"router": {"name": router}})
    changed |= {"method": {"weight": BALANCED}} if balanced else {}
    own = ConfigSource("the series' settings", config.model_dump(mode="json"))
    return resolve("distill", [own, ConfigSource("--routers", changed)]).config


def train_command(
    task: str,
    params: Mapping[str, Any],
    reporter: Reporter,
    again: str,
    one: str | None = None,
    guard: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Summary | Plan | list[RunDir]:
    """What a command that trains is asked for: a run, the runs of a series, or with `dry_run` the plan of a run.

    again  what continues all of it after a stop; one: what continues a run alone, None: its own command
    guard  as of a `Launcher`
    """
    (config, plan), dry = resolve_command(task, params), params["dry_run"]
    with tempfile.TemporaryDirectory() if dry else nullcontext(config.runs_dir) as folder:
        config = keep_teacher(config, Path(folder))
        configs = series(config, params) if task == "distill" else []
        several = bool(configs) and wants_series(params)
        if several and dry:
            reporter.say(f"runs of the series: {len(configs)}; the first is tried")
            config, several = configs[0], False
        if plan.finished and not several:
            draw_mixtures(RunDir(plan.summary.folder), reporter.say)
            return plan.summary
        if plan.resume is not None and not several and is_console_process() and plan.resume.in_use:
            with plan.resume.locked():  # which says who is in: before what takes long
                pass
        config = locate_inputs(config)  # whatever is missing is reported before torch is loaded
        from sakd_cli.engine.runtime import as_in_new_process
        from sakd_cli.runs import launch

        launcher = launch.Launcher(reporter, params["resume"] is not None, again, guard)

        def train(config: RunConfig, plan: ResumePlan) -> Summary:
            summary = launcher.train(config, plan, again if several else one)
            draw_mixtures(RunDir(summary.folder), reporter.say)
            return summary

        with as_in_new_process(), code.as_usage_errors():
            if several:
                return train_series(configs, train, launcher, parallel=params["parallel"], again=again)
            return launch.dry_run(config) if dry else train(config, plan)


def train_series(
    configs: list[DistillConfig],
    train: Callable[[RunConfig, ResumePlan], Summary],
    launcher: "Launcher",
    *,
    parallel: bool,
    again: str,
) -> list[RunDir]:
    """Train a series one after another in this process or, `parallel`, each in a process of its own.

    All learn from one teacher: the one with which a run that is resumed began, else today's, trained first where it is
    missing. A router that matches rates matches those of its own seed.

    train   what trains one run in this process
    again   the command that continues the series after a stop
    """
    resume, reporter = launcher.resume, launcher.reporter
    members = _members(configs, launcher)
    with tempfile.TemporaryDirectory() as folder:
        scheduler = Scheduler(members, configs[0].runs_dir, Path(folder), fresh=not resume)
        if not resume:
            _take_controls(scheduler, reporter)
        if parallel:
            several = sum(member.matched is None for member in members)
            executor, messages = LocalExecutor(several, several, configs[0].device), Messages(scheduler, reporter)
            with closing(executor), received_signals(reporter) as signals:
                scheduler.run(executor, signals, again=again, refresh=messages.refresh, pause=PAUSE)
        else:

            def train_job(job: Job) -> None:
                done = sum(entry.state is State.done for entry in scheduler.entries.values())
                reporter.say(f"run {done + 1} of {len(members)}: {job.key}")
                train(job.config, ResumePlan(resume=job.run, lenient=True) if job.run else ResumePlan())

            scheduler.run(InProcessExecutor(train_job))
        scheduler.check(f"what is finished stays: {again}")
        return [run for entry in scheduler.entries.values() if (run := entry.run)]


def _members(configs: list[DistillConfig], launcher: "Launcher") -> list[Member]:
    """The runs with their one teacher; the run whose rates a router matches is of the series or located."""
    plans = [resume_config(config) for config in configs] if launcher.resume else []
    if not (begun := [config.teacher for config, plan in plans if plan.resume]):
        first = locate_inputs(configs[0])
        begun = [(first if first.teacher.weights else launcher.pretrain(first)[0]).teacher]
    pinned = {"weights": begun[0].weights, "sha256": begun[0].sha256}
    names, members = [_name(config) for config in configs], list[Member]()
    selecting = {config.seed: _name(config) for config in reversed(configs) if config.router.selects}
    for config, name in zip(configs, names, strict=True):
        config = config.model_copy(update={"teacher": config.teacher.model_copy(update=pinned)})
        matched = selecting.get(config.seed) if isinstance(config.router, RandomMatchedConfig) else None
        if matched is None:
            config, matched = locate_inputs(resume_config(config)[0] if launcher.resume else config), None
        members.append(Member(name, Role.student, config, matched=matched))
    return members


def _take_controls(scheduler: Scheduler, reporter: Reporter) -> None:
    """Take the controls (of several routers `always` and `never`) that are finished, whoever made them; say which."""
    index, taken, entries = RunIndex(scheduler.index.runs_dir), list[str](), list(scheduler.entries.values())
    index.refresh()
    several = len({entry.member.router for entry in entries}) > 1
    for entry in (one for one in entries if several and one.member.router in (CLASSICAL, PLAIN)):
        run = None if (config := scheduler.config_of(entry)) is None else index.of(config)
        if run is not None and run.finished:
            entry.state, entry.run, entry.already_done = State.done, run, True
            taken.append(f"{entry.member.key} ({run.path.name})")
    if taken:
        reporter.say(f"not trained again, finished in {index.runs_dir}: {'; '.join(taken)}")


def _name(config: DistillConfig) -> str:
    return f"{config.router.name}{' balanced' * bool(config.method.balance)}, seed {config.seed}"


class Messages:
    """Passes on what the runs of a scheduler write to their stderr, line by line, with the run's name."""

    def __init__(self, scheduler: Scheduler, reporter: Reporter) -> None:
        self.scheduler, self.reporter = scheduler, reporter
        self._read = dict[str, int]()  # bytes of each run's log
        scheduler.changed = self._changed

    def refresh(self) -> None:
        """Pass on what is new."""
        for entry in self.scheduler.entries.values():
            if entry.state is State.running:
                self._follow(entry)

    def _changed(self, entry: ScheduledRun) -> None:
        if entry.state is State.running:
            self._read[entry.member.key] = 0
            return
        self._follow(entry)
        if entry.error:
            self.reporter.warn(f"{entry.member.key}: {entry.error}")

    def _follow(self, entry: ScheduledRun) -> None:
        name, ended = entry.member.key, entry.state is not State.running
        try:
            with opened(self.scheduler.log_of(entry)) as log:
                log.seek(self._read.get(name, 0))
                new = log.read()
        except OSError:
            return
        new = new if ended else new[: new.rfind(b"\n") + 1]  # no half of a line
        self._read[name] = self._read.get(name, 0) + len(new)
        for line in new.decode(errors="backslashreplace").splitlines():
            kind, _, text = line.partition(": ")
            if kind == "warning":
                self.reporter.warn(f"{name}: {text}")
            elif kind not in ("error", "hint"):
                self.reporter.say(f"{name}: {line.rstrip()}")
