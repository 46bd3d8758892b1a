"""`sakd sweep`: a grid of runs, on this machine or on a cluster, and its table"""

import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, redirect_stdout
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.console import Group, RenderableType
from rich.live import Live

from sakd_cli.cli.console import ConsoleReporter, emit, show
from sakd_cli.cli.options import Values, with_options
from sakd_cli.config.grid import Grid, Member, Role, grid
from sakd_cli.config.resolve import ConfigSource, config_sources, file_source, presets, resolve
from sakd_cli.config.sweep import SweepConfig
from sakd_cli.config.training import DistillConfig
from sakd_cli.documents.sweep import SweepDocument, SweepRun
from sakd_cli.errors import UsageError
from sakd_cli.files import parse_yaml, write_aside
from sakd_cli.report.render.format import duration, fixed, named, number, plain
from sakd_cli.report.render.sheet import Sheet
from sakd_cli.rundir import RunDir
from sakd_cli.sweep.cluster import RayExecutor, SlurmExecutor
from sakd_cli.sweep.estimate import plan
from sakd_cli.sweep.executor import Executor, LocalExecutor
from sakd_cli.sweep.halving import STAGES, cell_of, halved, require_optuna
from sakd_cli.sweep.scheduler import ScheduledRun, Scheduler, State, received_signals
from sakd_cli.torchrun import require_single_process

SWEEP = "sweep"
SIDE = 32  # pixels of the images of a data set whose settings do not say it
PAUSE = 0.5  # seconds between two looks at what has ended
SHOWN = 8  # runs that ended last, below those that run
INTERVAL = 2.0  # seconds between two looks at the logs of what runs

FileOrPreset = Annotated[str, typer.Argument(metavar="FILE", help="A sweep's settings, or the name of such a preset.")]


@with_options("sweep")
def sweep(options: Values, json: bool, quiet: bool, csv: bool, markdown: Path | None, file: FileOrPreset) -> None:
    """Train a grid of methods x pairs x routers x seeds: finished runs are skipped, unfinished ones resumed.

    Examples:

        sakd sweep table-same-family --methods fitnet,sp --pairs resnet56:resnet20 --budget 0.1 --seeds 3 --dry-run

        sakd sweep mine.yaml --jobs 2 --markdown table.md
    """
    require_single_process("sakd sweep")
    from sakd_cli.report.sweep.tables import plan_tables

    reporter = ConsoleReporter(quiet=quiet)
    name, settings, runs = understood(file, options)
    folder = runs.members[0].config.runs_dir
    scheduler = Scheduler(runs.members, folder, folder / "sweeps" / name)
    skipped = runs.skipped | _impossible(scheduler, settings)
    if options["estimate"]:
        planned = plan(name, scheduler, skipped, options["measure"], reporter)
        emit(planned) if json else show(*plan_tables(planned))
        return
    if options["retry_failed"]:
        scheduler.refresh(forgive=True)
    if settings.halving:
        skipped |= _halved(file, options, settings.halving, scheduler, reporter)
    _carry_out(scheduler, options, reporter)
    document = _document(name, scheduler, skipped)
    _printed(document, csv=csv, json=json, markdown=markdown)
    scheduler.check(f"--retry-failed tries them again; their messages: {scheduler.folder / 'jobs'}")


def _halved(file: str, options: Values, factor: int, scheduler: Scheduler, reporter: ConsoleReporter) -> dict[str, str]:
    """Cells of the grid that are left out after fewer epochs, with the reason."""
    require_optuna()
    whole = {key: entry.member for key, entry in scheduler.entries.items()}
    stages = [
        # Teachers are whole ones from the beginning.
        [whole[one.key] if one.role is Role.teacher else one for one in short.members if one.key in whole]
        for stage in range(STAGES)
        for short in [understood(file, options, factor ** (stage - STAGES))[2]]
    ]

    def train(members: Sequence[Member]) -> dict[str, float]:
        part = Scheduler(members, scheduler.index.runs_dir, scheduler.folder)
        _carry_out(part, options, reporter)
        runs = [sweep_run(entry) for entry in part.entries.values() if entry.member.role is Role.student]
        return {run.key: run.validation_top1 for run in runs if run.validation_top1 is not None}

    out = halved(stages, factor, train)
    scheduler.leave_out([key for key, member in whole.items() if cell_of(member) in out])
    cells = {cell_of(member) for member in whole.values() if member.pair}
    reporter.say(f"halving: {len(out)} of {len(cells)} settings are left out")
    return out


def understood(file: str, params: Mapping[str, Any], share: float = 1.0) -> tuple[str, SweepConfig, Grid]:
    """Name of the sweep, its settings and its runs. Raises UsageError where they do not go together."""
    path = Path(file).expanduser()
    if not path.exists() and path.stem in presets():
        path = presets()[path.stem]
    layer = file_source(path, str(file))
    if layer.values.get("task") != SWEEP:
        raise UsageError(f"{file}: is no sweep, its task is {layer.values.get('task')!r}", "it begins with task: sweep")
    part = {"methods": "methods", "pairs": "pairs", "routers": "some_routers", "seeds": "seed_count"}
    chosen = [ConfigSource(f"--{key}", {key: params[name]}) for key, name in part.items() if params[name]]
    settings = resolve(SWEEP, [layer, *chosen]).config
    assert isinstance(settings, SweepConfig)
    given = {key: params[key] for key in ("data_root", "runs_dir", "device", "precision")}
    layers = config_sources({**given, "set_": params["set_"]})
    return path.stem, settings, grid(settings, layers, params["budget"], share)


def _impossible(scheduler: Scheduler, settings: SweepConfig) -> dict[str, str]:
    """Methods that cannot be used for a pair, left out with the reason. Raises UsageError where they are refused."""
    cells: dict[str, tuple[DistillConfig, list[str]]] = {}
    for key, entry in scheduler.entries.items():
        member = entry.member
        if entry.state is State.done or member.pair is None or not isinstance(member.config, DistillConfig):
            continue
        cells.setdefault(f"{member.method} {':'.join(member.pair)}", (member.config, []))[1].append(key)
    if not cells:
        return {}
    from sakd_cli.runs.forecast import Workbench

    benches, skipped = dict[int, Workbench](), dict[str, str]()
    for cell, (config, keys) in cells.items():
        side = config.data.model_dump().get("size", SIDE)
        if (reason := benches.setdefault(side, Workbench(side)).refusal(config)) is None:
            continue
        if settings.infeasible == "refuse":
            raise UsageError(f"{cell}: {reason}", "leave it out, or say infeasible: skip")
        skipped[cell] = reason
        scheduler.leave_out(keys)
    return skipped


def _carry_out(scheduler: Scheduler, params: Mapping[str, Any], reporter: ConsoleReporter) -> None:
    """Run what is not finished; nothing is started where all is."""
    if not scheduler.unfinished():
        return
    with redirect_stdout(sys.stderr):  # a library of the executor's may print; stdout is for the data
        executor = _executor(params, scheduler)
        waiting = scheduler.counts()[State.waiting]
        reporter.say(f"{waiting} of {len(scheduler.entries)} runs to do, on {executor.about()}")
        table, again = ProgressTable(scheduler, reporter), shlex.join(["sakd", *sys.argv[1:]])
        with closing(executor), received_signals(reporter) as signals, table.shown():
            scheduler.run(executor, signals, again=again, refresh=table.refresh, pause=PAUSE)


def _executor(params: Mapping[str, Any], scheduler: Scheduler) -> Executor:
    """Raises UsageError where it is not to be had, or the settings are not for it."""
    resources = dict(_assignment(named) for named in params["resource"] or [])
    per_gpu, where = params["jobs_per_gpu"], params["executor"]
    if where == "local":
        if resources:
            raise UsageError("--resource is for --executor ray or slurm; here it is --jobs and --jobs-per-gpu")
        device = next(iter(scheduler.entries.values())).member.config.device
        return LocalExecutor(params["jobs"], per_gpu, device)
    if where == "ray":
        return RayExecutor(params["jobs"], per_gpu, resources)
    return SlurmExecutor(params["jobs"], resources, scheduler.folder)


def _assignment(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not (key and equals and value):
        raise UsageError(f"--resource {text!r} is not of the form key=value", "for example --resource num_gpus=0.5")
    try:
        return key, parse_yaml(value)
    except (yaml.YAMLError, ValueError):
        raise UsageError(f"--resource {key}: {value[:40]!r} is no YAML value") from None


def _document(name: str, scheduler: Scheduler, skipped: Mapping[str, str]) -> SweepDocument:
    from sakd_cli.report.sweep.results import sweep_document

    entries = list(scheduler.entries.values())
    data = [entry.member.config.data for entry in entries if entry.member.role is Role.student]
    names = {one.name if one.classes is None and one.limit is None else None for one in data}  # None: a part of it
    return sweep_document(name, list(map(sweep_run, entries)), skipped, names.pop() if len(names) == 1 else None)


def sweep_run(entry: ScheduledRun) -> SweepRun:
    """A run of a sweep as the document has it."""
    from sakd_cli.report.runs.compare import run_curve

    member, config = entry.member, entry.member.config
    results: dict[str, Any] = {} if entry.run is None else {"run": plain(entry.run.path)}
    if entry.run is not None and entry.run.finished:
        summary = entry.run.summary
        results |= {"top1": summary.last.top1, "loss": summary.last.loss, "best_top1": summary.best.top1}
        results["validation_top1"] = next((point.top1 for point in reversed(run_curve(entry.run))), None)
        shared = member.control is not None  # with other teachers
        results |= {"seconds": summary.seconds}
        results["teacher_top1"] = None if shared or summary.teacher is None else summary.teacher.top1
    return SweepRun(
        key=member.key,
        role=member.role.value,
        teacher=member.pair[0] if member.pair else None,
        student=config.student if isinstance(config, DistillConfig) else config.model_dump()["model"],
        method=None if member.role is Role.baseline else member.method,
        router=member.router,
        matched=member.matched,
        seed=config.seed,
        epochs=config.train.epochs,
        state=entry.state.value,
        already_done=entry.already_done,
        resumed=entry.resumed,
        error=entry.error,
        **results,
    )


def _printed(document: SweepDocument, *, csv: bool, json: bool, markdown: Path | None) -> None:
    from sakd_cli.report.sweep.tables import sweep_csv, sweep_markdown, sweep_tables

    if markdown is not None:
        write_aside(markdown, sweep_markdown(document).encode())
    if json:
        emit(document)
    elif csv:
        sys.stdout.write(sweep_csv(document))
    else:
        show(*sweep_tables(document))


class ProgressTable:
    """Follows a scheduler."""

    def __init__(self, scheduler: Scheduler, reporter: ConsoleReporter) -> None:
        self.scheduler, self.reporter = scheduler, reporter
        self.terminal = reporter.console.is_terminal and not reporter.quiet
        self.ended: list[ScheduledRun] = []
        self._live: Live | None = None
        self._looked = 0.0
        self._begun: dict[str, tuple[int, float]] = {}  # epoch and time at which it was first seen
        scheduler.changed = self._changed

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Keep the table on the terminal meanwhile."""
        if not self.terminal:
            yield
            return
        with Live(self._table(), console=self.reporter.console, auto_refresh=False, transient=True) as self._live:
            try:
                yield
            finally:
                self._live = None

    def refresh(self) -> None:
        """Show how far the runs are; does nothing between two looks."""
        if self._live is not None and time.monotonic() - self._looked >= INTERVAL:
            self._looked = time.monotonic()
            self._live.update(self._table(), refresh=True)

    def _changed(self, entry: ScheduledRun) -> None:
        if entry.state is not State.running and entry.state is not State.waiting:
            self.ended.append(entry)
        if self._live is None:
            counts = self.scheduler.counts()
            over = sum(counts[state] for state in (State.done, State.failed, State.blocked))
            self.reporter.say(
                f"[{over}/{len(self.scheduler.entries)}] {_state(entry)}  {entry.member.key}{_detail(entry)}"
            )

    def _table(self) -> RenderableType:
        names = ("Run", "State", "Epoch", "Step", "Validation top-1 %", "Left")
        rows = [self._row(entry) for entry in [*self.scheduler.locate(), *reversed(self.ended[-SHOWN:])]]
        counts = ", ".join(f"{count} {state}" for state, count in self.scheduler.counts().items() if count)
        notes = [f"{counts}. Ctrl-C saves every run; the same command resumes them."]
        return Group(Sheet("", names, rows, notes, text=2))

    def _row(self, entry: ScheduledRun) -> list[str]:
        epoch, step, top1 = progress(entry.run)
        epochs = entry.member.config.train.epochs
        left = None
        if entry.state is State.running and epoch is not None:
            first, since = self._begun.setdefault(entry.member.key, (epoch, time.monotonic()))
            if epoch > first:
                left = (time.monotonic() - since) / (epoch - first) * (epochs - epoch)
        shown = "" if epoch is None else f"{epoch}/{epochs}"
        remaining = "" if left is None else duration(left)
        return [entry.member.key, _state(entry), shown, named(step), fixed(top1, 2), remaining]


def progress(run: RunDir | None) -> tuple[int | None, int | None, float | None]:
    """Epoch and step of a run's last line of metrics, and the last top-1 on the images that select."""
    epoch, step, top1 = None, None, None
    for line in run.lines("metrics.jsonl") if run is not None else ():
        if isinstance(line, dict) and (known := number(line.get("epoch"))) is not None:
            epoch = int(known)
            step = int(number(line.get("step")) or step or 0)
            top1 = number(line.get("top1")) if line.get("kind") == "eval" else top1
    return epoch, step, top1


def _state(entry: ScheduledRun) -> str:
    if entry.state is State.running and entry.resumed:
        return "resumed"
    return entry.state.value


def _detail(entry: ScheduledRun) -> str:
    if entry.error:
        return f": {entry.error}"
    if entry.state is not State.done or entry.run is None:
        return ""
    summary = entry.run.summary
    return f"  top-1 {fixed(summary.last.top1, 2)} %, {duration(summary.seconds)}"
