"""Which run a training command is about: a new one, one to resume (`--resume`), one to replace. No torch."""

import os
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from sakd_cli.config.code import trust
from sakd_cli.config.datasets import CIFAR10Config, CIFAR100Config, DataConfig, FilesConfig
from sakd_cli.config.identity import EXTENDED, FREE, HELD, MOVED, Difference, differences, idle, listed
from sakd_cli.config.options import OPTIONS
from sakd_cli.config.resolve import ConfigSource, config_sources, flat, nested, resolve
from sakd_cli.config.train import Train
from sakd_cli.config.training import DistillConfig, RunConfig
from sakd_cli.documents.training import Summary
from sakd_cli.errors import CheckpointError, DataError, DiskError, UsageError
from sakd_cli.files import expanded, nearest_folder, sha256
from sakd_cli.rundir import IMAGES, RunDir, all_runs, look_up, runs_like
from sakd_cli.runs.locate import runs_dir_of, with_teachers_preprocessing, with_weights_of_run
from sakd_cli.runs.own import trust_own
from sakd_cli.writing import make_folder

AUTO = "auto"
NEW_RUN = "a new run that starts with its weights: --set student_weights=RUN, or init_from of a network alone"
# Options of a series: its settings must be said.
SERIES = ("routers", "with_control", "seeds")
# Settings that stand in every config as they are.
NAMES = ("task", "seed", "student", "model", "method.name", "router.name", "data.name", "train.epochs")
NETWORK_KEYS = ("model", "student", "teacher.source", "teacher.others")
# Options that say nothing of what is trained.
PLACES = {"device", "runs_dir", "log"}
BEGINNING = {".lock", ".holder", "..holder.tmp"}  # what may be there before config.yaml
BEGINNING |= {"env.json", ".env.json.tmp", "images.json", ".images.json.tmp", ".config.yaml.tmp"}


class ResumePlan(NamedTuple):
    """What a command means to do: make a new run, resume one, or replace one. Nothing is replaced unasked.

    resume     resume this run
    lenient    where its last checkpoint is damaged, an older one will do
    folder     make the new run exactly here; None: `<date>-<time>-<label>` in the folder of runs
    overwrite  a run that is there goes first
    extends    the run that is resumed is to go on beyond what its end was
    """

    resume: RunDir | None = None
    lenient: bool = False
    folder: Path | None = None
    overwrite: bool = False
    extends: bool = False

    @property
    def finished(self) -> bool:
        """Whether there is nothing left to do."""
        return self.resume is not None and self.resume.finished and not self.extends

    @property
    def summary(self) -> Summary:
        """Of the finished run."""
        assert self.resume is not None
        return self.resume.summary

    def check(self) -> None:
        """Raise UsageError where a new run would stand on something."""
        if self.folder is None and self.overwrite:
            raise UsageError("--overwrite needs --run-dir DIR, the run to replace")
        if self.folder is None:
            return
        RunDir(self.folder)
        above = nearest_folder(self.folder.absolute().parent)
        if not os.access(above, os.W_OK):
            raise DiskError(f"{self.folder}: cannot be made: {above} is not to be written", hint="another --run-dir")
        if not self.folder.exists():
            return
        there = {path.name for path in self.folder.iterdir()} if self.folder.is_dir() else {str(self.folder)}
        if not there - BEGINNING:  # empty, or a run that was killed before it began
            return
        if "config.yaml" not in there:
            raise UsageError(f"{self.folder}: exists and is no run directory; nothing was changed")
        if not self.overwrite:
            if (run := RunDir(self.folder)).in_use:  # as of a second `--resume auto` of the same moment
                with run.locked():  # which says who is in
                    pass
            hint = f"--resume {self.folder} resumes it, --overwrite replaces it"
            raise UsageError(f"{self.folder}: there is a run already", hint)

    def open(self, runs_dir: Path, label: str) -> RunDir:
        """The run directory to work in, to be locked."""
        self.check()
        if self.resume is not None:
            return self.resume
        if self.folder is None:
            return RunDir.create(runs_dir, label)
        make_folder(self.folder)
        return RunDir(self.folder)


def resolve_command(task: str, params: Mapping[str, Any]) -> tuple[Any, ResumePlan]:
    """The config that the options of a training command make, and what is to become of it on the disk.

    What it names as networks may be built: a user's own function is named by the user, here or when the run began.
    """
    config, plan = _planned(task, params)
    named = [value for key, value in flat(config.model_dump(mode="json")).items() if key in NETWORK_KEYS]
    trust(*(name for value in named for name in (value if isinstance(value, list) else [value])))
    return config, plan


def _planned(task: str, params: Mapping[str, Any]) -> tuple[Any, ResumePlan]:
    given = config_sources(params)
    folder, overwrite = params["run_dir"], params["overwrite"]
    if params["resume"] is None:
        plan = ResumePlan(folder=folder, overwrite=overwrite)
        plan.check()
        config = _resolved(task, given)
        _check_folder(config.data)
        return config, plan
    if folder is not None and params["resume"] == AUTO and not overwrite:
        return _at(folder, task, given)
    if folder is not None or overwrite:
        raise UsageError("--resume RUN continues an existing run; it goes with neither --run-dir nor --overwrite")
    if params["resume"] == AUTO:
        return _newest(task, given, params)
    run = RunDir(expanded(params["resume"]))
    config, extends = _continued(run, given, task)
    _require_last(run, config, extends=extends)
    return config, ResumePlan(resume=run, extends=extends)


def _resolved(task: str, given: list[ConfigSource]) -> Any:
    """The config of a new run."""
    return with_weights_of_run(with_teachers_preprocessing(*resolve(task, given)))


def _at(folder: Path, task: str, given: list[ConfigSource]) -> tuple[Any, ResumePlan]:
    """`--run-dir DIR --resume auto`: the run in this folder, which must be of these settings, or a new one there."""
    config, run = _resolved(task, given), RunDir(folder)
    if not (folder / "config.yaml").is_file():
        plan = ResumePlan(folder=folder)
        plan.check()
        return config, plan
    if found := _differences(_settings_of(run, task), config):
        raise UsageError(f"{folder}: the run there has other settings: {listed(found)}", "another --run-dir")
    return own_settings(run, config), ResumePlan(resume=run, lenient=True)


def _continued(run: RunDir, given: list[ConfigSource], task: str) -> tuple[Any, bool]:
    """The run's own settings with what may change between two parts of it, and whether there will be more epochs.

    That is how and where it works (`FREE`), where its teacher and its images lie (`MOVED`), and its length, where
    `--epochs` says so: the milestones stay, unless they are said as well. Raises UsageError, naming each, for any
    other difference.
    """
    here = _settings_of(run, task)
    own, asked = resolve(task, [here]).config, resolve(task, [here, *given])
    here_and_now = asked.origins.get("train.epochs", "").startswith(("--", "settings "))  # no file, no environment
    extends = here_and_now and asked.config.train.epochs > own.train.epochs
    changing = MOVED | (EXTENDED if extends else set())
    if found := [one for one in _differences(here, asked.config) if one.key not in changing]:
        fewer = any(one.key == "train.epochs" for one in found)
        raise UsageError(
            f"{run.path}: --resume changes no setting of a run, but {listed(found)}",
            hint="a run can be extended, not shortened: --epochs N" if fewer else "start a new run instead",
        )
    config = _in_place(here, given, task)
    schedules = {f"schedule {getattr(one, 'schedule', None)}" for one in (own.train, getattr(own, "router", None))}
    if isinstance(own, DistillConfig):
        schedules |= {f"weight_schedule {one.weight_schedule}" for one in (own.method, *own.method.parts)}
    if extends and (fixed := sorted(one for one in schedules if one.endswith(("cosine", "one-cycle", "linear")))):
        raise UsageError(f"{run.path}: {fixed[0]} has fallen to its end in {own.train.epochs} epochs", NEW_RUN)
    if extends:
        length: dict[str, Any] = {"epochs": asked.config.train.epochs}
        if own.train.schedule == "step":
            length["milestones"] = asked.config.train.milestones or own.train.decay_epochs()
        config = config.model_copy(update={"train": config.train.model_copy(update=length)})
    config = config.model_copy(update={"data": config.data.model_copy(update={"root": asked.config.data.root})})
    if (teacher := getattr(asked.config, "teacher", None)) is not None:
        moved = {key: getattr(teacher, key) for key in ("source", "weights", "others", "other_weights")}
        config = config.model_copy(update={"teacher": config.teacher.model_copy(update=moved)})
    return config, extends


def _require_last(run: RunDir, config: RunConfig, *, extends: bool) -> None:
    """`require_fingerprint` of the last checkpoint, as far as it can be read, before anything else is done."""
    try:
        state = run.read_json("checkpoints/last/state.json")
    except UsageError:  # the checkpoints are read and checked when the run begins
        return
    folder, before = run.path / "checkpoints" / "last", run.extended
    patience, epoch, best = config.train.patience, state.get("epoch"), state.get("best")
    last = best.get("epoch") if isinstance(best, dict) else 0
    waited = epoch - last if isinstance(epoch, int) and isinstance(last, int) else 0
    if extends and patience is not None and waited >= patience:
        raise UsageError(
            f"{run.path}: has ended by train.patience={patience}: no better {config.train.metric}", NEW_RUN
        )
    if extends:
        before = [*before, look_up(run.config, "train.epochs")]
    require_fingerprint(folder, state.get("fingerprint"), epoch, fingerprint(config, run.path / IMAGES), before)


def require_fingerprint(where: Path, saved: Any, epoch: Any, now: Mapping[str, Any], extended: Collection[int]) -> None:
    """Raise CheckpointError, naming each key with both values, where a checkpoint was made with other settings.

    saved     the fingerprint in the checkpoint `where`, after `epoch` epochs; now: that of the run
    extended  the numbers of epochs after which the run was to end before (`RunDir.extended`)
    """
    try:
        old, new = saved["settings"], now["settings"]
        found = differences(old, new)
    except (KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{where}: does not say with which settings it was made") from None
    if saved.get("images") not in (None, now.get("images", saved.get("images"))):
        raise CheckpointError(
            f"{where}: made with other images than images.json lists", "put images.json back as it was"
        )
    if old.get("train.epochs") in extended and old["train.epochs"] < new["train.epochs"]:
        past = [_decays(settings, epoch) for settings in (old, new)]
        found = [one for one in found if one.key not in EXTENDED]
        if past[0] != past[1]:  # the learning rates of epochs that are trained
            found.append(Difference(f"train.milestones up to epoch {epoch}", *past))
    if found := [one for one in found if one.key not in HELD]:
        raise CheckpointError(
            f"{where}: made with other settings: {listed(found)}",
            hint="put config.yaml back as it was, or start a new run; --epochs N extends a run",
        )


def _decays(settings: Mapping[str, Any], epoch: int) -> list[int]:
    """The milestones of these settings up to an epoch."""
    keys = [key for key in ("epochs", "schedule", "milestones") if f"train.{key}" in settings]
    train = {key: settings[f"train.{key}"] for key in keys}
    return [milestone for milestone in Train.model_validate(train).decay_epochs() if milestone <= epoch]


def fingerprint(config: RunConfig, images: Path | None = None) -> dict[str, Any]:
    """What a checkpoint says of the run that made it, so that nothing else goes on with it: `RunDir.fingerprint`.

    images  the run's list of its images
    """
    known = {} if images is None else {"images": sha256(images) if images.is_file() else None}
    return {"settings": flat(config.model_dump(mode="json"))} | known


def _check_folder(data: DataConfig) -> None:
    """What is wrong with `--data-root` at first sight, before a teacher is looked for or anything is downloaded."""
    root = data.root
    if root is not None and isinstance(data, FilesConfig) and not root.is_dir():
        raise DataError(f"{root}: {'not a folder' if root.exists() else 'no such folder'}", "name an unpacked folder")
    if root is None or not isinstance(data, CIFAR10Config | CIFAR100Config) or any(root.glob("cifar-*")):
        return
    endings = (".jpg", ".jpeg", ".png")
    if any(file.suffix.lower() in endings for depth in ("*/*", "train/*/*") for file in root.glob(depth)):
        raise DataError(
            f"{root}: holds pictures, not the files of {data.name}", f"--dataset imagefolder --data-root {root}"
        )


def find_matching_run(config: RunConfig) -> ResumePlan:
    """Go on with the newest run of exactly these settings, or make a new one."""
    for run in runs_like(config.runs_dir, plain_names(config)):
        with suppress(UsageError):
            if not _differences(_settings_of(run, config.task), config):
                return ResumePlan(resume=run, lenient=True)
    return ResumePlan()


def plain_names(config: RunConfig) -> dict[str, Any]:
    """Settings by which most runs are told from this one without reading them as a config."""
    known = flat(config.model_dump(mode="json"))
    return {key: known[key] for key in NAMES if key in known and key not in idle(known)}


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
        return resume_config(_resolved(task, given))
    runs_dir = runs_dir_of(given)
    for run in all_runs(runs_dir):
        try:
            here = _settings_of(run, task)
        except UsageError:
            continue
        return _in_place(here, given, task), ResumePlan(resume=run, lenient=True)
    raise UsageError(f"--resume auto: no {task} run in {runs_dir}", hint="say what to train, or name a run")


def _settings_of(run: RunDir, task: str) -> ConfigSource:
    settings = run.config
    trust_own(run)
    if settings.get("task") != task:
        raise UsageError(f"{run.path}: is a run of {settings.get('task')!r}, not of {task!r}")
    return ConfigSource(f"{run.path}", settings)


def _in_place(here: ConfigSource, given: list[ConfigSource], task: str) -> Any:
    """The run's own settings, but on the device and with the intervals that are asked for now."""
    free = [layer for layer in given if flat(layer.values).keys() <= FREE - {"runs_dir"}]
    return resolve(task, [here, *free]).config


def _differences(here: ConfigSource, config: RunConfig) -> list[Difference]:
    """The settings that are others in the run."""
    old = flat(resolve(here.values["task"], [here]).config.model_dump(mode="json"))
    return differences(old, flat(config.model_dump(mode="json")))
