"""Is there anything to route? The products against exact gradients, what explains them, and the command."""

import contextlib
import json
from typing import Any

import pytest
import torch
from conftest import PAIR, TINY, CliRunner
from test_step import batches, make
from torch.nn import functional as F

from sakd_cli.config.resolve import config_sources
from sakd_cli.rundir import RunDir
from sakd_cli.runs.probe import class_share, explained
from sakd_cli.runs.survey import trained_job
from sakd_cli.tasks import ahead
from sakd_cli.tasks.ahead import along, held_out_gradient


@pytest.mark.parametrize("method", ["fitnet", "at", "vid"])
def test_a_product_is_that_of_the_two_gradients(method: str, float64: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "STEP", 1e-7)  # in float64; over kinks of ReLUs a longer one errs by a percent
    task = make(method, "always").eval()
    batch, other = batches(task, 2)
    weights = [p for p in task.network.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in weights]
    way = held_out_gradient(task.network, [(other.images, other.labels)])
    assert float(sum(part.square().sum() for part in way)) == pytest.approx(1.0)
    found = along(task.network, way, lambda: task.sample_losses(batch))
    assert all(torch.equal(a, b) for a, b in zip(before, weights, strict=True)), "the weights stay as they are"
    student = task.student_features(batch.images)
    ones = torch.ones(len(task.spots), len(batch.labels))
    loss = task.factors.feature * task.feature_distiller(student, task.teacher_features(batch), ones[:-1], batch)
    for k in range(len(loss)):
        exact = torch.autograd.grad(loss[k], weights, retain_graph=True, allow_unused=True, materialize_grads=True)
        product = sum(float((a * b).sum()) for a, b in zip(exact, way, strict=True))
        assert float(found[k].mean()) == pytest.approx(product, rel=1e-3)


def test_an_images_loss_is_its_own_part(float64: None) -> None:
    task = make("fitnet", "always").eval()
    batch = batches(task, 1)[0]
    with torch.no_grad():
        s, t = task.student_features(batch.images), task.teacher_features(batch)
        (spot, _), (regressor,) = task.spots, task.feature_distiller.regressors
        error = F.mse_loss(regressor(s.stages[spot.student]), t.stages[spot.teacher], reduction="none")
    found = task.sample_losses(batch)
    torch.testing.assert_close(found[0], error.flatten(1).mean(dim=1))
    assert found.shape == (2, len(batch.labels))


def test_what_explains_a_product_is_measured_on_other_images() -> None:
    draw = torch.Generator().manual_seed(0)
    features = torch.randn(400, 5, generator=draw)
    noise = torch.randn(400, generator=draw)
    assert float(explained(features, features[:, 0] * 3) or 0) > 0.95
    assert float(explained(features, noise) or 0) < 0.05
    assert explained(features, torch.zeros(400)) is None
    labels = torch.arange(400) % 4
    assert class_share(labels.double(), labels) == pytest.approx(1.0)
    assert float(class_share(noise, labels) or 0) < 0.05
    assert class_share(torch.ones(400), labels) is None


def test_a_run_is_probed(trained_cli: CliRunner, distilled: dict[str, Any]) -> None:
    found = trained_cli.sakd("inspect-spots", distilled["run"], "--probe", "--json").document["probe"]
    assert (found["images"], found["held_out"], found["held_out_split"]) == (90, 10, "validation")
    again = trained_cli.sakd("inspect-spots", distilled["run"], "--probe", "--json").document["probe"]
    assert found == again
    for spot in found["spots"]:
        assert 0 <= spot["helps"] <= 1
        assert -1 <= (spot["reliability"] or 0) <= 1
        assert spot["settled"] == 1
    text = " ".join(trained_cli.sakd("inspect-spots", distilled["run"], "--probe").out.split())
    assert "Is there anything to route?" in text
    assert json.loads(trained_cli.sakd("inspect-spots", distilled["run"], "--json").out)["probe"] is None


def test_a_run_in_16_bits_is_probed_in_32(trained_cli: CliRunner) -> None:
    """As every run on a GPU is by default: in 16 bits a step along the gradient moves no weight."""
    path = trained_cli.sakd(*PAIR, "--method", "kd", *TINY, "--precision", "bf16", "--json").document["run"]
    run = RunDir(trained_cli.path / path)
    with contextlib.chdir(trained_cli.path):
        jobs = [trained_job(run, config_sources({}), losses=losses) for losses in (False, True)]
    assert [job.mode.autocast_dtype for job in jobs] == [torch.bfloat16, None]
