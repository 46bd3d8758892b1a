"""The guide "extending", carried out word by word in a copy: what it adds is listed, trained, resumed and evaluated."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from conftest import SCHEMAS
from generated_guides import GUIDES, ROOT

# Files of the package that each kind of addition touches, as the guide's own table says.
TOUCHES = {
    "A distiller": 3,
    "A router": 2,
    "A family of networks": 3,
    "A data set": 3,
    "An option": 1,
    "A training procedure": 2,
    "A column of a report": 2,
}
PLACE = r"(?:(New file) `([^`]+)`|In `([^`]+)`, (before|behind|instead of) `([^\n]+)`|At the (end) of `([^`]+)`):?"
STEP = re.compile(PLACE + r"\n\n(?:<!-- test: [^\n]+ -->\n)?```\w+\n(.*?)```\n", re.DOTALL)
PROGRAM = """
import contextlib, io, json, os, pathlib, sys
from unittest import mock
import pytest
from sakd_cli.cli.app import run

for arguments in json.load(sys.stdin):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        if arguments[0] == 'rm':
            code = pathlib.Path(arguments[1]).unlink() or 0
        elif arguments[0] == 'pytest':
            os.chdir(arguments[1])
            code = pytest.main(arguments[2:])
        elif arguments[0] == 'stopped':
            with mock.patch('sakd_cli.cli.console.ConsoleReporter.stop', lambda self: 2):
                code = run(arguments[1:])
        else:
            code = run(arguments)
    print(json.dumps([code, out.getvalue(), err.getvalue()]))
"""
FEW = ["--dataset", "stripes", "--set", "data.train=120", "--set", "data.test=40", "--batch-size", "40", "--json", "-q"]
WEIGHTS = "teacher/teacher/model.safetensors"
DISTILL = ["distill", "--teacher", "teacher", "--student", "plain3", "--method", "huber"]
DISTILL += ["--router", "first-epochs", "--epochs", "2", "--set", "router.epochs=1", "--run-dir", "first"]
SMOOTH = ["pretrain-smooth", "plain3", "--set", "smoothing=0.2", "--run-dir", "smooth"]
COMMANDS = {
    "methods": ["list", "methods", "--json"],
    "routers": ["list", "routers", "--json"],
    "models": ["list", "models", "--json"],
    "datasets": ["list", "datasets", "--json"],
    "shown": ["show", "method", "huber"],
    "option": ["config", "show", "--preset", "quickstart", "--weight-decay", "0.002", "--json"],
    "pretrained": ["pretrain-teacher", "plain3", "--run-dir", "teacher", "--epochs", "1", *FEW],
    "distilled": [*DISTILL, *FEW],
    "spots": ["inspect-spots", "first", "--json"],
    "removed": ["rm", "first/summary.json"],
    "resumed": ["distill", "--resume", "first", "--json", "-q"],
    "evaluated": ["eval", "first", "--json", "-q", "--set", "timing_seconds=0"],
    "table": ["eval", "first", "-q", "--set", "timing_seconds=0"],
    "smoothed": ["stopped", *SMOOTH, "--epochs", "1", *FEW],
    "smoothed on": ["pretrain-smooth", "--resume", "smooth", "--json", "-q"],
    "help": ["pretrain-smooth", "--help"],
    "imported": ["import-weights", WEIGHTS, "--model", "plain3", "--out", "in", *FEW[:6], "--json", "-q"],
    "not imported": ["import-weights", WEIGHTS, "--model", "resnet8", "--out", "no", *FEW[:6], "-q"],
}


class Step(NamedTuple):
    """Lines of the guide, and where it says that they go."""

    file: str
    place: str
    anchor: str
    lines: str

    def apply(self, root: Path) -> None:
        path = root / self.file
        if self.place == "New file":
            assert not path.exists(), f"{self.file} is there already"
            path.write_text(self.lines, encoding="utf-8")
            return
        text = path.read_text(encoding="utf-8")
        if self.place == "end":
            path.write_text(f"{text}\n\n{self.lines}", encoding="utf-8")
            return
        line = f"{self.anchor}\n"
        count = text.count(f"\n{line}")
        assert count == 1, f"{self.file}: {self.anchor!r} is not one line of it"
        parts = {"before": self.lines + line, "behind": line + self.lines, "instead of": self.lines}
        path.write_text(text.replace(f"\n{line}", f"\n{parts[self.place]}"), encoding="utf-8")


def sections() -> dict[str, list[Step]]:
    """Title of each section of the guide -> its steps."""
    text = (GUIDES / "extending.md").read_text(encoding="utf-8")
    found = {}
    for section in text.split("\n## ")[1:]:
        title, _, body = section.partition("\n")
        steps = []
        for new, new_file, file, place, anchor, end, end_file, lines in STEP.findall(body):
            steps.append(Step(new_file or file or end_file, new or place or end, anchor, lines))
        assert body.count("```python") + body.count("```toml") == len(steps), f"{title}: a block does not say where"
        found[title] = steps
    return found


def run(copy: Path, *arguments: str, **how: Any) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SAKD_")}
    environment |= {"PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, **how)


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project with all additions of the guide but the plug-in, which is a package of its own."""
    copy = tmp_path_factory.mktemp("copy")
    ignored = shutil.ignore_patterns("*.pyc.*")  # files that another process is writing; what is compiled stays so
    for folder in ("sakd_cli", "presets", "tests"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", copy)
    for title, steps in sections().items():
        for step in steps if title != "A plug-in" else []:
            step.apply(copy)
    return copy


@pytest.fixture(scope="module")
def done(copy: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str, str]]:
    """Exit code, stdout and stderr of every command and of the copy's own tests, in one process of the copy."""
    folder = tmp_path_factory.mktemp("folder")
    about = ("architecture", "distillers", "routing", "models", "data", "config", "options")
    files = [f"tests/test_{name}.py" for name in about]
    chosen = "huber or first-epochs or plain3 or agree or meets_code or fulfils or overridden or published_defaults "
    chosen += "or says_in_a_sentence or sets_a_key"
    tests = ["pytest", str(copy), *files, "-n", "0", "-p", "no:cacheprovider", "-k", chosen]
    commands = COMMANDS | {"tests": tests}
    answer = run(copy, "-c", PROGRAM, cwd=folder, input=json.dumps(list(commands.values())))
    assert answer.returncode == 0, answer.stderr
    answers = [tuple(json.loads(line)) for line in answer.stdout.splitlines()]
    return dict(zip(commands, answers, strict=True))


def document(done: dict[str, tuple[int, str, str]], name: str) -> Any:
    code, out, err = done[name]
    assert code == 0, err
    return json.loads(out)


@pytest.mark.parametrize("title", TOUCHES)
def test_an_addition_touches_as_few_files_as_promised(title: str) -> None:
    files = {step.file for step in sections()[title] if step.file.startswith("sakd_cli/")}
    assert len(files) == TOUCHES[title]
    assert set(TOUCHES) | {"A plug-in", "In one file"} == {title for title, steps in sections().items() if steps}


def test_what_was_added_passes_the_tests_of_what_is_registered(done: Any) -> None:
    code, out, _ = done["tests"]
    assert code == 0, out[-4000:]
    count = re.search(r"(\d+) passed", out)
    assert count is not None
    assert int(count[1]) > 25


def test_what_was_added_is_well_formed(copy: Path) -> None:
    changed = [str(copy / step.file) for title, steps in sections().items() if title != "A plug-in" for step in steps]
    python = sorted({file for file in changed if file.endswith(".py")})
    fixed = run(copy, "-m", "ruff", "check", "--fix", "-q", "--config", str(copy / "pyproject.toml"), *python)
    assert fixed.returncode == 0, fixed.stdout


@pytest.mark.parametrize(
    ("kind", "name"),
    [("methods", "huber"), ("routers", "first-epochs"), ("models", "plain3"), ("datasets", "stripes")],
)
def test_what_was_added_is_listed(done: Any, kind: str, name: str) -> None:
    assert name in [row["name"] for row in document(done, kind)["rows"]]


def test_what_was_added_is_trained_resumed_and_evaluated(done: Any) -> None:
    assert "h(r(s) - t)" in done["shown"][1]
    assert document(done, "pretrained")["network"] == "plain3"
    first, resumed = document(done, "distilled"), document(done, "resumed")
    assert {**first, "seconds": 0, "phases": 0} == {**resumed, "seconds": 0, "phases": 0}
    spots = document(done, "spots")
    assert [round(spot["fraction"], 3) for spot in spots["overall"]] == [0.5, 0.5], (
        "distilled in the first of two epochs"
    )
    assert document(done, "evaluated")["images"] == 40


def test_a_network_of_an_added_family_is_imported_or_says_why_not(done: Any) -> None:
    assert document(done, "imported")["network"] == "plain3"
    code, _, err = done["not imported"]
    assert (code, "is no resnet8" in err, "Traceback" in err) == (2, True, False)


def test_an_added_option_sets_its_key(done: Any) -> None:
    shown = document(done, "option")
    assert "0.002" in json.dumps(shown)


def test_an_added_column_is_in_the_table(done: Any) -> None:
    code, out, err = done["table"]
    assert code == 0, err
    error = 100 - document(done, "evaluated")["top1"]
    assert re.search(rf"Error % +{error:.2f}\b", out), out


def test_an_added_procedure_has_a_command_a_stop_hint_and_a_document_that_fits_its_schema(done: Any) -> None:
    code, _, err = done["smoothed"]
    assert (code, "sakd pretrain-smooth --resume smooth" in err) == (130, True)
    summary = document(done, "smoothed on")
    assert (summary["task"], summary["network"], summary["epochs"]) == ("smooth", "plain3", 1)
    SCHEMAS[summary["schema"]].model_validate(summary)
    assert "smoothed labels" in done["help"][1]
    assert "--student-friendly" not in done["help"][1]


def test_the_plug_in_of_the_guide_is_the_one_that_is_tested() -> None:
    steps = sections()["A plug-in"]
    assert len(steps) == 5
    for step in steps:
        kept = Path(__file__).parent / "plugin_example" / step.file
        assert step.lines == kept.read_text(encoding="utf-8"), f"{step.file} in the guide is another one"
