"""A run goes on with what it began with, or says what is another now: settings, length, teacher."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import yaml
from conftest import CliRunner
from safetensors.torch import load_file

from sakd_cli import files, runindex
from sakd_cli.config.grid import Member, Role
from sakd_cli.config.resolve import ConfigSource, resolve
from sakd_cli.errors import RunInUseError, SeriesError, UsageError
from sakd_cli.models import artifact
from sakd_cli.models.artifact import NetworkCard, save_weights
from sakd_cli.models.table import create
from sakd_cli.rundir import RunDir, newest_run
from sakd_cli.sweep.executor import Ended, Executor, Job
from sakd_cli.sweep.scheduler import Scheduler, State

TINY = ["--dataset", "shapes", "--set", "data.train=60", "--set", "data.test=40", "--batch-size", "20"]
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
        result = runs.sakd("distill", "--resume", "moved", "--teacher-weights", "elsewhere/teacher", "-q")
        assert result.code == 0, result.err
        assert "elsewhere" in yaml.safe_load((run / "config.yaml").read_text())["teacher"]["weights"]
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


@pytest.mark.parametrize("moment", ["aside", "in"])
def test_a_folder_is_whole_whenever_its_replacement_is_killed(tmp_path: Path, moment: str) -> None:
    """Whichever of the two renames is the last, one of both is there, and the next call leaves nothing aside."""
    folder = tmp_path / "export"
    folder.mkdir()
    (folder / "content").write_text("old")
    renames = []

    def killed(path: Path, target: Path) -> Path:
        renames.append(path)
        if len(renames) == {"aside": 2, "in": 3}[moment]:
            raise KeyboardInterrupt
        os.rename(path, target)
        return target

    def replace() -> None:
        with files.whole_folder(folder) as new:
            (new / "content").write_text("new")
            files.write_aside(new / "more", b"")

    with mock.patch.object(Path, "replace", killed), pytest.raises(KeyboardInterrupt):
        replace()
    there = [path for path in (folder, tmp_path / ".export.old") if path.is_dir()]
    assert [(path / "content").read_text() for path in there] == ["old"]
    with files.whole_folder(folder) as new:
        assert (folder / "content").read_text() == "old", "the old one is back before anything is written"
        (new / "content").write_text("newer")
    assert (folder / "content").read_text() == "newer"
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_nothing_is_written_where_another_folder_or_run_lies_now(tmp_path: Path) -> None:
    path, elsewhere = tmp_path / "run", tmp_path / "moved"
    path.mkdir()
    run = RunDir(path)
    with run.locked():
        files.write_json(path / "env.json", {"id": "first"})
        assert run.identity == "first"
        run.append("metrics.jsonl", {"a": 1})
        path.rename(elsewhere)
        path.mkdir()
        for write in (
            lambda: run.append("metrics.jsonl", {"a": 2}),
            lambda: files.write_aside(path / "summary.json", b"{}"),
            lambda: run.cut_logs({}),
            run.clear,
        ):
            with pytest.raises(RunInUseError, match="another folder or run"):
                write()
        assert list(path.iterdir()) == []
    assert (elsewhere / "metrics.jsonl").read_text() == '{"a": 1}\n'
    path.rmdir()
    elsewhere.rename(path)
    with RunDir(path).locked():
        (path / "env.json").unlink()
    again = RunDir(path)
    with again.locked():
        files.write_json(path / "env.json", {"id": "second"})
        assert again.identity == "second"
        (path / "env.json").write_text('{"id": "third"}')
        with pytest.raises(RunInUseError):
            again.append("metrics.jsonl", {"a": 3})


class Remembering(Executor):
    """Takes every job; `end` makes the one of that key end."""

    def __init__(self) -> None:
        self.jobs, self.over = dict[str, Job](), list[Ended]()

    def about(self) -> str:
        return "nowhere"

    def room(self) -> int:
        return 9

    def submit(self, jobs: Sequence[Job]) -> None:
        self.jobs |= {job.key: job for job in jobs}

    def ended(self) -> list[Ended]:
        over, self.over = self.over, []
        return over


def a_sweep(folder: Path) -> Scheduler:
    """Of two teachers whose paths differ in what no file's name would show."""
    layers = [ConfigSource("", {"teacher": {"sha256": "0" * 64}, "student": "resnet8"})]
    keys = ["fitnet always ./教师:resnet8 seed 0", "fitnet always ./老师:resnet8 seed 0"]
    members = []
    for seed, key in enumerate(keys):
        own = ConfigSource("", {"seed": seed, "teacher": {"source": f"t{seed}"}})
        config = resolve("distill", [*layers, own]).config
        members.append(Member(key, Role.student, config, ("./t", "resnet8")))
    scheduler = Scheduler(members, folder, folder / "sweeps")
    for name in ("jobs", "failed"):
        (folder / "sweeps" / name).mkdir(parents=True, exist_ok=True)
    return scheduler


def test_runs_of_a_sweep_have_files_of_their_own_and_one_sweep_at_a_time_trains_each(tmp_path: Path) -> None:
    first, second = a_sweep(tmp_path), a_sweep(tmp_path)
    taking, idle = Remembering(), Remembering()
    first._start(taking)
    second._start(idle)
    assert len({job.log for job in taking.jobs.values()}) == 2, "no two keys share a file"
    assert idle.jobs == {}, "what another sweep trains is not trained twice"
    bad, _ = taking.jobs
    taking.over = [Ended(bad, 3)]
    first._collect(taking, interrupted=False)
    for entry in second.entries.values():
        entry.not_before = 0.0
    second._start(idle)
    assert [entry.state for entry in second.entries.values()] == [State.failed, State.waiting], "nor what failed there"


def test_a_run_that_ends_well_and_leaves_nothing_fails_the_sweep(tmp_path: Path) -> None:
    scheduler, executor = a_sweep(tmp_path), Remembering()
    scheduler._start(executor)
    executor.over = [Ended(key, code) for key, code in zip(executor.jobs, (0, 3), strict=True)]
    scheduler._collect(executor, interrupted=False)
    with pytest.raises(SeriesError, match="left no finished run") as caught:
        scheduler.check("")
    assert caught.value.exit_code == 1


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


def test_the_digest_of_columns_covers_their_type_and_shape() -> None:
    numbers = np.arange(6, dtype=np.int64)
    same = [numbers, numbers.reshape(2, 3), numbers.view(np.float64), numbers.view(np.uint64)]
    assert len({one.tobytes() for one in same}) == 1
    assert len({files.columns_digest({"a": one}) for one in same}) == len(same)


@pytest.mark.parametrize("text", ["NaN", "[Infinity]", '{"a": 1e999}', "9" * 400, "-" + "9" * 5000, "[" * 10**5])
def test_what_no_document_holds_is_no_json(text: str) -> None:
    with pytest.raises(ValueError, match=r"number|nested|digits|JSON|Expecting"):
        files.parse_json(text)
    assert files.parse_json(json.dumps({"sha256": "1234567890" * 6 + "e999"})), "a text may look like one"


def test_many_runs_are_found_by_an_index_that_is_never_trusted_blindly(tmp_path: Path) -> None:
    for seed in range(runindex.MANY):
        (tmp_path / f"r{seed:03d}").mkdir()
        (tmp_path / f"r{seed:03d}" / "config.yaml").write_text(f"task: distill\nseed: {seed}\n")
    index = tmp_path / runindex.NAME

    def found(seed: int) -> str | None:
        run = newest_run(tmp_path, {"task": "distill", "seed": seed}, finished=False)
        return None if run is None else run.path.name

    assert found(7) == "r007"
    assert index.is_file()
    whole = index.read_bytes()
    with mock.patch.object(runindex, "read_config", wraps=runindex.read_config) as read:
        assert found(7) == "r007"
        assert {call.args[0].parent.name for call in read.call_args_list} == {"r007"}, "its own file, and no other"
    for damage in (b"", whole[:-9], whole.replace(b'"seed": 7', b'"seed": 8'), b"[" * 10**5, b"\x00" * 99):
        index.write_bytes(damage)
        assert (found(7), found(8)) == ("r007", "r008")
    (tmp_path / "r007" / "config.yaml").write_text("task: distill\nseed: 99\n")
    assert (found(7), found(99)) == (None, "r007")
    forged = json.loads(index.read_bytes().partition(b"\n")[2])
    forged["r003"][1]["seed"] = 1234
    body = json.dumps(forged).encode()
    index.write_bytes(hashlib.sha256(body).hexdigest().encode() + b"\n" + body)
    assert found(1234) is None, "what it says of a run is read again there"
    index.unlink()
    assert found(3) == "r003"


@pytest.mark.parametrize("reader", [["compare"], ["inspect-spots"], ["report"]])
def test_no_reader_shows_settings_that_a_finished_run_was_not_trained_with(runs: CliRunner, reader: list[str]) -> None:
    run = runs.path / "relabelled"
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(runs.path / "short", run)
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("weight_decay: 0.0005", "weight_decay: 0.5", 1))
    runs.assert_rejects([*reader, "relabelled"], 4, "weight_decay was 0.0005 and is 0.5")


@pytest.mark.parametrize("name", ["torchvision/vit_h_14", "timm/eva_giant_patch14_224", "torchvision/vit_l_16"])
def test_a_small_file_that_names_a_large_network_builds_none(tmp_path: Path, name: str) -> None:
    card = json.dumps(NetworkCard(name, "shapes", ("a", "b"), (0.5,) * 3, (0.3,) * 3, 224)._asdict())
    artifact.save_module(tmp_path / "small.safetensors", artifact.FORMAT, torch.nn.Linear(1, 1), card)
    with (
        mock.patch.object(artifact, "create", side_effect=AssertionError),
        pytest.raises(UsageError, match="numbers, the file 2"),
    ):
        artifact.load(tmp_path / "small.safetensors")


@pytest.mark.skipif(sys.platform != "linux", reason="prctl")
@pytest.mark.parametrize("deaf", [False, True], ids=["", "one that hears no signal"])
def test_a_process_of_torchrun_ends_when_that_is_killed(tmp_path: Path, deaf: bool) -> None:
    """As it waits for another process in a call of a library, which lets no handler of Python's run."""
    own = ["import signal, time", "from sakd_cli.cli import child", "child.PATIENCE = 0.5", "child.bound_to_launcher()"]
    own += ["signal.signal(signal.SIGTERM, signal.SIG_IGN)"] * deaf + ["print('ready', flush=True)", "time.sleep(60)"]
    worker = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {chr(10).join(own)!r}])"
    environment = os.environ | {"TORCHELASTIC_RUN_ID": "none", "PYTHONPATH": str(Path(__file__).parents[1])}
    with subprocess.Popen([sys.executable, "-c", worker], env=environment, stdout=subprocess.PIPE) as launcher:
        assert launcher.stdout is not None
        assert launcher.stdout.readline() == b"ready\n"
        launcher.kill()
        begun = time.monotonic()
        assert launcher.stdout.read() == b"", "until the last that holds the pipe has ended"
        assert time.monotonic() - begun < 10


def test_no_figure_of_a_summary_can_be_changed_without_a_word(runs: CliRunner) -> None:
    run = runs.path / "better"
    shutil.copytree(runs.path / "short", run)
    summary = json.loads((run / "summary.json").read_text())
    summary["last"]["top1"] += 1
    (run / "summary.json").write_text(json.dumps(summary, indent=2))
    for command in (["compare", "better"], ["distill", "--resume", "better"], ["report", "better"]):
        runs.assert_rejects(command, 4, "summary.json: missing or damaged")
