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
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Unpack

from sakd_cli.calls import (
    BenchOptions,
    DistillOptions,
    ExportOptions,
    ImportOptions,
    Inputs,
    Place,
    PredictOptions,
    PretrainOptions,
    SweepOptions,
)
from sakd_cli.config import code
from sakd_cli.config.base import own_name
from sakd_cli.config.datasets import DATASETS, DataConfig
from sakd_cli.config.method import MethodConfig
from sakd_cli.config.options import FILE, options_of
from sakd_cli.config.resolve import BENCHED, ConfigSource, config_sources, nested, resolve
from sakd_cli.config.routers import LearnedConfig, RouterConfig
from sakd_cli.config.training import PROCEDURES
from sakd_cli.documents.bench import Bench
from sakd_cli.documents.evaluation import EnsembleEvaluation, Evaluation, Predictions
from sakd_cli.documents.spots import EXTREMES, Split, SpotsDocument
from sakd_cli.documents.sweep import SweepDocument
from sakd_cli.documents.table import Comparison, Export, Imported, Report
from sakd_cli.documents.training import Summary
from sakd_cli.errors import UsageError
from sakd_cli.report.runs.compare import compare as compare_runs
from sakd_cli.report.spots.log import spots_document
from sakd_cli.report.spots.survey import Survey, read_survey
from sakd_cli.rundir import RunDir, look_up, newest_run
from sakd_cli.runs.locate import (
    check_teacher,
    library_or_path,
    locate_inputs,
    runs_dir_of,
    target_or_newest,
    what_to_score,
)
from sakd_cli.runs.own import keep_teacher, trust_own
from sakd_cli.runs.resume import resolve_command

if TYPE_CHECKING:
    from sakd_cli.batch import Batch
    from sakd_cli.data.dataset import Dataset
    from sakd_cli.distillers.distiller import Distiller, SpotwiseDistiller
    from sakd_cli.engine.reporter import Reporter
    from sakd_cli.models.spot import Spot
    from sakd_cli.models.staged import Features, StagedModel, StageInfo
    from sakd_cli.routing.router import Decision, Router, Seen
    from sakd_cli.runs.extension import loader_of
    from sakd_cli.runs.job import Job

# fmt: off
__all__ = [
    "Batch", "Bench", "BenchOptions", "Comparison", "DataConfig", "Dataset", "Decision", "DistillOptions", "Distiller",
    "EnsembleEvaluation", "Evaluation", "Export", "ExportOptions", "Features", "ImportOptions", "Imported", "Job",
    "LearnedConfig", "MethodConfig", "PredictOptions", "Predictions", "PretrainOptions", "Report", "Reporter", "Router",
    "RouterConfig", "RunResult", "Seen", "Spot", "SpotsDocument", "SpotwiseDistiller", "StageInfo", "StagedModel",
    "SweepDocument", "SweepOptions", "bench", "compare", "distill", "evaluate", "export", "import_weights",
    "inspect_spots", "loader_of", "predict", "prepare", "pretrain_teacher", "report", "sweep",
]
# Options that name what may be an object.
NAMED = ("model", "network", "teacher", "student", "student_friendly", "method", "router", "dataset")
# Options about images or the machine, which only mean something when the networks are run.
OF_LIVE = ("live", "data_root", "device", "config", "set_", "settings")
_HEAVY = {
    "Batch": "batch", "SpotwiseDistiller": "distillers.distiller",
    "Distiller": "distillers.distiller", "Reporter": "engine.reporter", "Spot": "models.spot",
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

    teacher   an architecture (its newest finished run), a run directory, a weights file or folder; or a list of them
    pretrain  train the teacher first if it has no finished run
    resume, reporter   as for `pretrain_teacher`
    """
    return _train("distill", options)


def prepare(**options: Unpack[DistillOptions]) -> "Job":
    """A distillation with these options, built and not run, for a loop of one's own: nothing is written.

    Its `task` turns a batch of `loader_of(job)` into a loss; `task.groups()` are the parameters with their rates.
    """
    from sakd_cli.runs import build

    config, _ = resolve_command("distill", _params("distill", options))
    with code.told():
        return build.build(locate_inputs(keep_teacher(config)))


def _train(task: str, options: Mapping[str, Any]) -> RunResult:
    config, plan = resolve_command(task, _params(PROCEDURES[task].command, options))
    if (summary := plan.summary if plan.finished else None) is None:
        from sakd_cli.runs.launch import Launcher

        launcher = Launcher(_reporter(options), options.get("resume") is not None)
        with code.told():
            summary = launcher.train(locate_inputs(keep_teacher(config)), plan)
    return RunResult(Path(str(summary.run)), summary)


def _params(command: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a call as the options of its command, with paths as the command line has them.

    Where a network, method, router or data set is named, an object may stand (`code.name_of`).
    """
    rows = options_of(command)
    names = {row.flag.partition("/")[0].removeprefix("--").replace("-", "_"): name for name, row in rows.items()}
    names |= {name: name for name in (*rows, "settings", "reporter", "trust")}
    if wrong := options.keys() - names.keys():
        raise TypeError(f"unknown option: {', '.join(sorted(wrong))}")
    code.trust(*(options.get("trust") or ()))
    given = {names[name]: _plain(value) if names[name] in NAMED else value for name, value in options.items()}
    params = {name: str(value) if isinstance(value, Path) else value for name, value in given.items()}
    of_paths = [name for name, row in rows.items() if row.type == FILE]
    paths = {name: Path(params[name]) for name in of_paths if params.get(name) is not None}
    defaults = {name: None if row.default is ... else row.default for name, row in rows.items()}
    return defaults | params | paths


def _plain(value: Any) -> Any:
    """A name as it is, of an object the name that it gets."""
    if isinstance(value, str | Path | None):
        return value
    return [_plain(one) for one in value] if isinstance(value, list | tuple) else code.name_of(value)


def _path(target: Place | None, sources: Sequence[ConfigSource]) -> Path | None:
    return library_or_path(None if target is None else Path(target), sources)


def _reporter(options: Mapping[str, Any]) -> "Reporter":
    from sakd_cli.engine.reporter import NullReporter

    return options.get("reporter") or NullReporter()


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
    found = [what_to_score(_path(target, given), runs_dir_of(given))]
    check_teacher(found, forced=False, teacher=teacher)
    from sakd_cli.runs.evaluate import evaluate_all

    reporter = _reporter(options)
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


def predict(network: Place, *pictures: Place, **options: Unpack[PredictOptions]) -> Predictions:
    """What a network answers for pictures, folders and patterns: the document of `sakd predict --json`.

    What cannot be read is in the document (`failed`), and raises nothing.
    """
    params = _params("predict", options)
    sources = config_sources(params)
    weights, _ = what_to_score(_path(network, sources), runs_dir_of(sources))
    from sakd_cli.runs.predict import find_pictures
    from sakd_cli.runs.predict import predict as carry_out

    found, reporter = find_pictures([str(path) for path in pictures]), _reporter(options)
    return carry_out(weights, found, sources, reporter, top=params["top_classes"], early=not params["always_on"])


def export(target: Place | None = None, **options: Unpack[ExportOptions]) -> Export:
    """Export a network for other programs: the document of `sakd export --json`.

    target  a run, a folder of a network or its file; None: the newest run
    """
    params = _params("export", options)
    sources = config_sources(params)
    where = target_or_newest(_path(target, sources), runs_dir_of(sources))
    from sakd_cli.export.export import Order
    from sakd_cli.export.export import export as carry_out

    return carry_out(where, Order.of(params), sources, _reporter(options))


def import_weights(file: Place, **options: Unpack[ImportOptions]) -> Imported:
    """Bring in weights of another program: the document of `sakd import-weights --json`."""
    params = _params("import-weights", options)
    from sakd_cli.export.import_weights import Source
    from sakd_cli.export.import_weights import import_weights as carry_out

    source = Source(Path(file), params["network"], params["key"], params["class_order"])
    return carry_out(source, config_sources(params), params["import_dir"], _reporter(options))


def compare(*runs: Place, baseline: str | None = None) -> Comparison:
    """Runs against each other: the document of `sakd compare --json`; needs no torch.

    baseline  compare every group with this one: a run, or words of its label
    """
    return compare_runs([RunDir(Path(run)) for run in runs], baseline)


def report(run: Place, out: Place | None = None) -> Report:
    """Write everything about a run as one HTML file, `RUN/report.html` unless `out` says where; `sakd report`."""
    from sakd_cli.report.render import plots
    from sakd_cli.report.runs.page import RunPage

    page = Path(run) / "report.html" if out is None else Path(out)
    return RunPage(RunDir(Path(run)), plotted=plots.available(lambda reason: None)).write(page)


def bench(**options: Unpack[BenchOptions]) -> Bench:
    """Time a training step: the document of `sakd bench --json`."""
    params = _params("bench", options)
    sources = [ConfigSource("the bench's default", nested(BENCHED)), *config_sources(params)]
    from sakd_cli.bench.scaling import ordered

    return ordered(resolve("distill", sources).config, params, _reporter(options).say)


def sweep(grid: Place | Mapping[str, Any], **options: Unpack[SweepOptions]) -> SweepDocument:
    """Train a grid of methods, pairs, routers and seeds: the document of `sakd sweep --json`.

    grid  a file, the name of a preset, or what such a file has; finished runs are skipped, unfinished ones resumed
    Raises SeriesError where runs have failed; the others are finished.
    """
    params, reporter = _params("sweep", options), _reporter(options)
    from sakd_cli.sweep import carry_out, scheduler

    file = grid if isinstance(grid, Mapping) else str(grid)
    name, settings, runs = carry_out.understood(file, params)
    folder = runs.members[0].config.runs_dir
    todo = scheduler.Scheduler(runs.members, folder, folder / "sweeps" / name)
    skipped = runs.skipped | carry_out.leave_out_impossible(todo, settings)

    def run(part: scheduler.Scheduler) -> None:
        if part.unfinished():
            executor = carry_out.executor_of(params, part)
            with closing(executor), scheduler.received_signals(reporter) as signals:
                part.run(executor, signals, again="call it again")

    skipped |= carry_out.train(file, params, settings, todo, run, reporter.say)
    document = carry_out.document_of(name, todo, skipped, params["baseline"])
    todo.check("retry_failed=True tries them again")
    return document
