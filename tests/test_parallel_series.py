"""Several runs at once: each is the run it is alone, a stop reaches all of them, one that fails stops no other."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PAIR, TINY, CliRunner
from fork_server import ForkServer
from safetensors.torch import load_file

from sakd_cli.config.grid import Member, Role
from sakd_cli.config.resolve import ConfigSource, flat, resolve
from sakd_cli.errors import SeriesError, Stopped
from sakd_cli.rundir import RunDir, all_runs
from sakd_cli.sweep.executor import LocalExecutor
from sakd_cli.sweep.scheduler import Scheduler, received_signals
from sakd_cli.sweep.series import Messages


class RecordingReporter:
    """Records messages and warnings; never asks a run to stop."""

    quiet = False

    def __init__(self) -> None:
        self.messages: list[str] = []
        self.warned: list[str] = []
        self.say, self.warn = self.messages.append, self.warned.append


NOTES_SIGNALS = """
import signal, sys, time
got = []
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, frame: got.append(number))
print("ready", file=sys.stderr, flush=True)
while len(got) < WANTED:
    time.sleep(0.01)
print("got", got, file=sys.stderr, flush=True)
sys.exit(130)
"""


POPEN = subprocess.Popen
KD = {"teacher": {"source": "resnet8", "sha256": "0" * 64}, "student": "resnet8", "method": "kd"}


def together(
    programs: list[str], recorder: RecordingReporter, folder: Path, monkeypatch: pytest.MonkeyPatch, jobs: int = 9
) -> None:
    """Run programs in the place of runs; one is finished when it has written the file DONE."""
    names = [f"run {place}" for place in range(len(programs))]
    done = {name: folder / name / "summary.json" for name in names}
    ready = {name: f"DONE = {str(done[name])!r}\n{program}" for name, program in zip(names, programs, strict=True)}

    def start(command: Sequence[str], **where: Any) -> Any:
        [name] = [name for name in names if f"{name.replace(' ', '-')}-" in str(command)]
        return POPEN([sys.executable, "-c", ready[name]], **where)

    monkeypatch.setattr("sakd_cli.sweep.executor.subprocess.Popen", start)
    members = []
    for seed, name in enumerate(names):
        (folder / name).mkdir()
        members.append(Member(name, Role.student, resolve("distill", [ConfigSource("", KD | {"seed": seed})]).config))

    def finished_run(name: str) -> RunDir | None:
        return RunDir(folder / name) if done[name].is_file() else None

    scheduler = Scheduler(members, folder, folder / "jobs")
    monkeypatch.setattr(scheduler.index, "of", lambda config: finished_run(names[config.seed]))
    messages = Messages(scheduler, recorder)
    with closing(LocalExecutor(jobs, 1, "cpu")) as executor, received_signals(recorder) as signals:
        scheduler.run(executor, signals, again="sakd ...", refresh=messages.refresh, pause=0.02)
    scheduler.check("what is finished stays")


FINISH = "; open(DONE, 'w').close()"


def test_messages_come_with_the_name_of_their_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = RecordingReporter()
    programs = [f"import time; time.sleep({0.2 * (3 - k)})" for k in range(3)]
    programs[1] += "; import sys; print('epoch 1\\nwarning: odd', file=sys.stderr)"
    together([program + FINISH for program in programs], recorder, tmp_path, monkeypatch)
    assert (recorder.messages, recorder.warned) == (["run 1: epoch 1"], ["run 1: odd"])


def test_only_so_many_work_at_once_and_each_has_its_share_of_the_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sakd_cli.sweep.executor.cpu_count", lambda: 8)
    monkeypatch.setenv("SAKD_EPOCHS", "9")
    monkeypatch.delenv("OMP_NUM_THREADS")
    program = "import json, os, time; a = time.time(); time.sleep(0.2); json.dump({'time': [a, time.time()],"
    program += "'threads': os.environ['OMP_NUM_THREADS'], 'settings': [k for k in os.environ if k.startswith('SAKD_')]}"
    together([program + ", open(DONE, 'w'))"] * 4, RecordingReporter(), tmp_path, monkeypatch, jobs=2)
    found = [json.loads(path.read_text()) for path in tmp_path.glob("*/summary.json")]
    assert len(found) == 4
    for one in found:
        assert sum(other["time"][0] <= one["time"][0] < other["time"][1] for other in found) <= 2
    assert {one["threads"] for one in found} == {"4"}
    assert found[0]["settings"] == []


def test_one_that_fails_stops_no_other_and_its_error_and_code_are_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder, again = RecordingReporter(), RecordingReporter()
    fails = "import sys; print('error: no room\\nhint: tidy up', file=sys.stderr); sys.exit(5)"
    ends = "import time; time.sleep(0.3); import sys; print('finished', file=sys.stderr)" + FINISH
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    with pytest.raises(SeriesError, match="2 of 3 runs failed; run 0: no room") as caught:
        together([fails, ends, "import sys; sys.exit(3)"], recorder, tmp_path / "first", monkeypatch)
    assert caught.value.exit_code == 5
    assert "run 1: finished" in recorder.messages
    assert set(recorder.warned) == {"run 0: no room (exit code 5)", "run 2: no message (exit code 3)"}
    (tmp_path / "third").mkdir()
    dies = (
        "import os\ntry: os.mkdir(DONE + '2')\nexcept OSError: open(DONE, 'w').close()\nelse: os.kill(os.getpid(), 9)"
    )
    together([dies], again, tmp_path / "third", monkeypatch)
    assert again.warned == ["run 0: killed by signal 9 (attempt 1 of 3)"], "why it begins again"
    with pytest.raises(SeriesError) as caught:
        together([fails, "import sys; sys.exit(1)"], recorder, tmp_path / "second", monkeypatch)
    assert caught.value.exit_code == 1, "a bug is worse than any mistake"


@pytest.mark.parametrize("times", [1, 2])
def test_a_signal_reaches_all_as_often_as_it_comes_and_starts_no_other(
    times: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = RecordingReporter()

    def send() -> None:
        for _ in range(times):
            while sum("ready" in line for line in recorder.messages) < 2:
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.3)

    threading.Thread(target=send).start()
    with pytest.raises(Stopped) as caught:
        together([NOTES_SIGNALS.replace("WANTED", str(times))] * 3, recorder, tmp_path, monkeypatch, jobs=2)
    assert (caught.value.exit_code, caught.value.hint) == (143, "resume with sakd ...")
    assert sorted(line for line in recorder.messages if "got" in line) == [
        f"run {k}: got {[15] * times}" for k in (0, 1)
    ]


def contents(run: Path) -> dict[str, Any]:
    """All weights, states and logs, but for torch's own generator: nothing draws from it, others may have."""
    files = [*run.rglob("*.safetensors"), *run.glob("*.jsonl")]
    found: dict[str, Any] = {}
    for path in (path for path in files if "previous" not in path.parts):
        name = path.relative_to(run).as_posix()
        held = load_file(path) if path.suffix == ".safetensors" else {"text": path.read_text()}
        found |= {f"{name}/{key}": part for key, part in held.items() if not key.startswith("random/")}
    return found


def test_two_seeds_at_once_stopped_and_gone_on_with_are_the_two_runs_alone(
    trained_cli: CliRunner, teacher: Path, tmp_path: Path, fork_server: ForkServer
) -> None:
    arguments = [*PAIR, *TINY, "--method", "kd", "--epochs", "3", "--set", "save_every=1", "--set", "data.train=100"]
    arguments += ["--set", "data.test=40", "--teacher", str(teacher), "--seeds", "2"]
    alone = trained_cli.sakd(*arguments, "--runs-dir", str(tmp_path / "alone"), "--quiet", "--json").document
    here = ["--runs-dir", str(tmp_path / "at once")]
    child = fork_server.at(trained_cli.path).start(*arguments, *here, "--parallel")
    for seed in (0, 1):
        child.signal_when(f"adaptive, seed {seed}: epoch 1", 0)
    os.kill(child.pid, signal.SIGINT)
    assert child.wait() == 130, child.err
    assert "--parallel" in child.err.splitlines()[-1]
    begun = all_runs(tmp_path / "at once")
    assert len(begun) == 2
    assert all((run.path / "checkpoints" / "last").is_dir() for run in begun)
    assert not all(run.finished for run in begun)
    again = [*arguments, *here, "--resume", "auto", "--quiet", "--json"]
    document = trained_cli.sakd(*again).document
    assert len(all_runs(tmp_path / "at once")) == 2
    for ours, theirs in zip(document["runs"], alone["runs"], strict=True):
        one, other = contents(Path(ours["run"])), contents(Path(theirs["run"]))
        assert one.keys() == other.keys()
        for name, part in one.items():
            assert torch.equal(part, other[name]) if isinstance(part, torch.Tensor) else part == other[name], name
        configs = [flat(RunDir(Path(row["run"])).config) for row in (ours, theirs)]
        assert {key for key in configs[0] if configs[0][key] != configs[1][key]} == {"runs_dir"}
    finished = trained_cli.sakd(*again, "--parallel").document
    assert finished["runs"] == document["runs"], "each process finds its own run and has nothing left to do"
