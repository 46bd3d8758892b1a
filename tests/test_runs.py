"""`sakd runs`, and the one line of a script that makes, resumes or reports a run."""

import os
import shlex
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import DRAWN, CliRunner
from filelock import FileLock
from yaml import YAMLError

from sakd_cli import runindex
from sakd_cli.files import parse_yaml
from sakd_cli.report.runs import entries
from sakd_cli.rundir import RunDir
from sakd_cli.runs import build

TINY = shlex.split(f"{DRAWN} --set data.train=60 --batch-size 20 --epochs 1 -q")
RUN = ["distill", "--teacher", "./runs/t", "--student", "resnet8", *TINY]


@pytest.fixture(scope="module")
def there(cli: CliRunner) -> CliRunner:
    """A teacher `t`, a student `s` of it, and `broken`, whose settings are damaged."""
    for command in (["pretrain-teacher", "resnet14", *TINY, "--run-dir", "runs/t"], [*RUN, "--run-dir", "runs/s"]):
        result = cli.sakd(*command)
        assert result.code == 0, result.err
    (cli.path / "runs" / "broken").mkdir()
    (cli.path / "runs" / "broken" / "config.yaml").write_text("a: [")
    return cli


def names(cli: CliRunner, *words: str) -> list[str]:
    return [Path(row["run"]).name for row in cli.sakd("runs", *words, "--json").document["rows"]]


@pytest.mark.parametrize("moment", ["found", "read", "judged"])
def test_a_run_that_others_remove_meanwhile_is_left_out(
    there: CliRunner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    shutil.copytree(there.path / "runs", tmp_path / "runs")
    place, name = {
        "found": (runindex, "read_config"),
        "read": (entries, "_whole_and_top1"),
        "judged": (entries, "run_entry"),
    }[moment]
    plain = getattr(place, name)

    def late(*given: Any, **more: Any) -> Any:
        shutil.rmtree(tmp_path / "runs" / "s", ignore_errors=True)
        return plain(*given, **more)

    monkeypatch.setattr(place, name, late)
    assert sorted(names(CliRunner(tmp_path))) == ["broken", "t"]


def test_runs_are_listed_filtered_and_sorted(there: CliRunner) -> None:
    assert sorted(names(there)) == ["broken", "s", "t"]
    assert names(there, "--where", "method.name=fitnet") == ["s"]
    assert names(there, "--where", "network=resnet14", "--where", "seed=0") == ["t"]
    assert names(there, "--where", "state=damaged") == ["broken"]
    assert names(there, "--where", "seed=9") == []
    assert names(there, "--sort", "network") == ["t", "s", "broken"]
    assert names(there, "--sort=-network") == ["s", "t", "broken"]
    assert "resnet14" in there.sakd("runs").out
    nothing = there.sakd("runs", "--runs-dir", "nowhere", "--json")
    assert (nothing.code, nothing.document["rows"]) == (0, [])
    assert nothing.err == "warning: nowhere: no such folder\n"
    there.assert_rejects(["runs", "--sort", "size"], 2, "no such column")
    there.assert_rejects(["runs", "--where", "seed"], 2, "key=value")
    for key in ("method.nam", "networ", "nothing"):
        there.assert_rejects(["runs", "--where", f"{key}=fitnet"], 2, f"unknown key '{key}'")
    assert names(there, "--where", "method.power=9") == []  # of a method that no run has
    there.assert_rejects(["runs", "move", "runs/s"], 2, "neither")
    os.utime(there.path / "runs" / "s" / "config.yaml", (0, 0))  # as if it had begun long ago
    rows = there.sakd("runs", "--json").document["rows"]
    assert all(row["changed"] > "2000" for row in rows), "a run changes until it ends"


def test_a_run_that_is_in_use_is_told_before_anything_is_built(
    there: CliRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, at = RunDir(there.path / "runs/s"), []
    monkeypatch.setattr(build, "build", lambda *arguments, **more: at.append("built"))
    with run.locked():
        assert run.in_use
        there.assert_rejects(["distill", "--resume", "runs/s", "--epochs", "9"], 8, "in use by process")
        there.assert_rejects([*RUN, "--run-dir", "runs/s"], 8, "in use by process")
    assert at == []


def test_a_run_that_goes_on_needs_no_room_for_what_it_has(there: CliRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(there.path / "runs/s", there.path / "room")
    (free := SimpleNamespace()).free = 700_000  # a checkpoint of resnet8 more, but not all that a run leaves
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    there.assert_rejects([*RUN, "--run-dir", "new"], 5, "the disk is full, 1.8")
    result = there.sakd("distill", "--resume", "room", "--epochs", "2", "-q")
    assert result.code == 0, result.err
    free.free = 500_000
    there.assert_rejects(["distill", "--resume", "room", "--epochs", "3", "-q"], 5, "the disk is full, 0.6")


def test_who_looks_whether_a_run_is_in_use_keeps_nobody_out(there: CliRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunDir(there.path / "runs/s")
    looking = FileLock(run.path / ".lock", thread_local=False)
    looking.acquire()
    timer = threading.Timer(0.1, looking.release)
    timer.start()
    with run.locked():
        timer.join()
    monkeypatch.setattr(FileLock, "acquire", lambda *_, **__: (_ for _ in ()).throw(OSError("read-only")))
    assert not run.in_use  # on a disk that is not to be written nobody works on it
    (run.path / ".holder").write_text("{}")
    assert run.in_use
    (run.path / ".holder").unlink()


def test_a_run_is_shown_with_its_settings(there: CliRunner) -> None:
    (row,) = there.sakd("runs", "show", "runs/s", "--json").document["rows"]
    assert row["settings"]["method"]["name"] == "fitnet"
    assert "train.momentum: 0.9" in there.sakd("runs", "show", "runs/s").out


def test_only_what_nobody_needs_is_removed_and_only_when_meant(there: CliRunner) -> None:
    there.assert_rejects(["runs", "rm", "runs/t", "--yes"], 2, "it is the teacher of")
    there.assert_rejects(["runs", "rm", "runs/s"], 2, "would be removed for ever")
    shutil.copytree(there.path / "runs" / "s", there.path / "runs" / "copy")
    with FileLock(there.path / "runs" / "copy" / ".lock"):
        there.assert_rejects(["runs", "rm", "runs/copy", "--yes"], 2, "a process works on it")
    assert there.sakd("runs", "rm", "runs/copy", "--yes", "--json").document["removed"] == ["runs/copy"]
    assert sorted(path.name for path in (there.path / "runs").iterdir()) == ["broken", "s", "t"]


def test_a_removal_that_was_cut_short_stands_in_no_way_and_a_link_is_no_run(there: CliRunner) -> None:
    runs = there.path / "runs"
    shutil.copytree(runs / "s", runs / "copy")
    shutil.copytree(runs / "s", runs / ".copy.removed")
    (runs / "link").symlink_to("s")
    there.assert_rejects(["runs", "rm", "runs/link", "--yes"], 2, "it is a symbolic link")
    there.assert_rejects(["runs", "rm", "runs/copy", "runs/link", "--yes"], 2, "it is a symbolic link")
    assert there.sakd("runs", "rm", "runs/copy", "--yes").code == 0
    (runs / "link").unlink()
    assert sorted(path.name for path in runs.iterdir()) == ["broken", "s", "t"]
    shutil.copytree(runs / "s", runs / ".copy.removed2")
    assert sorted(names(there)) == ["broken", "s", "t"]
    assert there.sakd("runs", "rm", "runs/copy", "--yes").code == 0, (
        "the same line again ends a removal that was killed"
    )
    assert sorted(path.name for path in runs.iterdir()) == ["broken", "s", "t"]
    there.assert_rejects(["runs", "rm", "runs/copy", "--yes"], 2, "not a run directory")


@pytest.mark.parametrize(
    "text",
    [
        "a: 1\nb:\n  c: [1, x]\nd:\n- 2\n",
        "# said\na: 1\n\n# more\nb: |\n  c: 1\n\n  d\ne: 2\n",
        "a: 'x\n\n  b: 1'\nc: 2\n",
        "a: {b: 1,\n  c: 2}\nd: >-\n  e\n",
        "? a\n: 1\nb: 2\n",
        "{a: 1, b: 2}\n",
        "--- \na: 1\n",
        "1: 2\n",
        "- a\n- b\n",
        "a",
        "",
        "a: [1,\n2]\n",
        "a: &x 1\nb: 2\n",
    ],
)
def test_settings_by_blocks_are_those_of_the_whole_file(text: str) -> None:
    assert runindex._by_blocks(text) == parse_yaml(text)
    for parse in (runindex._by_blocks, parse_yaml):
        with pytest.raises(YAMLError, match="'a' stands twice"):
            parse("a: 1\na: 2\n")


def test_a_folder_of_runs_that_may_not_be_read_is_not_called_empty(
    there: CliRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    (there.path / "shut").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "shut")
    for words in ("runs", "inspect-spots", "eval", "distill --teacher resnet20 --student resnet8 --dataset shapes"):
        there.assert_rejects([*words.split(), "--runs-dir", "shut"], 5, "shut: cannot be read: Permission denied")


def test_settings_that_may_not_be_read_are_not_called_damaged(
    there: CliRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    (there.path / "shut.d").mkdir()
    (there.path / "shut.d" / "config.yaml").write_text("[")
    for shut, code, what in (("", 4, "damaged"), ("config.yaml", 5, "not to be read")):
        monkeypatch.setattr(os, "access", lambda path, mode, shut=shut: Path(path).name != shut)
        there.assert_rejects(["inspect-spots", "shut.d"], code, f"its config.yaml is {what}")


def test_settings_whose_keys_are_numbers_are_damaged(there: CliRunner) -> None:
    odd = there.path / "odd" / "run"
    odd.mkdir(parents=True)
    (odd / "config.yaml").write_text("1: 2\ntask: distill\n")
    there.assert_rejects(["runs", "show", "odd/run"], 4, "its config.yaml is damaged")
    assert there.sakd("runs", "--runs-dir", "odd", "--json").document["rows"][0]["state"] == "damaged"


def test_one_line_makes_resumes_and_reports_a_run(there: CliRunner) -> None:
    line = [*RUN, "--run-dir", "once", "--resume", "auto", "--json"]
    made = there.sakd(*line).document
    before = there.tree()
    assert there.sakd(*line).document == made
    assert there.tree() == before
    (there.path / "once" / "summary.json").unlink()
    assert there.sakd(*line).document["last"] == made["last"]
    there.assert_rejects([*line, "--seed", "3"], 2, "seed was 0 and is 3")
    refused = [*RUN, "--seeds", "100000000", "--dry-run"]
    there.assert_rejects(refused, 2, "at most 10000 runs")


def test_the_index_answers_for_runs_that_look_as_before_and_for_no_others(
    there: CliRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sixty runs: the second list reads no file of a run; what was changed or is gone since then is noticed."""
    many = there.path / "many"
    for number in range(60):
        shutil.copytree(there.path / "runs" / "s", many / f"s{number}", ignore=shutil.ignore_patterns("*.safetensors"))
    first = there.sakd("runs", "--runs-dir", "many", "--json").out
    assert (many / ".index.json").is_file()
    with monkeypatch.context() as patched:
        patched.setattr(RunDir, "require_own_settings", None)
        assert there.sakd("runs", "--runs-dir", "many", "--json").out == first
    summary = many / "s7" / "summary.json"
    summary.write_text(summary.read_text().replace('"top1": ', '"top1": 1', 1))
    config = many / "s8" / "config.yaml"
    config.write_text(config.read_text().replace("momentum: 0.9", "momentum: 0.8"))
    shutil.rmtree(many / "s9")
    rows = {Path(row["run"]).name: row for row in there.sakd("runs", "--runs-dir", "many", "--json").document["rows"]}
    assert [name for name, row in rows.items() if row["state"] == "damaged"] == ["s8", "s7"]
    assert len(rows) == 59
    (many / ".index.json").write_text((many / ".index.json").read_text().replace('"finished"', '"stopped"', 1)[:-9])
    assert len(names(there, "--runs-dir", "many")) == 59, "an index that is damaged is read anew"


def test_neither_a_second_teacher_nor_a_run_whose_rates_are_repeated_is_removed(there: CliRunner) -> None:
    for name, seed in (("u", "5"), ("v", "6")):
        made = ["pretrain-teacher", "resnet14", *TINY, "--seed", seed, "--run-dir", f"more/{name}"]
        assert there.sakd(*made).code == 0
    two = ["distill", "--teacher", "./more/u", "--teacher=./more/v", "--student", "resnet8", *TINY]
    rates = [*RUN, "--router", "random-matched", "--set", "router.run=more/adaptive", "--run-dir", "more/repeated"]
    for command in ([*two, "--run-dir", "more/two"], [*RUN, "--run-dir", "more/adaptive"], rates):
        result = there.sakd(*command)
        assert result.code == 0, result.err
    assert "run: more/adaptive\n" in (there.path / "more" / "repeated" / "config.yaml").read_text()
    there.assert_rejects(["runs", "rm", "more/v", "--yes"], 2, "it is the teacher of")
    there.assert_rejects(["runs", "rm", "more/adaptive", "--yes"], 2, "repeats its rates")
    (there.path / "elsewhere").mkdir()
    (there.path / "more").rename(there.path / "elsewhere" / "more")
    run = there.path / "elsewhere" / "more" / "repeated"
    (run / "summary.json").unlink()
    result = there.sakd("distill", "--resume", str(run), "-q")
    assert result.code == 0, result.err
    assert str(there.path / "more") not in (run / "config.yaml").read_text(), "no place where it was before"
    lines = (there.path / "elsewhere" / "more" / "adaptive" / "spots.jsonl").read_text()
    (there.path / "elsewhere" / "more" / "adaptive" / "spots.jsonl").write_text(lines + lines)
    (run / "summary.json").unlink()
    assert "is not the record that this run began with" in there.sakd("distill", "--resume", str(run), "-q").err
