"""Which trained network a path means: that of a run, a folder or a file, or of the newest run. No torch."""

from collections.abc import Sequence
from pathlib import Path

from sakd_cli.config.resolve import ConfigSource
from sakd_cli.errors import UsageError
from sakd_cli.rundir import RunDir, newest_run


def target_or_newest(target: Path | None, runs_dir: Path) -> Path:
    """The path that was named, or the newest run with a network. Raises UsageError where there is none."""
    if target is None:
        found = newest_run(runs_dir, {}, finished=False, delivered=True)
        if found is None:
            raise UsageError(f"no run with a trained network in {runs_dir}", hint="name a run or a weights file")
        return found.path
    if not target.exists():
        raise UsageError(f"{target}: no such file or directory")
    return target


def what_to_score(target: Path | None, runs_dir: Path) -> tuple[Path, RunDir | None]:
    """The weights, and the run they come from (None for a file of no run)."""
    target = target_or_newest(target, runs_dir)
    run = run_of(target)
    if run is None or run.path != target:
        return target, run
    delivered = run.ensemble or run.deliverable
    if delivered is None:
        raise UsageError(f"{target}: this run has not saved a network yet")
    return delivered, run


def run_of(target: Path) -> RunDir | None:
    """The run that a path is, or lies in."""
    if (target / "config.yaml").is_file():
        return RunDir(target)
    folder = target.resolve() if target.is_dir() else target.resolve().parent
    above = [RunDir(parent) for parent in folder.parents[:2] if (parent / "config.yaml").is_file()]
    return above[0] if above else None


def words_of(run: RunDir | None) -> list[ConfigSource]:
    """On what the run was trained, by whom, and who leaves its ensemble early."""
    words = run.config if run else {}
    told = {key: words[key] for key in ("data", "teacher", "residual") if words.get(key)}
    return [ConfigSource("the run's config", told)] if told else []


def is_ensemble(path: Path) -> bool:
    """Whether the weights are a student's with its residual students."""
    return (path / "ensemble.json").is_file() or path.name == "ensemble.json"


def check_teacher(found: Sequence[tuple[Path, RunDir | None]], *, forced: bool, teacher: object) -> None:
    """Raise UsageError where a teacher is named for an ensemble; `forced`: all are taken for one."""
    if teacher is not None and (forced or any(is_ensemble(weights) for weights, _ in found)):
        raise UsageError("--teacher: an ensemble is scored beside the teacher that it was trained with")
