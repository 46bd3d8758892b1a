"""A sweep on Slurm whose programs are played by scripts: what they refuse, lose or do not answer."""

import logging.config
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import DRAWN

from sakd_cli.errors import UsageError
from sakd_cli.sweep import cluster
from sakd_cli.sweep.cluster import LOST, SlurmExecutor
from sakd_cli.sweep.executor import Job, start_job

pytest.importorskip("submitit", reason="the extra `slurm` is not installed")
logger = pytest.importorskip("submitit.core.logger")
QUICK = ("list", "routers")
TAKES = {"srun": "exit 1", "sbatch": "echo Submitted batch job 7", "scancel": "exit 1"}


def slurm(folder: Path, monkeypatch: pytest.MonkeyPatch, **programs: str) -> SlurmExecutor:
    """An executor beside programs of these lines of shell."""
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    for name, line in (TAKES | programs).items():
        (folder / name).write_text(f"#!/bin/sh\n{line}\n")
        (folder / name).chmod(0o755)
    executor = SlurmExecutor(None, {}, folder)
    executor.executor._executor.job_class.watcher.clear()  # one for all tests, whose job has one number
    return executor


def job(folder: Path) -> Job:
    return Job("one", QUICK, folder / "one.log", folder)


def sacct(state: str) -> str:
    return f"echo 'JobID|State|NodeList'; echo '7|{state}|n1'"


@pytest.mark.parametrize("line", ["echo 'sbatch: error: invalid partition' >&2; exit 1", "echo Welcome"])
def test_what_sbatch_refuses_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str) -> None:
    executor = slurm(tmp_path, monkeypatch, sbatch=line)
    with pytest.raises(UsageError, match=r"--executor slurm: .*(invalid partition|Welcome)"):
        executor.submit([job(tmp_path)])


@pytest.mark.parametrize(("key", "value"), [("timeout_min", "soon"), ("nodes", 2), ("tasks_per_node", 2)])
def test_resources_that_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, value: object) -> None:
    slurm(tmp_path, monkeypatch)
    with pytest.raises(UsageError, match=key):
        SlurmExecutor(None, {key: value}, tmp_path)


def test_the_second_ctrl_c_leaves_where_scancel_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    executor = slurm(tmp_path, monkeypatch, sacct=sacct("PENDING"))
    executor.submit([job(tmp_path)])
    executor.stop(signal.SIGINT)
    assert executor.ended() == []
    executor.stop(signal.SIGINT)
    assert executor.ended() == [("one", LOST)]


def test_jobs_that_are_cancelled_before_they_begin_are_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = tmp_path / "state"
    state.write_text("PENDING")
    executor = slurm(tmp_path, monkeypatch, sacct=sacct(f"'$(cat {state})'"), scancel=f"echo CANCELLED > {state}")
    executor.submit([job(tmp_path)])
    task = executor.tasks["one"][1]
    assert executor.ended() == []
    task.watcher._start_time -= 3600  # it has waited for an hour, and is asked every ten minutes
    executor.stop(signal.SIGINT)
    begun = time.monotonic()
    while not (ended := executor.ended()):
        assert time.monotonic() - begun < 10
    assert ended == [("one", LOST)]
    assert time.monotonic() - begun < 10


def test_the_state_of_a_lost_job_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    executor = slurm(tmp_path, monkeypatch, sacct=sacct("NODE_FAIL"))
    executor.submit([job(tmp_path)])
    begun = time.monotonic()
    assert executor.ended() == [], "its result may be on the way, and nothing waits for it meanwhile"
    assert time.monotonic() - begun < 10
    monkeypatch.setattr(cluster, "PATIENCE", 0)
    assert executor.ended() == [("one", LOST)]
    assert (tmp_path / "one.log").read_text() == "error: slurm job 7 gave no exit code, its state is NODE_FAIL\n"


def test_a_slurm_without_accounts_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    logging.config.dictConfig(logger.CONFIG)  # its handlers on the streams of this test
    executor = slurm(tmp_path, monkeypatch, sacct="exit 1")
    executor.submit([job(tmp_path)])
    for _ in range(3):
        executor.tasks["one"][1].watcher.update()
    assert "".join(capfd.readouterr()).count("status may be inaccurate") == 1


def test_a_run_whose_time_is_up_saves_its_state(tmp_path: Path) -> None:
    """Slurm sends SIGUSR2 to all processes of the job; submitit has it queued again, and SIGTERM comes."""
    words = f"pretrain-teacher resnet8 {DRAWN} --set data.train=60 --batch-size 12"
    run = Job("one", (*words.split(), "--epochs", "9999", "--run-dir", "run"), tmp_path / "one.log", tmp_path)
    with start_job(run, dict(os.environ), session=False) as child:
        while child.poll() is None and not (tmp_path / "run" / "metrics.jsonl").exists():
            time.sleep(0.05)
        child.send_signal(signal.SIGUSR2)
        time.sleep(0.2)
        child.send_signal(signal.SIGTERM)
    assert child.returncode == 128 + signal.SIGTERM
    assert "is saved" in run.log.read_text()


def test_a_worker_that_is_told_to_exit_stops_its_run(tmp_path: Path) -> None:
    """submitit leaves by SystemExit, in a handler."""
    code = """
import pathlib, signal, sys
from sakd_cli.sweep import executor
signal.signal(signal.SIGALRM, lambda *_: sys.exit(3))
signal.setitimer(signal.ITIMER_REAL, 0.5)
executor.start_job = lambda *_, **__: executor.subprocess.Popen(["sleep", "60"])
executor.run_job(executor.Job("one", (), pathlib.Path("one.log"), pathlib.Path(".")))
"""
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=False, timeout=50).returncode == 3
