"""Disks that are full, cannot be written or are named oddly; terminals that are gone, narrow or plain."""

import errno
import json
import os
import shlex
import shutil
import stat
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
from conftest import DRAWN, CliRunner
from fork_server import ROOT, Faults, ForkServer, fingerprint

from sakd_cli import writing
from sakd_cli.engine import checkpoint
from sakd_cli.errors import DiskError, RunInUseError
from sakd_cli.report.runs.entries import remove
from sakd_cli.report.runs.page import RunPage
from sakd_cli.rundir import RunDir

SHORT = f"{DRAWN} --set data.train=24 --batch-size 8 --set save_every=2 -q"
WORDS = shlex.split(f"distill --teacher teacher --student resnet8 --method at {SHORT} --epochs 2")


@pytest.fixture(scope="module")
def desk(fork_server: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> ForkServer:
    """A folder with a teacher's run and a distillation that nothing befell."""
    here = fork_server.at(tmp_path_factory.mktemp("disk"))
    for arguments in (
        shlex.split(f"pretrain-teacher resnet8 {SHORT} --epochs 1 --run-dir teacher"),
        [*WORDS, "--run-dir", "sound"],
    ):
        made = here.sakd(*arguments)
        assert made.code == 0, made.err
    return here


def goes_on(desk: ForkServer, run: Path) -> None:
    """The newest checkpoint is whole, and the run ends in the bits of the undisturbed one."""
    if any((run / "checkpoints" / name).is_dir() for name in ("last", "previous")):
        assert checkpoint.find(run / "checkpoints", None, RunDir(run).identity)
    begun = (run / "config.yaml").is_file()
    again = desk.sakd(*(["distill", "--resume", str(run), "-q"] if begun else [*WORDS, "--run-dir", str(run)]))
    assert again.code == 0, again.err
    assert fingerprint(run) == fingerprint(desk.cwd / "sound")


@pytest.mark.parametrize("stride", [17, pytest.param(1, marks=pytest.mark.battery)], ids=["some", "all"])
def test_a_disk_that_fills_up_at_any_write_costs_nothing(desk: ForkServer, stride: int) -> None:
    kinds = (errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EIO, errno.EDQUOT)
    for touch in range(stride, 999, stride):
        number = errno.ENOSPC if stride > 1 else kinds[touch % 5]
        run = desk.cwd / f"full{stride}-{touch}"
        failed = desk.sakd(*WORDS, "--run-dir", str(run), faults=Faults(fail=(touch, number)))
        if failed.code == 0:
            break
        assert failed.code == 5, f"at touch {touch}: {failed.err}"
        error, *hints = failed.err.splitlines()
        assert len(hints) <= 1
        full = number in (errno.ENOSPC, errno.EDQUOT) and "cannot be made" not in error
        assert (" MB needed, " in error and error.endswith(" MB free")) if full else os.strerror(number) in error, (
            f"at touch {touch}: {error}"
        )
        goes_on(desk, run)
    assert touch > 30


@pytest.mark.parametrize("most", [100, 2_000, 100_000])
def test_files_that_may_not_grow_cost_nothing(desk: ForkServer, most: int) -> None:
    run = desk.cwd / f"small{most}"
    failed = desk.sakd(*WORDS, "--run-dir", run.name, faults=Faults(file_size=most))  # the message is a file too
    assert failed.code == 5, failed.err
    assert failed.err.splitlines()[0].endswith("cannot be written: File too large")
    goes_on(desk, run)


ODD = [
    "größer 模型 🎓",
    "a" * 255,
    *(pytest.param(name, marks=pytest.mark.battery) for name in ("-dash", "'x\"", "$HOME;ls")),
]


@pytest.mark.parametrize("name", ODD)
def test_odd_names_are_names(desk: ForkServer, name: str) -> None:
    assert desk.sakd(*WORDS, f"--run-dir={name}").code == 0
    run = f"./{name}"
    assert fingerprint(desk.cwd / name) == fingerprint(desk.cwd / "sound")
    for arguments in (
        ["eval", run, "--json", "-q"],
        ["inspect-spots", run, "--json"],
        ["distill", "--resume", run, "--json"],
    ):
        result = desk.sakd(*arguments)
        assert result.code == 0, result.err
        assert json.loads(result.out)
    pretrained = desk.sakd(
        *WORDS, "--set", f"teacher.source={json.dumps(run, ensure_ascii=False)}", "--epochs", "1", "--dry-run", "--json"
    )
    assert pretrained.code == 0, pretrained.err
    assert desk.sakd("runs", "rm", run, "--yes").code == 0
    assert not list(desk.cwd.glob(f".{name[:9]}*"))
    assert not (desk.cwd / name).exists()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--runs-dir", "~nobody-of-that-name/runs"], "nobody knows that home folder"),
        (["--teacher", "~nobody-of-that-name/run"], "nobody knows that home folder"),
        (["--set", "data.root=~nobody-of-that-name"], "nobody knows that home folder"),
        (["--method", "dfa", "--set", "method.weights=~nobody-of-that-name"], "nobody knows that home folder"),
        (["--run-dir", "a" * 256], "File name too long"),
    ],
)
def test_homes_and_names_that_cannot_be(desk: ForkServer, arguments: list[str], text: str) -> None:
    desk.assert_rejects([*WORDS, *arguments], 2, text)


def test_a_full_disk_is_known_before_a_page_and_says_what_goes_on(
    desk: ForkServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    full = desk.sakd("report", "sound", "--out", "page.html", faults=Faults(fail=(1, errno.ENOSPC)))
    assert full.err.splitlines()[-1] == "hint: make room, then the same command again"
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10_000))
    with pytest.raises(DiskError, match="the disk is full"):
        RunPage(RunDir(desk.cwd / "sound"), print).write(tmp_path / "page.html")
    assert not list(tmp_path.iterdir())
    run = CliRunner(tmp_path).sakd(*shlex.split(f"pretrain-teacher resnet8 {SHORT}"))
    assert run.err.splitlines()[-1] == "hint: make room, then go on: --resume", (
        "of a series, too, none is trained twice"
    )


def test_a_run_is_removed_from_a_full_disk(desk: ForkServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Who would make room removes runs."""
    shutil.copytree(desk.cwd / "sound", tmp_path / "run")
    monkeypatch.setattr(os, "fsync", mock.Mock(side_effect=OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))))
    assert CliRunner(tmp_path).sakd("runs", "rm", "run", "--yes").code == 0
    assert not list(tmp_path.iterdir())


def test_file_systems_that_lack_something(desk: ForkServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No fsync of folders (SMB), no flock (Lustre), no rename of folders (a lower layer of overlayfs)."""

    def fail(number: int) -> None:
        raise OSError(number, os.strerror(number))

    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda at: fail(errno.EINVAL) if stat.S_ISDIR(os.fstat(at).st_mode) else fsync(at))
    with writing.whole_folder(tmp_path / "made") as folder:
        (folder / "file").touch()
    run = RunDir(tmp_path / "run")
    shutil.copytree(desk.cwd / "sound", run.path)
    monkeypatch.setattr(Path, "rename", lambda *_: fail(errno.EXDEV))
    with pytest.raises(DiskError, match="cannot be removed: Invalid cross-device link"):
        remove(run)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made", "run"]
    monkeypatch.setattr("fcntl.flock", lambda *_: fail(errno.ENOSYS))
    (run.path / ".lock").touch()
    with warnings.catch_warnings(action="ignore"), pytest.raises(RunInUseError) as raised, run.locked():
        pass
    assert raised.value.hint == f"if there is none, remove {run.path / '.lock'}"
    code = "import fcntl, os, pathlib; from sakd_cli.writing import acquire_lock as lock\ndef flock(*_): "
    code += "raise OSError(38, 'Function not implemented')\nfcntl.flock = flock; lock(pathlib.Path('soft')).release()"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, check=True)
    assert done.stderr == b"", "where the lock is a file, that is no news"


def test_a_name_of_255_bytes_is_one_for_all_that_is_written(desk: ForkServer) -> None:
    """Also aside, before it has its name; a page without room for the names of its plots is not left alone."""
    for words in (
        ["export", "sound", "--out", "é" * 127],
        ["compare", "sound", "teacher", "--plot", "p" * 251 + ".png"],
    ):
        assert desk.sakd(*words).code == 0
        assert (desk.cwd / words[-1]).exists()
    page = desk.sakd("report", "sound", "--out", "r" * 245 + ".html")
    assert (page.code, page.err.count("\n")) == (2, 1), "the plots' names are longer"
    assert not [path.name for path in desk.cwd.iterdir() if path.name.startswith(("rr", ".rr", ".éé", ".pp"))]


READERS = ["list models", "list models --json", "inspect-spots sound", "inspect-spots sound --json", "show method sp"]


@pytest.mark.parametrize("arguments", READERS)
def test_a_reader_that_has_gone_is_no_error(desk: ForkServer, arguments: str) -> None:
    result = desk.sakd(*arguments.split(), faults=Faults(stdout="closed"))
    assert (result.code, result.err) == (141, "")


NARROW: dict[str, str | None] = {"COLUMNS": "20", "TERM": "dumb", "HOME": None, "NO_COLOR": "1"}


@pytest.mark.parametrize(
    "arguments", ["eval sound -q", "inspect-spots sound", "list methods", "config show --preset quickstart"]
)
def test_a_narrow_plain_terminal_without_a_home_shows_every_figure(desk: ForkServer, arguments: str) -> None:
    here, there = (desk.sakd(*arguments.split(), faults=Faults(environment=odd)) for odd in ({}, NARROW))
    assert (here.code, there.code, there.err) == (0, 0, "")
    assert "\x1b" not in there.out
    assert {part for part in there.out.split() if "%" in part} >= {part for part in here.out.split() if "%" in part}


@pytest.mark.parametrize("width", ["99999999", "0", "\N{SUPERSCRIPT TWO}", "9" * 5000])
def test_no_width_of_a_terminal_keeps_a_page_from_being_shown(desk: ForkServer, width: str) -> None:
    """Neither minutes and gigabytes of blanks, nor an empty page, nor a traceback."""
    for name in ("COLUMNS", "LINES", "TERMINAL_WIDTH"):
        for arguments in (["--help"], ["list", "models"]):
            page = desk.sakd(*arguments, faults=Faults(environment={name: width}))
            assert (page.code, page.err) == (0, "")
            assert 1_000 < len(page.out) < 100_000


PLAIN = {"LC_ALL": "C", "LANG": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}


def test_a_library_that_cannot_be_imported_is_not_an_internal_error(desk: ForkServer, tmp_path: Path) -> None:
    """As one that was built for another version of torch, or that takes no such value of its environment variable."""
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text("raise RuntimeError('operator nms does not exist\\n')")
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    line = [sys.executable, "-m", "sakd_cli", "predict", "sound", "nothing.png", "-q"]
    done = subprocess.run(line, cwd=desk.cwd, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (2, 2), done.stderr
    assert done.stderr.startswith("error: torchvision cannot be imported: RuntimeError: operator nms does not exist\n")


@pytest.mark.parametrize(
    ("odd", "arguments"),
    [
        ({"PYTHONOPTIMIZE": "2"}, "list methods"),
        pytest.param({"PYTHONOPTIMIZE": "2"}, "show method sp", marks=pytest.mark.battery),
        (PLAIN, "inspect-spots sound"),
        ({"HOME": "/dev/null/none"}, "compare sound teacher --plot curves.png"),
        pytest.param({"PYTHONOPTIMIZE": "2"}, " ".join(["ALL", "--run-dir optimized"]), marks=pytest.mark.battery),
        pytest.param(PLAIN | {"LC_ALL": "tr_TR.UTF-8"}, "ALL --run-dir größe", marks=pytest.mark.battery),
    ],
)
def test_odd_interpreters(desk: ForkServer, odd: dict[str, str], arguments: str) -> None:
    line = [part for word in arguments.split() for part in (WORDS if word == "ALL" else [word])]
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | odd
    done = subprocess.run([sys.executable, "-m", "sakd_cli", *line], cwd=desk.cwd, env=environment, capture_output=True)
    assert (done.returncode, done.stderr.removeprefix(b"written: curves.png\n")) == (0, b"")
    assert done.stdout.strip()
