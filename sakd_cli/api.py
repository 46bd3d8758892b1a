"""What the command line does, as calls, and the contracts for people who bring a router, a method or a loop.

    pretrain_teacher, distill, evaluate, predict, compare   the commands of the same names, with the same options
    inspect_spots, export, import_weights, report, sweep, bench     likewise
    prepare, loader_of                                      a distillation that is built and not run, and its batches
    Distiller, Router, StagedModel, Dataset                 what to distil, where to, what a network is, and images
    MethodConfig, Spot, Features, Seen, StageInfo, Batch    what these are made of and given
    Reporter                                                follows a training

Nothing is printed, and every mistake is a `SakdError` (`sakd_cli.errors`). The arguments of a call win over the
environment (`SAKD_*`), which wins over `config`, then `preset`, then the default, as on the command line; `settings`
sets any key of `sakd config show` by its dotted name, and wins over all. Torch is loaded by the first call that needs
it.
"""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Unpack, overload

from sakd_cli.calls.options import (
    BenchOptions,
    CheckOptions,
    DistillOptions,
    EvaluateOptions,
    ExportOptions,
    ImportOptions,
    Place,
    PredictOptions,
    PretrainOptions,
    SeriesOptions,
    SpotOptions,
    SweepOptions,
    apart,
    params_of,
    place_of,
    plain_of,
    reporter_of,
)
from sakd_cli.calls.results import (
    check_data,
    compare,
    evaluate,
    export,
    import_weights,
    inspect_spots,
    predict,
    report,
    runs,
)
from sakd_cli.config import code
from sakd_cli.config.datasets import DataConfig
from sakd_cli.config.method import MethodConfig
from sakd_cli.config.resolve import BENCHED, ConfigSource, config_sources, nested, resolve
from sakd_cli.config.routers import LearnedConfig, RouterConfig
from sakd_cli.config.training import PROCEDURES
from sakd_cli.documents.base import Shown
from sakd_cli.documents.bench import Bench
from sakd_cli.documents.evaluation import EnsembleEvaluation, Evaluation, Evaluations, Predictions
from sakd_cli.documents.listing import RunEntries
from sakd_cli.documents.spots import SpotsDocument
from sakd_cli.documents.sweep import SweepDocument, SweepPlan
from sakd_cli.documents.table import Comparison, DataCheck, Export, Imported, Report
from sakd_cli.documents.training import Plan, Summary
from sakd_cli.engine.reporter import Reporter
from sakd_cli.errors import UsageError
from sakd_cli.report.runs.compare import compare as compare_runs
from sakd_cli.rundir import RunDir
from sakd_cli.runs.locate import locate_inputs
from sakd_cli.runs.own import keep_teacher
from sakd_cli.runs.resume import resolve_command

if TYPE_CHECKING:
    from sakd_cli.batch import Batch
    from sakd_cli.data.dataset import Dataset
    from sakd_cli.distillers.distiller import Distiller, SpotwiseDistiller
    from sakd_cli.models.spot import Spot
    from sakd_cli.models.staged import Features, StagedModel, StageInfo
    from sakd_cli.routing.router import Decision, Router, Seen
    from sakd_cli.runs.extension import loader_of
    from sakd_cli.runs.job import Job

# fmt: off
__all__ = [
    "Batch", "Bench", "BenchOptions", "CheckOptions", "Comparison", "DataCheck", "DataConfig", "Dataset", "Decision",
    "DistillOptions", "Distiller", "EnsembleEvaluation", "EvaluateOptions", "Evaluation", "Evaluations", "Export",
    "ExportOptions", "Features", "ImportOptions", "Imported", "Job", "LearnedConfig", "MethodConfig", "Plan",
    "PredictOptions", "Predictions", "PretrainOptions", "Report", "Reporter", "Router", "RouterConfig", "RunEntries",
    "RunResult", "Seen", "SeriesOptions", "Spot", "SpotOptions", "SpotsDocument", "SpotwiseDistiller", "StageInfo",
    "StagedModel", "SweepDocument", "SweepOptions", "SweepPlan", "bench", "check_data", "compare", "distill",
    "evaluate", "export", "import_weights", "inspect_spots", "loader_of", "predict", "prepare", "pretrain_teacher",
    "report", "runs", "sweep",
]
AGAIN = 'the same call with resume="auto"'  # what continues a training that was stopped
_HEAVY = {
    "Batch": "batch", "SpotwiseDistiller": "distillers.distiller",
    "Distiller": "distillers.distiller", "Spot": "models.spot",
    **dict.fromkeys(("Features", "StageInfo", "StagedModel"), "models.staged"),
    **dict.fromkeys(("Decision", "Router", "Seen"), "routing.router"), "Dataset": "data.dataset",
    "Job": "runs.job", "loader_of": "runs.extension",
}
# fmt: on


def __getattr__(name: str) -> Any:
    """The contracts, which load torch."""
    if name not in _HEAVY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"sakd_cli.{_HEAVY[name]}"), name)


@dataclass(frozen=True)
class RunResult(Shown):
    """A finished run: its directory, and its summary."""

    path: Path
    summary: Summary

    def __fspath__(self) -> str:
        """Its directory: a result stands wherever a run does."""
        return str(self.path)

    @property
    def top1(self) -> float:
        """Percent of the test images, after the last epoch."""
        return self.summary.last.top1

    @property
    def network(self) -> Path:
        """Folder of the exported network, which may be used as `teacher`."""
        return RunDir(self.path).require_deliverable()


@overload
def pretrain_teacher(
    model: str | None = None, *, dry_run: Literal[True], **options: Unpack[PretrainOptions]
) -> Plan: ...
@overload
def pretrain_teacher(model: str | None = None, **options: Unpack[PretrainOptions]) -> RunResult: ...
def pretrain_teacher(model: str | None = None, **options: Any) -> RunResult | Plan:
    """Train one network with cross-entropy: a teacher, or a student from scratch; `sakd pretrain-teacher`.

    options   as of the command, `settings` (any key by its dotted name), and `trust` (functions of the user's own,
              `package.module:function`, that a weights file may ask for)
    dry_run   build everything and try one batch; nothing is written, and the plan is returned
    resume    a run directory, or `"auto"`: resume the newest run with these settings, unless it is finished
    reporter  is called at every step that is logged, and may stop the run; default: none
    """
    found = _trained("pretrain", {"model": model, **options})
    assert not isinstance(found, list)
    return found if isinstance(found, Plan) else RunResult(found.folder, found)


@overload
def distill(*, dry_run: Literal[True], **options: Unpack[SeriesOptions]) -> Plan: ...
@overload
def distill(**options: Unpack[DistillOptions]) -> RunResult: ...
@overload
def distill(**options: Unpack[SeriesOptions]) -> RunResult | Comparison: ...
def distill(**options: Any) -> RunResult | Comparison | Plan:
    """Train a student from a teacher, deciding per sample and step where it learns; `sakd distill`.

    teacher   an architecture (its newest finished run), a run directory, a weights file or folder; or a list of them
    pretrain  train the teacher first if it has no finished run
    seeds, routers, with_control   several runs, whose comparison is returned
    dry_run, resume, reporter      as for `pretrain_teacher`
    """
    found = _trained("distill", options)
    if isinstance(found, list):
        return compare_runs(found, options.get("baseline"))
    return found if isinstance(found, Plan) else RunResult(found.folder, found)


def prepare(**options: Unpack[DistillOptions]) -> "Job":
    """A distillation with these options, built and not run, for a loop of one's own: nothing is written.

    Its `task` turns a batch of `loader_of(job)` into a loss; `task.groups()` are the parameters with their rates.
    """
    from sakd_cli.engine.runtime import as_in_new_process
    from sakd_cli.runs import build

    if wrong := options.keys() & {"resume", "seeds", "routers", "with_control", "parallel", "baseline"}:
        raise UsageError(f"prepare: builds one new run, so it cannot have {', '.join(sorted(wrong))}")
    config, _ = resolve_command("distill", params_of("distill", options))
    with as_in_new_process(), code.as_usage_errors():
        return build.build(locate_inputs(keep_teacher(config)))


def _trained(task: str, options: Mapping[str, Any]) -> Summary | Plan | list[RunDir]:
    from sakd_cli.sweep.series import train_command

    return train_command(task, params_of(PROCEDURES[task].command, options), reporter_of(options), AGAIN, AGAIN)


@apart
def bench(**options: Unpack[BenchOptions]) -> Bench:
    """Time a training step: the document of `sakd bench --json`."""
    params = params_of("bench", options)
    sources = [ConfigSource("the bench's default", nested(BENCHED)), *config_sources(params)]
    config = resolve("distill", sources).config
    from sakd_cli.bench.scaling import run_bench

    return run_bench(config, params, reporter_of(options).say)


@overload
def sweep(
    grid: Place | Mapping[str, Any], *, dry_run: Literal[True], measure: float = 60.0, **options: Unpack[SweepOptions]
) -> SweepPlan: ...
@overload
def sweep(grid: Place | Mapping[str, Any], **options: Unpack[SweepOptions]) -> SweepDocument: ...
@apart
def sweep(grid: Place | Mapping[str, Any], **options: Any) -> SweepDocument | SweepPlan:
    """Train a grid of methods, pairs, routers and seeds: the document of `sakd sweep --json`.

    grid     a file, the name of a preset, or what such a file has; what is finished is skipped, the rest resumed
    dry_run  estimate runs, hours and bytes, timing steps for `measure` seconds; nothing is written
    Raises SeriesError where runs have failed; the others are finished.
    """
    params, reporter = params_of("sweep", options), reporter_of(options)
    grid = plain_of(grid) if isinstance(grid, Mapping) else place_of("grid", grid)
    from sakd_cli.sweep.carry_out import carry_out

    document, todo = carry_out(grid, params, reporter, again="the same call")
    if todo is not None:
        todo.check("retry_failed=True tries them again")
    return document
