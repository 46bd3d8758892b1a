"""Whom `--teacher` means: a weights file, a run directory, or the newest finished run of an architecture."""

import shlex
from pathlib import Path

from sakd_cli.config.networks import brought, find_network, find_trainable
from sakd_cli.config.run import DistillConfig, EvalConfig
from sakd_cli.data.table import describe
from sakd_cli.errors import UsageError
from sakd_cli.models import artifact, foreign
from sakd_cli.models.artifact import Artifact, NetworkCard
from sakd_cli.reading import expanded
from sakd_cli.rundir import RunDir, newest_run, sha256


def find_teacher(config: DistillConfig | EvalConfig) -> Path | None:
    """The weights file or folder to load; None where the architecture has no finished run for this data set, or where
    no teacher is named.

    Raises UsageError where `teacher.source` is neither a path nor the name of a network.
    """
    if config.teacher is None:
        return None
    if config.teacher.weights is not None:
        return config.teacher.weights
    path = expanded(config.teacher.source)
    if not _is_path(config.teacher.source):
        name = find_trainable(config.teacher.source).name
        run = newest_run(config.runs_dir, {"task": "pretrain", "model": name} | config.data.identity())
        return run.deliverable if run else None
    return weights_at(path, "teacher")


def load_teacher(config: DistillConfig | EvalConfig, path: Path) -> Artifact:
    """The teacher in a file or folder; also one of torchvision or timm, named by `teacher.source`, in a file of theirs.

    Raises UsageError where it is none.
    """
    assert config.teacher is not None
    if brought(config.teacher.source) is None or not path.is_file() or artifact.is_ours(path):
        return artifact.load(path)
    known, name = describe(config.data), config.teacher.source
    side = known.train.side
    model = foreign.load_foreign(path, name, len(known.classes), side)
    return Artifact(model, NetworkCard(name, known.name, known.classes, known.mean, known.std, side), sha256(path))


def weights_at(path: Path, word: str) -> Path:
    """The weights file or folder that a path means: of a run directory its network. `word` of a config that says it."""
    if (path / "config.yaml").is_file():
        folder = RunDir(path).deliverable
        if folder is None:
            raise UsageError(f"{path}: this run has not saved a network yet")
        return folder
    if path.exists():
        return path
    raise UsageError(f"{word}: {path}: no such file or directory")


def _is_path(source: str) -> bool:
    """Whether a teacher is meant as a path: the name of a network wins over a folder of that name."""
    if brought(source) is not None:
        return False
    if "/" in source or source.endswith(".safetensors"):
        return True
    try:
        find_network(source)
    except UsageError:
        return expanded(source).exists()
    return False


def pretrain_command(config: DistillConfig) -> str:
    """The command line that trains the missing teacher."""
    words = ["sakd", "pretrain-teacher", find_network(config.teacher.source).name, "--dataset", config.data.name]
    default = type(config).model_fields["runs_dir"].default
    if config.data.root is not None:
        words += ["--data-root", str(config.data.root)]
    kind = type(config.data).model_fields
    for key, value in config.data.identity().items():
        word = key.removeprefix("data.")
        if word not in ("name", "root") and value != kind[word].default:
            words += ["--set", f"{key}={value}"]
    if config.runs_dir != default:
        words += ["--runs-dir", str(config.runs_dir)]
    return shlex.join(words)


def no_teacher(config: DistillConfig) -> UsageError:
    """What to say, and what to do, where there is no teacher."""
    name = find_network(config.teacher.source).name
    return UsageError(
        f"teacher: no finished {name} on {config.data.name} in {config.runs_dir}; add --pretrain, or train it first",
        hint=pretrain_command(config),
    )
