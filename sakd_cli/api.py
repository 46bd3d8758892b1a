"""The four things that the command line does, as calls, and the contracts for people who bring a method or a loop.

    pretrain_teacher, distill, evaluate, inspect_spots      the commands of the same names, with the same words
    Distiller, Router, StagedModel                          what to distil, where to, and what a network is
    MethodConfig, Spot, Features, StageInfo, Batch          what these are made of and given (a method in words first)
    Reporter                                                 who may listen to a training

Nothing is printed, and every mistake is a `SakdError` (`sakd_cli.errors`). The words of a call win over the environment
(`SAKD_*`), which wins over `config`, then `preset`, then the default, as on the command line; `settings` reaches every
word of `sakd config show` by its dotted name, and wins over all. Torch is loaded by the first call that needs it.
"""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sakd_cli.config.methods import MethodConfig
from sakd_cli.config.resolve import config_sources, resolve
from sakd_cli.documents.evaluation import EnsembleEvaluation, Evaluation
from sakd_cli.documents.spots import SpotsDocument
from sakd_cli.documents.training import Summary
from sakd_cli.errors import UsageError
from sakd_cli.report.spots import measure
from sakd_cli.report.spots.log import spot_report
from sakd_cli.report.spots.survey import Survey, survey_of
from sakd_cli.rundir import RunDir, newest_run
from sakd_cli.runs.locate import check_teacher, locate_inputs, what_to_score
from sakd_cli.runs.resume import resolve_command

if TYPE_CHECKING:
    from sakd_cli.batch import Batch
    from sakd_cli.distillers.distiller import Distiller
    from sakd_cli.engine.reporter import Reporter
    from sakd_cli.models.spot import Spot
    from sakd_cli.models.staged import Features, StagedModel, StageInfo
    from sakd_cli.routing.router import Router

__all__ = [
    "Batch",
    "Distiller",
    "EnsembleEvaluation",
    "Evaluation",
    "Features",
    "MethodConfig",
    "Reporter",
    "Router",
    "RunResult",
    "Spot",
    "SpotsDocument",
    "StageInfo",
    "StagedModel",
    "distill",
    "evaluate",
    "inspect_spots",
    "pretrain_teacher",
]
_HEAVY = {
    "Batch": "sakd_cli.batch",
    "Features": "sakd_cli.models.staged",
    "Spot": "sakd_cli.models.spot",
    "StageInfo": "sakd_cli.models.staged",
    "Distiller": "sakd_cli.distillers.distiller",
    "Router": "sakd_cli.routing.router",
    "StagedModel": "sakd_cli.models.staged",
    "Reporter": "sakd_cli.engine.reporter",
}
Split = Literal["train", "validation", "test"]
# Config about images or the machine, which only mean something when the networks are run.
OF_LIVE = ("live", "data_root", "device", "config", "set_", "settings")


def __getattr__(name: str) -> Any:
    """The contracts, which load torch."""
    if name not in _HEAVY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HEAVY[name]), name)


@dataclass(frozen=True)
class RunResult:
    """A finished run: its directory, and its summary."""

    path: Path
    summary: Summary

    @property
    def top1(self) -> float:
        """Percent of the test images, after the last epoch."""
        return self.summary.last.top1

    @property
    def network(self) -> Path:
        """Folder of the delivered network, which a `teacher` may name."""
        folder = RunDir(self.path).deliverable
        if folder is None:
            raise UsageError(f"{self.path}: this run has not saved a network yet")
        return folder


def pretrain_teacher(
    model: str | None = None,
    *,
    dataset: str | None = None,
    data_root: str | Path | None = None,
    epochs: int | None = None,
    batch_size: int | None = None,
    seed: int | None = None,
    device: str | None = None,
    preset: str | None = None,
    config: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
    runs_dir: str | Path | None = None,
    run_dir: str | Path | None = None,
    resume: str | Path | None = None,
    overwrite: bool = False,
    reporter: "Reporter | None" = None,
) -> RunResult:
    """Train one network with cross-entropy: a teacher, or a student alone; `sakd pretrain-teacher`.

    resume   a run directory, or `"auto"`: the newest run of these words is gone on with, or left alone where finished
    reporter  is told of every step that is logged, and may stop the run; None: nobody
    """
    words, intent = resolve_command("pretrain", {"set_": (), **_given(locals(), "model")})
    if intent.finished:
        return _result(intent.summary)
    from sakd_cli.engine.reporter import NullReporter
    from sakd_cli.runs.launch import Launcher

    return _result(Launcher(reporter or NullReporter()).train(words, intent))


def distill(
    *,
    teacher: str | Path | None = None,
    student: str | None = None,
    method: str | None = None,
    router: str | None = None,
    pretrain: bool | None = None,
    dataset: str | None = None,
    data_root: str | Path | None = None,
    epochs: int | None = None,
    batch_size: int | None = None,
    seed: int | None = None,
    device: str | None = None,
    preset: str | None = None,
    config: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
    runs_dir: str | Path | None = None,
    run_dir: str | Path | None = None,
    resume: str | Path | None = None,
    overwrite: bool = False,
    reporter: "Reporter | None" = None,
) -> RunResult:
    """Train a student from a teacher, deciding per sample and step where it learns; `sakd distill`.

    teacher   an architecture (its newest finished run), a run directory, or a weights file or folder
    pretrain  train the teacher first where no finished run of it is there
    resume, reporter   as for `pretrain_teacher`
    """
    own = ("teacher", "student", "method", "router", "pretrain")
    words, intent = resolve_command("distill", {"set_": (), **_given(locals(), *own)})
    if intent.finished:
        return _result(intent.summary)
    from sakd_cli.engine.reporter import NullReporter
    from sakd_cli.runs.launch import Launcher

    return _result(Launcher(reporter or NullReporter(), resume is not None).train(locate_inputs(words), intent))


def evaluate(
    target: str | Path | None = None,
    *,
    teacher: str | Path | None = None,
    early: bool = True,
    dataset: str | None = None,
    data_root: str | Path | None = None,
    device: str | None = None,
    settings: Mapping[str, Any] | None = None,
    runs_dir: str | Path | None = None,
    reporter: "Reporter | None" = None,
) -> Evaluation | EnsembleEvaluation:
    """Judge a trained network on the test images, as `sakd eval --json` says it.

    target  a run, a folder of a network or its file; None: the newest run
    early   whether images leave an ensemble of residual students early
    """
    given = config_sources(_texts(locals(), "teacher", "dataset", "data_root", "device", "settings", "runs_dir"))
    found = [what_to_score(None if target is None else Path(target), resolve("eval", given).config.runs_dir)]
    check_teacher(found, forced=False, teacher=teacher)
    from sakd_cli.engine.reporter import NullReporter
    from sakd_cli.runs.evaluate_ensemble import evaluate_all

    compelled = teacher is not None
    (document,) = evaluate_all(found, given, reporter or NullReporter(), teacher_required=compelled, early=early)
    return document


def inspect_spots(
    run: str | Path | None = None,
    *,
    live: bool = False,
    split: Split = "train",
    sample: bool = False,
    seed: int = 0,
    extremes: int = measure.KEPT,
    dataset: str | None = None,
    data_root: str | Path | None = None,
    device: str | None = None,
    settings: Mapping[str, Any] | None = None,
    runs_dir: str | Path | None = None,
    reporter: "Reporter | None" = None,
) -> SpotsDocument:
    """Where knowledge flowed in a distillation, as `sakd inspect-spots --json` says it; needs no torch.

    But `live`, another split than `train` and every word about images or device run the networks again.

    run     None: the newest distillation
    sample  draw once, from `seed`, instead of using probabilities; extremes: images at each end of each spot
    """
    words = _texts(locals(), "dataset", "data_root", "device", "settings", "runs_dir") | {"live": live}
    where = run_to_look_at(None if run is None else Path(run), words)
    survey = looked_at(where, words, split, reporter, seed=seed, kept=extremes)
    document = measure.spot_document(where, survey, sample=sample, seed=seed, extremes=extremes)
    return SpotsDocument.model_validate(document)


def run_to_look_at(named: Path | None, words: Mapping[str, Any]) -> RunDir:
    """The run that is named, or the newest distillation on the data set that the words name."""
    if named:
        return RunDir(named)
    places = {name: words[name] for name in ("dataset", "runs_dir")}
    runs = resolve("eval", config_sources(places)).config.runs_dir
    wanted = {"task": "distill"} | ({"data.name": words["dataset"]} if words["dataset"] else {})
    if (found := newest_run(runs, wanted, finished=False)) is None:
        raise UsageError(f"no distillation in {runs}", hint="sakd distill --preset quickstart, or name a run")
    return found


def looked_at(
    run: RunDir, words: Mapping[str, Any], split: Split, reporter: "Reporter | None", *, seed: int, kept: int
) -> Survey | None:
    """What the run kept by image, or what its networks say now where the words ask for that."""
    data = run.config.get("data")
    own = data.get("name") if isinstance(data, dict) else None
    another = words["dataset"] not in (None, own)
    if not (another or split != "train" or any(words.get(name) for name in OF_LIVE)):
        return survey_of(run, None)
    spot_report(run)  # whatever is wrong with the record of the run is said before
    from sakd_cli.engine.reporter import NullReporter
    from sakd_cli.runs.survey import live

    return survey_of(run, live(run, config_sources(words), split, reporter or NullReporter(), seed=seed, kept=kept))


_TRAINING = (
    "dataset",
    "data_root",
    "epochs",
    "batch_size",
    "seed",
    "device",
    "preset",
    "config",
    "settings",
    "runs_dir",
)


def _given(names: Mapping[str, Any], *own: str) -> dict[str, Any]:
    """The arguments of a training call as the options of its command."""
    return _texts(names, *own, *_TRAINING, "run_dir", "resume", "overwrite")


def _texts(names: Mapping[str, Any], *wanted: str) -> dict[str, Any]:
    """Some arguments, with paths as the command line has them."""
    words = {name: str(word) if isinstance(word := names[name], Path) else word for name in wanted}
    return words | {name: Path(words[name]) for name in ("config", "run_dir") if words.get(name) is not None}


def _result(summary: Summary) -> RunResult:
    return RunResult(Path(str(summary.run)), summary)
