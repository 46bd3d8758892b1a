"""What a path or a name means: a teacher, weights, a run. No torch, unless a library's network is named."""

import importlib
import shlex
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sakd_cli import torchrun
from sakd_cli.config.datasets import FilesConfig
from sakd_cli.config.networks import find_network, find_trainable, of_library
from sakd_cli.config.preprocessing import Preprocessing
from sakd_cli.config.resolve import ConfigSource, config_sources, resolve
from sakd_cli.config.routers import RandomMatchedConfig
from sakd_cli.config.sweep import is_path
from sakd_cli.config.training import DistillConfig, EvalConfig
from sakd_cli.errors import DataError, SakdError, UsageError
from sakd_cli.files import card_settings, expanded, folder_of, resolved, sha256, weights_file
from sakd_cli.rundir import RunDir, newest_run
from sakd_cli.runs.own import trust_own
from sakd_cli.writing import wait_for_lock


def find_teacher(config: DistillConfig | EvalConfig) -> Path | None:
    """The weights file or folder to load; None where the architecture has no finished run for this data set, or where
    no teacher is named.

    Raises UsageError where `teacher.source` is neither a path nor the name of a network.
    """
    if config.teacher is None:
        return None
    if config.teacher.logits is not None:
        return weights_at(config.teacher.logits, "teacher.logits")
    weights, source = config.teacher.weights, config.teacher.source
    if weights == "library" and of_library(source):
        library = importlib.import_module("sakd_cli.runs.initial_weights")  # which loads torch
        return library.trained_by_library(find_network(source).name, config.data)
    if weights == "library" and not any(map(of_library, config.teacher.others)):
        hint = "timm/NAME, torchvision/NAME or hf-hub:OWNER/NAME"
        raise UsageError(f"teacher: {source} is no network of a library", hint)
    if isinstance(weights, Path):
        return weights_at(weights, "teacher.weights", hint="--teacher-weights FILE, or library")
    if not _means_path(config.teacher.source):
        name = find_trainable(config.teacher.source).name
        run = newest_run(config.runs_dir, {"task": "pretrain", "model": name} | config.data.identity())
        require_intact(run)
        return run.deliverable if run else None
    return weights_at(config.teacher.source, "teacher")


@contextmanager
def only_trainer(config: DistillConfig, say: Callable[[str], None]) -> Iterator[Path | None]:
    """Let one process at a time train the missing teacher of a `runs_dir`; the weights, where another has by now.

    Processes of one run go on together, without it. `say` is told of a wait. Raises DiskError.
    """
    if torchrun.requested_world_size() > 1:
        yield None
        return
    name = find_trainable(config.teacher.source).name
    path = config.runs_dir / f".{name}-{config.data.name}.lock".replace("/", "-")  # own code is named by its file
    text = f"another process trains {name} on {config.data.name} in {config.runs_dir}: waiting for it"
    lock = wait_for_lock(path, lambda: say(text), hint="--runs-dir DIR")
    try:
        yield find_teacher(config)
    finally:
        path.unlink(missing_ok=True)  # whoever waits for the lock has it then, and finds the teacher
        lock.release()


def library_or_path(target: Path | None, layers: Sequence[ConfigSource]) -> Path | None:
    """A path as it is; of the name of a library's network the folder with what the library has trained."""
    if target is None or target.exists() or not of_library(str(target)):
        return target
    name = find_network(str(target)).name
    return importlib.import_module("sakd_cli.runs.initial_weights").network_by_name(name, layers)


def weights_at(source: Path | str, key: str, hint: str | None = None) -> Path:
    """The weights file or folder that a path means: of a run directory its network. `key`: the setting, for errors."""
    path = expanded(source)
    require_intact(run_of(path))
    if (path / "config.yaml").is_file():
        return RunDir(path).require_deliverable()
    if path.exists():
        return path
    raise UsageError(f"{key}: {source}: no such file or directory", hint)


def with_weights_of_run(config: Any) -> Any:
    """Settings whose teacher's weights are the network itself where a run directory was named: as the run notes it."""
    if not isinstance(config, DistillConfig) or not isinstance(named := config.teacher.weights, Path):
        return config
    try:
        weights = weights_at(named, "teacher.weights")
    except SakdError:  # it is told where the inputs are located
        return config
    return config.model_copy(update={"teacher": config.teacher.model_copy(update={"weights": weights})})


def _means_path(source: str) -> bool:
    """Whether a teacher is meant as a path: the name of a network wins over a folder of that name."""
    if is_path(source):
        return True
    try:
        find_network(source)
    except UsageError:
        return expanded(source).exists()
    return False


def with_teachers_preprocessing(config: Any, origins: Collection[str]) -> Any:
    """The settings of a distillation, whose pictures are shown as its teacher's card says where nothing else is said.

    origins  dotted keys that are said. Who says a size says all of the geometry: size, resize and its mode.
    """
    if not isinstance(config, DistillConfig) or not isinstance(config.data, FilesConfig):
        return config
    try:
        if (weights := find_teacher(config)) is None:
            return config
        seen = Preprocessing.model_validate(card_settings(weights_file(weights))["preprocessing"])
    except (DataError, UsageError):  # it is told where the inputs are located
        return config
    except (OSError, ValueError, KeyError, TypeError):  # no network of ours, or its card says nothing of pictures
        return config
    geometry = {"size", "resize", "resize_mode"}
    said = {key for key in Preprocessing.model_fields if f"data.{key}" in origins}
    said |= geometry if said & geometry else set()
    own = config.data.seen.model_dump()
    taken = {key: value for key, value in seen.model_dump().items() if key not in said and value != own[key]}
    data = resolve("eval", [ConfigSource("-", {"data": config.data.model_dump() | taken})]).config.data
    return config.model_copy(update={"data": data})


def locate_inputs(config: Any) -> Any:
    """The config with every name that may mean something else tomorrow replaced by the path it means today.

    These are the teacher (left open where `teacher.pretrain` will train it) and the run whose rates a router repeats.
    Raises UsageError where there is none.
    """
    if not isinstance(config, DistillConfig):
        return config
    path, router = find_teacher(config), config.router
    if path is None and not config.teacher.pretrain:
        raise _missing(config, "add --pretrain, or train it first")
    if isinstance(router, RandomMatchedConfig) and router.run is None:
        router = router.model_copy(update={"run": str(find_adaptive_run(config).path.resolve())})
    if isinstance(router, RandomMatchedConfig) and router.run is not None:
        record = expanded(router.run) / "spots.jsonl"
        digest = sha256(record) if record.is_file() else None  # whoever reads it says what is wrong
        if router.run_sha256 not in (None, digest):
            raise UsageError(f"router.run: {record} is not the record that this run began with (its SHA-256 differs)")
        router = router.model_copy(update={"run_sha256": digest})
    places: dict[str, Any] = {"weights": path}
    if config.teacher.others:
        found = list[Path]()
        for one in config.teacher.each_other:
            alone = config.model_copy(update={"teacher": one})
            if (other := find_teacher(alone)) is None:
                raise _missing(alone, "of several, --pretrain trains the first alone")
            found.append(other.resolve())
        files = [weights_file(path) for path in found]
        sums = config.teacher.other_sha256 or tuple(sha256(file) if file.is_file() else "" for file in files)
        places |= {"other_weights": tuple(found), "other_sha256": sums}
    return config.model_copy(update={"teacher": config.teacher.model_copy(update=places), "router": router})


def _missing(config: DistillConfig, cure: str) -> UsageError:
    """That a teacher has no finished run."""
    name = find_network(config.teacher.source).name
    text = f"teacher: no finished {name} on {config.data.name} in {config.runs_dir}; {cure}"
    return UsageError(text, hint=pretrain_command(config, name))


def find_adaptive_run(config: DistillConfig) -> RunDir:
    """The newest finished adaptive run of the same networks, method and data set; one of the same seed, if there is."""
    wanted = {"task": "distill", "teacher.source": config.teacher.source, "student": config.student}
    wanted |= config.data.identity() | {"method.name": config.method.name, "router.name": "adaptive"}
    run = newest_run(config.runs_dir, wanted | {"seed": config.seed}) or newest_run(config.runs_dir, wanted)
    if run is None:
        raise UsageError(
            f"router random-matched: no finished adaptive run of {config.teacher.source} to {config.student} "
            f"with {config.method.name} on {config.data.name} in {config.runs_dir}",
            hint="distil with --router adaptive first, or name its run: --set router.run=DIR",
        )
    return run


def pretrain_command(config: DistillConfig, name: str) -> str:
    """The command line that trains a network as a teacher for this distillation."""
    words = ["sakd", "pretrain-teacher", name, "--dataset", config.data.name]
    if config.data.root is not None:
        words += ["--data-root", str(config.data.root)]
    fields = type(config.data).model_fields
    for key, value in config.data.identity().items():
        if key not in ("data.name", "data.root") and value != fields[key.removeprefix("data.")].default:
            words += ["--set", f"{key}={value}"]
    if config.runs_dir != type(config).model_fields["runs_dir"].default:
        words += ["--runs-dir", str(config.runs_dir)]
    return shlex.join(words)


def runs_dir_of(sources: Sequence[ConfigSource]) -> Path:
    """The folder of the runs, whatever else the sources say: other settings may need a run's to make sense."""
    saying = [one for one in sources if "runs_dir" in one.values]
    alone = [one._replace(values={"runs_dir": one.values["runs_dir"]}) for one in saying]
    return resolve("eval", alone).config.runs_dir


def run_or_newest(
    run: Path | None, runs_dir: str | Path | None, wanted: Mapping[str, Any], kind: str = "run"
) -> RunDir:
    """The run that was named, or the newest one whose config agrees. Raises UsageError where there is none."""
    if run is not None:
        return RunDir(run)
    folder = runs_dir_of(config_sources({"runs_dir": None if runs_dir is None else str(runs_dir)}))
    if (found := newest_run(folder, dict(wanted), finished=False)) is None:
        raise UsageError(f"no {kind} in {folder}", hint="sakd distill --preset quickstart, or name a run")
    return found


def target_or_newest(target: Path | None, runs_dir: Path) -> Path:
    """The path that was named, or the newest run with a network. Raises UsageError where there is none."""
    if target is None:
        if (found := newest_run(runs_dir, {}, finished=False, delivered=True)) is None:
            raise UsageError(f"no run with a trained network in {runs_dir}", hint="name a run or a weights file")
        return found.path
    if not target.exists():
        raise UsageError(f"{target}: no such file or directory", "sakd runs lists the runs")
    return target


def what_to_score(target: Path | None, runs_dir: Path) -> tuple[Path, RunDir | None]:
    """The weights, and the run they come from (None for a file of no run)."""
    target = target_or_newest(target, runs_dir)
    run = run_of(target)
    require_intact(run, "branches/")
    if run is None or run.path != target:
        return target, run
    return run.ensemble or run.require_deliverable(), run


def run_of(target: Path) -> RunDir | None:
    """The run that a path is, or lies in."""
    if (target / "config.yaml").is_file():
        return RunDir(target)
    folder = folder_of(resolved(target))
    above = [RunDir(parent) for parent in folder.parents[:2] if (parent / "config.yaml").is_file()]
    return above[0] if above else None


def require_intact(run: RunDir | None, *more: str) -> None:
    """Raise DamagedError where the network of a run that is to be used, or its card, is not as the run left it."""
    trust_own(run)
    if run is not None:
        run.require_files("student/", "teacher/", "ensemble/", *more)


def settings_of(run: RunDir | None) -> list[ConfigSource]:
    """The settings of the run's data, teacher and residual students, for its evaluation. DamagedError if changed."""
    if run:
        run.require_own_settings(but="teacher.sha256")
    config = run.config if run else {}
    known = {key: config[key] for key in ("data", "teacher", "residual") if config.get(key)}
    return [ConfigSource("the run's config", known)] if known else []


def is_ensemble(path: Path) -> bool:
    """Whether the weights are a student's with its residual students."""
    return (path / "ensemble.json").is_file() or path.name == "ensemble.json"


def check_teacher(found: Sequence[tuple[Path, RunDir | None]], *, forced: bool, teacher: object) -> None:
    """Raise UsageError where a teacher is named for an ensemble; `forced`: all are taken for one."""
    if isinstance(teacher, list | tuple) and len(teacher) > 1:
        raise UsageError("--teacher: a network is scored beside one teacher")
    if teacher not in (None, [], ()) and (forced or any(is_ensemble(weights) for weights, _ in found)):
        raise UsageError("--teacher: an ensemble is scored beside the teacher that it was trained with")
