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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Unpack, overload

from sakd_cli.calls import (
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
    check_scoring,
    params_of,
    place_of,
    plain_of,
)
from sakd_cli.config import code
from sakd_cli.config.base import own_row
from sakd_cli.config.datasets import DATASETS, DataConfig, ImageFolderConfig
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
from sakd_cli.engine.reporter import NullReporter, Reporter
from sakd_cli.errors import UsageError
from sakd_cli.report.evaluation.ensemble import exit_chart_of
from sakd_cli.report.evaluation.tables import write_matrix
from sakd_cli.report.render import plots
from sakd_cli.report.runs.compare import compare as compare_runs
from sakd_cli.report.runs.compare_tables import curve_charts
from sakd_cli.report.runs.entries import run_entries, run_entry
from sakd_cli.report.runs.page import RunPage
from sakd_cli.rundir import RunDir
from sakd_cli.runs.inspection import inspect_run
from sakd_cli.runs.locate import (
    check_teacher,
    library_or_path,
    locate_inputs,
    run_or_newest,
    runs_dir_of,
    target_or_newest,
    what_to_score,
)
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

    @classmethod
    def of(cls, summary: Summary) -> "RunResult":
        """The run that a summary is of."""
        return cls(Path(str(summary.run)), summary)

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
    return found if isinstance(found, Plan) else RunResult.of(found)


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
    return found if isinstance(found, Plan) else RunResult.of(found)


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

    return train_command(task, params_of(PROCEDURES[task].command, options), _reporter(options), AGAIN, AGAIN)


def _path(target: Place | None, sources: Sequence[ConfigSource]) -> Path | None:
    return library_or_path(None if target is None else place_of("target", target), sources)


def _reporter(options: Mapping[str, Any]) -> Reporter:
    return options.get("reporter") or NullReporter()


@overload
def evaluate(target: Place | None = None, /, **options: Unpack[EvaluateOptions]) -> Evaluation | EnsembleEvaluation: ...
@overload
def evaluate(target: Place, other: Place, /, *more: Place, **options: Unpack[EvaluateOptions]) -> Evaluations: ...
@apart
def evaluate(*targets: Place | None, **options: Any) -> Evaluation | EnsembleEvaluation | Evaluations:
    """Evaluate trained networks: the document of `sakd eval --json`.

    targets  runs, folders of networks or their files; none: the newest run
    split    which images; None: the test images, or all of another folder that `data_root` names
    """
    matrix, options = options.get("confusion") or False, options | {"confusion": options.get("confusion") or None}
    params = params_of("eval", options | ({"confusion": None} if matrix is True else {}))
    check_scoring(params, len(targets))
    always, curve, plot, confusion = (params[name] for name in ("always_on", "curve", "plot", "confusion"))
    given = config_sources(params)
    found = [what_to_score(_path(target, given), runs_dir_of(given)) for target in targets or (None,)]
    forced, teacher = bool(params["early_exit"] or always or curve or plot), params["teacher"] or None
    check_teacher(found, forced=forced, teacher=teacher)
    from sakd_cli.runs.evaluate import evaluate_all

    kinds: dict[str, Any] = {"as_ensembles": forced, "early": not always, "curve": bool(curve or plot)}
    kinds |= {"matrix": bool(matrix), "split": params["eval_split"], "teacher_required": teacher is not None}
    results = evaluate_all(found, given, _reporter(options), **kinds)
    if plot is not None:
        plots.write(plots.figure_of([exit_chart_of(results[0])]), plot)
    if confusion is not None:
        write_matrix(results[0], confusion)
    return results[0] if len(results) == 1 else Evaluations(evaluations=results)


@apart
def inspect_spots(run: Place | None = None, **options: Unpack[SpotOptions]) -> SpotsDocument:
    """Where knowledge flowed in a distillation: the document of `sakd inspect-spots --json`; needs no torch.

    But `live`, another split than `train` and every option about images or device run the networks again.

    run     None: the newest distillation
    sample  draw once, from `seed`, instead of using probabilities; extremes: images at each end of each spot
    plot, html, samples   files to write
    """
    params = params_of("inspect-spots", options)
    return inspect_run(None if run is None else place_of("run", run), params, _reporter(options))


@apart
def predict(network: Place, *pictures: Place, **options: Unpack[PredictOptions]) -> Predictions:
    """What a network answers for pictures, folders and patterns: the document of `sakd predict --json`.

    What cannot be read is in the document (`failed`), and raises nothing.
    """
    params = params_of("predict", options)
    sources = config_sources(params)
    weights, _ = what_to_score(_path(network, sources), runs_dir_of(sources))
    from sakd_cli.runs.predict import find_pictures
    from sakd_cli.runs.predict import predict as carry_out

    found, early = find_pictures([str(place_of("pictures", path)) for path in pictures]), not params["always_on"]
    return carry_out(weights, found, sources, _reporter(options), top=params["top_classes"], early=early)


@apart
def export(target: Place | None = None, **options: Unpack[ExportOptions]) -> Export:
    """Export a network for other programs: the document of `sakd export --json`.

    target  a run, a folder of a network or its file; None: the newest run
    """
    params = params_of("export", options)
    sources = config_sources(params)
    where = target_or_newest(_path(target, sources), runs_dir_of(sources))
    from sakd_cli.export.export import ExportSettings
    from sakd_cli.export.export import export as carry_out

    return carry_out(where, ExportSettings.of(params), sources, _reporter(options))


@apart
def import_weights(file: Place, **options: Unpack[ImportOptions]) -> Imported:
    """Bring in weights of another program: the document of `sakd import-weights --json`."""
    params = params_of("import-weights", options)
    from sakd_cli.export.import_weights import import_weights as carry_out

    return carry_out(place_of("file", file), params, config_sources(params), _reporter(options))


def compare(*runs: Place, baseline: str | None = None, plot: Place | None = None) -> Comparison:
    """Runs against each other: the document of `sakd compare --json`; needs no torch.

    baseline  compare every group with this one: a run, or words of its label
    plot      file to write the curves to
    """
    if plot is not None:
        plots.require_plot(place_of("plot", plot))
    document = compare_runs([RunDir(place_of("runs", run)) for run in runs], baseline and str(baseline))
    if plot is not None:
        plots.write(plots.figure_of(curve_charts(document)), Path(plot))
    return document


def runs(
    *named: Place, runs_dir: Place | None = None, where: Mapping[str, Any] | None = None, sort: str | None = None
) -> RunEntries:
    """Which runs there are, or these with their settings: the document of `sakd runs --json`; needs no torch.

    where, sort  as of the command: `{"method.name": "fitnet"}`, `"-top1"`
    """
    if named:
        found = [RunDir(place_of("runs", name)) for name in named]
        return RunEntries(rows=[run_entry(run, run.config, shown=True) for run in found], removed=[])
    folder = runs_dir_of(config_sources({"runs_dir": runs_dir and str(place_of("runs_dir", runs_dir))}))
    return RunEntries(rows=run_entries(folder, where or {}, sort and str(sort)), removed=[])


@apart
def check_data(what: Place, **options: Unpack[CheckOptions]) -> DataCheck:
    """What is wrong with a folder of pictures, a list of them, or a data set by name: `sakd data check --json`.

    Every fault is in the document (`findings`), and raises nothing. Nothing is changed or downloaded.
    """
    params, reporter = params_of("data-check", options), _reporter(options)
    name, there = str(what), place_of("what", what).exists()
    row = name if name in DATASETS else None if there else own_row(name, DATASETS)
    name = name if row and row.endswith("/NAME") else row or ""
    settings = {"data.name": name or ImageFolderConfig().name, "data.root": params["data_root"]}
    if not name:
        settings["data.manifest" if str(what).lower().endswith(".csv") else "data.root"] = str(what)
    more = config_sources({"set_": params["set_"], "settings": options.get("settings")})
    config = resolve("eval", [ConfigSource("the command line", nested(settings)), *more]).config.data
    from sakd_cli.data.check import check

    try:
        return check(config, lambda count: reporter.begin("reading files", count), reporter.advance)
    finally:
        reporter.end()


def report(
    run: Place | None = None,
    out: Place | None = None,
    *,
    runs_dir: Place | None = None,
    reporter: Reporter | None = None,
) -> Report:
    """Write everything about a run (None: the newest) as one HTML file, `RUN/report.html` unless `out` says where."""
    found = run_or_newest(None if run is None else place_of("run", run), runs_dir, {})
    page = found.path / "report.html" if out is None else place_of("out", out)
    if page.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"--out {page}: the name of an HTML file ends in .html")
    return RunPage(found, _reporter({"reporter": reporter}).warn).write(page)


@apart
def bench(**options: Unpack[BenchOptions]) -> Bench:
    """Time a training step: the document of `sakd bench --json`."""
    params = params_of("bench", options)
    sources = [ConfigSource("the bench's default", nested(BENCHED)), *config_sources(params)]
    config = resolve("distill", sources).config
    from sakd_cli.bench.scaling import run_bench

    return run_bench(config, params, _reporter(options).say)


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
    params, reporter = params_of("sweep", options), _reporter(options)
    grid = plain_of(grid) if isinstance(grid, Mapping) else place_of("grid", grid)
    from sakd_cli.sweep.carry_out import carry_out

    document, todo = carry_out(grid, params, reporter, again="the same call")
    if todo is not None:
        todo.check("retry_failed=True tries them again")
    return document
