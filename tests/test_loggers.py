"""The numbers of a run, shown elsewhere too: every logger of the table, with its library or with what stands for it."""

import csv
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import PAIR, TINY, CliRunner

from sakd_cli.engine.loggers import LOGGERS, logging_to
from sakd_cli.rundir import RunDir


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_csv_is_a_table_of_all_lines_also_after_a_resume(trained_cli: CliRunner) -> None:
    run = trained_cli.path / "as-csv"
    assert trained_cli.sakd(*PAIR, *TINY, "--run-dir", str(run), "--log", "csv", "-q").code == 0
    rows = list(csv.DictReader((run / "metrics.csv").read_text().splitlines()))
    assert [float(row["eval/top1"]) for row in rows if row["eval/top1"]] == [lines(run)[-1]["top1"]]
    assert [row["step"] for row in rows if row["train/loss"]] == ["2"]
    (run / "summary.json").unlink()
    (run / "metrics.csv").unlink()
    extended = ["distill", "--resume", str(run), "--epochs", "2", "--log", "csv", "-q"]
    assert trained_cli.sakd(*extended).code == 0
    assert len([row for row in csv.DictReader((run / "metrics.csv").read_text().splitlines()) if row["eval/top1"]]) == 2


def test_csv_has_all_of_an_epoch_before_the_epoch_is_saved(tmp_path: Path) -> None:
    """A run that is killed after its last epoch logs no more lines, and so its table is not written again."""
    run = RunDir(tmp_path)
    with logging_to(run, ["csv"], print):
        for name, line in (("metrics.jsonl", {"kind": "eval", "epoch": 1, "top1": 2.0}), ("spots.jsonl", {"ce": 3.0})):
            run.append(name, {"epoch": 1} | line)
        rows = list(csv.DictReader((tmp_path / "metrics.csv").read_text().splitlines()))
    assert [(row["eval/top1"], row["spots/ce"]) for row in rows] == [("2.0", ""), ("", "3.0")]


def test_mlflow_gets_settings_and_metrics(trained_cli: CliRunner) -> None:
    mlflow = pytest.importorskip("mlflow")
    run = trained_cli.path / "as-mlflow"
    result = trained_cli.sakd(*PAIR, *TINY, "--run-dir", str(run), "--log", "mlflow,csv", "-q")
    assert (result.code, "mlflow" in result.err) == (0, False)
    client = mlflow.MlflowClient(tracking_uri=(run / "mlruns").as_uri())
    (found,) = client.search_runs([client.get_experiment_by_name("sakd").experiment_id])
    assert found.data.metrics["eval/top1"] == lines(run)[-1]["top1"]
    assert (found.data.params["method.name"], found.info.status) == ("fitnet", "FINISHED")
    assert (run / "metrics.csv").is_file()


def test_wandb_is_offline_unless_told_otherwise_and_may_fail(
    trained_cli: CliRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    logged = SimpleNamespace(log=lambda values: seen.append(values), finish=lambda: seen.append("finished"))
    module = SimpleNamespace(init=lambda **about: seen.append(about) or logged, Settings=lambda **about: about)
    monkeypatch.setitem(sys.modules, "wandb", module)
    run = trained_cli.path / "as-wandb"
    assert trained_cli.sakd(*PAIR, *TINY, "--run-dir", str(run), "--log", "wandb", "-q").code == 0
    about, *points, end = seen
    assert (about["mode"], about["resume"], about["dir"]) == ("offline", "allow", str(run))
    assert about["settings"]["symlink"] is False, "no run is written that holds one"
    assert about["id"] == json.loads((run / "env.json").read_text())["id"]
    assert any(point.get("eval/top1") == lines(run)[-1]["top1"] for point in points)
    assert end == "finished"

    def broken(**about: Any) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(module, "init", broken)
    result = trained_cli.sakd(*PAIR, *TINY, "--run-dir", str(run) + "-2", "--log", "wandb", "-q")
    warning = "warning: --log wandb: ConnectionError: no route to host; the run goes on without it"
    assert (result.code, result.err.splitlines()[-1]) == (0, warning)


@pytest.mark.parametrize("name", [name for name in LOGGERS if name != "csv"])
def test_what_is_missing_is_one_line_before_anything_is_written(
    trained_cli: CliRunner, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    result = trained_cli.assert_rejects([*PAIR, *TINY, "--log", name, "-q"], 2, f"--log {name}: it is not installed")
    assert f"pip install 'sakd[{name}]'" in result.err
