"""A run that cannot be lost: real processes, killed, stopped and crashed at any moment, go on to the same bits."""

import hashlib
import json
import os
import platform
import random
import shlex
import shutil
import signal
import time
from pathlib import Path

import pytest
from conftest import DRAWN
from fork_server import Child, Faults, ForkServer, fingerprint

SHORT = f"{DRAWN} --set data.train=60 --batch-size 12 --set log_every=2 --set save_every=2"
DISTIL = f"distill --teacher teacher --student resnet8 {SHORT} --epochs 3 --set router.lr=0.01 -q"
METHODS = {
    "fitnet": "--method fitnet",
    "seldom": "--method fitnet --set save_every=null --epochs 9",
    "crd": "--method crd --set method.negatives=16",
    "balanced": "--method vid --loss-weight auto",
    "ft": "--method ft --set method.warmup_epochs=1 --router anti",
    "dfa": "--method dfa --teacher deeper --epochs 1 --set method.search_epochs=1 --set method.second_order=true",
    "residual": "--residual-students 1 --set residual.loss=inner --set residual.architectures=resnet8 "
    "--set residual.max_cost=3 --set residual.min_gain=-9 --set data.train=30",
}


@pytest.fixture(scope="module")
def fork_server(fork_server: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> ForkServer:
    """Forks commands in a folder that holds a teacher's run."""
    fork_server = fork_server.at(tmp_path_factory.mktemp("kills"))
    for arguments in ("resnet8 --run-dir teacher", "resnet14 --run-dir deeper"):  # a resnet8 has no two blocks to mix
        child = fork_server.sakd(*shlex.split(f"pretrain-teacher {arguments} {SHORT} --epochs 1 -q"))
        assert child.code == 0, child.err
    return fork_server


@pytest.fixture(scope="module")
def whole(fork_server: ForkServer) -> dict[str, dict[str, str]]:
    """What each method's uninterrupted run leaves."""
    prints = {}
    for name, arguments in METHODS.items():
        child = fork_server.sakd(*shlex.split(f"{DISTIL} {arguments} --run-dir whole-{name}"))
        assert child.code == 0, child.err
        prints[name] = fingerprint(fork_server.cwd / f"whole-{name}")
        folder = fork_server.cwd / f"whole-{name}" / "checkpoints"
        best, last = (json.loads((folder / each / "state.json").read_text()) for each in ("best", "last"))
        steps = last["step"] // last["epoch"]
        assert best["step"] == steps * best["best"]["epoch"], "the weights that were judged, at the end of an epoch"
    return prints


def saves(run: Path) -> list[int]:
    """When its checkpoints were written."""
    while True:
        try:
            return sorted(path.stat().st_mtime_ns for path in run.glob("checkpoints/**/manifest.json"))
        except FileNotFoundError:  # renamed while we looked
            continue


def kill_somewhere(child: Child, run: Path, draw: random.Random) -> int:
    """Let it save once more (or, one time in four, not even that), then kill it a little later; its exit code.

    One of a run that has its summary already is let go: it has nothing to save, and might never come to its end.
    """
    if (run / "summary.json").is_file():
        return child.wait()
    before, patient = saves(run), draw.random() < 0.75
    while patient and saves(run) == before and not (run / "summary.json").is_file():
        time.sleep(0.002)
    time.sleep(draw.uniform(0.0, 0.15))
    os.kill(child.pid, signal.SIGKILL)
    return child.wait()


def test_a_run_killed_at_random_moments_ends_in_the_same_bits(
    fork_server: ForkServer, whole: dict[str, dict[str, str]], pytestconfig: pytest.Config
) -> None:
    kills, draw, attempt = 0, random.Random(5), 0
    while kills < pytestconfig.getoption("--kills"):
        name = list(METHODS)[attempt % len(METHODS)]
        attempt += 1
        run = fork_server.cwd / f"killed-{name}-{attempt}"
        child = fork_server.start(*shlex.split(f"{DISTIL} {METHODS[name]} --run-dir {run}"))
        while kill_somewhere(child, run, draw) != 0:
            kills += 1
            begun = (run / "config.yaml").is_file()
            arguments = f"distill --resume {run}" if begun else f"{DISTIL} {METHODS[name]} --run-dir {run}"
            child = fork_server.start(*shlex.split(arguments), "-q")
        assert fingerprint(run) == whole[name]


@pytest.mark.parametrize(
    ("method", "moment", "number"),
    [
        ("ft", "warmup: ", signal.SIGINT),
        ("ft", "train: ", signal.SIGTERM),
        ("dfa", "search: ", signal.SIGTERM),
        ("residual", "residual-1: ", signal.SIGINT),
    ],
)
def test_a_signal_saves_and_names_the_command_that_goes_on(
    fork_server: ForkServer, whole: dict[str, dict[str, str]], method: str, moment: str, number: signal.Signals
) -> None:
    run = fork_server.cwd / f"stopped-{number.name}-{moment[:2]}"
    arguments = shlex.split(f"{DISTIL} {METHODS[method]} --run-dir {run}")
    arguments.remove("-q")
    stopped = fork_server.start(*arguments)
    stopped.signal_when(moment, number)
    assert stopped.wait() == 128 + number
    *_, error, hint = stopped.err.splitlines()
    assert error.startswith(f"error: {'interrupted' if number == signal.SIGINT else 'terminated'}; step ")
    assert "Traceback" not in stopped.err
    command = shlex.split(hint.removeprefix("hint: resume with "))
    assert fork_server.sakd(*command[1:]).code == 0
    assert fingerprint(run) == whole[method]


def test_a_second_signal_ends_at_once_and_leaves_the_last_good_state(
    fork_server: ForkServer, whole: dict[str, dict[str, str]]
) -> None:
    run = fork_server.cwd / "impatient"
    arguments = shlex.split(f"{DISTIL} {METHODS['fitnet']} --run-dir {run}")
    arguments.remove("-q")
    stopped = fork_server.start(*arguments)
    stopped.signal_when("step 4/", signal.SIGTERM)
    os.kill(stopped.pid, signal.SIGTERM)
    assert stopped.wait() == 143
    assert fork_server.sakd("distill", "--resume", str(run), "-q").code == 0
    assert fingerprint(run) == whole["fitnet"]


@pytest.mark.parametrize("stride", [13, pytest.param(1, marks=pytest.mark.battery)], ids=["some", "all"])
def test_a_crash_at_any_touch_of_the_disk_costs_nothing(fork_server: ForkServer, stride: int) -> None:
    arguments = shlex.split(f"{DISTIL} {METHODS['fitnet']} --set save_every=3 --epochs 1")
    assert fork_server.sakd(*arguments, "--run-dir", f"untouched{stride}").code == 0
    wanted = fingerprint(fork_server.cwd / f"untouched{stride}")
    for touch in range(stride, 999, stride):
        run = fork_server.cwd / f"crash{stride}-{touch}"
        crashed = fork_server.sakd(*arguments, "--run-dir", str(run), faults=Faults(crash=touch))
        if crashed.code == 0:
            break
        assert crashed.code == 9, crashed.err
        begun = (run / "config.yaml").is_file()
        again = fork_server.sakd(
            *(["distill", "--resume", str(run), "-q"] if begun else [*arguments, "--run-dir", str(run)])
        )
        assert again.code == 0, f"after touch {touch}: {again.err}"
        assert fingerprint(run) == wanted, f"after touch {touch}"
    assert touch > 40


def finished(fork_server: ForkServer) -> Path:
    """A run of two epochs, made once."""
    run = fork_server.cwd / "finished"
    if not run.exists():
        assert fork_server.sakd(*shlex.split(f"{DISTIL} {METHODS['fitnet']} --epochs 2 --run-dir {run}")).code == 0
    return run


def test_a_finished_run_prints_its_summary_and_runs_no_step(fork_server: ForkServer) -> None:
    run = finished(fork_server)
    before = fingerprint(run)
    again = fork_server.sakd("distill", "--resume", str(run), "--json")
    assert again.code == 0
    kept = json.loads((run / "summary.json").read_text())
    assert len(kept.pop("sha256")) == 64
    assert json.loads(again.out) == kept | {"run": str(run)}
    assert fingerprint(run) == before


def unfinished(fork_server: ForkServer, name: str) -> Path:
    """A copy of that run which died in front of its summary, with a damaged last checkpoint."""
    run = fork_server.cwd / name / "run"  # a folder of its own, so that it is the newest there
    shutil.copytree(finished(fork_server), run)
    (run / "summary.json").unlink()
    return run


@pytest.mark.parametrize("damage", ["flipped", "cut", "empty", "missing", "swapped", "of the future", "of another"])
def test_a_damaged_checkpoint_is_never_used(fork_server: ForkServer, damage: str) -> None:
    run = unfinished(fork_server, f"damaged-{damage.replace(' ', '-')}")
    last = run / "checkpoints" / "last"
    file = last / "training.safetensors"
    sound = file.read_bytes()
    if damage == "missing":
        file.unlink()
    elif damage == "swapped":
        shutil.copy(fork_server.cwd / "teacher" / "checkpoints" / "last" / file.name, file)
    elif damage == "of another":  # a run of the same arguments
        other = fork_server.cwd / "whole-other"
        assert fork_server.sakd(*shlex.split(f"{DISTIL} {METHODS['fitnet']} --epochs 2 --run-dir {other}")).code == 0
        shutil.rmtree(last)
        shutil.copytree(other / "checkpoints" / "last", last)
    elif damage == "of the future":
        state = (last / "state.json").read_text().replace("sakd.checkpoint/4", "sakd.checkpoint/99")
        (last / "state.json").write_text(state)
        manifest = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(last.iterdir())}
        del manifest["manifest.json"]
        (last / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    else:
        middle = len(sound) // 2
        flipped = sound[:middle] + bytes([sound[middle] ^ 4]) + sound[middle + 1 :]
        file.write_bytes({"flipped": flipped, "cut": sound[:-1], "empty": b""}[damage])
    refused = fork_server.sakd("distill", "--resume", str(run), "-q")
    assert refused.code == 4
    assert refused.err.splitlines()[0].startswith(f"error: {last}")
    taken = fork_server.sakd(
        *shlex.split(f"{DISTIL} {METHODS['fitnet']} --epochs 2 --runs-dir {run.parent} --resume auto")
    )
    assert taken.code == 0, taken.err
    assert taken.err.startswith(f"warning: {last}")
    assert fingerprint(run) == fingerprint(finished(fork_server))


def test_one_directory_has_one_process(fork_server: ForkServer) -> None:
    run = fork_server.cwd / "shared"
    arguments = shlex.split(f"{DISTIL} {METHODS['fitnet']} --epochs 200 --run-dir {run}")
    arguments.remove("-q")
    first = fork_server.start(*arguments)
    first.signal_when("step 2/", 0)
    second = fork_server.sakd("distill", "--resume", str(run))
    assert second.code == 8
    assert f"in use by process {first.pid} on {platform.node()}" in second.err
    third = fork_server.sakd(*arguments, "--overwrite")
    assert third.code == 8
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    assert (
        fork_server.sakd(*shlex.split(f"{DISTIL} {METHODS['fitnet']} --epochs 1 --run-dir {run} --overwrite")).code == 0
    )
    assert json.loads((run / "summary.json").read_text())["epochs"] == 1


MISTAKES = """
resume changes no setting of a run, but train.epochs was 2 and is 1          | distill --resume finished --epochs 1
resume changes no setting of a run, but method.name was "fitnet" and is "at"  | distill --resume finished --method at
finished: is a run of 'distill', not of 'pretrain'                      | pretrain-teacher --resume finished
nowhere: not a run directory                                            | distill --resume nowhere
it goes with neither --run-dir nor --overwrite                          | distill --resume finished --overwrite
there is a run already                                                  | distill --run-dir finished WORDS
is no run directory; nothing was changed                                | distill --run-dir . --overwrite WORDS
--overwrite needs --run-dir                                             | distill --overwrite WORDS
no distill run in empty                                                 | distill --resume --runs-dir empty
"""


def test_a_missing_teacher_is_trained_by_one_process(fork_server: ForkServer) -> None:
    """The first is held in the middle of it and then killed: of the two that wait one trains it, for both."""
    words = f"distill --teacher resnet8 --student resnet8 --method kd --pretrain --epochs 1 --runs-dir once {SHORT}"
    first = fork_server.start(*shlex.split(words))
    first.signal_when("training it first", signal.SIGSTOP)
    others = [fork_server.start(*shlex.split(f"{words} --seed {seed}")) for seed in (1, 2)]
    for other in others:
        other.signal_when("waiting for it", 0)
    os.kill(first.pid, signal.SIGKILL)
    assert [child.wait() for child in (first, *others)] == [-signal.SIGKILL, 0, 0]
    assert ["training it first" in other.err for other in others].count(True) == 1
    finished = sorted(path.parent.name.split("-")[2] for path in fork_server.cwd.glob("once/*/summary.json"))
    assert finished == ["distill", "distill", "pretrain"]
    assert not [*fork_server.cwd.glob("once/.*.lock")]


@pytest.mark.parametrize("case", MISTAKES.strip().splitlines(), ids=lambda case: case.split("|")[1].strip())
def test_a_wrong_intent_touches_nothing(fork_server: ForkServer, case: str) -> None:
    text, arguments = (part.strip() for part in case.split("|"))
    before = fingerprint(finished(fork_server))
    refused = fork_server.sakd(*shlex.split(arguments.replace("WORDS", f"{DISTIL.removeprefix('distill ')}")))
    assert refused.code == 2
    assert text in refused.err.splitlines()[0]
    assert len(refused.err.splitlines()) <= 2
    assert fingerprint(finished(fork_server)) == before


def test_the_same_seed_gives_the_same_bits_and_another_does_not(
    fork_server: ForkServer, whole: dict[str, dict[str, str]]
) -> None:
    prints = []
    for seed in (0, 1):
        arguments = f"{DISTIL} {METHODS['crd']} --seed {seed} --run-dir seed{seed}"
        assert fork_server.sakd(*shlex.split(arguments)).code == 0
        prints.append(fingerprint(fork_server.cwd / f"seed{seed}"))
    assert prints[0] == whole["crd"]
    weights = [{digest for file, digest in each.items() if file.endswith("model.safetensors")} for each in prints]
    assert not weights[0] & weights[1]
