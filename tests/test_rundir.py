"""A run on disk: whole files or none, directories of their own, and what is read back from a damaged run."""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import SHAPES, CliRunner
from safetensors import safe_open
from safetensors.torch import load_file

from sakd_cli.errors import DiskError, UsageError
from sakd_cli.files import below, sha256, size_below
from sakd_cli.models.artifact import FORMAT, load, save_weights
from sakd_cli.rundir import RunDir, all_runs, newest_run
from sakd_cli.writing import write_aside, write_json

OF_A_RUN = {"config.yaml", "env.json", "images.json", "metrics.jsonl", "summary.json", ".lock"}
OF_A_DISTILLATION = OF_A_RUN | {"spots.jsonl", "samples.safetensors", "survey.safetensors"}
OF_A_CHECKPOINT = {"model.safetensors", "training.safetensors", "state.json", "manifest.json"}
OF_A_NETWORK = {"model.safetensors", "config.json", "README.md"}


def make_run(runs_dir: Path, name: str, config: Any, *, at: int, finished: bool = True) -> RunDir:
    """A run directory whose config.yaml was written `at` seconds."""
    folder = runs_dir / name
    folder.mkdir(parents=True)
    text = config if isinstance(config, str) else yaml.safe_dump(config)
    (folder / "config.yaml").write_text(text, encoding="utf-8")
    os.utime(folder / "config.yaml", (at, at))
    if finished:
        (folder / "summary.json").write_text("{}\n", encoding="utf-8")
    return RunDir(folder)


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_replaced_as_a_whole_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    path.write_text("old and much longer than the new one", encoding="utf-8")
    write_aside(path, b"new")
    assert (path.read_bytes(), names_in(tmp_path)) == (b"new", ["figures.json"])
    assert sha256(path) == hashlib.sha256(b"new").hexdigest()


def test_a_write_that_fails_leaves_the_old_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "figures.json"
    path.write_bytes(b"old")

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskError, match=r"figures\.json: the disk is full, .* MB needed, .* MB free"):
        write_aside(path, b"new")
    assert path.read_bytes() == b"old"


def test_the_bytes_are_on_the_disk_before_the_file_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, seen = tmp_path / "figures.json", []
    flush = os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda handle: (seen.append((os.fstat(handle).st_size, path.exists())), flush(handle))
    )
    write_aside(path, b"four")
    assert seen == [(4, False)]


def test_a_folder_that_is_not_there_is_a_disk_error(tmp_path: Path) -> None:
    with pytest.raises(DiskError, match="cannot be written") as caught:
        write_json(tmp_path / "none" / "a.json", {})
    assert caught.value.exit_code == 5


def test_json_is_one_document_and_holds_no_nan(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"a": [1, None]})
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": [1, None]}
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": [1, None]}


@pytest.mark.parametrize("moment", range(6))
def test_what_goes_away_while_a_folder_is_listed_is_left_out(tmp_path: Path, moment: int) -> None:
    for place in ("best", "last", "kd/last"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "state.json").write_bytes(b"12")
    assert size_below(tmp_path, "*.json") == 6
    names = []
    for path in below(tmp_path):
        names.append(path.name)
        if len(names) == moment + 1:
            shutil.rmtree(tmp_path)
    assert moment < len(names) <= 6
    assert {"best", "kd", "last"} <= {*names}
    assert not tmp_path.exists()
    assert size_below(tmp_path, "*.json") == 0


def test_new_directories_never_collide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.strftime", lambda form: "20260101-000000")
    made = [RunDir.create(tmp_path / "a" / "runs", "pretrain-x").path for _ in range(5)]
    assert len(set(made)) == 5
    assert names_in(tmp_path / "a" / "runs") == sorted(path.name for path in made)
    assert made[0].name == "20260101-000000-pretrain-x"


def test_a_runs_folder_that_cannot_be_made_is_a_disk_error_with_a_way_out(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file", encoding="utf-8")
    with pytest.raises(DiskError, match="cannot make a run directory") as caught:
        RunDir.create(tmp_path / "runs", "x")
    assert "--runs-dir" in (caught.value.hint or "")


def test_lines_come_back_in_order(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    assert list(run.lines("metrics.jsonl")) == []
    records = [{"step": step, "name": "ä\n"} for step in range(3)]
    for record in records:
        run.append("metrics.jsonl", record)
    assert list(run.lines("metrics.jsonl")) == records
    assert len((tmp_path / "metrics.jsonl").read_bytes().splitlines()) == 3


@pytest.mark.parametrize("cut", range(1, 14))
def test_a_torn_line_is_left_out_and_spoils_no_other(tmp_path: Path, cut: int) -> None:
    run = RunDir(tmp_path)
    for step in (1, 2):
        run.append("metrics.jsonl", {"step": step})
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    run.append("metrics.jsonl", {"step": 3})
    run.append("metrics.jsonl", {"step": 4})
    kept = [{"step": 2}] if cut == 1 else []  # only the line's end is gone
    assert list(run.lines("metrics.jsonl")) == [{"step": 1}, *kept, {"step": 3}, {"step": 4}]


@pytest.mark.parametrize("junk", [b"\x00\x00\x00", b"\xff\xfe{}", b"{'a': 1}", b'{"a": 1', b""])
def test_junk_between_the_lines_is_left_out(tmp_path: Path, junk: bytes) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b'{"a": 1}\n' + junk + b'\n{"a": 2}\n')
    assert list(RunDir(tmp_path).lines("metrics.jsonl")) == [{"a": 1}, {"a": 2}]


def test_a_line_holds_no_nan(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        RunDir(tmp_path).append("metrics.jsonl", {"loss": float("inf")})
    assert list(RunDir(tmp_path).lines("metrics.jsonl")) == []


def test_a_line_that_cannot_be_written_is_a_disk_error(tmp_path: Path) -> None:
    with pytest.raises(DiskError, match="cannot be written"):
        RunDir(tmp_path / "gone").append("metrics.jsonl", {})


@pytest.mark.parametrize("content", [None, b"", b"{", b"[1]", b"null", b"\xff\xfe"])
def test_a_damaged_document_is_named(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "summary.json").write_bytes(content)
    with pytest.raises(UsageError, match=r"summary\.json: missing or damaged"):
        RunDir(tmp_path).read_json("summary.json")


@pytest.mark.parametrize(
    "content", [None, b"", b"a: [", b"[1]", b"text", b"\xff\xfe\x00", b"a: !!python/name:os.system"]
)
def test_a_damaged_config_is_no_run(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "config.yaml").write_bytes(content)
    with pytest.raises(UsageError, match="not a run directory"):
        _ = RunDir(tmp_path).config


def test_a_run_is_finished_when_its_summary_is_there(tmp_path: Path) -> None:
    assert not make_run(tmp_path, "a", {}, at=1, finished=False).finished
    assert make_run(tmp_path, "b", {}, at=1).finished


def test_the_deliverable_is_the_folder_that_has_weights(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    (tmp_path / "student").mkdir()
    assert run.deliverable is None
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "model.safetensors").touch()
    assert run.deliverable == tmp_path / "teacher"


def test_runs_are_listed_newest_first_whatever_their_names(tmp_path: Path) -> None:
    assert all_runs(tmp_path / "none") == []
    for name, at in {"c": 1, "a": 3, "b": 2, "z": 2}.items():
        make_run(tmp_path, name, {}, at=at)
    (tmp_path / "no-run").mkdir()
    (tmp_path / "file").touch()
    assert [run.path.name for run in all_runs(tmp_path)] == ["a", "z", "b", "c"]


def test_the_newest_run_is_finished_and_fits_what_is_wanted(tmp_path: Path) -> None:
    shapes, cifar = {"model": "resnet8", "data": {"name": "shapes"}}, {"model": "resnet8", "data": {"name": "cifar10"}}
    make_run(tmp_path, "old", shapes, at=1)
    make_run(tmp_path, "wanted", shapes, at=2)
    make_run(tmp_path, "other-data", cifar, at=3)
    make_run(tmp_path, "unfinished", shapes, at=4, finished=False)
    make_run(tmp_path, "other-model", shapes | {"model": "resnet14"}, at=5)
    found = newest_run(tmp_path, {"model": "resnet8", "data.name": "shapes"})
    assert found is not None
    assert found.path.name == "wanted"
    assert newest_run(tmp_path, {"model": "resnet8", "data.name": "cifar100"}) is None
    assert newest_run(tmp_path, {"model.name": "resnet8"}) is None, "a path through a word leads nowhere"


@pytest.mark.parametrize("damaged", ["", "a: [", "[1]", "data: 3\nmodel: resnet8"])
def test_a_damaged_run_hides_no_other(tmp_path: Path, damaged: str) -> None:
    make_run(tmp_path, "sound", {"model": "resnet8", "data": {"name": "shapes"}}, at=1)
    make_run(tmp_path, "damaged", damaged, at=2)
    found = newest_run(tmp_path, {"model": "resnet8", "data.name": "shapes"})
    assert found is not None
    assert found.path.name == "sound"


def files_below(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.is_file()}


def test_a_pretraining_leaves_what_the_house_plan_says(teacher: Path) -> None:
    assert files_below(teacher) == OF_A_RUN
    assert files_below(teacher / "teacher") == OF_A_NETWORK
    assert {path.name for path in teacher.iterdir() if path.is_dir()} == {"teacher", "checkpoints"}
    assert files_below(teacher / "checkpoints" / "last") == OF_A_CHECKPOINT


def test_a_distillation_leaves_what_the_house_plan_says_and_no_pickle(
    cli: CliRunner, distilled: dict[str, Any]
) -> None:
    folder = cli.path / distilled["run"]
    assert files_below(folder) == OF_A_DISTILLATION
    assert files_below(folder / "student") == OF_A_NETWORK
    assert all(files_below(folder / "checkpoints" / name) == OF_A_CHECKPOINT for name in ("last", "best"))
    for path in (path for path in folder.rglob("*") if path.is_file()):
        match path.suffix:
            case ".safetensors":
                assert isinstance(load_file(path), dict)
            case ".json":
                assert isinstance(json.loads(path.read_text()), dict)
            case ".jsonl":
                assert all(isinstance(json.loads(line), dict) for line in path.read_text().splitlines())
            case _:
                assert path.name in ("config.yaml", "README.md", ".lock")


@pytest.mark.parametrize("place", ["student", "checkpoints/last", "checkpoints/best"])
def test_weights_open_alone_and_say_what_they_are(cli: CliRunner, distilled: dict[str, Any], place: str) -> None:
    weights = cli.path / distilled["run"] / place / "model.safetensors"
    with safe_open(weights, "pt") as opened:
        header = json.loads(opened.metadata()["sakd"])
    card = json.loads(header["card"])
    assert (header["format"], card["architecture"], card["dataset"]) == (FORMAT, "resnet8", "shapes")
    assert (len(card["classes"]), len(card["mean"]), len(card["std"]), card["side"]) == (20, 3, 3, SHAPES["size"])
    assert load(weights).model(torch.zeros(2, 3, 32, 32)).shape == (2, 20)


def test_the_summary_has_the_figures_of_both_networks_and_names_the_teacher(
    cli: CliRunner, teacher: Path, distilled: dict[str, Any]
) -> None:
    folder = cli.path / distilled["run"]
    kept = json.loads((folder / "summary.json").read_text())
    assert len(kept.pop("sha256")) == 64
    assert kept == distilled | {"run": None}
    assert (distilled["last"]["epoch"], distilled["last"]["split"]) == (1, "test")
    assert (distilled["best"]["selected_on"], distilled["images"]) == ("validation", 90)
    assert "held out" in distilled["protocol"]
    assert distilled["teacher"]["sha256"] == sha256(teacher / "teacher" / "model.safetensors")
    assert distilled["teacher"]["top1"] == json.loads((teacher / "summary.json").read_text())["last"]["top1"]


def test_a_run_is_repeated_bit_for_bit_from_its_config(cli: CliRunner, distilled: dict[str, Any]) -> None:
    again = cli.sakd("distill", "--config", f"{distilled['run']}/config.yaml", "--quiet", "--json")
    assert again.err == ""
    assert again.document["run"] != distilled["run"]
    first, second = (cli.path / summary["run"] for summary in (distilled, again.document))
    for name in ("config.yaml", "spots.jsonl", "metrics.jsonl", "samples.safetensors"):
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
    ours, theirs = (load_file(path / "student" / "model.safetensors") for path in (first, second))
    assert not [name for name in ours if not torch.equal(ours[name], theirs[name])]


def test_the_same_network_is_always_the_same_file(teacher: Path, tmp_path: Path) -> None:
    network = load(teacher / "teacher")
    for number in range(8):
        save_weights(tmp_path / f"{number}.safetensors", network.model, network.card)
    assert {sha256(path) for path in tmp_path.iterdir()} == {network.sha256}
