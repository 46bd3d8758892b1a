"""A teacher's logits from a file: the same run as with the network's answers; what is refused."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SHAPES, TINY, CliRunner
from safetensors.torch import load_file, save_file

from sakd_cli.config.resolve import ConfigSource, nested, resolve
from sakd_cli.runs.build import distillation
from sakd_cli.runs.extension import loader_of

CLASSES = 20
RUN = ["distill", "--student", "resnet8", "--router", "always"]


@pytest.fixture(scope="module")
def answers(trained_cli: CliRunner, distilled: dict[str, Any]) -> Path:
    """Written for the images of a run with the same data settings, as its `images.json` lists them."""
    images = (trained_cli.path / distilled["run"] / "images.json").read_bytes()
    logits = torch.randn(90, CLASSES, generator=torch.Generator().manual_seed(1))
    path = trained_cli.path / "answers.safetensors"
    save_file({"logits": logits}, path, {"images": hashlib.sha256(images).hexdigest()})
    return path


@pytest.mark.parametrize("method", ["kd", "dkd"])
def test_a_run_learns_from_the_file_and_goes_on(trained_cli: CliRunner, answers: Path, method: str) -> None:
    words = [*RUN, "--method", method, *TINY, "--set", "teacher.logits=answers.safetensors"]
    words += ["--set", "train.schedule=constant"]
    found = trained_cli.sakd(*words, "--epochs", "2", "--json").document
    once = trained_cli.sakd(*words, "--json").document
    extended = trained_cli.sakd("distill", "--resume", once["run"], "--epochs", "2", "-q")
    assert extended.code == 0, extended.err
    folders = (trained_cli.path / run["run"] / "student" for run in (found, once))
    weights = [load_file(folder / "model.safetensors") for folder in folders]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert trained_cli.sakd("eval", found["run"], "-q").code == 0
    save_file({"logits": load_file(answers)["logits"] + 1}, trained_cli.path / "changed.safetensors", {"images": "0"})
    kept = answers.read_bytes()
    answers.write_bytes((trained_cli.path / "changed.safetensors").read_bytes())
    changed = trained_cli.sakd("distill", "--resume", once["run"], "--epochs", "3").err
    assert "is not the teacher this run began with" in changed
    answers.write_bytes(kept)


def test_the_logits_are_those_of_each_image(trained_cli: CliRunner, answers: Path) -> None:
    """With a weight of 0 for the labels, what is learned are the answers of the file."""
    words = {"teacher.logits": answers, "teacher.weights": answers, "student": "resnet8", "method.name": "kd"}
    words |= {"router.name": "always", "data.name": "shapes"} | {f"data.{k}": v for k, v in SHAPES.items()}
    job = distillation(resolve("distill", [ConfigSource("-", nested(words))]).config)
    batch = next(iter(loader_of(job).epoch(1)))
    assert torch.equal(job.task.teacher_features(batch).logits, load_file(answers)["logits"][batch.index])


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--method", "fitnet"], "teacher.logits: method fitnet needs features, and a file has logits of images alone"),
        (["--method", "kd", "--router", "adaptive"], "teacher.logits: router adaptive needs features"),
        (["--method", "kd", "--set", "data.mixup=0.2"], "teacher.logits: data.mixup needs answers for mixed images"),
        (
            ["--method", "kd", "--set", "data.train=120"],
            "holds float32 [90, 20]; wanted are floating-point numbers [108",
        ),
        (["--method", "kd", "--set", "data.seed=1"], "is of other images"),
        (["--method", "kd", "--set", "teacher.logits=whole.safetensors"], "holds int64 [90, 20]; wanted are floating"),
        (["--method", "kd", "--set", "teacher.logits=nan.safetensors"], "the logits of image 7, counted from 0"),
        (["--method", "kd", "--set", "teacher.logits=other.txt"], "no safetensors file with a tensor `logits`"),
        (["--method", "kd", "--set", "teacher.logits=nowhere"], "teacher.logits: nowhere: no such file or directory"),
    ],
)
def test_what_a_file_cannot_give_costs_a_line(
    trained_cli: CliRunner, answers: Path, words: list[str], text: str
) -> None:
    (trained_cli.path / "other.txt").write_text(json.dumps({}))
    logits, about = load_file(answers)["logits"], {"images": "0"}
    save_file({"logits": logits.long()}, trained_cli.path / "whole.safetensors", about)
    save_file({"logits": logits.index_fill(0, torch.tensor(7), torch.nan)}, trained_cli.path / "nan.safetensors", about)
    result = trained_cli.sakd(*RUN, *TINY, "--set", "teacher.logits=answers.safetensors", *words)
    assert text in result.err.splitlines()[0]
    assert result.code in (2, 4)
