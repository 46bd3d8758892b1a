"""Which run a training command is about: a new one, one to resume (`--resume`), one to replace. No torch."""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from sakd_cli.config.datasets import DataConfig, FilesConfig
from sakd_cli.config.identity import FREE, first_difference, identity
from sakd_cli.config.options import OPTIONS
from sakd_cli.config.resolve import ConfigSource, config_sources, flat, nested, resolve
from sakd_cli.config.training import RunConfig
from sakd_cli.errors import DataError, UsageError
from sakd_cli.files import expanded
from sakd_cli.rundir import ResumePlan, RunDir, all_runs

AUTO = "auto"
# Options of a series: its settings must be said.
SERIES = ("routers", "with_control", "seeds")
# Options that say nothing of what is trained.
PLACES = {"device", "runs_dir", "log"}
# What a sweep's config leaves open, or what may lie elsewhere.
OPEN = {"method.weights_sha256", "data.root", "data.download"}


def resolve_command(task: str, params: Mapping[str, Any]) -> tuple[Any, ResumePlan]:
    """The config that the options of a training command make, and what is to become of it on the disk."""
    given = config_sources(params)
    folder, overwrite = params["run_dir"], params["overwrite"]
    if params["resume"] is None:
        plan = ResumePlan(folder=folder, overwrite=overwrite)
        plan.check()
        config = resolve(task, given).config
        _check_folder(config.data)
        return config, plan
    if folder is not None or overwrite:
        raise UsageError("--resume continues an existing run; it goes with neither --run-dir nor --overwrite")
    if params["resume"] == AUTO:
        return _newest(task, given, params)
    run = RunDir(expanded(params["resume"]))
    here = _settings_of(run, task)
    if difference := _difference(here, resolve(task, [here, *given]).config):
        raise UsageError(
            f"{run.path}: --resume changes no setting of a run, but {difference}", hint="start a new run instead"
        )
    return _in_place(here, given, task), ResumePlan(resume=run)


def _check_folder(data: DataConfig) -> None:
    """What is wrong with `--data-root` at first sight, before a teacher is looked for or anything is downloaded."""
    root = data.root
    if root is not None and isinstance(data, FilesConfig) and not root.is_dir():
        raise DataError(f"{root}: {'not a folder' if root.exists() else 'no such folder'}", "name it with --data-root")
    if root is None or not data.name.startswith("cifar") or any(root.glob("cifar-*")):
        return
    endings = (".jpg", ".jpeg", ".png")
    if any(file.suffix.lower() in endings for depth in ("*/*", "train/*/*") for file in root.glob(depth)):
        raise DataError(
            f"{root}: holds pictures, not the files of {data.name}", f"--dataset imagefolder --data-root {root}"
        )


def find_matching_run(config: RunConfig) -> ResumePlan:
    """Go on with the newest run of exactly these settings, or make a new one."""
    for run in all_runs(config.runs_dir):
        with suppress(UsageError):
            if _difference(_settings_of(run, config.task), config) is None:
                return ResumePlan(resume=run, lenient=True)
    return ResumePlan()


def resume_config(config: RunConfig) -> tuple[Any, ResumePlan]:
    """The settings and the plan of the newest run of exactly these settings, else of a new run."""
    plan = find_matching_run(config)
    return (config if plan.resume is None else own_settings(plan.resume, config)), plan


def own_settings(run: RunDir, config: RunConfig) -> Any:
    """The settings with which a run began (its teacher above all, and no newer one), working where `config` says."""
    now = {key: value for key, value in flat(config.model_dump(mode="json")).items() if key in FREE}
    return resolve(config.task, [_settings_of(run, config.task), ConfigSource("these settings", nested(now))]).config


def _newest(task: str, given: list[ConfigSource], params: Mapping[str, Any]) -> tuple[Any, ResumePlan]:
    """`--resume auto`: with settings, the newest run of these settings or a new one; without any, the newest run."""
    settings = [*(name for name, row in OPTIONS.items() if row.key), "preset", "config", "set_", "settings", *SERIES]
    if not {name for name in settings if params.get(name)} <= PLACES:
        return resume_config(resolve(task, given).config)
    runs_dir = resolve("eval", [layer for layer in given if layer.values.keys() <= {"runs_dir"}]).config.runs_dir
    for run in all_runs(runs_dir):
        try:
            here = _settings_of(run, task)
        except UsageError:
            continue
        return _in_place(here, given, task), ResumePlan(resume=run, lenient=True)
    raise UsageError(f"--resume auto: no {task} run in {runs_dir}", hint="say what to train, or name a run")


def _settings_of(run: RunDir, task: str) -> ConfigSource:
    settings = run.config
    if settings.get("task") != task:
        raise UsageError(f"{run.path}: is a run of {settings.get('task')!r}, not of {task!r}")
    return ConfigSource(f"{run.path}", settings)


def _in_place(here: ConfigSource, given: list[ConfigSource], task: str) -> Any:
    """The run's own settings, but on the device and with the intervals that are asked for now."""
    free = [layer for layer in given if flat(layer.values).keys() <= FREE - {"runs_dir"}]
    return resolve(task, [here, *free]).config


def _difference(here: ConfigSource, config: RunConfig) -> str | None:
    """The first setting that is another one in the run; None where all are the same."""
    old = flat(resolve(here.values["task"], [here]).config.model_dump(mode="json"))
    new = flat(config.model_dump(mode="json"))
    key = first_difference(old, new)
    return None if key is None else f"{key} is {old.get(key)!r} there and {new.get(key)!r} here"


def config_identity(config: RunConfig) -> str:
    """What two runs share that compute the same."""
    known = flat(config.model_dump(mode="json"))
    if known.get("router.run") is not None:
        known["router.run"] = str(Path(known["router.run"]).resolve())
    return identity(known, without=OPEN - config.data.identity().keys())  # a folder of images is known by its place


class RunIndex:
    """The runs of a folder by what they compute; of several that compute the same, a finished one, else the newest.

    fresh   those that are there already do not count
    """

    def __init__(self, runs_dir: Path, *, fresh: bool = False) -> None:
        self.runs_dir = runs_dir
        self._seen: dict[Path, str | None] = {run.path: None for run in all_runs(runs_dir)} if fresh else {}

    def refresh(self) -> None:
        """Read what was not there at the last call."""
        for path in {run.path for run in all_runs(self.runs_dir)} - self._seen.keys():
            self._seen[path] = _identity_at(RunDir(path))

    def of(self, config: RunConfig) -> RunDir | None:
        """The run of these settings."""
        wanted = config_identity(config)
        same = [RunDir(path) for path, known in self._seen.items() if known == wanted and path.is_dir()]
        return max(same, key=lambda run: (run.finished, run.path.name), default=None)


def _identity_at(run: RunDir) -> str | None:
    try:
        settings = run.config
        config = resolve(str(settings.get("task")), [ConfigSource(str(run.path), settings)]).config
        return config_identity(config) if isinstance(config, RunConfig) else None
    except (UsageError, KeyError):
        return None
