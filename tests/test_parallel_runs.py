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
from nursery import Child, Nursery, Trouble

WORDS = "--dataset shapes --set data.train=150 --set data.test=60 --batch-size 30 --set log_every=1"
FIRST = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
DISTIL = shlex.split(f"distill --teacher teacher --student resnet8 --method fitnet --epochs 3 {WORDS} -q")


@pytest.fixture(scope="module")
def nursery(warm: Nursery, tmp_path_factory: pytest.TempPathFactory) -> Nursery:
    nursery = warm.at(tmp_path_factory.mktemp("together"))
    teacher = nursery.sakd(*shlex.split(f"pretrain-teacher resnet8 --epochs 1 {WORDS} --run-dir teacher -q"))
    assert teacher.code == 0, teacher.err
    return nursery


def started(nursery: Nursery, count: int, *words: str) -> list[Child]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    troubles = [Trouble(words=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(count)]
    return [nursery.start(*words, trouble=trouble) for trouble in troubles]


def ended(children: list[Child]) -> list[int]:
    return [child.wait() for child in children]


def steps_of(run: Path) -> list[int]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line["step"] for line in lines if line["kind"] == "train"]


def test_one_talks_and_the_numbers_are_those_of_one_process(nursery: Nursery) -> None:
    sync = ("--set", "runtime.sync_batchnorm=true")
    alone = nursery.sakd(*DISTIL, *sync, "--run-dir", "alone", "--json")
    assert alone.code == 0, alone.err
    children = started(nursery, 2, *DISTIL, *sync, "--run-dir", "two", "--json")
    assert ended(children) == [0, 0], [child.err for child in children]
    assert (children[1].out, children[1].err) == ("", "")
    summary = json.loads(children[0].out)
    assert json.loads((nursery.cwd / "two" / "env.json").read_text())["processes"] == 2
    assert steps_of(nursery.cwd / "two") == list(range(1, 16))
    ours, theirs = (
        [json.loads(line) for line in (nursery.cwd / run / "metrics.jsonl").read_text().splitlines()]
        for run in ("two", "alone")
    )
    assert ours[0]["loss"] == pytest.approx(theirs[0]["loss"], rel=1e-5)  # later steps part as rounding grows
    assert ours[4]["loss"] == pytest.approx(theirs[4]["loss"], rel=2e-2)
    spots = [(nursery.cwd / run / "spots.jsonl").read_text().splitlines() for run in ("two", "alone")]
    assert len(spots[0]) == len(spots[1]) == 3
    assert json.loads(spots[0][0])["samples"] == json.loads(spots[1][0])["samples"] == 135
    assert summary["headline"]["epoch"] == 3


def test_a_stop_is_everybodys_and_any_number_of_processes_goes_on(nursery: Nursery) -> None:
    children = started(nursery, 2, *[word for word in DISTIL if word != "-q"], "--run-dir", "stopped")
    children[0].signal_when("step 3/", 0)
    children[1].signal_when("", signal.SIGTERM)
    assert ended(children) == [143, 143], [child.err for child in children]
    done = steps_of(nursery.cwd / "stopped")
    assert done == list(range(1, len(done) + 1))
    assert len(done) < 15
    children = started(nursery, 3, "distill", "--resume", "stopped", "-q")
    assert ended(children) == [0, 0, 0], [child.err for child in children]
    assert steps_of(nursery.cwd / "stopped") == list(range(1, 16))


def test_a_process_that_is_killed_ends_all(nursery: Nursery) -> None:
    words = [word for word in DISTIL if word != "-q"]
    children = started(nursery, 2, *words, "--run-dir", "killed", "--set", "train.epochs=400")
    children[0].signal_when("epoch 2  holdout", 0)
    children[1].signal_when("", signal.SIGKILL)
    begun = time.monotonic()
    assert ended(children) == [9, -9]
    assert time.monotonic() - begun < 30
    assert children[0].err.splitlines()[-2] == "error: process 0 of 2: another one has ended"


def test_the_step_of_two_levels_is_for_one_process(nursery: Nursery) -> None:
    words = shlex.split(f"distill --teacher resnet14 --pretrain --student resnet8 --method dfa {WORDS} --dry-run")
    first = Trouble(words=FIRST)
    nursery.refuses(words, 2, "the search for mixtures works in one process only, 2 were started", first)


@pytest.mark.parametrize("words", ["sweep sweep-small", "distill --preset ablation --routers all --together"])
def test_what_starts_processes_of_its_own_is_for_one_process(nursery: Nursery, words: str) -> None:
    nursery.refuses(shlex.split(words), 2, "works in one process only, 2 were started", Trouble(words=FIRST))


def test_a_number_of_processes_without_the_rest_means_nothing(nursery: Nursery) -> None:
    assert nursery.sakd("list", "routers", trouble=Trouble(words={"WORLD_SIZE": "2"})).out


def test_what_only_the_first_one_meets_ends_the_others_in_one_line(nursery: Nursery) -> None:
    (nursery.cwd / "file").write_text("")
    children = started(nursery, 2, *DISTIL, "--runs-dir", "file")
    assert ended(children) == [5, 9]
    assert children[0].err.startswith("error: file: ")
    assert children[1].err.splitlines()[0] == "error: process 1 of 2: another one has ended"


def test_torchrun_starts_them(nursery: Nursery) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "sakd_cli"]
    words = [*DISTIL, "--run-dir", "launched", "--set", "train.epochs=1", "--json"]
    told = subprocess.run([*launcher, *words], cwd=nursery.cwd, capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stderr
    assert json.loads(told.stdout)["run"] == "launched"
