"""A run goes on with what it began with, or says what is another now: settings, length, teacher."""

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import DRAWN, CliRunner
from safetensors.torch import load_file

from sakd_cli import writing
from sakd_cli.errors import DamagedError
from sakd_cli.models.artifact import NetworkCard, save_weights
from sakd_cli.models.table import create
from sakd_cli.rundir import RunDir

TINY = shlex.split(f"{DRAWN} --set data.train=60 --batch-size 20")
RUN = ["distill", "--teacher", "./t", "--student", "resnet8", *TINY, "-q"]


@pytest.fixture(scope="module")
def runs(cli: CliRunner) -> CliRunner:
    """A teacher `t`; from it `short` of two epochs, and `long`, which decays after the same epochs, of four."""
    for arguments in (
        ["pretrain-teacher", "resnet8", *TINY, "--epochs", "1", "--run-dir", "t", "-q"],
        [*RUN, "--epochs", "2", "--milestones", "1", "--run-dir", "short"],
        [*RUN, "--epochs", "4", "--milestones", "1,3", "--run-dir", "long"],
    ):
        result = cli.sakd(*arguments)
        assert result.code == 0, result.err
    return cli


def stopped(cli: CliRunner, name: str) -> Path:
    """A copy of `short` as it was after its first epoch."""
    run = cli.path / name
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(cli.path / "short", run)
    shutil.rmtree(run / "checkpoints" / "last")
    (run / "checkpoints" / "previous").rename(run / "checkpoints" / "last")
    for file in ("summary.json", "survey.safetensors"):
        (run / file).unlink()
    return run


EDITS = {
    "train.lr": 0.5,
    "train.momentum": 0.1,
    "train.weight_decay": 0.0,
    "train.batch_size": 30,
    "train.epochs": 3,
    "train.nesterov": True,
    "train.lr_decay": 0.5,
    "train.milestones": [],
    "runtime.precision": "bf16",
    "method.ce_weight": 0.0,
    "method.temperature": 2.0,
    "router.tau": 2.0,
    "data.split_seed": 3,
    "data.test": 30,
    "data.validation": 0.2,
    "data.mean": [0.1, 0.1, 0.1],
    "seed": 7,
    "teacher.sha256": "0" * 64,
}


@pytest.mark.parametrize("key", EDITS)
def test_an_edited_setting_is_refused_with_both_values(runs: CliRunner, key: str) -> None:
    run = stopped(runs, "edited")
    config = yaml.safe_load((run / "config.yaml").read_text())
    *parents, leaf = key.split(".")
    section = config
    for parent in parents:
        section = section[parent]
    old, section[leaf] = section[leaf], EDITS[key]
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    result = runs.assert_rejects(["distill", "--resume", "edited"], 4, key)
    was, now = (json.dumps(value)[:40] for value in (old, EDITS[key]))
    assert f"{key} was {was} and is {now}" in result.err


def test_all_differences_are_named_and_what_may_change_is_none(runs: CliRunner) -> None:
    run = stopped(runs, "several")
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("momentum: 0.9", "momentum: 0.8").replace("\nseed: 0", "\nseed: 3"))
    result = runs.assert_rejects(["distill", "--resume", "several"], 4, "made with other settings")
    assert "train.momentum was 0.9 and is 0.8" in result.err
    assert "seed was 0 and is 3" in result.err
    free = text.replace("log_every: 50", "log_every: 1").replace("save_every: null", "save_every: 1")
    (run / "config.yaml").write_text(free)
    result = runs.sakd("distill", "--resume", "several", "--device", "cpu", "-q")
    assert result.code == 0, result.err


def test_an_extended_run_is_the_longer_run(runs: CliRunner) -> None:
    run = runs.path / "extended"
    shutil.copytree(runs.path / "short", run)
    result = runs.sakd("distill", "--resume", "extended", "--epochs", "4", "--milestones", "1,3", "--json", "-q")
    assert result.document["extended"] == [2]
    assert result.document["epochs"] == 4
    assert "extended from 2" in runs.sakd("distill", "--resume", "extended").out
    for name in ("student/model.safetensors", "survey.safetensors", "samples.safetensors", "spots.jsonl"):
        assert (run / name).read_bytes() == (runs.path / "long" / name).read_bytes()
    ours, theirs = (load_file(one / "checkpoints/last/training.safetensors") for one in (run, runs.path / "long"))
    assert all((ours[name] == theirs[name]).all() for name in theirs if not name.startswith("random/"))
    assert yaml.safe_load((run / "config.yaml").read_text())["train"]["milestones"] == [1, 3]


def test_a_stopped_run_can_be_extended_and_keeps_its_milestones(runs: CliRunner) -> None:
    run = stopped(runs, "further")
    assert runs.sakd("distill", "--resume", "further", "--epochs", "3", "-q").code == 0
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert (config["train"]["epochs"], config["train"]["milestones"]) == (3, [1])
    again = runs.sakd("distill", "--resume", "further", "--epochs", "3", "--json")
    assert again.document["extended"] == [2], "it is finished, and nothing is done"


def test_a_run_is_neither_shortened_nor_given_another_past(runs: CliRunner) -> None:
    runs.assert_rejects(["distill", "--resume", "long", "--epochs", "3", "--milestones", "1"], 2, "train.epochs was 4")
    refused = ["distill", "--resume", "short", "--epochs", "4", "--milestones", "2"]
    runs.assert_rejects(refused, 4, "train.milestones up to epoch 2 was [1] and is [2]")
    assert runs.sakd("distill", "--resume", "short", "--json", SAKD_EPOCHS="9").code == 2, "only the command extends"


def test_a_teacher_that_has_moved_is_taken_if_it_is_the_same(runs: CliRunner) -> None:
    run = stopped(runs, "moved")
    (runs.path / "t").rename(runs.path / "elsewhere")
    try:
        lost = runs.sakd("distill", "--resume", "moved", "-q")
        assert (lost.code, "--teacher-weights" in lost.err) == (2, True), lost.err
        result = runs.sakd("distill", "--resume", "moved", "--teacher-weights", "elsewhere", "-q")  # its run directory
        assert result.code == 0, result.err
        assert "elsewhere/teacher" in yaml.safe_load((run / "config.yaml").read_text())["teacher"]["weights"]
        stopped(runs, "moved")
        other = ["distill", "--resume", "moved", "--teacher-weights", "long/student"]
        assert "is not the teacher this run began with" in runs.sakd(*other).err
    finally:
        (runs.path / "elsewhere").rename(runs.path / "t")


def test_a_finished_run_counts_and_its_unfinished_double_is_named(runs: CliRunner) -> None:
    run = runs.path / "again"
    shutil.copytree(runs.path / "short", run)
    (run / "summary.json").unlink()
    alone = runs.sakd("compare", "short", "long", "--json").document
    document = runs.sakd("compare", "short", "again", "long", "--json").document
    assert [group["top1"] for group in document["groups"]] == [group["top1"] for group in alone["groups"]]
    assert document["comparisons"][0]["difference"] == alone["comparisons"][0]["difference"]
    assert "counts once: short, not again (not finished)" in " ".join(
        runs.sakd("compare", "short", "again").out.split()
    )


CARDS = {
    "std": [(0.3, 0.0, 0.3), (0.3, -0.1, 0.3), (0.3, float("nan"), 0.3), (0.3, float("inf"), 0.3), ()],
    "mean": [(), (0.5, float("nan"), 0.5), (0.5,)],
    "side": [0, -1, 10**9],
    "classes": [()],
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in CARDS.items() for value in values])
def test_a_card_with_impossible_numbers_is_refused_by_every_command(runs: CliRunner, key: str, value: Any) -> None:
    card = NetworkCard("resnet8", "shapes", tuple("ab"), (0.5,) * 3, (0.3,) * 3, 32)._replace(**{key: value})
    save_weights(runs.path / "odd.safetensors", create("resnet8", 2), card)
    for command in (
        ["eval", "odd.safetensors", "--dataset", "shapes", "-q"],
        ["export", "odd.safetensors", "--out", "exported", "-q"],
        [*RUN[:1], "--teacher", "./odd.safetensors", *RUN[3:]],
    ):
        runs.assert_rejects(command, 2, {"side": "pixels", "classes": "no classes"}.get(key, f"the {key} ["))


@pytest.mark.parametrize("reader", [["compare"], ["inspect-spots"], ["report"]])
def test_no_reader_shows_settings_that_a_finished_run_was_not_trained_with(runs: CliRunner, reader: list[str]) -> None:
    run = runs.path / "relabelled"
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(runs.path / "short", run)
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("weight_decay: 0.0005", "weight_decay: 0.5", 1))
    runs.assert_rejects([*reader, "relabelled"], 4, "weight_decay was 0.0005 and is 0.5")


def test_no_figure_of_a_summary_can_be_changed_without_a_word(runs: CliRunner) -> None:
    run = runs.path / "better"
    shutil.copytree(runs.path / "short", run)
    summary = json.loads((run / "summary.json").read_text())
    summary["last"]["top1"] += 1
    (run / "summary.json").write_text(json.dumps(summary, indent=2))
    for command in (["compare", "better"], ["distill", "--resume", "better"], ["report", "better"]):
        runs.assert_rejects(command, 4, "summary.json: missing or damaged")


def edits(run: Path) -> dict[str, Any]:
    """What may happen to the files of a run that have no digest of their own: file -> its new content."""
    lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    spots = (run / "spots.jsonl").read_text()
    card = json.loads((run / "student/config.json").read_text())
    return {
        "metrics.jsonl": lines[0].replace(b'"loss": ', b'"loss": 1') + b"".join(lines[1:]),
        "metrics.jsonl, a line less": b"".join(lines[1:]),
        "metrics.jsonl, a line more": b"".join([lines[0], *lines]),
        "metrics.jsonl, missing": None,
        "spots.jsonl": spots.replace('"fraction": 0.', '"fraction": 0.1').encode(),
        "student/config.json": json.dumps(card | {"classes": card["classes"][::-1]}).encode(),
        "env.json": (run / "env.json").read_bytes().replace(b'"cpu"', b'"gpu"'),
    }


@pytest.mark.parametrize("ended", [True, False], ids=["finished", "stopped"])
def test_a_figure_that_others_changed_is_not_shown(runs: CliRunner, ended: bool) -> None:
    run = stopped(runs, "touched")
    if ended:
        shutil.rmtree(run)
        shutil.copytree(runs.path / "short", run)
    readers = {"compare": ["compare", "touched"], "spots": ["inspect-spots", "touched"]}
    readers["report"] = ["report", "touched", "--out", "page.html", "-q"]
    for what, content in edits(run).items():
        name = what.partition(",")[0]
        before = (run / name).read_bytes()
        (run / name).unlink()
        if content is not None:
            (run / name).write_bytes(content)
        whose = {"metrics.jsonl": ("compare",), "env.json": ()}.get(name, ("spots",))
        for reader in (*whose, "report"):
            runs.assert_rejects(readers[reader], 4, f"touched/{name}")
        (run / name).write_bytes(before)
    assert all(runs.sakd(*readers[name]).code == 0 for name in ("compare", "spots"))


def test_a_log_goes_on_with_its_digest_and_a_checkpoint_of_later_goes_with_it(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.append("metrics.jsonl", {"a": 1})
    first = run.log_ends()["metrics.jsonl"]
    run.append("metrics.jsonl", {"a": 2})
    later = run.log_ends()["metrics.jsonl"]
    for name, end in (("last", first), ("residual-1/last", later)):
        state = {"logs": {"metrics.jsonl": end.bytes}, "log_sha256": {"metrics.jsonl": end.sha256}}
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        writing.write_json(tmp_path / "checkpoints" / name / "state.json", state)
    assert list(RunDir(tmp_path).lines("metrics.jsonl")) == [{"a": 1}, {"a": 2}]
    again = RunDir(tmp_path)
    again.cut_logs({"metrics.jsonl": first.bytes}, {"metrics.jsonl": first.sha256})
    assert not (tmp_path / "checkpoints/residual-1/last").exists(), "it knows of lines that are no longer there"
    again.append("metrics.jsonl", {"a": 2})
    assert again.log_ends()["metrics.jsonl"] == later
    (tmp_path / "metrics.jsonl").write_bytes(b'{"a": 3}\n{"a": 2}\n')
    with pytest.raises(DamagedError, match="changed by others"):
        list(again.lines("metrics.jsonl"))


def test_a_folder_of_runs_may_be_moved_and_its_runs_go_on(runs: CliRunner) -> None:
    """From any working folder: the teacher is named from the old one, and found above the run."""
    run = stopped(runs, "project")
    text = (run / "config.yaml").read_text()
    assert "weights: t/teacher\n" in text
    elsewhere = runs.path / "else" / "where"
    (elsewhere / "inner").mkdir(parents=True)
    (runs.path / "project").rename(elsewhere / "project")
    (runs.path / "t").rename(elsewhere / "t")
    try:
        assert runs.sakd("distill", "--resume", "else/where/project", "-q").code == 0
        assert CliRunner(elsewhere / "inner").sakd("compare", "../project").code == 0
    finally:
        (elsewhere / "t").rename(runs.path / "t")


LEFT = {
    "survey.safetensors": ["inspect-spots", "report"],
    "samples.safetensors": ["inspect-spots", "report"],
    "images.json": ["inspect-spots", "report"],
    "student/config.json": ["eval", "export", "predict", "inspect-spots", "report"],
    "student/model.safetensors": ["eval", "export", "predict"],
    "env.json": ["report"],
}


@pytest.mark.parametrize("name", LEFT)
def test_no_reader_does_without_a_file_that_a_finished_run_has_left(runs: CliRunner, name: str) -> None:
    """Deleted, or that of another run: one line, where the figures would be others; where they are fewer it is told."""
    run = runs.path / "finished"
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(runs.path / "short", run)
    more = {"predict": ["nowhere.png"], "report": ["--out", "page.html"], "export": ["--out", "exported"]}
    for other in (run / "no such file", runs.path / "long" / name):
        (run / name).unlink(missing_ok=True)
        if other.is_file() and name not in ("env.json", "images.json"):  # whose seal is right, and which is the same
            shutil.copyfile(other, run / name)
        for reader in LEFT[name]:
            if not (run / name).exists() and name in ("survey.safetensors", "samples.safetensors"):
                result = runs.sakd(reader, "finished", *more.get(reader, []))
                assert (result.code, f"{name}: is gone" in result.err) == (0, True), result.err
                continue
            runs.assert_rejects([reader, "finished", *more.get(reader, [])], 4, name)


def test_a_seal_by_another_name_is_no_seal(runs: CliRunner) -> None:
    run = runs.path / "unsealed"
    shutil.copytree(runs.path / "short", run)
    text = (run / "env.json").read_text()
    (run / "env.json").write_text(text.replace('"sha256"', '"sha257"'))
    runs.assert_rejects(["report", "unsealed"], 4, "env.json: missing or damaged")


@pytest.mark.parametrize("name", ["metrics.jsonl", "spots.jsonl"])
def test_a_run_whose_log_was_changed_does_not_go_on(runs: CliRunner, name: str) -> None:
    for change in (lambda log: log.replace(b"0.", b"1.", 1), lambda log: b"", lambda log: None):
        run = stopped(runs, "rewritten")
        content = change((run / name).read_bytes())
        (run / name).unlink()
        if content is not None:
            (run / name).write_bytes(content)
        result = runs.sakd("distill", "--resume", "rewritten", "-q")
        assert (result.code, result.err.count("\n")) == (4, 2), result.err
        assert f"{name}: was changed by others" in result.err


def test_a_network_is_not_scored_by_settings_that_its_run_was_not_trained_with(runs: CliRunner) -> None:
    run = runs.path / "other settings"
    shutil.copytree(runs.path / "short", run)
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("\nseed: 0", "\nseed: 3"))
    for words in (["eval", str(run)], ["eval", str(run), "short"], ["export", str(run), "--out", "nowhere"]):
        runs.assert_rejects([*words, "-q"], 4, "seed was 0 and is 3")


def test_a_summary_of_another_run_and_counts_that_are_gone_are_told(runs: CliRunner) -> None:
    run = runs.path / "with another summary"
    shutil.copytree(runs.path / "short", run)
    shutil.copy(runs.path / "long" / "summary.json", run / "summary.json")
    for words in (["distill", "--resume"], ["report"]):
        runs.assert_rejects([*words, str(run), "-q"], 4, "summary.json: it or the run's env.json is of another run")
    assert runs.sakd("runs", "show", str(run), "--json").document["rows"][0]["state"] == "damaged"
    (run / "summary.json").unlink()
    shutil.copy(runs.path / "long" / "env.json", run / "env.json")
    runs.assert_rejects(["report", str(run), "-q"], 4, "env.json: is of another run than its last checkpoint")
    shutil.copy(runs.path / "short" / "env.json", run / "env.json")
    words = ["inspect-spots", str(run), "--json"]
    assert "is gone" not in runs.sakd(*words).err
    (run / "samples.safetensors").unlink()
    (run / "survey.safetensors").unlink()
    assert "samples.safetensors: is gone" in " ".join(runs.sakd(*words).err.split())


def test_a_checkpoint_without_settings_is_no_internal_error(runs: CliRunner) -> None:
    run = runs.path / "no settings"
    shutil.copytree(runs.path / "short", run)
    file = run / "checkpoints" / "last" / "state.json"
    state = json.loads(file.read_text())
    for odd in (None, 3, [], {}):
        file.write_text(json.dumps(state | {"fingerprint": odd}))
        assert runs.sakd("compare", str(run), "long", "--json").code in (0, 4)
        file.write_text(json.dumps(state | {"fingerprint": {"settings": odd}}))
        assert runs.sakd("compare", str(run), "long", "--json").code in (0, 4)


def test_a_key_that_is_null_makes_no_other_group(runs: CliRunner) -> None:
    run = runs.path / "null under another name"
    shutil.copytree(runs.path / "short", run)
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("clip_value: null", "clop_value: null"))
    groups = runs.sakd("compare", str(run), "short", "--json").document["groups"]
    assert len(groups) == 1
    (run / "config.yaml").write_text(text.replace("\neffective:", "\neffectives:"))
    runs.assert_rejects(["compare", str(run), "short"], 4, "effectives.")
