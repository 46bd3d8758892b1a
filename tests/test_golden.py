"""A change in numbers cannot pass unseen: the first 20 losses of every training procedure, kept as text.

Everything runs in float64 on one thread, so that eight digits are the same on every machine. A change that is meant is
written down with `python tests/test_golden.py`, and told in the CHANGELOG under "Numbers".
"""

import json
import shlex
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import in_float64
from fork_server import words_of

from sakd_cli.cli.app import run

FOLDER = Path(__file__).with_name("golden")
DATA = "--dataset shapes --set data.train=112 --set data.test=20 --batch-size 10 --epochs 2 --set log_every=1 -q"
TEACHER = "pretrain-teacher resnet8"
PLAIN = "distill --teacher {root}/pretrain/teacher --student resnet8"
DISTIL = f"{PLAIN} --set router.recipe=published"
PROCEDURES = {
    "pretrain": TEACHER,
    "pretrain-friendly": f"{TEACHER} --student-friendly resnet8",
    "distill-always-at": f"{PLAIN} --method at --router always",
    "distill-adaptive-fitnet": f"{DISTIL} --method fitnet --set router.lr=0.01",
    "distill-adaptive-crd": f"{DISTIL} --method crd --set method.negatives=16 --set router.lr=0.01",
    "distill-simkd": f"{DISTIL} --method simkd --set router.lr=0.01",
    "distill-search-dfa": f"{DISTIL} --method dfa --teacher {{root}}/deeper/teacher --set method.search_epochs=1",
    "distill-residual": f"{DISTIL} --method kd --epochs 1 --residual-students 1 --set residual.architectures=resnet8 "
    "--set residual.max_cost=3 --set residual.loss=inner",
    "distill-random-ft": f"{PLAIN} --method ft --set method.warmup_epochs=1 --router random",
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a teacher's run; everything is float64 while it is in use."""
    folder = tmp_path_factory.mktemp("golden")
    with in_float64():
        begin(folder)
        yield folder


def begin(folder: Path) -> None:
    for arguments in (f"{TEACHER} --run-dir {folder}/pretrain", f"pretrain-teacher resnet14 --run-dir {folder}/deeper"):
        assert run(shlex.split(f"{arguments} {DATA}")) == 0


def curve(folder: Path, name: str) -> str:
    """One line per step: phase, step and loss, for the first 20 steps."""
    arguments = PROCEDURES[name].format(root=folder)
    first, *rest = shlex.split(arguments)  # what a procedure says of its own comes last, and so counts
    if name != "pretrain":  # is there already
        assert run(words_of([first, *shlex.split(DATA), *rest, "--run-dir", f"{folder}/{name}"])) == 0
    lines = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "step" in line]
    return "".join(f"{line['kind']} {line['step']} {line['loss']:.8g}\n" for line in steps[:20])


@pytest.mark.parametrize("name", PROCEDURES)
def test_the_curve_is_the_one_that_was_kept(root: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert curve(root, name) == (FOLDER / f"{name}.txt").read_text()


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as place, in_float64():
        begin(Path(place))
        for wanted in sys.argv[1:] or PROCEDURES:
            (FOLDER / f"{wanted}.txt").write_text(curve(Path(place), wanted))
