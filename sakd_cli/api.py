"""The four things that the command line does, as calls, and the contracts for people who bring a method or a loop.

    pretrain_teacher, distill, evaluate, inspect_spots      the commands of the same names, with the same options
    Distiller, Router, StagedModel                          what to distil, where to, and what a network is
    MethodConfig, Spot, Features, StageInfo, Batch          what these are made of and given
    Reporter                                                follows a training

Nothing is printed, and every mistake is a `SakdError` (`sakd_cli.errors`). The arguments of a call win over the
environment (`SAKD_*`), which wins over `config`, then `preset`, then the default, as on the command line; `settings`
sets any key of `sakd config show` by its dotted name, and wins over all. Torch is loaded by the first call that needs
it.
"""

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict, Unpack

from sakd_cli.config import code
from sakd_cli.config.base import own_name
from sakd_cli.config.datasets import DATASETS, DataConfig
from sakd_cli.config.method import MethodConfig
from sakd_cli.config.options import options_of
from sakd_cli.config.resolve import config_sources, resolve
from sakd_cli.config.routers import LearnedConfig, RouterConfig
from sakd_cli.config.training import PROCEDURES
from sakd_cli.documents.evaluation import EnsembleEvaluation, Evaluation
from sakd_cli.documents.spots import EXTREMES, Split, SpotsDocument
from sakd_cli.documents.training import Summary
from sakd_cli.errors import UsageError
from sakd_cli.report.spots.log import spots_document
from sakd_cli.report.spots.survey import Survey, read_survey
from sakd_cli.rundir import RunDir, look_up, newest_run
from sakd_cli.runs.locate import check_teacher, library_or_path, locate_inputs, runs_dir_of, what_to_score
from sakd_cli.runs.own import trust_own
from sakd_cli.runs.resume import resolve_command

if TYPE_CHECKING:
    from sakd_cli.batch import Batch
    from sakd_cli.data.dataset import Dataset
    from sakd_cli.distillers.distiller import Distiller, SpotwiseDistiller
    from sakd_cli.engine.reporter import Reporter
    from sakd_cli.models.spot import Spot
    from sakd_cli.models.staged import Features, StagedModel, StageInfo
    from sakd_cli.routing.router import Decision, Router, Seen

# fmt: off
__all__ = [
    "Batch", "DataConfig", "Dataset", "Decision", "DistillOptions", "Distiller", "EnsembleEvaluation", "Evaluation",
    "Features", "LearnedConfig", "MethodConfig", "PretrainOptions", "Reporter", "Router", "RouterConfig", "RunResult",
    "Seen", "Spot", "SpotsDocument", "SpotwiseDistiller", "StageInfo", "StagedModel", "distill", "evaluate",
    "inspect_spots", "pretrain_teacher",
]
Place = str | Path
# Options about images or the machine, which only mean something when the networks are run.
OF_LIVE = ("live", "data_root", "device", "config", "set_", "settings")
_HEAVY = {
    "Batch": "batch", "SpotwiseDistiller": "distillers.distiller",
    "Distiller": "distillers.distiller", "Reporter": "engine.reporter", "Spot": "models.spot",
    **dict.fromkeys(("Features", "StageInfo", "StagedModel"), "models.staged"),
    **dict.fromkeys(("Decision", "Router", "Seen"), "routing.router"), "Dataset": "data.dataset",
}
Inputs = TypedDict("Inputs", {  # noqa: UP013
    "dataset": str, "data_root": Place, "device": str, "runs_dir": Place, "settings": Mapping[str, Any],
    "reporter": "Reporter", "trust": Sequence[str],
}, total=False)
_Training = TypedDict("_Training", {  # noqa: UP013
    "epochs": int, "batch_size": int, "lr": float, "milestones": Sequence[int], "validation": float, "seed": int,
    "manifest": Place, "head": Literal["keep", "replace"], "precision": Literal["auto", "fp32", "bf16"],
    "compile": bool, "deterministic": bool, "sync_batchnorm": bool, "log": Literal["tensorboard"], "preset": str,
    "protocol": Literal["honest", "published"],
    "config": Place, "run_dir": Place, "resume": Place, "overwrite": bool,
}, total=False)
_Distillation = TypedDict("_Distillation", {  # noqa: UP013
    "teacher": Place, "teacher_weights": Place, "student": str, "method": str, "router": str, "temperature": float,
    "loss_weight": float | Literal["auto"], "dfa_weights": Place, "residual_students": int, "pretrain": bool,
    "cache_teacher": bool, "allow_teacher_mismatch": bool, "global_batch": bool,
}, total=False)
# fmt: on


class PretrainOptions(Inputs, _Training, total=False):
    """The options of `sakd pretrain-teacher`, and `settings` and `reporter`."""

    student_friendly: Sequence[str]


class DistillOptions(Inputs, _Training, _Distillation, total=False):
    """The options of `sakd distill`, and `settings` and `reporter`."""


def __getattr__(name: str) -> Any:
    """The contracts, which load torch."""
    if name not in _HEAVY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"sakd_cli.{_HEAVY[name]}"), name)


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
        """Folder of the exported network, which may be used as `teacher`."""
        folder = RunDir(self.path).deliverable
        if folder is None:
            raise UsageError(f"{self.path}: this run has not saved a network yet")
        return folder


def pretrain_teacher(model: str | None = None, **options: Unpack[PretrainOptions]) -> RunResult:
    """Train one network with cross-entropy: a teacher, or a student from scratch; `sakd pretrain-teacher`.

    options   as of the command, `settings` (any key by its dotted name), and `trust` (functions of the user's own,
              `package.module:function`, that a weights file may ask for)
    resume    a run directory, or `"auto"`: resume the newest run with these settings, unless it is finished
    reporter  is called at every step that is logged, and may stop the run; default: none
    """
    return _train("pretrain", {"model": model, **options})


def distill(**options: Unpack[DistillOptions]) -> RunResult:
    """Train a student from a teacher, deciding per sample and step where it learns; `sakd distill`.

    teacher   an architecture (its newest finished run), a run directory, or a weights file or folder
    pretrain  train the teacher first if it has no finished run
    resume, reporter   as for `pretrain_teacher`
    """
    return _train("distill", options)


def _train(task: str, options: Mapping[str, Any]) -> RunResult:
    config, plan = resolve_command(task, _params(PROCEDURES[task].command, options))
    if (summary := plan.summary if plan.finished else None) is None:
        from sakd_cli.engine.reporter import NullReporter
        from sakd_cli.runs.launch import Launcher

        launcher = Launcher(options.get("reporter") or NullReporter(), options.get("resume") is not None)
        with code.told():
            summary = launcher.train(locate_inputs(config) if task == "distill" else config, plan)
    return RunResult(Path(str(summary.run)), summary)


def _params(command: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a call as the options of its command, with paths as the command line has them."""
    if wrong := options.keys() - {*options_of(command), "settings", "reporter", "trust"}:
        raise TypeError(f"unknown option: {', '.join(sorted(wrong))}")
    code.trust(*(options.get("trust") or ()))
    params = {name: str(value) if isinstance(value, Path) else value for name, value in options.items()}
    paths = {name: Path(params[name]) for name in ("config", "run_dir") if params.get(name) is not None}
    return dict.fromkeys(options_of(command)) | params | paths


def evaluate(
    target: Place | None = None,
    *,
    teacher: Place | None = None,
    early: bool = True,
    split: Literal["train", "val", "test", "all"] | None = None,
    **options: Unpack[Inputs],
) -> Evaluation | EnsembleEvaluation:
    """Evaluate a trained network on the test images: the document of `sakd eval --json`.

    target  a run, a folder of a network or its file; None: the newest run
    early   whether images exit an ensemble of residual students early
    split   which images; None: the test images, or all of another folder that `data_root` names
    """
    given = config_sources(_params("eval", {"teacher": teacher, **options}))
    found = [what_to_score(library_or_path(None if target is None else Path(target), given), runs_dir_of(given))]
    check_teacher(found, forced=False, teacher=teacher)
    from sakd_cli.engine.reporter import NullReporter
    from sakd_cli.runs.evaluate import evaluate_all

    reporter = options.get("reporter") or NullReporter()
    (document,) = evaluate_all(found, given, reporter, teacher_required=teacher is not None, early=early, split=split)
    return document


def inspect_spots(
    run: Place | None = None,
    *,
    live: bool = False,
    split: Split = "train",
    sample: bool = False,
    seed: int = 0,
    extremes: int = EXTREMES,
    **options: Unpack[Inputs],
) -> SpotsDocument:
    """Where knowledge flowed in a distillation: the document of `sakd inspect-spots --json`; needs no torch.

    But `live`, another split than `train` and every option about images or device run the networks again.

    run     None: the newest distillation
    sample  draw once, from `seed`, instead of using probabilities; extremes: images at each end of each spot
    """
    params = _params("inspect-spots", {"live": live, **options})
    place, reporter = None if run is None else Path(run), options.get("reporter")
    return inspect_run(place, params, split, reporter, sample=sample, seed=seed, extremes=extremes)[0]


def inspect_run(
    named: Path | None,
    options: Mapping[str, Any],
    split: Split,
    reporter: "Reporter | None",
    *,
    sample: bool,
    seed: int,
    extremes: int,
) -> tuple[SpotsDocument, Survey | None]:
    """What `inspect_spots` returns, and the survey: the run's own, or a new one where the options ask for that."""
    name = options["dataset"]
    dataset = name and (own_name(name, DATASETS) or name)
    if named is None:
        runs = resolve("eval", config_sources({n: options[n] for n in ("dataset", "runs_dir")})).config.runs_dir
        wanted = {"task": "distill"} | ({"data.name": dataset} if dataset else {})
        if (found := newest_run(runs, wanted, finished=False)) is None:
            raise UsageError(f"no distillation in {runs}", hint="sakd distill --preset quickstart, or name a run")
        named = found.path
    run, measured = RunDir(named), None
    trust_own(run)
    another = dataset not in (None, look_up(run.config, "data.name"))
    if another or split != "train" or any(options.get(name) for name in OF_LIVE):
        spots_document(run)  # whatever is wrong with the record of the run is reported before
        from sakd_cli.engine.reporter import NullReporter
        from sakd_cli.runs.survey import live

        sources = config_sources(options)
        measured = live(run, sources, split, reporter or NullReporter(), seed=seed, extremes=extremes)
    survey = read_survey(run, measured)
    document = spots_document(run, survey, sample=sample, seed=seed, extremes=extremes)
    if options.get("probe"):
        from sakd_cli.engine.reporter import NullReporter
        from sakd_cli.runs.probe import probe

        probed = probe(run, config_sources(options), reporter or NullReporter(), seed=seed)
        document = document.model_copy(update={"probe": probed})
    return document, survey
