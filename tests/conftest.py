"""A folder in which commands are run, and one tiny teacher and student that are trained once for all tests."""

import contextlib
import gc
import importlib
import io
import json
import os
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, get_args
from unittest import mock

import pytest
from fork_server import ForkServer, words_of

from sakd_cli.cli.app import run
from sakd_cli.documents.table import DOCUMENTS

# Set before torch is imported. On small tensors a second thread wins nothing; on a busy machine waiting for it costs.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["XDG_STATE_HOME"] = tempfile.mkdtemp()  # what a user's runs leave outside of their folders

SCHEMAS = {get_args(kind.model_fields["schema_"].annotation)[0]: kind for kind in DOCUMENTS.values()}
SHAPES = {"train": 100, "test": 20, "size": 16}
DRAWN = f"--dataset shapes --set data.test={SHAPES['test']} --set data.size={SHAPES['size']}"
TINY = shlex.split(f"{DRAWN} --set data.train={SHAPES['train']} --epochs 1")
PAIR = shlex.split("distill --teacher resnet8 --student resnet8")


@dataclass(frozen=True)
class Result:
    """Exit code and output of a command."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        """The one JSON document on stdout; fails where there is anything beside it, or it is not as its schema says."""
        assert self.code == 0, self.err
        document = json.loads(self.out)
        if isinstance(document, dict) and "schema" in document:
            SCHEMAS[document["schema"]].model_validate(document)
        return document


@dataclass(frozen=True)
class CliRunner:
    """A folder with a `runs` folder in it, in which commands are run."""

    path: Path

    def sakd(self, *arguments: str, **environment: str) -> Result:
        out, err = io.StringIO(), io.StringIO()
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("SAKD_", "FORCE_COLOR"))}
        with (
            contextlib.chdir(self.path),
            mock.patch.dict(os.environ, clean | environment, clear=True),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            code = run(words_of(arguments))
        return Result(code, out.getvalue(), err.getvalue())

    def tree(self) -> dict[str, tuple[int, int]]:
        return {
            path.relative_to(self.path).as_posix(): (path.stat().st_size, path.stat().st_mtime_ns)
            for path in self.path.rglob("*")
            if path.name != ".lock"  # who looks whether it is held touches it, and filelock before 3.30 its time
        }

    def assert_rejects(self, tokens: list[str], code: int, text: str) -> Result:
        """One line of error, at most one of hint, the exit code, and nothing written."""
        before = self.tree()
        result = self.sakd(*tokens)
        lines = result.err.splitlines()
        assert (result.code, result.out) == (code, ""), result.err
        assert lines[0].startswith("error: ")
        assert [line.partition(":")[0] for line in lines[1:]] in ([], ["hint"])
        assert text in lines[0]
        assert self.tree() == before
        return result


@pytest.fixture(scope="session")
def fork_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    """The process that forks commands, for all tests; `fork_server.at(folder)` runs them there."""
    fork_server = ForkServer(tmp_path_factory.mktemp("fork_server"))
    yield fork_server
    fork_server.close()


@contextmanager
def in_float64() -> Iterator[None]:
    """Meanwhile torch's default type is float64, in runs too."""
    import torch

    torch.set_default_dtype(torch.float64)
    try:
        with mock.patch("sakd_cli.engine.runtime.as_in_new_process", nullcontext):
            yield
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.fixture
def float64() -> Iterator[None]:
    with in_float64():
        yield


@pytest.fixture(scope="module")
def cli(tmp_path_factory: pytest.TempPathFactory) -> CliRunner:
    return CliRunner(tmp_path_factory.mktemp("cli"))


@contextmanager
def on_the_cpu() -> Iterator[None]:
    """Meanwhile there is no GPU, here and in processes that are started: what tests expect is what a CPU gives."""
    with pytest.MonkeyPatch.context() as hidden:
        hidden.setenv("CUDA_VISIBLE_DEVICES", "")
        for name in ("is_available", "is_initialized") if "torch" in sys.modules else ():
            hidden.setattr(f"torch.cuda.{name}", lambda: False)
        yield


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    with nullcontext() if item.get_closest_marker("gpu") else on_the_cpu():
        return (yield)  # type: ignore[return-value]


class Made(NamedTuple):
    """A folder in which a command was run, and its output."""

    path: Path
    result: Result

    def copy_to(self, path: Path) -> Result:
        shutil.copytree(self.path, path, dirs_exist_ok=True)
        return self.result


@pytest.fixture(scope="session")
def _teacher_made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    cli = CliRunner(tmp_path_factory.mktemp("teacher"))
    with on_the_cpu():
        result = cli.sakd("pretrain-teacher", "resnet8", *TINY)
    assert result.code == 0, result.err
    return Made(cli.path, result)


@pytest.fixture(scope="session")
def _student_made(tmp_path_factory: pytest.TempPathFactory, _teacher_made: Made) -> Made:
    cli = CliRunner(tmp_path_factory.mktemp("student"))
    _teacher_made.copy_to(cli.path)
    with on_the_cpu():
        result = cli.sakd(*PAIR, "--method", "fitnet", *TINY, "--json")
    return Made(cli.path, result)


@pytest.fixture(scope="module")
def pretrained(cli: CliRunner, _teacher_made: Made) -> Result:
    """The output of a command that trained a teacher for one epoch, in the folder of `cli`."""
    return _teacher_made.copy_to(cli.path)


@pytest.fixture(scope="module")
def teacher(cli: CliRunner, pretrained: Result) -> Path:
    """Its run directory."""
    return cli.path / pretrained.out.strip().splitlines()[-1].removeprefix("run: ")


@pytest.fixture(scope="module")
def distilled(cli: CliRunner, _student_made: Made, pretrained: Result) -> dict[str, Any]:
    """The summary of a distillation from that teacher."""
    document: dict[str, Any] = _student_made.copy_to(cli.path).document
    return document


@pytest.fixture(scope="module")
def trained_cli(cli: CliRunner, distilled: dict[str, Any]) -> CliRunner:
    """The folder with these two runs."""
    return cli


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A GPU's tests come first: compilers remember what they found, and `on_the_cpu` hides it from the others."""
    if "torch" in sys.modules and sys.modules["torch"].cuda.is_available():
        items.sort(key=lambda item: item.get_closest_marker("gpu") is None)
        importlib.import_module("torch._dynamo.trace_rules").get_torch_obj_rule_map()
        importlib.import_module("torch.utils._triton").has_triton()


def pytest_collection_finish() -> None:
    """What was imported stays: the collector need not look through all of torch again and again."""
    gc.collect()
    gc.freeze()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kills", type=int, default=6, help="how often tests/test_resume.py kills a run")
