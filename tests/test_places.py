"""Every command where stderr or the current folder is gone, or a scheduler sets a variable of torchrun's."""

import os
import shlex
import signal
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from conftest import DRAWN
from fork_server import ROOT, Faults, ForkServer

from sakd_cli.cli import process

TINY = f"{DRAWN} --set data.train=40 --batch-size 20 --epochs 1 -q"
MADE = (
    f"pretrain-teacher resnet8 {TINY} --run-dir t",
    f"distill --teacher ./t --student resnet8 {TINY} --run-dir d --set teacher.allow_mismatch=true",
)
CODES = {  # what each command ends with, wherever it can work
    "list models": 0,
    "guide exit-codes": 0,
    "config show --preset quickstart": 0,
    "show method fitnet": 0,
    "show router adaptive": 0,
    "show key train.lr": 0,
    "show schema runs": 0,
    "runs --runs-dir .": 0,
    "runs show d": 0,
    "runs rm t --yes": 2,
    "compare t d": 0,
    "watch d": 0,
    "inspect-spots d": 0,
    "report t --out page.html -q": 0,
    "report nowhere": 2,
    "eval d -q --set timing_seconds=0 --dataset shapes": 0,
    "eval nowhere": 2,
    "predict d nowhere.png": 3,
    "export d --out d -q": 2,
    "export d --out new --format nope": 2,
    "import-weights nowhere.pth --model resnet8": 2,
    "bench --scaling nope": 2,
    "data check nowhere": 3,
    "sweep nowhere.yaml": 2,
    "distill --resume d -q": 0,
    f"distill --teacher ./t --student resnet8 {TINY} --dry-run --set teacher.allow_mismatch=true": 0,
    "distill --student nope": 2,
    f"pretrain-teacher resnet8 {TINY} --dry-run": 0,
    "pretrain-teacher resnt8": 2,
}
PLACES = {
    "stderr closed": Faults(stderr="closed"),
    "stderr full": Faults(stderr="full"),
    "no current folder": Faults(nowhere=True),
    "a scheduler's WORLD_SIZE": Faults(environment={"WORLD_SIZE": "2", "RANK": None}),
}


@pytest.fixture(scope="module")
def there(fork_server: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> ForkServer:
    """A folder with a teacher `t` and its student `d`."""
    server = fork_server.at(tmp_path_factory.mktemp("places"))
    for words in MADE:
        child = server.sakd(*shlex.split(words))
        assert child.code == 0, child.err
    return server


@pytest.mark.parametrize("place", PLACES)
def test_a_command_works_or_says_one_line_in_any_place(there: ForkServer, place: str) -> None:
    """Its exit code is the same, or 2 where there is no current folder; never a traceback, at most one error."""
    faults = PLACES[place]
    for words, code in CODES.items():
        child = there.sakd(*shlex.split(words), faults=faults)
        assert child.code == (2 if faults.nowhere else code), (words, child.err)
        assert "Traceback" not in child.err + child.out
        told = [line for line in child.err.splitlines() if line.startswith("error: ")]
        assert len(told) == (child.code != 0 and faults.stderr == "file"), (words, child.err)
        assert child.out or child.code or "-q" in words, f"{words} does nothing"
    assert not (there.cwd / "new").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_at_the_very_end_is_no_traceback(number: int) -> None:
    """As of a second Ctrl-C while Python takes leave."""
    code = "import atexit, os, sys; from sakd_cli.cli import app; sys.argv = ['sakd', 'list', 'presets']; "
    code += f"atexit.register(os.kill, os.getpid(), {int(number)}); app.main()"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (-number, "")


@pytest.mark.parametrize(("words", "code"), [("runs rm {run}", 2), ("predict {run} -", 3)])
def test_a_closed_stdin_is_an_empty_one(there: ForkServer, words: str, code: int) -> None:
    """Closed by the shell, as Python then starts without one."""
    line = [sys.executable, "-m", "sakd_cli", *words.format(run=there.cwd / "d").split()]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    ended = subprocess.run(
        ["sh", "-c", 'exec "$@" <&-', "sh", *line], cwd=there.cwd, env=environment, capture_output=True, text=True
    )
    assert ended.returncode == code, ended.stderr
    assert ended.stderr.startswith("error: ")
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("words", [f"pretrain-teacher resnet8 {TINY}", "eval d -q"])
def test_a_command_that_is_forked_finds_all_that_is_large_loaded(there: ForkServer, words: str) -> None:
    """Else each such test takes seconds longer, which no test would notice."""
    child = there.sakd(*shlex.split(words))
    assert child.code == 0
    assert not [name for name in child.loaded if name.startswith(("torch", "sympy", "scipy", "matplotlib", "sakd_cli"))]


def test_a_current_folder_without_a_name_is_told(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Its path is longer than the system takes (4,096 bytes); MKL would end the process."""
    monkeypatch.setattr(os, "getcwd", lambda: "/x" * 3000)
    assert not process.somewhere()
    assert capsys.readouterr().err.startswith("error: the current folder")


def test_a_zip_file_is_no_installation(tmp_path: Path) -> None:
    """Of which `list presets` was empty, and a sweep failed at its end."""
    with zipfile.ZipFile(tmp_path / "sakd.whl", "w") as wheel:
        for path in {*(ROOT / "sakd_cli").rglob("*.py"), *(ROOT / "sakd_cli").rglob("page.*s")}:
            wheel.write(path, path.relative_to(ROOT))
    found = subprocess.run(
        [sys.executable, "-m", "sakd_cli", "list", "presets"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path / "sakd.whl")},
        capture_output=True,
        text=True,
    )
    assert (found.returncode, found.stdout) == (2, "")
    assert found.stderr.splitlines() == ["error: sakd cannot be used from within a zip file", "hint: pip install it"]
