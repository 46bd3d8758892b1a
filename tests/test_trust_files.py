"""What a run and a sweep leave is theirs: folders that are replaced or moved, names, claims, digests, the index."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import TINY, CliRunner

from sakd_cli import files, runindex, torchrun, writing
from sakd_cli.config.grid import Member, Role
from sakd_cli.config.resolve import ConfigSource, resolve
from sakd_cli.data.fingerprint import content_hashes
from sakd_cli.data.published import _wordnet_names
from sakd_cli.errors import DataError, RunInUseError, SeriesError, UsageError, unknown
from sakd_cli.models import artifact
from sakd_cli.models.artifact import NetworkCard
from sakd_cli.rundir import RunDir, newest_run
from sakd_cli.runs.images import Images
from sakd_cli.sweep.executor import Ended, Executor, Job
from sakd_cli.sweep.scheduler import Scheduler, State


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
        with writing.whole_folder(folder) as new:
            (new / "content").write_text("new")
            writing.write_aside(new / "more", b"")

    with mock.patch.object(Path, "replace", killed), pytest.raises(KeyboardInterrupt):
        replace()
    there = [path for path in (folder, tmp_path / ".export.old") if path.is_dir()]
    assert [(path / "content").read_text() for path in there] == ["old"]
    with writing.whole_folder(folder) as new:
        assert (folder / "content").read_text() == "old", "the old one is back before anything is written"
        (new / "content").write_text("newer")
    assert (folder / "content").read_text() == "newer"
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_a_folder_is_filled_by_one_at_a_time(tmp_path: Path) -> None:
    folder = tmp_path / "export"
    with writing.whole_folder(folder) as first:
        (first / "content").write_text("first")
        with pytest.raises(RunInUseError, match="another process is writing it"), writing.whole_folder(folder):
            pass
    assert (folder / "content").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_nothing_is_written_where_another_folder_or_run_lies_now(tmp_path: Path) -> None:
    path, elsewhere = tmp_path / "run", tmp_path / "moved"
    path.mkdir()
    run = RunDir(path)
    with run.locked():
        writing.write_json(path / "env.json", {"id": "first"})
        assert run.identity == "first"
        run.append("metrics.jsonl", {"a": 1})
        path.rename(elsewhere)
        path.mkdir()
        for write in (
            lambda: run.append("metrics.jsonl", {"a": 2}),
            lambda: writing.write_aside(path / "summary.json", b"{}"),
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
        writing.write_json(path / "env.json", {"id": "second"})
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
    (note,) = (tmp_path / "sweeps" / "failed").iterdir()
    os.utime(note, (time.time() + 3600,) * 2)  # a file server's clock goes before
    third, retried = a_sweep(tmp_path), Remembering()
    first._unclaim(first.entries[[*first.entries][1]])
    third.refresh(forgive=True)
    third._start(retried)
    assert bad in retried.jobs, "whatever the clocks say"


def test_a_run_that_ends_well_and_leaves_nothing_fails_the_sweep(tmp_path: Path) -> None:
    scheduler, executor = a_sweep(tmp_path), Remembering()
    scheduler._start(executor)
    executor.over = [Ended(key, code) for key, code in zip(executor.jobs, (0, 3), strict=True)]
    scheduler._collect(executor, interrupted=False)
    with pytest.raises(SeriesError, match="left no finished run") as caught:
        scheduler.check("")
    assert caught.value.exit_code == 1


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


@pytest.mark.parametrize(
    "name", ["torchvision/vit_h_14", "torchvision/regnet_y_128gf", "timm/eva_giant_patch14_224", "torchvision/vit_l_16"]
)
def test_a_small_file_that_names_a_large_network_builds_none(tmp_path: Path, name: str) -> None:
    card = json.dumps(NetworkCard(name, "shapes", ("a", "b"), (0.5,) * 3, (0.3,) * 3, 224)._asdict())
    small = tmp_path / "small.safetensors"
    small.write_bytes(artifact.module_bytes(artifact.FORMAT, torch.nn.Linear(1, 1), card))
    with (
        mock.patch.object(artifact, "create", side_effect=AssertionError),
        pytest.raises(UsageError, match="numbers, the file 2"),
    ):
        artifact.load(small)


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


TOGETHER = {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}


def test_what_a_scheduler_sets_makes_no_command_silent(cli: CliRunner, teacher: Path) -> None:
    assert cli.sakd("list", "routers", **TOGETHER).out
    words = ["distill", "--teacher", str(teacher), "--student", "resnet8", *TINY, "-q"]
    assert cli.sakd(*words, "--dry-run", **TOGETHER).out
    assert cli.sakd("list", "routers", **TOGETHER, LOCAL_RANK="x").out == "", "torchrun's second process"
    result = cli.sakd(*words, **TOGETHER)
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("error: WORLD_SIZE=2 is set, but torchrun has not started this process\n")
    for variables in ({"RANK": "7"}, {"RANK": "0", "MASTER_PORT": "99999"}, {"RANK": "0", "MASTER_PORT": "x"}):
        assert cli.sakd(*words, **TOGETHER | variables, LOCAL_RANK="0").code == 2


def test_of_processes_with_the_same_error_the_first_tells_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in TOGETHER.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert (torchrun.tells("a", common=True), torchrun.tells("a", common=False)) == (False, True)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "1" / "error.json"))
    assert [torchrun.tells(message, common=True) for message in ("a", "a", "b")] == [True, False, True]


@pytest.mark.skipif(sys.platform == "win32", reason="SIGSTOP")
def test_a_command_that_was_stopped_waits_for_no_process_of_its_own(tmp_path: Path) -> None:
    lines = ["import multiprocessing, os, signal, time", "from sakd_cli.cli import process"]
    lines += ["child = multiprocessing.get_context('fork').Process(target=time.sleep, args=(60,), daemon=True)"]
    lines += [
        "child.start()",
        "os.kill(child.pid, signal.SIGSTOP)",
        "print(time.time(), flush=True)",
        "process.leave(130)",
    ]
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "")
    assert time.time() - float(done.stdout) < 3


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS")
@pytest.mark.parametrize("gigabytes", [1.0, 3.1])
def test_an_address_space_without_room_for_torch_costs_one_line(gigabytes: float) -> None:
    """In the larger one torch ends the process itself, by abort(3), where nobody looks before."""
    words = f"ulimit -v {gigabytes * 1e6:.0f}; exec {sys.executable} -m sakd_cli eval none.safetensors"
    done = subprocess.run(["bash", "-c", words], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) in ((6, ""), (2, "")), "2: a small build of torch found room"
    assert [line.partition(":")[0] for line in done.stderr.splitlines()][:1] == ["error"]
    assert "Traceback" not in done.stderr


def test_a_full_disk_is_told_before_a_picture_is_read(
    cli: CliRunner, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    monkeypatch.setattr(Images, "preload", mock.Mock(side_effect=AssertionError))
    words = ["distill", "--teacher", str(teacher), "--student", "resnet8", *TINY, "-q", "--run-dir", "no/room"]
    assert "needed, 0.001 MB free" in cli.assert_rejects(words, 5, "no/room: the disk is full").err


@pytest.mark.skipif(sys.platform == "win32", reason="os.mkfifo")
def test_what_is_no_file_is_not_read_for_ever(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "words.txt")
    (tmp_path / "zero").symlink_to("/dev/zero")
    for name in ("words.txt", "zero"):
        for read in (files.sha256, lambda path: files.read_bytes(path, 9)):
            with pytest.raises(OSError, match="Not a regular file"):
                read(tmp_path / name)
        assert files.log_digest(tmp_path / name) == ""
        with pytest.raises(DataError, match="not a regular file"):
            content_hashes([str(tmp_path / name)])
    assert _wordnet_names(tmp_path, ("n01", "n02")) == ("n01", "n02")
    os.mkfifo(tmp_path / "my.py")
    assert "name a class in it" in unknown("router", str(tmp_path / "my.py"), ())


def test_a_loop_of_links_costs_one_line(trained_cli: CliRunner) -> None:
    (trained_cli.path / "loop").symlink_to("loop")
    pair = ["distill", "--student", "resnet8", *TINY, "--dry-run"]
    logits = ["--method", "kd", "--router", "always", "--set", "teacher.logits=loop"]
    single = [[word, "loop"] for word in ("eval", "report", "inspect-spots", "export", "watch")]
    for words in (*single, ["predict", "loop", "."], [*pair, "--teacher", "./loop"], [*pair, *logits]):
        result = trained_cli.sakd(*words)
        assert result.code in (2, 3)
        assert result.err.startswith("error: ")
        assert len(result.err.splitlines()) <= 2
    (trained_cli.path / "loop").unlink()
