"""The Python API: the same runs as by the command line, typed results, nothing on stdout."""

import contextlib
import io
import re
import subprocess
import sys
from inspect import signature
from pathlib import Path
from typing import Any, get_overloads, get_type_hints
from unittest import mock

import pytest
import torch
from conftest import SHAPES, CliRunner
from PIL import Image
from torch import nn

from sakd_cli import api
from sakd_cli.config import code
from sakd_cli.config.options import OPTIONS, options_of
from sakd_cli.documents.training import Summary
from sakd_cli.errors import DiskError, UsageError

ROOT = Path(__file__).parents[1]
# Command: its call, and the options that are typed as its keywords; of others the signature says them.
CALLS: dict[str, tuple[Any, Any]] = {
    "distill": (api.distill, api.SeriesOptions),
    "pretrain-teacher": (api.pretrain_teacher, api.PretrainOptions),
    "eval": (api.evaluate, api.EvaluateOptions),
    "predict": (api.predict, api.PredictOptions),
    "inspect-spots": (api.inspect_spots, api.SpotOptions),
    "export": (api.export, api.ExportOptions),
    "import-weights": (api.import_weights, api.ImportOptions),
    "bench": (api.bench, api.BenchOptions),
    "sweep": (api.sweep, api.SweepOptions),
    "data-check": (api.check_data, api.CheckOptions),
    "compare": (api.compare, None),
    "report": (api.report, None),
    "runs": (api.runs, None),
}
# What only a terminal has, and why.
TERMINAL = {
    "json": "a call returns the document",
    "csv": "prints to stdout; the document has the same rows",
    "quiet": "a call prints nothing; `reporter` hears it",
    "set": "`settings`, a dict",
    "top": "rows of the printed tables of inspect-spots",
    "yes": "answers the question of `sakd runs rm`",
}
TERMINAL_COMMANDS = {"guide", "watch", "list", "show-method", "show-router", "show-key", "show-schema", "config-show"}
FEW = {f"data.{key}": value for key, value in SHAPES.items()}


class Half(api.Router):
    """Half of the images"""

    def decide(self, seen: api.Seen) -> Any:
        return seen.labels % 2 == 0


def narrow(num_classes: int) -> nn.Module:
    layers = [nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, num_classes))


@pytest.fixture(autouse=True)
def here(cli: CliRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(cli.path)


def test_a_call_makes_the_run_that_the_command_makes(
    trained_cli: CliRunner, distilled: dict[str, Any], teacher: Path
) -> None:
    arguments: dict[str, Any] = {"dataset": "shapes", "epochs": 1, "settings": FEW}
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        run = api.distill(teacher=teacher, student="resnet8", method="fitnet", run_dir="by-call", **arguments)
        again = api.distill(teacher=teacher, student="resnet8", method="fitnet", resume="by-call", **arguments)
    assert out.getvalue() == ""
    assert run.summary.last.plain() == distilled["last"] == again.summary.last.plain()
    assert run.path == Path("by-call") == again.path
    theirs = trained_cli.path / distilled["run"] / "student" / "model.safetensors"
    assert (run.network / "model.safetensors").read_bytes() == theirs.read_bytes()
    judged = api.evaluate(run.path, settings={"timing_seconds": 0})
    assert isinstance(judged, api.Evaluation)
    assert judged.top1 == run.top1
    assert judged.teacher is not None
    assert judged.teacher.sha256 == run.summary.teacher.sha256
    spots = api.inspect_spots(run.path)
    assert [spot.name for spot in spots.overall] == ["stage2", "logits"]
    live = api.inspect_spots(run.path, split="test", extremes=1)
    assert live.measured is not None
    assert live.measured.images == SHAPES["test"]


def test_a_watcher_follows_and_may_stop(teacher: Path) -> None:
    from sakd_cli.engine.reporter import NullReporter
    from sakd_cli.errors import Stopped

    class Follower(NullReporter):
        def __init__(self) -> None:
            self.messages: list[str] = []
            self.steps = 0

        def say(self, text: str) -> None:
            self.messages.append(text)

        def advance(self, step: int) -> None:
            self.steps = step

        def stop(self) -> int:
            return 15 if self.steps == 2 else 0

    follower = Follower()
    arguments: dict[str, Any] = {
        "teacher": teacher,
        "student": "resnet8",
        "dataset": "shapes",
        "epochs": 1,
        "settings": FEW | {"data.train": 200},
    }
    with pytest.raises(Stopped):
        api.distill(run_dir="stopped", reporter=follower, **arguments)
    assert any("resnet8 on shapes" in line for line in follower.messages)
    assert api.distill(resume="stopped", **arguments).summary.epochs == 1


def test_mistakes_are_errors_of_ours(teacher: Path) -> None:
    with pytest.raises(UsageError, match="did you mean 'fitnet'"):
        api.distill(teacher=teacher, student="resnet8", method="fitnett")
    with pytest.raises(UsageError, match=r"data\.trian.*settings data\.trian"):
        api.pretrain_teacher("resnet8", dataset="shapes", settings={"data.trian": 3})
    with pytest.raises(UsageError, match="no such file"):
        api.evaluate("nowhere")
    with pytest.raises(UsageError, match="not a run directory"):
        api.inspect_spots("nowhere")
    with pytest.raises(UsageError, match=r"--split: must be 'train', 'val', 'test' or 'all', got 'tset'"):
        api.evaluate(teacher, split="tset")  # type: ignore[call-overload]
    with pytest.raises(UsageError, match=r"--format: must be 'safetensors', .* got 'onx'"):
        api.export(teacher, format="onx")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="--top: must be greater than or equal to 1, got 0"):
        api.predict(teacher, "photos", top=0)
    with pytest.raises(UsageError, match="--run-dir: must be a path, got 5"):
        api.pretrain_teacher("resnet8", run_dir=5)  # type: ignore[call-overload]
    with pytest.raises(UsageError, match="settings: must be a mapping"):
        api.pretrain_teacher("resnet8", settings="train.lr=1")  # type: ignore[call-overload]
    with pytest.raises(UsageError, match="where: must be a mapping"):
        api.runs(where="task=distill")  # type: ignore[arg-type]
    for reporter in (print, api.Reporter):
        with pytest.raises(UsageError, match="reporter: must be an object whose class is a subclass of"):
            api.pretrain_teacher("resnet8", reporter=reporter)  # type: ignore[call-overload]
    for call in (api.predict, api.compare, api.evaluate):
        with pytest.raises(UsageError, match=r": must be a path, got \['a.png', 'b.png'\]"):
            call(teacher, ["a.png", "b.png"])
    for wrong in ({"preset": ["a"]}, {"resume": True}, {"overwrite": "no"}, {"run_dir": True}):
        with pytest.raises(UsageError, match=f"{next(iter(wrong)).replace('_', '-')}: must be"):
            api.pretrain_teacher("resnet8", **wrong)  # type: ignore[call-overload]
    with pytest.raises(UsageError, match="prepare: builds one new run, so it cannot have resume"):
        api.prepare(resume="auto")
    for call, options, text in (
        (api.distill, {"alpha": 0.5}, r"alpha \(settings={'method.kl_weight': ...}\)"),
        (api.pretrain_teacher, {"learning_rate": 1, "set": {}}, r"learning_rate \(lr=\), set \(settings={'train.lr'"),
        (api.evaluate, {"batch": 1}, r"batch \(batch_size=\)"),
    ):
        with pytest.raises(TypeError, match=f"unknown option: {text}"):
            call(**options)
    for wrong, text in (
        ({"config": {"train": 1}}, r"--config: must be a path, got {'train': 1}"),
        ({"trust": True}, "trust: must be names such as my.py:Hard, got True"),
        ({"dry_run": "yes"}, "--dry-run: must be True or False, got 'yes'"),
        ({"seed": [1]}, "seed: must be a whole number"),
    ):
        with pytest.raises(UsageError, match=text):
            api.pretrain_teacher("resnet8", **wrong)
    with pytest.raises(UsageError) as told:
        api.predict(teacher, torch.zeros(3, 32, 32))  # type: ignore[arg-type]
    assert re.fullmatch(r"pictures: must be a path, got tensor[^\n]{54}\.\.\.", told.value.message)
    with pytest.raises(UsageError, match="predict: which pictures"):
        api.predict(teacher)
    with pytest.raises(AttributeError, match="nothing"):
        api.nothing  # noqa: B018


def test_what_stands_for_a_name_or_a_path_is_taken_as_such(teacher: Path) -> None:
    """A mapping with a name, a device, a path in settings, and an entry of a list of runs."""
    shapes: dict[str, Any] = {"dataset": {"name": "shapes"} | {key[5:]: value for key, value in FEW.items()}}
    shapes |= {"teacher": teacher, "student": "resnet8", "epochs": 1, "dry_run": True}
    settings = {"router.run": teacher, "device": torch.device("cpu")}
    with pytest.raises(UsageError, match=f"{teacher.name} has no usable record"):  # found, and no distillation
        api.distill(router="random-matched", settings=settings, **shapes)
    api.distill(method={"name": "kd", "temperature": 3}, device=torch.device("cpu"), **shapes)
    entry = next(row for row in api.runs(runs_dir=teacher.parent).rows if row.run == str(teacher))
    assert Path(entry) == teacher


@pytest.mark.parametrize("command", [*CALLS])
def test_every_option_of_a_command_is_a_keyword_of_its_call_or_belongs_to_the_terminal(command: str) -> None:
    call, typed = CALLS[command]
    flags = {row.flag.removeprefix("--").replace("-", "_") for row in options_of(command).values()}
    words = {"runs_dir"} if command == "runs" else set()
    said = [*get_overloads(call), call]
    given = {name for one in said for name, p in signature(one).parameters.items() if p.kind is not p.VAR_KEYWORD}
    keywords = given | set(getattr(typed, "__annotations__", ()))
    left = flags - keywords - words
    assert left <= set(TERMINAL) - ({"top"} if command == "predict" else set()), left
    assert not keywords & {"json", "quiet", "set", "csv", "yes"}
    others = {"settings", "reporter", "trust", "options", "target", "other", "more", "targets", "network", "pictures"}
    others |= {"file", "run", "runs", "named", "what", "grid", "model"}
    assert keywords - others <= flags


def test_every_command_has_a_call_or_belongs_to_the_terminal() -> None:
    rows = {command for row in OPTIONS.values() for command in row.commands.split()}
    assert rows == {*CALLS} | (TERMINAL_COMMANDS - {"guide"})
    with pytest.raises(TypeError, match="unknown option: epoch"):
        api.distill(epoch=3)  # type: ignore[call-overload]


def test_what_would_be_done_is_a_plan_and_nothing_is_written(teacher: Path, cli: CliRunner) -> None:
    before, shapes = sorted(cli.path.rglob("*")), {"dataset": "shapes", "epochs": 1, "settings": FEW}
    plan = api.distill(teacher=teacher, student="resnet8", method="kd", dry_run=True, seeds=3, **shapes)
    assert (plan.images, [one.name for one in plan.spots]) == (90, ["logits"])
    assert api.distill(teacher=[Path(teacher)], student="resnet8", method="kd", dry_run=True, **shapes) == plan
    assert api.pretrain_teacher("resnet8", dry_run=True, **shapes).steps_per_epoch == 2
    grid = {"task": "sweep", "pairs": ["resnet8:resnet8"], "methods": ["kd"], "routers": ["always"]}
    grid |= {"common": {"data": {"name": "shapes", **{k.removeprefix("data."): v for k, v in FEW.items()}}}}
    estimated = api.sweep(grid, dry_run=True, measure=0.1, seeds=2, runs_dir="estimated")
    assert (estimated.runs, estimated.finished) == (3, 0), "one teacher"
    assert before == sorted(cli.path.rglob("*"))


def test_objects_stand_in_the_settings_of_a_sweep_too() -> None:
    grid = {"task": "sweep", "pairs": [(narrow, "resnet8")], "methods": ["kd"], "routers": [Half, "always"]}
    grid |= {"common": {"data": {"name": "shapes", "train": 60, "test": 40}, "train": {"epochs": 1}}}
    plan = api.sweep(grid, dry_run=True, measure=0.1, seeds=1, runs_dir="estimated")
    assert [row.what.count("test_api.py:Half") for row in plan.rows] == [0, 1, 0]
    with pytest.raises(UsageError, match=r"router python:Half was an object of another process; .* FILE\.py:Half"):
        api.distill(teacher="resnet8", student="resnet8", router="python:Half")


def test_a_series_gives_the_comparison_of_its_runs(teacher: Path) -> None:
    few: dict[str, Any] = {"teacher": teacher, "student": "resnet8", "method": "kd", "dataset": "shapes", "epochs": 1}
    own = code.name_of(Half)
    found = api.distill(**few, settings=FEW, seeds=2, routers=[Half, "never"], baseline="never", runs_dir="series")
    assert isinstance(found, api.Comparison)
    assert sorted((run.router, run.seed) for run in found.runs) == [
        *((name, seed) for name in (own, "never") for seed in (0, 1))
    ]
    assert [one.text.partition(":")[0] for one in found.comparisons]
    assert [row.state for row in api.runs(runs_dir="series", where={"router.name": "never"}).rows] == ["finished"] * 2


def test_a_notebook_shows_a_result_on_several_lines(distilled: dict[str, Any]) -> None:
    shown = mock.Mock()
    for result in (api.RunResult(Path("run"), Summary(**distilled)), api.inspect_spots(distilled["run"])):
        result._repr_pretty_(shown, False)
        text = shown.text.call_args.args[0]
        assert text.startswith(f"{type(result).__name__}(\n    ")
        assert max(map(len, text.splitlines())) < 160


def test_a_result_stands_wherever_a_run_does(teacher: Path) -> None:
    few: dict[str, Any] = {"teacher": teacher, "student": "resnet8", "method": "kd", "dataset": "shapes", "epochs": 1}
    run = api.distill(**few, settings=FEW)
    assert [one.run for one in api.compare(run).runs] == [str(api.inspect_spots(run).run)]
    again = api.distill(teacher=run, student="resnet8", dataset="shapes", settings=FEW, dry_run=True)
    assert next(one.name for one in again.networks if one.role == "teacher") == run.summary.network
    assert api.distill(resume=run).top1 == run.top1


def test_a_data_set_may_be_spelled_otherwise(distilled: dict[str, Any], trained_cli: CliRunner) -> None:
    spots = api.inspect_spots(dataset="Shapes", runs_dir=trained_cli.path / "runs")
    assert (spots.dataset, spots.measured is not None and spots.measured.source) == ("shapes", "survey")


def test_the_contracts_are_there_and_the_import_is_cheap() -> None:
    from sakd_cli.distillers.distiller import Distiller
    from sakd_cli.models.staged import StagedModel
    from sakd_cli.routing.router import Router

    assert (api.Distiller, api.Router, api.StagedModel) == (Distiller, Router, StagedModel)
    program = "import sys, sakd_cli.api; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0
    for name in api.__all__:
        assert getattr(api, name).__doc__, name
    for call in (*(call for call, _ in CALLS.values()), api.prepare):
        assert "return" in get_type_hints(call, {**vars(api), "Reporter": api.Reporter, "Job": api.Job})


def test_every_other_call_gives_the_document_of_its_command(trained_cli: CliRunner, distilled: dict[str, Any]) -> None:
    run = trained_cli.path / distilled["run"]
    assert api.compare(run).plain() == trained_cli.sakd("compare", str(run), "--json").document
    Image.new("RGB", (32, 32), (200, 30, 30)).save(trained_cli.path / "red.png")
    found = api.predict(run, "red.png", top=2)
    assert [len(one.classes) for one in found.predictions] == [2]
    weights = run / "student" / "model.safetensors"
    with pytest.raises(UsageError, match="is no resnet14"):
        api.import_weights(weights, model="resnet14", dataset="shapes", out="brought", settings=FEW)
    assert Path(api.report(run, "page.html").written[0]).name == "page.html"


def test_a_mistake_in_an_object_has_the_line_of_the_object(teacher: Path) -> None:
    class Wrong(api.Router):
        def decide(self) -> Any:  # type: ignore[override]
            return 1

    with pytest.raises(UsageError, match=r"test_api\.py, line \d+: .*Wrong\.decide: TypeError"):
        api.distill(teacher=teacher, student="resnet8", method="kd", router=Wrong, dataset="shapes", settings=FEW)


def test_objects_stand_where_names_stand(teacher: Path) -> None:
    import torch

    class Sure(api.Router):
        """Where the teacher is sure"""

        def decide(self, seen: api.Seen) -> Any:
            return seen.teacher_loss < seen.teacher_loss.mean()

    labels = torch.arange(60) % 3
    images = (labels[:, None, None, None] * 80 + torch.arange(8)).expand(60, 3, 8, 8).to(torch.uint8)
    data = api.Dataset.of((images, labels), (images, labels))
    layers = [nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU()]
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3))
    chosen: dict[str, Any] = {"teacher": net, "student": net, "dataset": data, "router": Sure, "method": "kd"}
    run = api.distill(**chosen, epochs=1, batch_size=20)
    assert (run.summary.network, run.summary.dataset) == ("python:sequential", "python:dataset")
    assert api.distill(**chosen, epochs=1, batch_size=20, resume=run.path).top1 == run.top1
    assert api.evaluate(run.path, settings={"timing_seconds": 0}).top1 == run.top1
    (Path(run.path) / "full").write_text("a file")
    with pytest.raises(DiskError, match="full/teachers: cannot be made"):
        api.prepare(**chosen, runs_dir=run.path / "full")
