"""Mixtures from the command line: searched, made or read from a file; what a run leaves of them and what is shown."""

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import DRAWN, CliRunner, Result
from sample_documents import sample

from sakd_cli.config.resolve import ConfigSource, resolve
from sakd_cli.documents.training import Mixtures
from sakd_cli.models.artifact import load
from sakd_cli.models.table import create
from sakd_cli.report.render import plots
from sakd_cli.report.spots.charts import mixture_chart
from sakd_cli.report.spots.tables import mixture_table
from sakd_cli.runs import build
from sakd_cli.runs.locate import locate_inputs

SIZE = f"{DRAWN} --set data.train=80 --batch-size 16 --epochs 1"
DISTIL = f"distill --teacher deep --student resnet8 --method dfa {SIZE} --set method.search_epochs=1"


@pytest.fixture(scope="module")
def cli(tmp_path_factory: pytest.TempPathFactory) -> CliRunner:
    """With a teacher of two blocks per stage."""
    cli = CliRunner(tmp_path_factory.mktemp("mixtures"))
    result(cli, f"pretrain-teacher resnet14 {SIZE} --run-dir deep")
    return cli


@pytest.fixture(scope="module")
def searched(cli: CliRunner) -> dict[str, Any]:
    """The summary of a run with a search."""
    return result(cli, f"{DISTIL} --run-dir searched --json").document


def result(cli: CliRunner, line: str) -> Result:
    done = cli.sakd(*shlex.split(line))
    assert done.code == 0, done.err
    return done


def record_of(cli: CliRunner, run: str) -> dict[str, Any]:
    return json.loads((cli.path / run / "dfa.json").read_text(encoding="utf-8"))


def job_of(cli: CliRunner, monkeypatch: pytest.MonkeyPatch, **arguments: Any) -> build.Job:
    monkeypatch.chdir(cli.path)
    data = {"name": "shapes", "train": 80, "test": 40}
    tree = {"teacher": "deep", "student": "resnet8", "data": data, "method": {"name": "dfa", **arguments}}
    return build.distillation(locate_inputs(resolve("distill", [ConfigSource("test", tree)]).config))


def test_a_run_leaves_what_it_found_and_says_so(cli: CliRunner, searched: dict[str, Any]) -> None:
    record = record_of(cli, "searched")
    assert searched["mixtures"] == record
    assert searched["search_seconds"] > 0
    assert (record["teacher"], record["dataset"], record["norm"]) == ("resnet14", "shapes", "rms")
    assert (record["distance"], record["seed"], record["search"]["search_epochs"]) == ("l2", 0, 1)
    for index, group in enumerate(record["groups"], start=1):
        assert (group["index"], group["name"], group["blocks"], group["positions"]) == (
            index,
            f"stage{index}",
            2,
            [1, 2],
        )
        assert torch.tensor(group["beta"]).softmax(0).tolist() == pytest.approx(group["alpha"], abs=1e-6)
        assert group["alpha"][group["largest"] - 1] == max(group["alpha"]) != min(group["alpha"])
    kinds = [json.loads(line)["kind"] for line in (cli.path / "searched" / "metrics.jsonl").read_text().splitlines()]
    assert kinds == ["search", "train", "eval"]
    shown = result(cli, "inspect-spots searched").out
    assert "Mixtures of the teacher's blocks" in shown
    assert f"{100 * record['groups'][2]['alpha'][1]:.1f}" in shown
    assert result(cli, "inspect-spots searched --json").document["mixtures"] == record


def test_what_is_delivered_is_the_plain_student(cli: CliRunner, searched: dict[str, Any]) -> None:
    network = load(cli.path / "searched" / "student").model
    plain = create("resnet8", 20)
    assert list(network.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(network.state_dict())
    images = torch.randn(3, 3, 32, 32)
    assert torch.equal(plain.eval()(images), network.eval()(images))


def test_the_search_has_students_of_its_own_and_its_mixtures_stay_as_they_are(
    cli: CliRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = job_of(cli, monkeypatch)
    search = build.search_of(job)
    assert search is not None
    students = [*search.network, job.network]
    weights = [torch.cat([p.flatten() for p in student.parameters()]) for student in students]
    assert not any(torch.equal(a, b) for k, a in enumerate(weights) for b in weights[:k])
    assert not any(name.endswith(("alpha0", "alpha1", "alpha2")) for name, _ in job.task.named_parameters())
    assert not any(p.requires_grad for p in job.teacher.model.parameters())
    again = build.search_of(job_of(cli, monkeypatch))
    assert all(torch.equal(a, b) for a, b in zip(search.parameters(), again.parameters(), strict=True))


def test_a_file_gives_its_mixtures_to_another_run(cli: CliRunner, searched: dict[str, Any]) -> None:
    done = result(cli, f"{DISTIL} --dfa-weights searched/dfa.json --run-dir lent --json --seed 1")
    assert record_of(cli, "lent") == record_of(cli, "searched")
    assert done.document["search_seconds"] is None
    assert "warning" not in done.err
    arguments = resolve("distill", [ConfigSource("lent", build.RunDir(cli.path / "lent").config)]).config.method
    assert arguments.weights == str(cli.path / "searched" / "dfa.json")
    other = record_of(cli, "searched") | {"dataset": "cifar100"}
    (cli.path / "cifar.json").write_text(json.dumps(other))
    warned = result(cli, f"{DISTIL} --dfa-weights cifar.json --run-dir transferred -q")
    (line,) = warned.err.splitlines()
    assert line.endswith("cifar.json: was found on cifar100, and is used on shapes")
    assert record_of(cli, "transferred") == other


def test_the_same_seed_finds_the_same_mixtures(cli: CliRunner, searched: dict[str, Any]) -> None:
    result(cli, f"{DISTIL} --router never --run-dir again -q")
    assert record_of(cli, "again")["groups"] == record_of(cli, "searched")["groups"]


@pytest.mark.parametrize("word", ["uniform", "last", "random"])
def test_what_is_made_costs_no_search(cli: CliRunner, monkeypatch: pytest.MonkeyPatch, word: str) -> None:
    job = job_of(cli, monkeypatch, weights=word)
    assert build.search_of(job) is None
    plan = result(cli, f"{DISTIL} --dfa-weights {word} --dry-run --json").document
    assert [group["blocks"] for group in plan["mixtures"]["groups"]] == [2, 2, 2]
    assert (plan["mixtures"]["weights"], plan["mixtures"]["search"]) == (word, None)
    assert "stage3" in result(cli, f"{DISTIL} --dfa-weights {word} --dry-run").out.partition("Mixtures")[2]


def changed(**change: Any) -> Any:
    return lambda record: record | change


def with_group(**change: Any) -> Any:
    return lambda record: record | {"groups": [record["groups"][0] | change, *record["groups"][1:]]}


WRONG = {
    "holds mixtures of resnet20, not of resnet14": changed(teacher="resnet20"),
    "was searched with norm none, this run has rms": changed(norm="none"),
    "has 3 blocks of stage 1": with_group(blocks=3, alpha=[0.5, 0.25, 0.25], beta=None),
    "has 2 blocks of stage 4": with_group(index=4),
    "holds no mixtures of blocks, or damaged ones": with_group(alpha=[0.5, 0.6]),
    "w.json: holds no mixtures": with_group(alpha=["half", 0.5]),
    "holds no mixtures of": changed(schema="sakd.dfa/9"),
    "or damaged ones": changed(groups=[]),
    "damaged: positions of stage 1 is not [1, 2]": with_group(positions=[2, 3]),
    "damaged: largest of stage 1 is not": with_group(largest=7),
    "damaged: entropy of stage 1 is not": with_group(entropy=0.1),
    "w.json: holds no mixtures of blocks, or damaged": with_group(beta=[9.0, 0.0]),
}


@pytest.mark.parametrize("text", WRONG)
def test_a_file_that_does_not_fit_costs_one_line(cli: CliRunner, searched: dict[str, Any], text: str) -> None:
    (cli.path / "w.json").write_text(json.dumps(WRONG[text](record_of(cli, "searched"))))
    cli.assert_rejects(shlex.split(f"{DISTIL} --dfa-weights w.json"), 2, text)


def test_a_run_goes_on_with_the_file_it_began_with_only(cli: CliRunner, searched: dict[str, Any]) -> None:
    (cli.path / "moving.json").write_text(json.dumps(record_of(cli, "searched")))
    result(cli, f"{DISTIL} --dfa-weights moving.json --run-dir begun -q")
    (cli.path / "begun" / "summary.json").unlink()
    (cli.path / "moving.json").write_text(json.dumps(record_of(cli, "searched") | {"seed": 9}))
    cli.assert_rejects(["distill", "--resume", "begun", "-q"], 2, "is not the file this run began with")


def test_the_picture_is_drawn_or_one_line_says_what_is_missing(
    cli: CliRunner, searched: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    picture = cli.path / "searched" / "dfa.png"
    picture.unlink(missing_ok=True)
    again = result(cli, "distill --resume searched")
    assert again.err.splitlines() == [
        "no dfa.png: plots need matplotlib, which is not installed (pip install 'sakd[plots]')"
    ]
    assert not picture.exists()
    monkeypatch.undo()
    pytest.importorskip("matplotlib")
    result(cli, "distill --resume searched --json")
    assert picture.read_bytes().startswith(b"\x89PNG")
    page = cli.sakd("report", "searched", "--json").document
    assert "Mixtures of the teacher's blocks" in page["sections"]
    assert "searched/report-mixtures.png" in page["written"]
    groups = [{"name": "a", "alpha": [1 / 36] * 36}, {"name": "b", "alpha": [1.0]}]
    plots.write(plots.figure_of([mixture_chart(sample(Mixtures, groups=groups))]), tmp_path / "long.png")
    assert (tmp_path / "long.png").stat().st_size > 1000


def test_blocks_that_were_left_out_are_named() -> None:
    groups = [{"name": "stage1", "alpha": [0.25, 0.75], "positions": [2, 3], "largest": 2, "entropy": 0.56}]
    sheet = mixture_table(sample(Mixtures, groups=groups, teacher="MobileNetV2"))
    assert sheet.rows == [["stage1", "2", " 25.0  75.0", "2", "0.56"]]
    assert sheet.notes[-1] == "stage1: blocks 2, 3; others differ in width"
