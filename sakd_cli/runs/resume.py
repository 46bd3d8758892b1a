"""Which run a training command is about: a new one, one to go on with (`--resume`), one to replace. No torch."""

from collections.abc import Mapping
from typing import Any

from sakd_cli.config.options import OPTIONS
from sakd_cli.config.resolve import ConfigSource, config_sources, flat, nested, resolve
from sakd_cli.config.training import FREE, RunConfig
from sakd_cli.errors import UsageError
from sakd_cli.files import expanded
from sakd_cli.rundir import ResumePlan, RunDir, all_runs

AUTO = "auto"
# Config that a run fills in for itself when it begins (`build.pinned`).
PINNED = {"teacher.weights", "teacher.sha256", "router.run", "method.weights_sha256"}
# Options of a series: its settings must be said.
SERIES = ("routers", "with_control", "seeds")
# Options that say nothing of what is trained.
PLACES = {"device", "runs_dir", "log"}


def resolve_command(task: str, params: Mapping[str, Any]) -> tuple[Any, ResumePlan]:
    """The config that the options of a training command make, and what is to become of it on the disk."""
    given = config_sources(params)
    folder, overwrite = params["run_dir"], params["overwrite"]
    if params["resume"] is None:
        plan = ResumePlan(folder=folder, overwrite=overwrite)
        plan.check()
        return resolve(task, given).config, plan
    if folder is not None or overwrite:
        raise UsageError("--resume goes on with a run that is there; it goes with neither --run-dir nor --overwrite")
    if params["resume"] == AUTO:
        return _newest(task, given, params)
    run = RunDir(expanded(params["resume"]))
    here = _words_of(run, task)
    if told := _differing(here, resolve(task, [here, *given]).config):
        raise UsageError(f"{run.path}: --resume changes no word of a run, but {told}", hint="start a new run instead")
    return _in_place(here, given, task), ResumePlan(resume=run)


def find_matching_run(config: RunConfig) -> ResumePlan:
    """Go on with the newest run of exactly these settings, or make a new one."""
    wanted = ConfigSource("these settings", config.model_dump(mode="json"))
    for run in all_runs(config.runs_dir):
        try:
            same = _differing(_words_of(run, wanted.values["task"]), config) is None
        except UsageError:
            continue
        if same:
            return ResumePlan(resume=run, lenient=True)
    return ResumePlan()


def resume_config(config: RunConfig) -> tuple[Any, ResumePlan]:
    """The twin's own settings (its teacher above all, and no newer one) and the way to go on with it, or a new run."""
    plan, task = find_matching_run(config), config.task
    if plan.resume is None:
        return config, plan
    settings = flat(config.model_dump(mode="json"))
    now = ConfigSource("these settings", nested({key: settings[key] for key in sorted(FREE) if key in settings}))
    return resolve(task, [_words_of(plan.resume, task), now]).config, plan


def _newest(task: str, given: list[ConfigSource], params: Mapping[str, Any]) -> tuple[Any, ResumePlan]:
    """`--resume auto`: with settings, the newest run of these settings or a new one; without any, the newest run."""
    named = [name for name, row in OPTIONS.items() if row.key]
    spoken = [name for name in (*named, "preset", "config", "set_", "settings", *SERIES) if params.get(name)]
    if not set(spoken) <= PLACES:
        return resume_config(resolve(task, given).config)
    runs_dir = resolve("eval", [layer for layer in given if layer.values.keys() <= {"runs_dir"}]).config.runs_dir
    for run in all_runs(runs_dir):
        try:
            here = _words_of(run, task)
        except UsageError:
            continue
        return _in_place(here, given, task), ResumePlan(resume=run, lenient=True)
    raise UsageError(f"--resume auto: no {task} run in {runs_dir}", hint="say what to train, or name a run")


def _words_of(run: RunDir, task: str) -> ConfigSource:
    settings = run.config
    if settings.get("task") != task:
        raise UsageError(f"{run.path}: is a run of {settings.get('task')!r}, not of {task!r}")
    return ConfigSource(f"{run.path}", settings)


def _in_place(here: ConfigSource, given: list[ConfigSource], task: str) -> Any:
    """The run's own settings, but on the device and with the intervals that are asked for now."""
    free = [layer for layer in given if flat(layer.values).keys() <= FREE - {"runs_dir"}]
    return resolve(task, [here, *free]).config


def _differing(here: ConfigSource, config: RunConfig) -> str | None:
    """The first word that is another one in the run; None where all are the same."""
    old = flat(resolve(here.values["task"], [here]).config.model_dump(mode="json"))
    new = flat(config.model_dump(mode="json"))
    for key in [*new, *(key for key in old if key not in new)]:
        if key in FREE or (key in PINNED and new.get(key) is None):
            continue
        if old.get(key) != new.get(key):
            return f"{key} is {old.get(key)!r} there and {new.get(key)!r} here"
    return None
