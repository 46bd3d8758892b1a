"""Whole commands on a GPU: `python -m pytest -m gpu`; on a CPU that plays one: `-p played_gpu tests/test_gpu.py`."""

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PAIR, SHAPES, TINY, CliRunner

from sakd_cli import api
from sakd_cli.config.routers import ROUTERS
from sakd_cli.engine.reporter import Reporter
from sakd_cli.errors import Stopped

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]  # torch warns as it compiles, and hides it
DEVICE = "cuda:0"
if not torch.cuda.is_available():
    pytest.skip("no GPU here: no command is run on one", allow_module_level=True)

# 14 steps: three are called, the others replayed; the last of an epoch is shorter.
STEPS = ["--device", DEVICE, "--epochs", "2", "--batch-size", "14"]
EXACT = ["--deterministic", "--precision", "fp32"]
RESIDUAL = ["--residual-students", "1", "--set", "residual.architectures=resnet8", "--set", "residual.max_cost=2"]
TRAININGS = {
    "teacher": ["pretrain-teacher", "resnet8"],
    "student-friendly teacher": ["pretrain-teacher", "resnet8", "--student-friendly", "resnet8"],
    "warm-up of ft": [*PAIR, "--method", "ft"],
    "warm-up of ab": [*PAIR, "--method", "ab"],
    "warm-up of fsp": [*PAIR, "--method", "fsp"],
    "search of dfa": [*PAIR, "--method", "dfa", "--set", "method.search_epochs=2"],
    "residual student": [*PAIR, "--method", "kd", *RESIDUAL, "--set", "residual.min_gain=-9"],
    "two methods": [*PAIR, "--method", "fitnet+crd", "--loss-weight", "auto"],
    "held-out images": [*PAIR, "--method", "fitnet", "--router", "meta"],
    "router every fourth step": [*PAIR, "--method", "fitnet", "--set", "router.update_every=4"],
    "mixtures and averages": [*PAIR, "--method", "kd", "--set", "data.mixup=0.2", "--set", "train.ema=0.9"],
    **{
        name: [*PAIR, "--method", "fitnet", "--set", f"train.optimizer={name}", "--lr", "0.001"]
        for name in ("adamw", "nadam", "rmsprop")
    },
}


def test_a_gpu_takes_no_tensors_of_two_devices() -> None:
    with pytest.raises(RuntimeError, match="on the same device"):
        torch.ones(2, device=DEVICE) + torch.ones(2)


@pytest.fixture(scope="module")
def teacher(cli: CliRunner) -> Path:
    result = cli.sakd("pretrain-teacher", "resnet8", *TINY, "--device", DEVICE)
    assert result.code == 0, result.err
    return cli.path / result.out.strip().splitlines()[-1].removeprefix("run: ")


def weights(run: Path) -> dict[str, bytes]:
    return {path.relative_to(run).as_posix(): path.read_bytes() for path in run.rglob("model.safetensors")}


@pytest.mark.parametrize("name", TRAININGS)
def test_a_training_of_captured_steps_ends_in_the_bits_of_called_ones(
    cli: CliRunner, teacher: Path, tmp_path: Path, name: str
) -> None:
    ended = {}
    for graph in ("true", "false"):
        run = tmp_path / graph
        given = [*TRAININGS[name], *TINY, *STEPS, *EXACT, "--set", f"runtime.graph={graph}", "--run-dir", str(run)]
        result = cli.sakd(*given)
        assert result.code == 0, result.err
        assert "it is called instead" not in result.err
        ended[graph] = weights(run)
    assert ended["true"].keys() == ended["false"].keys() != set()
    assert [file for file in ended["true"] if ended["true"][file] != ended["false"][file]] == []


@pytest.mark.parametrize("router", [name for name in ROUTERS if name != "random-matched"])
def test_a_step_of_every_router_compiles_whole(cli: CliRunner, teacher: Path, tmp_path: Path, router: str) -> None:
    compiled = ["--compile", "--precision", "bf16", "--run-dir", str(tmp_path / "run")]
    result = cli.sakd(*PAIR, "--method", "fitnet", "--router", router, *TINY, *STEPS, *compiled)
    assert result.code == 0, result.err
    assert "cannot be" not in result.err


class Stopping(Reporter):
    """Stops a training at a step."""

    def __init__(self, step: int) -> None:
        self.step, self.done = step, 0

    def advance(self, step: int) -> None:
        self.done = step

    def stop(self) -> int:
        return signal.SIGINT if self.done == self.step else 0


@pytest.mark.parametrize("step", [2, 5, 7, 10])
def test_a_run_that_is_stopped_at_a_step_resumes_to_the_same_bits(teacher: Path, tmp_path: Path, step: int) -> None:
    given: dict[str, Any] = {"student": "resnet8", "teacher": str(teacher), "method": "fitnet", "device": DEVICE}
    given |= {"dataset": "shapes", "epochs": 2, "batch_size": 14, "precision": "fp32", "deterministic": True}
    given["settings"] = {f"data.{key}": value for key, value in SHAPES.items()}
    whole = api.distill(**given, run_dir=tmp_path / "whole")
    with pytest.raises(Stopped):
        api.distill(**given, run_dir=tmp_path / "stopped", reporter=Stopping(step))
    resumed = api.distill(**given, run_dir=tmp_path / "stopped", resume="auto")
    assert weights(resumed.path)["student/model.safetensors"] == weights(whole.path)["student/model.safetensors"]


def test_a_run_reports_what_eval_finds_and_its_images_can_be_probed(
    cli: CliRunner, teacher: Path, tmp_path: Path
) -> None:
    run = str(tmp_path / "run")
    summary = cli.sakd(*PAIR, "--method", "fitnet", *TINY, *STEPS, "--run-dir", run, "--json").document
    untimed = ["--device", DEVICE, "--set", "timing_seconds=0", "--json"]
    first, _ = cli.sakd("eval", run, str(teacher), *untimed).document["evaluations"]
    assert first["top1"] == summary["last"]["top1"]
    assert cli.sakd("inspect-spots", run, "--probe", "--device", DEVICE, "--json").document["probe"]
