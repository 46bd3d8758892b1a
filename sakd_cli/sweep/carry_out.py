"""A sweep from its settings to its document, without a terminal."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from pathlib import Path
from typing import Any

from sakd_cli.config import code
from sakd_cli.config.base import choose
from sakd_cli.config.grid import Grid, Member, Role, grid
from sakd_cli.config.resolve import ConfigSource, config_sources, file_source, flat, parse_assignment, presets, resolve
from sakd_cli.config.sweep import SweepConfig
from sakd_cli.config.training import DistillConfig, RunConfig
from sakd_cli.documents.sweep import SweepDocument, SweepPlan, SweepRun
from sakd_cli.engine.reporter import Reporter
from sakd_cli.errors import UsageError
from sakd_cli.files import expanded
from sakd_cli.report.render.format import plain
from sakd_cli.report.runs.compare import run_curve
from sakd_cli.report.sweep.results import BASELINE, of_baseline, sweep_document
from sakd_cli.report.sweep.tables import sweep_markdown
from sakd_cli.sweep.cluster import RayExecutor, SlurmExecutor
from sakd_cli.sweep.estimate import plan
from sakd_cli.sweep.executor import Executor, LocalExecutor, library
from sakd_cli.sweep.halving import STAGES, dropped_by_halving
from sakd_cli.sweep.scheduler import ScheduledRun, Scheduler, State, received_signals
from sakd_cli.writing import write_aside

SWEEP, RUNS = "sweep", Path(RunConfig.model_fields["runs_dir"].default)
PAUSE = 0.5  # seconds between two looks at what has ended
Watch = Callable[[Scheduler], AbstractContextManager[Callable[[], None]]]
SIDE = 32  # pixels of the images of a data set whose settings do not say it


def read_sweep(
    file: str | Mapping[str, Any], params: Mapping[str, Any], share: float = 1.0
) -> tuple[str, SweepConfig, Grid]:
    """Name of a sweep, its settings and its runs. Raises UsageError where they do not go together.

    file  or the name of a preset, or what such a file has
    """
    path = Path(SWEEP) if isinstance(file, Mapping) else expanded(file)
    if not path.exists() and (path.stem in presets() or path.name == path.stem == str(file)):
        path = presets()[choose("preset", path.stem, presets(), "sakd list presets, or a YAML file of your own")]
    layer = ConfigSource("settings", dict(file)) if isinstance(file, Mapping) else file_source(path, str(file))
    code.trust(*code.own_names(flat(layer.values).values()))
    if layer.values.get("task") != SWEEP:
        raise UsageError(f"{file}: is no sweep, its task is {layer.values.get('task')!r}", "it begins with task: sweep")
    part = {"methods": "methods", "pairs": "pairs", "routers": "some_routers", "seeds": "seed_count"}
    chosen = [ConfigSource(f"--{key}", {key: params[name]}) for key, name in part.items() if params[name]]
    settings = resolve(SWEEP, [layer, *chosen]).config
    assert isinstance(settings, SweepConfig)
    given = {key: params[key] for key in ("data_root", "runs_dir", "device", "precision")}
    layers = config_sources({**given, "set_": params["set_"]})
    if not any("runs_dir" in one for one in (settings.common, *(layer.values for layer in layers))):
        layers.append(ConfigSource("the sweep's own folder", {"runs_dir": RUNS / path.stem}))
    runs = grid(settings, layers, params["budget"], share, params["protocol"])
    students = [one for one in runs.members if one.role is Role.student]
    cells = dict.fromkeys((one.method or "", one.router or "") for one in students)
    cells |= {(BASELINE, ""): None} if settings.baseline else {}
    if (baseline := params["baseline"]) and not of_baseline(baseline, cells):
        labels = ", ".join(" ".join(filter(None, cell)) for cell in cells)
        raise UsageError(f"--baseline {baseline!r}: no such cell of this sweep", f"words of one of: {labels}")
    return path.stem, settings, runs


def carry_out(
    file: str | Path | Mapping[str, Any],
    params: Mapping[str, Any],
    reporter: Reporter,
    again: str,
    watch: Watch = lambda scheduler: nullcontext(lambda: None),
) -> tuple[SweepDocument, Scheduler] | tuple[SweepPlan, None]:
    """Train what is not finished; or, asked for an estimate, nothing. The document, and how each run stands.

    file   or the name of a preset, or what such a file has
    again  the command that continues after a stop
    watch  a context meanwhile; what it gives is called after every look at what has ended
    """

    def run(part: Scheduler) -> None:
        if part.unfinished():
            executor = executor_of(params, part)
            reporter.say(f"{part.counts()[State.waiting]} of {len(part.entries)} runs to do, on {executor.about()}")
            with closing(executor), received_signals(reporter) as signals, watch(part) as refresh:
                part.run(executor, signals, again=again, refresh=refresh, pause=PAUSE)

    file = str(file) if isinstance(file, Path) else file
    name, settings, runs = read_sweep(file, params)
    folder = runs.members[0].config.runs_dir
    folder = RUNS if folder == RUNS / name else folder  # finished runs beside the sweep's folder count too
    scheduler = Scheduler(runs.members, folder, folder / "sweeps" / name)
    skipped = runs.skipped | _leave_out_impossible(scheduler, settings)
    if params["estimate"]:
        return plan(name, scheduler, skipped, params["measure"], reporter), None
    skipped |= _train(file, params, settings, scheduler, run, reporter.say)
    document = _document(name, scheduler, skipped, params["baseline"])
    if params["markdown"]:
        write_aside(params["markdown"], sweep_markdown(document).encode())
    return document, scheduler


def _leave_out_impossible(scheduler: Scheduler, settings: SweepConfig) -> dict[str, str]:
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


def _train(
    file: str | Mapping[str, Any],
    params: Mapping[str, Any],
    settings: SweepConfig,
    scheduler: Scheduler,
    run: Callable[[Scheduler], None],
    say: Callable[[str], None],
) -> dict[str, str]:
    """Have `run` train what is not finished; the cells that halving leaves out after fewer epochs, with the reason."""
    if params["retry_failed"]:
        scheduler.refresh(forgive=True)
    if not (factor := settings.halving):
        run(scheduler)
        return {}
    library("optuna", "halving", "Optuna")  # before anything is trained
    whole = {key: entry.member for key, entry in scheduler.entries.items()}
    stages = [
        # Teachers are whole ones from the beginning.
        [whole[one.key] if one.role is Role.teacher else one for one in short.members if one.key in whole]
        for stage in range(STAGES)
        for short in [read_sweep(file, params, factor ** (stage - STAGES))[2]]
    ]

    def trained(members: Sequence[Member]) -> dict[str, float]:
        part = Scheduler(members, scheduler.index.runs_dir, scheduler.folder)
        run(part)
        runs = [sweep_run(entry) for entry in part.entries.values() if entry.member.role is Role.student]
        return {run.key: run.validation_top1 for run in runs if run.validation_top1 is not None}

    out = dropped_by_halving(stages, factor, trained)
    scheduler.leave_out([key for key, member in whole.items() if member.cell in out])
    cells = {member.cell for member in whole.values() if member.pair}
    say(f"halving: {len(out)} of {len(cells)} settings are left out")
    run(scheduler)
    return out


def executor_of(params: Mapping[str, Any], scheduler: Scheduler) -> Executor:
    """Raises UsageError where it is not to be had, or the settings are not for it."""
    resources = dict(parse_assignment("--resource", text, "num_gpus=0.5") for text in params["resource"] or [])
    if None in resources.values():
        raise UsageError("--resource needs a value", "for example --resource num_gpus=0.5")
    per_gpu, where = params["jobs_per_gpu"], params["executor"]
    if where == "local":
        if resources:
            raise UsageError("--resource is for --executor ray or slurm; here it is --jobs and --jobs-per-gpu")
        device = next(iter(scheduler.entries.values())).member.config.device
        return LocalExecutor(params["jobs"], per_gpu, device)
    if where == "ray":
        return RayExecutor(params["jobs"], per_gpu, resources)
    return SlurmExecutor(params["jobs"], resources, scheduler.folder)


def _document(name: str, scheduler: Scheduler, skipped: Mapping[str, str], baseline: str | None) -> SweepDocument:
    """What it has found; `baseline`: words of the cells that all others are compared with."""
    entries = list(scheduler.entries.values())
    data = [entry.member.config.data for entry in entries if entry.member.role is Role.student]
    names = {one.name if one.classes is None and one.limit is None else None for one in data}  # None: a part of it
    dataset = names.pop() if len(names) == 1 else None
    return sweep_document(name, list(map(sweep_run, entries)), skipped, dataset, baseline)


def sweep_run(entry: ScheduledRun) -> SweepRun:
    """A run of a sweep as the document has it."""
    member, config = entry.member, entry.member.config
    results: dict[str, Any] = {} if entry.run is None else {"run": plain(entry.run.path)}
    if entry.run is not None and entry.run.finished:
        summary = entry.run.summary
        results |= {"top1": summary.last.top1, "loss": summary.last.loss, "best_top1": summary.best.top1}
        results["validation_top1"] = next((point.top1 for point in reversed(run_curve(entry.run))), None)
        results["seconds"] = summary.seconds
        if member.control is None and summary.teacher is not None:  # a control is shared with other teachers
            results["teacher_top1"] = summary.teacher.top1
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
