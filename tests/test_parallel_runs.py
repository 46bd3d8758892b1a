"""Several processes in one run directory, as `torchrun` starts them: one talks and writes, and they end together."""

import json
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import DRAWN
from fork_server import Child, Faults, ForkServer

WORDS = f"{DRAWN} --set data.train=60 --batch-size 12 --set log_every=1"
FIRST = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
DISTIL = shlex.split(f"distill --teacher teacher --student resnet8 --method fitnet --epochs 3 {WORDS} -q")


@pytest.fixture(scope="module")
def fork_server(fork_server: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> ForkServer:
    fork_server = fork_server.at(tmp_path_factory.mktemp("together"))
    teacher = fork_server.sakd(*shlex.split(f"pretrain-teacher resnet8 --epochs 1 {WORDS} --run-dir teacher -q"))
    assert teacher.code == 0, teacher.err
    return fork_server


def started(fork_server: ForkServer, count: int, *arguments: str, ranks: int | None = None) -> list[Child]:
    """All of `count` processes, or the first `ranks` of them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    own = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks or count)]
    return [fork_server.start(*arguments, faults=Faults(environment=shared | one)) for one in own]


def ended(children: list[Child]) -> list[int]:
    return [child.wait() for child in children]


def steps_of(run: Path) -> list[int]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line["step"] for line in lines if line["kind"] == "train"]


def test_one_talks_and_the_numbers_are_those_of_one_process(fork_server: ForkServer) -> None:
    sync = ("--set", "runtime.sync_batchnorm=true")
    alone = fork_server.sakd(*DISTIL, *sync, "--run-dir", "alone", "--json")
    assert alone.code == 0, alone.err
    children = started(fork_server, 2, *DISTIL, *sync, "--run-dir", "two", "--json")
    assert ended(children) == [0, 0], [child.err for child in children]
    assert (children[1].out, children[1].err) == ("", "")
    summary = json.loads(children[0].out)
    assert json.loads((fork_server.cwd / "two" / "env.json").read_text())["processes"] == 2
    assert steps_of(fork_server.cwd / "two") == list(range(1, 16))
    ours, theirs = (
        [json.loads(line) for line in (fork_server.cwd / run / "metrics.jsonl").read_text().splitlines()]
        for run in ("two", "alone")
    )
    assert ours[0]["loss"] == pytest.approx(theirs[0]["loss"], rel=1e-5)  # later steps part as rounding grows
    assert ours[4]["loss"] == pytest.approx(theirs[4]["loss"], rel=2e-2)
    spots = [(fork_server.cwd / run / "spots.jsonl").read_text().splitlines() for run in ("two", "alone")]
    assert len(spots[0]) == len(spots[1]) == 3
    assert json.loads(spots[0][0])["samples"] == json.loads(spots[1][0])["samples"] == 54
    assert summary["last"]["epoch"] == 3


def test_a_stop_is_everybodys_and_any_number_of_processes_goes_on(fork_server: ForkServer) -> None:
    children = started(fork_server, 2, *[word for word in DISTIL if word != "-q"], "--run-dir", "stopped")
    children[0].signal_when("step 3/", 0)
    children[1].signal_when("", signal.SIGTERM)
    assert ended(children) == [143, 143], [child.err for child in children]
    done = steps_of(fork_server.cwd / "stopped")
    assert done == list(range(1, len(done) + 1))
    assert len(done) < 15
    children = started(fork_server, 3, "distill", "--resume", "stopped", "-q")
    assert ended(children) == [0, 0, 0], [child.err for child in children]
    assert steps_of(fork_server.cwd / "stopped") == list(range(1, 16))
    assert children[0].err.startswith("warning: stopped: in 3 processes, began in 2: not the numbers of a run that")
    assert not children[1].err


def test_a_process_that_is_killed_ends_all(fork_server: ForkServer) -> None:
    arguments = [word for word in DISTIL if word != "-q"]
    children = started(fork_server, 2, *arguments, "--run-dir", "killed", "--set", "train.epochs=400")
    children[0].signal_when("epoch 2  validation", 0)
    children[1].signal_when("", signal.SIGKILL)
    begun = time.monotonic()
    assert ended(children) == [9, -9]
    assert time.monotonic() - begun < 30
    assert children[0].err.splitlines()[-2] == "error: process 0 of 2: another one has ended"


def test_one_that_waits_for_the_others_says_so_and_ends(fork_server: ForkServer) -> None:
    words = [*(word for word in DISTIL if word != "-q"), "--run-dir", "waited"]
    child = started(fork_server, 2, *words, ranks=1)[0]
    child.signal_when("process 0 of 2 waits for the others at 127.0.0.1:", signal.SIGTERM)
    begun = time.monotonic()
    assert child.wait() == 143
    assert time.monotonic() - begun < 10
    assert child.err.splitlines()[-1] == "error: terminated; nothing to save yet"


def test_the_step_of_two_levels_is_for_one_process(fork_server: ForkServer) -> None:
    arguments = shlex.split(f"distill --teacher resnet14 --pretrain --student resnet8 --method dfa {WORDS} --dry-run")
    first = Faults(environment=FIRST)
    fork_server.assert_rejects(arguments, 2, "the search for mixtures works in one process only, 2 were started", first)


@pytest.mark.parametrize("arguments", ["sweep sweep-small", "distill --preset ablation --routers all --parallel"])
def test_what_starts_processes_of_its_own_is_for_one_process(fork_server: ForkServer, arguments: str) -> None:
    fork_server.assert_rejects(
        shlex.split(arguments), 2, "works in one process only, 2 were started", Faults(environment=FIRST)
    )


def test_a_number_of_processes_without_the_rest_means_nothing(fork_server: ForkServer) -> None:
    assert fork_server.sakd("list", "routers", faults=Faults(environment={"WORLD_SIZE": "2"})).out


def test_what_only_the_first_one_meets_ends_the_others_in_one_line(fork_server: ForkServer) -> None:
    (fork_server.cwd / "file").write_text("")
    children = started(fork_server, 2, *DISTIL, "--runs-dir", "file")
    assert ended(children) == [5, 9]
    assert children[0].err.startswith("error: file: ")
    assert children[1].err.splitlines()[0] == "error: process 1 of 2: another one has ended"


def test_torchrun_starts_them(fork_server: ForkServer) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "sakd_cli"]
    arguments = [*DISTIL, "--run-dir", "launched", "--set", "train.epochs=2", "--router", "scheduled", "--json"]
    told = subprocess.run([*launcher, *arguments], cwd=fork_server.cwd, capture_output=True, text=True, check=False)
    assert (told.returncode, told.stderr) == (0, ""), told.stderr
    assert json.loads(told.stdout)["run"] == "launched"
    arguments = [*DISTIL, "--run-dir", "diverged", "--lr", "1e30"]  # where each process sees its own images
    told = subprocess.run([*launcher, *arguments], cwd=fork_server.cwd, capture_output=True, text=True, check=False)
    assert [line for line in told.stderr.splitlines() if "is not finite" in line] == [told.stderr.splitlines()[0]]
