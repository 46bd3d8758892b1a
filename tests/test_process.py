"""What a program has set in PyTorch: a call computes as in a new process, and leaves that as it was."""

import random
import signal
import threading
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from sakd_cli import api
from sakd_cli.engine.reporter import stop_signals_to
from sakd_cli.engine.runtime import _command, as_in_new_process, fp32_kept, full_fp32, set_tf32
from sakd_cli.errors import UsageError

SHAPES: dict[str, Any] = {"dataset": "shapes", "epochs": 1, "batch_size": 12}
SHAPES["settings"] = {"data.train": 36, "data.test": 20}
backends: Any = torch.backends


@contextmanager
def _wide() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@contextmanager
def _newer_tf32() -> Iterator[None]:
    """By the way of saying so that PyTorch recommends since 2.9."""
    with fp32_kept():
        backends.cuda.matmul.fp32_precision = backends.cudnn.conv.fp32_precision = "tf32"
        yield


SET: dict[str, Any] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "float64": _wide,
    "device": lambda: torch.device("meta"),
    "tf32": _newer_tf32,
}


def _state() -> list[Any]:
    matmul = convolutions = None
    with suppress(RuntimeError):
        matmul = torch.get_float32_matmul_precision()
    with suppress(RuntimeError):
        convolutions = backends.cudnn.allow_tf32
    fp32 = [place.fp32_precision for place in (backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn)]
    torch_state = torch.get_default_dtype(), torch.get_default_device(), torch.is_grad_enabled()
    modes = torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu"), backends.cudnn.benchmark
    numbers = torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()
    more = torch.are_deterministic_algorithms_enabled(), torch.get_num_threads(), signal.getsignal(signal.SIGINT)
    return [matmul, convolutions, fp32, torch_state, modes, numbers, more]


def _weights(runs_dir: Path) -> dict[str, torch.Tensor]:
    run = api.pretrain_teacher("resnet8", runs_dir=runs_dir, **SHAPES)
    with torch.device("cpu"):  # an old safetensors loads to the default one
        return load_file(run.network / "model.safetensors")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    return _weights(tmp_path_factory.mktemp("plain"))


@pytest.mark.parametrize("name", SET)
def test_what_a_program_has_set_changes_no_bit_of_a_run(
    name: str, plain: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    with SET[name]():
        before = _state()
        found = _weights(tmp_path)
        assert _state() == before
    for key, tensor in plain.items():
        assert tensor.dtype == found[key].dtype
        assert torch.equal(tensor, found[key]), key


def test_the_numbers_that_a_program_draws_are_those_without_a_run(tmp_path: Path) -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    run = api.pretrain_teacher("resnet8", runs_dir=tmp_path, **SHAPES)
    api.export(run.path, out=tmp_path / "out", settings={"timing_seconds": 0})
    assert torch.equal(torch.rand(4), expected)


def test_what_cuda_computes_by_is_put_back() -> None:
    before = _state()
    with as_in_new_process():
        set_tf32(True)
        backends.cudnn.benchmark = True
        torch.use_deterministic_algorithms(True)
    assert _state() == before


@pytest.mark.parametrize("newer", [False, True])
def test_full_precision_is_full_whichever_way_tf32_was_asked_for(newer: bool) -> None:
    with ExitStack() as stack:
        stack.enter_context(_newer_tf32() if newer else fp32_kept())
        if not newer:
            set_tf32(True)
        with full_fp32():
            assert torch.get_float32_matmul_precision() == "highest"
            assert backends.cudnn.conv.fp32_precision == "ieee"
        assert backends.cuda.matmul.fp32_precision == "tf32"


def test_a_series_in_processes_may_be_called_from_a_thread() -> None:
    """Where no signal can be received."""
    errors: list[BaseException] = []

    def call() -> None:
        try:
            with stop_signals_to(lambda number, frame: None):
                return
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    assert not errors


def test_a_traceback_says_what_to_do() -> None:
    error = UsageError("e: exists already", "--overwrite")
    assert traceback.format_exception_only(error)[-1] == "hint: --overwrite\n"


def test_a_type_checker_reads_the_types() -> None:
    assert (files("sakd_cli") / "py.typed").is_file()


def _inner() -> type[api.Router]:
    class Inner(api.Router):
        """A class that no file has under its name"""

        def decide(self, seen: api.Seen) -> torch.Tensor:
            return seen.labels >= 0

    return Inner


def test_what_only_this_process_knows_is_refused_before_runs_in_others_begin(tmp_path: Path) -> None:
    grid = {"task": "sweep", "pairs": ["resnet8:resnet8"], "methods": ["kd"], "routers": [_inner()]}
    with pytest.raises(UsageError, match="Inner is known to this process alone, and every run has one of its own"):
        api.sweep(grid | {"common": {"data": {"name": "shapes"}}}, runs_dir=tmp_path)
    assert not [*tmp_path.rglob("*.yaml")]


def test_the_command_of_a_run_is_that_of_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["study.py", "--fast"])
    assert _command() == "python study.py --fast"
    monkeypatch.setattr("sys.argv", ["/venv/bin/sakd", "distill"])
    assert _command() == "sakd distill"
