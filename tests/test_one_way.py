"""One way through a command: images, networks, the teacher and the mode are looked up once per job."""

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, CliRunner

from sakd_cli.config.training import PROCEDURES, TASKS
from sakd_cli.data import table as data
from sakd_cli.engine import runtime
from sakd_cli.models import table as models
from sakd_cli.runs import build, locate

COUNTED: dict[str, Callable[..., Any]] = {
    "loads": data.load,
    "networks": models.create,
    "teachers": locate.find_teacher,
    "modes": runtime.resolve_mode,
}


@contextmanager
def counting() -> Iterator[Counter[str]]:
    """Counts the calls of COUNTED, by whatever module; networks that take memory only."""
    counts = Counter[str]()

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **named: Any) -> Any:
            counts[name] += torch.empty(0).device.type != "meta"
            return function(*arguments, **named)

        return wrapped

    modules = [module for name, module in sys.modules.items() if name.startswith("sakd_cli.")]
    with pytest.MonkeyPatch.context() as patch:
        for name, function in COUNTED.items():
            places = [(m, key) for m in modules for key, value in vars(m).items() if value is function]
            assert places
            for module, key in places:
                patch.setattr(module, key, counted(name, function))
        yield counts


PAIR = ["--teacher", "resnet14", "--student", "resnet8", "--method", "kd"]


@pytest.fixture
def tokens(tmp_path: Path) -> list[str]:
    return [*TINY, "--set", "data.train=60", "--set", "data.test=40", "--runs-dir", str(tmp_path), "--quiet"]


def test_a_job_looks_everything_up_once(cli: CliRunner, tokens: list[str]) -> None:
    with counting() as counts:
        assert cli.sakd("pretrain-teacher", "resnet14", *tokens).code == 0
    assert counts == {"loads": 1, "networks": 1, "modes": 1}
    for options in (["--dry-run"], []):
        with counting() as counts:
            assert cli.sakd("distill", *PAIR, *tokens, *options).code == 0
        assert counts == {"loads": 1, "networks": 1, "teachers": 1, "modes": 1}, options
    with counting() as counts:
        residual = ["--residual-students", "1", "--set", "residual.max_cost=9"]
        assert cli.sakd("distill", *PAIR, *tokens, *residual).code == 0
    assert counts == {"loads": 1, "networks": 2, "teachers": 1, "modes": 1}, "a residual student is built once"


@pytest.mark.parametrize("residual", [0, 1])
def test_a_teacher_that_is_trained_first_is_one_more_job(cli: CliRunner, tokens: list[str], residual: int) -> None:
    more = ["--residual-students", str(residual), "--set", "residual.max_cost=9"]
    with counting() as counts:
        assert cli.sakd("distill", *PAIR, *tokens, *more, "--pretrain").code == 0
    # The student's side is built once with the untrained teacher, so that its mistakes are reported first; another
    # process may have trained the teacher meanwhile.
    assert counts == {"loads": 1 + residual, "networks": 3 + residual, "teachers": 2, "modes": 3}


def test_a_training_procedure_is_a_row_of_the_table() -> None:
    assert set(PROCEDURES) <= set(TASKS)
    for name, procedure in PROCEDURES.items():
        module, _, function = procedure.builder.partition(":")
        assert (procedure.config.model_fields["task"].default, module) == (name, build.__name__)
        assert callable(getattr(build, function))
