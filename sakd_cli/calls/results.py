"""Calls of `sakd_cli.api` about what is there: networks evaluated, used and carried elsewhere, runs, data."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack, overload

from sakd_cli.calls import options as typed
from sakd_cli.calls.options import EvaluateOptions, Place, apart, params_of, place_of, reporter_of
from sakd_cli.config import code
from sakd_cli.config.base import own_row
from sakd_cli.config.datasets import DATASETS, ImageFolderConfig
from sakd_cli.config.resolve import ConfigSource, config_sources, nested, resolve
from sakd_cli.documents.evaluation import EnsembleEvaluation, Evaluation, Evaluations, Predictions
from sakd_cli.documents.listing import RunEntries
from sakd_cli.documents.spots import SpotsDocument
from sakd_cli.documents.table import Comparison, DataCheck, Export, Imported, Report
from sakd_cli.engine.reporter import Reporter
from sakd_cli.errors import UsageError
from sakd_cli.report.evaluation import exit_chart_of, write_matrix
from sakd_cli.report.render import plots
from sakd_cli.report.runs.compare import compare as compare_runs
from sakd_cli.report.runs.compare_tables import curve_charts
from sakd_cli.report.runs.entries import run_entries, run_entry
from sakd_cli.report.runs.page import RunPage
from sakd_cli.rundir import RunDir
from sakd_cli.runs import locate
from sakd_cli.runs.inspection import inspect_run


def _path(target: Place | None, sources: Sequence[ConfigSource]) -> Path | None:
    return locate.library_or_path(None if target is None else place_of("target", target), sources)


def _check_scoring(params: Mapping[str, Any], count: int) -> None:
    """Raise UsageError where the options of `evaluate` exclude each other, or are not for so many networks."""
    if params["early_exit"] and params["always_on"]:
        raise UsageError("--early-exit and --always-on exclude each other")
    for name in ("plot", "confusion"):
        if (path := params[name]) is not None and count > 1:
            raise UsageError(f"--{name} is of one network, and {count} are named")
        if path is not None and (name == "plot" or path.suffix.lower() != ".csv"):
            plots.require_plot(path, f"--{name}", ".csv, " * (name == "confusion"))


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
    _check_scoring(params, len(targets))
    always, curve, plot, confusion = (params[name] for name in ("always_on", "curve", "plot", "confusion"))
    given = config_sources(params)
    found = [locate.what_to_score(_path(target, given), locate.runs_dir_of(given)) for target in targets or (None,)]
    forced, teacher = bool(params["early_exit"] or always or curve or plot), params["teacher"] or None
    locate.check_teacher(found, forced=forced, teacher=teacher)
    from sakd_cli.runs.evaluate import evaluate_all

    kinds: dict[str, Any] = {"as_ensembles": forced, "early": not always, "curve": bool(curve or plot)}
    kinds |= {"matrix": bool(matrix), "split": params["eval_split"], "teacher_required": teacher is not None}
    reporter = reporter_of(options)
    results = evaluate_all(found, given, reporter, **kinds)
    if plot is not None:
        plots.write(plots.figure_of([exit_chart_of(results[0])]), plot)
    if confusion is not None:
        write_matrix(results[0], confusion)
    for path in filter(None, (plot, confusion)):
        reporter.say(f"written: {path}")
    return results[0] if len(results) == 1 else Evaluations(evaluations=results)


@apart
def inspect_spots(run: Place | None = None, **options: Unpack[typed.SpotOptions]) -> SpotsDocument:
    """Where knowledge flowed in a distillation: the document of `sakd inspect-spots --json`; needs no torch.

    But `live`, another split than `train` and every option about images or device run the networks again.

    run     None: the newest distillation
    sample  draw once, from `seed`, instead of using probabilities; extremes: images at each end of each spot
    plot, html, samples   files to write
    """
    params = params_of("inspect-spots", options)
    return inspect_run(None if run is None else place_of("run", run), params, reporter_of(options))


@apart
def predict(network: Place, *pictures: Place, **options: Unpack[typed.PredictOptions]) -> Predictions:
    """What a network answers for pictures, folders and patterns: the document of `sakd predict --json`.

    What cannot be read is in the document (`failed`), and raises nothing.
    """
    params = params_of("predict", options)
    if not pictures:
        raise UsageError("predict: which pictures?", "predict(network, 'photos'): files, folders or patterns")
    sources = config_sources(params)
    weights, _ = locate.what_to_score(_path(network, sources), locate.runs_dir_of(sources))
    from sakd_cli.runs.predict import find_pictures
    from sakd_cli.runs.predict import predict as carry_out

    found, early = find_pictures([str(place_of("pictures", path)) for path in pictures]), not params["always_on"]
    return carry_out(weights, found, sources, reporter_of(options), top=params["top_classes"], early=early)


@apart
def export(target: Place | None = None, **options: Unpack[typed.ExportOptions]) -> Export:
    """Export a network for other programs: the document of `sakd export --json`.

    target  a run, a folder of a network or its file; None: the newest run
    """
    params = params_of("export", options)
    sources = config_sources(params)
    where = locate.target_or_newest(_path(target, sources), locate.runs_dir_of(sources))
    from sakd_cli.export.export import ExportSettings
    from sakd_cli.export.export import export as carry_out

    return carry_out(where, ExportSettings.of(params), sources, reporter_of(options))


@apart
def import_weights(file: Place, **options: Unpack[typed.ImportOptions]) -> Imported:
    """Bring in weights of another program: the document of `sakd import-weights --json`."""
    params = params_of("import-weights", options)
    from sakd_cli.export.import_weights import import_weights as carry_out

    return carry_out(place_of("file", file), params, config_sources(params), reporter_of(options))


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
    folder = locate.runs_dir_of(config_sources({"runs_dir": runs_dir and str(place_of("runs_dir", runs_dir))}))
    return RunEntries(rows=run_entries(folder, where or {}, sort and str(sort)), removed=[])


@apart
def check_data(what: Place, **options: Unpack[typed.CheckOptions]) -> DataCheck:
    """What is wrong with a folder of pictures, a list of them, or a data set by name: `sakd data check --json`.

    Every fault is in the document (`findings`), and raises nothing. Nothing is changed or downloaded.
    """
    params, reporter = params_of("data-check", options), reporter_of(options)
    name, there = str(what), place_of("what", what).exists()
    code.trust(*code.own_names([name]))
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
    folder = None if runs_dir is None else place_of("runs_dir", runs_dir)
    found = locate.run_or_newest(None if run is None else place_of("run", run), folder, {})
    page = found.path / "report.html" if out is None else place_of("out", out)
    if page.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"--out {page}: the name of an HTML file ends in .html")
    return RunPage(found, reporter_of({"reporter": reporter}).warn).write(page)
