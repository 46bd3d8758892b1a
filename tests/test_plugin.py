"""A package of one's own with one distiller and one network: built, installed, and used like ours. And broken ones."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, CliRunner

from sakd_cli.config import plugins
from sakd_cli.config.methods import METHODS
from sakd_cli.distillers.table import DISTILLERS

ROOT = Path(__file__).parents[1]
EXAMPLE = Path(__file__).parent / "plugin_example"
# One process for all commands: each of its own would load torch again.
PROGRAM = """
import contextlib, io, json, pathlib, sys
from sakd_cli.cli.app import run

for arguments in json.load(sys.stdin):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = pathlib.Path(arguments[1]).unlink() or 0 if arguments[0] == 'rm' else run(arguments)
    print(json.dumps([code, out.getvalue()]))
"""


def commands(folder: Path, site: Path, *several: list[str]) -> list[str]:
    """What each command printed, in a process that has the plug-in."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SAKD_")}
    environment |= {"PYTHONPATH": os.pathsep.join([str(ROOT), str(site)]), "OMP_NUM_THREADS": "1"}
    given = json.dumps(several)
    program = [sys.executable, "-W", "error", "-c", PROGRAM]
    done = subprocess.run(program, input=given, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [code for code, _ in answers] == [0] * len(several), done.stderr
    return [result for _, result in answers]


@pytest.mark.skipif(find_spec("hatchling") is None, reason="hatchling, which builds the package, is not installed")
def test_a_package_of_ones_own_is_built_installed_and_used(tmp_path: Path) -> None:
    source, site = tmp_path / "source", tmp_path / "site"
    shutil.copytree(EXAMPLE, source)
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*pip, "--target", str(site), str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    run = ["--run-dir", "first", *TINY, "--json", "-q"]
    result = commands(
        tmp_path,
        site,
        ["list", "methods", "--json"],
        ["list", "models", "--json"],
        ["show", "method", "cosine", "--json"],
        ["pretrain-teacher", "resnet8", *TINY, "-q"],
        ["distill", "--teacher", "resnet8", "--student", "tinynet", "--method", "cosine", *run],
        ["rm", "first/summary.json"],
        ["distill", "--resume", "first", "--json", "-q"],
        ["eval", "first", "--json", "-q", "--set", "timing_seconds=0"],
        ["export", "first", "--json", "-q", "--set", "timing_seconds=0"],
        ["distill", "--teacher", "first", "--student", "tinynet", "--method", "at", "--run-dir", "second", *TINY, "-q"],
    )
    methods, models, shown, _, distilled, _, resumed, scored, exported, _ = result
    assert {"name": "tinynet", "package": "sakd-example"}.items() <= json.loads(models)["rows"][-1].items()
    assert json.loads(methods)["rows"][-1]["package"] == "sakd-example"
    assert not any(row["package"] for row in json.loads(methods)["rows"][:-1])
    assert json.loads(shown)["defaults"]["weight"] == 5.0
    summary = json.loads(distilled)
    assert (summary["network"], summary["epochs"]) == ("tinynet", 1)
    assert json.loads(resumed)["last"] == summary["last"]
    assert json.loads(scored)["top1"] == pytest.approx(summary["last"]["top1"])
    assert json.loads(exported)["check"]["difference"] <= 1e-4


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Makes packages that are found as if they were installed: name, entry points, and their one module."""
    monkeypatch.syspath_prepend(tmp_path)

    def install(name: str, points: str, module: str = "") -> None:
        about = tmp_path / f"{name}-1.0.dist-info"
        about.mkdir()
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (about / "entry_points.txt").write_text(points)
        (tmp_path / f"{name}.py").write_text(module)
        plugins.plugged.cache_clear()

    yield install
    for name in [name for name, loaded in sys.modules.items() if str(tmp_path) in str(getattr(loaded, "__file__", ""))]:
        del sys.modules[name]
    monkeypatch.undo()
    plugins.plugged.cache_clear()


POINT = "[sakd.methods]\n{name} = {module}:{what}\n"
WORDS = """
from typing import Literal
from sakd_cli.config.method import MethodConfig

class Own(MethodConfig):
    \"\"\"Mine\"\"\"
    name: Literal["{name}"] = "{name}"
"""
ODD_TEXT = """
class Odd(Exception):
    def __str__(self):
        raise ValueError("in str")

raise Odd
"""
ODD_CLASS = """
class Kind(type):
    def __getattribute__(self, name):
        raise RuntimeError("no attributes")

class Own(metaclass=Kind): ...
"""
LOSS = """
from sakd_cli.api import SpotwiseDistiller

class Own(SpotwiseDistiller):
    places = "every_map"

    def __init__(self, spots, *, weight: float = 1.0):
        super().__init__(spots)

    def spot_loss(self, k, student, teacher, weight):
        {body}
"""


@pytest.mark.parametrize(
    ("module", "what", "told"),
    [
        ("raise RuntimeError('no such thing')", "Own", "cannot be loaded (RuntimeError: no such thing)"),
        ("import nothing_of_that_name", "Own", "cannot be loaded (ModuleNotFoundError"),
        ("", "Own", "cannot be loaded (AttributeError"),
        ("Own = 3", "Own", "is no Distiller of sakd_cli.api, and no MethodConfig"),
        (WORDS.format(name="other"), "Own", "calls itself 'other'"),
        ("raise SystemExit(0)", "Own", "cannot be loaded (SystemExit: 0)"),
        ("raise BaseException('odd')", "Own", "cannot be loaded (BaseException: odd)"),
        (ODD_TEXT, "Own", "cannot be loaded (Odd: Odd)"),
        ("import torch; torch.set_default_dtype(torch.float64); Own = 3", "Own", "sets torch's default type"),
        ("import torch; torch.set_default_device('meta'); Own = 3", "Own", "sets torch's default type or device"),
        (ODD_CLASS, "Own", "no attributes"),
        ("", "Own!", "is no `module:name`"),
    ],
)
def test_a_broken_plugin_is_one_line_and_spoils_nothing_else(
    cli: CliRunner, packages: Any, module: str, what: str, told: str
) -> None:
    packages("broken_one", POINT.format(name="mine", module="broken_one", what=what), module)
    assert cli.sakd("--help").code == 0
    listed = cli.sakd("list", "methods", "--json")
    assert "kd" in [row["name"] for row in listed.document["rows"]]
    assert "mine" not in [row["name"] for row in listed.document["rows"]]
    assert listed.err.count("warning: plug-in broken_one: ") == 1
    assert (torch.get_default_dtype(), torch.get_default_device().type) == (torch.float32, "cpu")
    sys.modules.pop("broken_one", None)  # as in another process
    result = cli.assert_rejects(
        ["config", "show", "--teacher", "a", "--student", "resnet8", "--method", "mine"], 2, told
    )
    assert "plug-in broken_one" in result.err
    cli.assert_rejects(
        ["config", "show", "--teacher", "a", "--student", "resnet8", "--set", "method.wait=3"], 2, "unknown key"
    )
    assert cli.sakd("config", "show", "--teacher", "a", "--student", "resnet8", "--method", "at").code == 0


def test_a_name_that_is_taken_is_refused(cli: CliRunner, packages: Any) -> None:
    packages("thief", POINT.format(name="at", module="thief", what="Own"), WORDS.format(name="at"))
    arguments = ["config", "show", "--teacher", "a", "--student", "resnet8", "--method"]
    cli.assert_rejects([*arguments, "at"], 2, "method 'at': wanted by sakd and by thief")
    assert cli.sakd(*arguments, "sp").code == 0
    packages("one", POINT.format(name="same", module="one", what="Own"), WORDS.format(name="same"))
    packages("two", POINT.format(name="same", module="two", what="Own"), WORDS.format(name="same"))
    cli.assert_rejects([*arguments, "same"], 2, "method 'same': wanted by ")


def test_a_method_without_a_distiller_and_a_network_that_is_none(
    cli: CliRunner, pretrained: object, packages: Any
) -> None:
    packages("half", POINT.format(name="half", module="half", what="Own"), WORDS.format(name="half"))
    cli.assert_rejects(["show", "method", "half"], 2, "no package has an entry point 'sakd.distillers'")
    packages("nets", "[sakd.networks]\nmynet = nets:build\nResNet8 = nets:build\n", "def build(name, classes): ...\n")
    arguments = ["distill", "--teacher", "resnet8", "--method", "kd", *TINY, "--student"]
    cli.assert_rejects([*arguments, "mynet"], 2, "mynet is no StagedModel of that name for 20 classes")
    cli.assert_rejects([*arguments, "ResNet8"], 2, "network 'ResNet8': wanted by sakd and by nets")
    assert "did you mean 'mynet'" in cli.assert_rejects([*arguments, "mynett"], 2, "unknown model").err
    assert set(DISTILLERS.own) == set(DISTILLERS)


def test_what_a_package_does_while_it_is_loaded_stays_there(
    cli: CliRunner, packages: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    loud = "import os, sys; os.write(1, b'noise'); print('noise'); sys.stdout = None; os.close(1); os.chdir('/')\n"
    loud += "sys.setrecursionlimit(300)\n"
    packages("loud", POINT.format(name="mine", module="loud", what="Own"), loud + LOSS.format(body="return 0"))
    listed = cli.sakd("list", "methods", "--json")
    assert [row["package"] for row in listed.document["rows"] if row["name"] == "mine"] == ["loud"]
    assert "noise" not in capfd.readouterr().out
    assert cli.sakd("show", "method", "mine", "--json").code == 0


def test_a_list_of_entry_points_that_cannot_be_read_and_an_odd_name_spoil_nothing(
    cli: CliRunner, packages: Any, tmp_path: Path
) -> None:
    packages("garbled", "[sakd.methods]\nnot an entry point\n")
    packages("added", POINT.format(name="a+b", module="added", what="Own"), "Own = 3")
    packages("routed", "[sakd.routers]\nadaptive = routed:Own\n", "Own = 3")
    packages("strange", "[sakd.methods]\nown = strange:Own\n")
    next(tmp_path.rglob("strange-1.0.dist-info/METADATA")).write_bytes(b"\xff\x00 nothing")
    listed = cli.sakd("list", "methods", "--json")
    assert [row["name"] for row in listed.document["rows"]] == list(METHODS.own)
    unnamed = "plug-in a package whose METADATA"
    for told in (
        unnamed,
        "plug-in garbled: 'garbled' cannot be loaded",
        "plug-in added: 'a+b' is no name for a method",
    ):
        assert listed.err.count(told) == 1, listed.err
    arguments = ["config", "show", "--teacher", "a", "--student", "resnet8", "--router", "always", "--method"]
    cli.assert_rejects([*arguments, "a+b"], 2, "plug-in added: 'a+b' is no name for a method")
    assert cli.sakd(*arguments, "at+rkd").code == 0
    assert cli.sakd("runs", "--runs-dir", "nowhere", "--json").code == 0


def test_what_a_package_makes_is_looked_at_before_it_is_trained(
    cli: CliRunner, pretrained: object, packages: Any
) -> None:
    made = "from sakd_cli.models.table import create\n\ndef build(name, classes):\n    m = create('resnet8', classes)\n"
    for name, change in (("big", "m.double()"), ("nowhere", "m.to('meta')"), ("still", "m.requires_grad_(False)")):
        packages(name, f"[sakd.networks]\n{name} = {name}:build\n", f"{made}    m.name = name\n    return {change}\n")
        words = ["pretrain-teacher", name, *TINY, "--dry-run"]
        cli.assert_rejects(words, 2, f"plug-in {name}: {name} must have float32 parameters")
    for name, body, told in (("none", "return None", "TypeError: expected Tensor"), ("ends", "exit()", "SystemExit")):
        packages(name, POINT.format(name=name, module=name, what="Own"), LOSS.format(body=body))
        words = ["distill", "--teacher", "resnet8", "--student", "resnet8", "--method", name, *TINY, "--dry-run"]
        assert "Own.spot_loss" in cli.assert_rejects(words, 2, told).err
