"""Classes of unequal size: weights, focal loss and sampling, by their definitions; refusals; what is reported."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PAIR, TINY, CliRunner
from test_step import CLASSES, batches, fit, make
from torch import Tensor
from torch.nn import functional as F

from sakd_cli.config.resolve import ConfigSource, flat, nested, resolve
from sakd_cli.data.dataset import balanced_rates
from sakd_cli.data.loader import draws
from sakd_cli.errors import UsageError
from sakd_cli.runs.resume import _decays
from sakd_cli.tasks.criterion import Criterion, class_weights

NAMES = tuple("abcdefghij")
LABELS = torch.cat([torch.full((5 * (k + 1),), k) for k in range(CLASSES)])


def focal(logits: Tensor, labels: Tensor, weight: Tensor, gamma: float) -> Tensor:
    p = logits.softmax(1)[torch.arange(len(labels)), labels]
    each = -((1 - p) ** gamma) * p.log()
    return (weight[labels] * each).sum() / weight[labels].sum()


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    ("gamma", "weights"),
    [(0.0, "balanced"), (0.0, [1.0, 0.5] * 5), (2.0, None), (0.5, "balanced"), (2.0, [1.0, 0.5] * 5)],
)
def test_twenty_steps_are_those_of_a_plain_script(gamma: float, weights: Any) -> None:
    task = make("kd", "never")
    task.criterion = Criterion(class_weights(weights, LABELS, NAMES), focal=gamma)
    student, made = copy.deepcopy(task.network), batches(task, 20)
    given = {None: torch.ones(CLASSES), "balanced": len(LABELS) / (CLASSES * torch.bincount(LABELS))}
    weight = given[weights] if not isinstance(weights, list) else torch.tensor(weights)
    sgd = torch.optim.SGD(student.train().parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    for batch in made:
        logits = student(batch.images)
        loss = focal(logits, batch.labels, weight, gamma) if gamma else F.cross_entropy(logits, batch.labels, weight)
        sgd.zero_grad()
        loss.backward()
        sgd.step()
    fit(task, made)
    for ours, theirs in zip(task.network.state_dict().values(), student.state_dict().values(), strict=True):
        assert torch.allclose(ours.double(), theirs.double(), rtol=1e-10, atol=1e-12)


def test_a_certain_right_answer_has_a_finite_gradient() -> None:
    logits = torch.tensor([[1e3, 0.0]], requires_grad=True)
    batch = batches(make("kd", "never"), 1)[0].map(lambda x: x[:1] * 0)
    Criterion(focal=0.5)(logits, batch).backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("threshold", [None, 0.1, 0.3])
def test_an_epoch_shows_every_class_as_often_as_it_should(threshold: float | None) -> None:
    rates, share = balanced_rates(LABELS, CLASSES, threshold), torch.bincount(LABELS) / len(LABELS)
    factor = 1 / share if threshold is None else (threshold / share).sqrt().clamp(min=1)
    expected = share * factor / (share * factor).sum() * len(LABELS)
    order = draws(len(LABELS), 0, False, 3, 1, 0, rates).order
    seen, shown = torch.bincount(LABELS[order], minlength=CLASSES), torch.bincount(order, minlength=len(LABELS))
    assert len(order) == len(LABELS)
    assert ((shown >= rates.floor()) & (shown <= rates.ceil())).all()
    epochs = [draws(len(LABELS), 0, False, 3, epoch, 0, rates).order for epoch in range(1, 101)]
    seen = torch.stack([torch.bincount(LABELS[one], minlength=CLASSES) for one in epochs]).double().mean(0)
    assert torch.allclose(seen, expected.double(), atol=0.6)
    assert torch.equal(draws(len(LABELS), 0, False, 3, 1, 0, rates).order, order)
    assert not torch.equal(epochs[0], epochs[1])


def test_weights_by_name_and_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "weights.json"
    file.write_text(json.dumps({"b": 3, "j": 0.5}))
    words = {"model": "resnet8", "train.class_weights": str(file)}
    config = resolve("pretrain", [ConfigSource("test", nested(words))]).config
    assert config.train.class_weights == {"b": 3, "j": 0.5}, "the numbers themselves are kept with the run"
    found = class_weights(config.train.class_weights, LABELS, NAMES)
    assert found is not None
    assert found.tolist() == [1, 3, *[1] * 7, 0.5]
    for text, wrong in {
        '{"b": -1}': "-1 for class 'b' is no number from 0 up",
        '{"b": true}': "True for class 'b' is no number",
        "[1, .inf]": "inf for class 2 is no number",
        "": "holds no number per class",
        "balanced": "holds no number per class",
    }.items():
        file.write_text(text)
        with pytest.raises(UsageError, match=wrong):
            resolve("pretrain", [ConfigSource("test", nested(words))])
    file.write_text("0: 2\n1: 3")  # classes that YAML reads as numbers
    assert resolve("pretrain", [ConfigSource("test", nested(words))]).config.train.class_weights == {"0": 2, "1": 3}
    known = flat(config.model_dump(mode="json"))
    assert _decays(known | {"train.epochs": 8}, 7) == [5, 6, 7], "a run with weights by name can be extended"
    with pytest.raises(UsageError, match="no class is called 'x'"):
        class_weights({"x": 1.0}, LABELS, NAMES)
    with pytest.raises(UsageError, match="2 numbers for 10 classes"):
        class_weights((1.0, 2.0), LABELS, NAMES)


@pytest.mark.parametrize(
    ("settings", "code", "text"),
    [
        (["train.class_weights=nowhere.json"], 2, "train.class_weights: nowhere.json: no such file or directory"),
        (["train.class_weights=1,2"], 2, "train.class_weights: 2 numbers for 20 classes"),
        (["train.class_weights=[1,-2]"], 2, "train.class_weights"),
        (["data.balance_threshold=0.1"], 2, "balance_threshold is of balance=repeated-factor alone"),
        (["data.balance=even"], 2, "data.balance"),
        (["train.class_weight=balanced"], 2, "unknown key 'train.class_weight'; here it is 'train.class_weights'"),
    ],
)
def test_mistakes_cost_a_line(trained_cli: CliRunner, settings: list[str], code: int, text: str) -> None:
    words = [word for setting in settings for word in ("--set", setting)]
    trained_cli.assert_rejects([*PAIR, "--method", "kd", *TINY, *words], code, text)


def test_a_memory_of_images_is_refused_beside_sampling(trained_cli: CliRunner) -> None:
    words = ["--method", "crd", *TINY, "--set", "data.balance=balanced"]
    trained_cli.assert_rejects([*PAIR, *words], 2, "data.balance: method crd keeps one row per image")


def test_a_run_reports_its_classes(trained_cli: CliRunner) -> None:
    words = ["--set", "train.class_weights=balanced", "--set", "data.balance=balanced", "--set", "train.focal_gamma=2"]
    found = trained_cli.sakd(*PAIR, "--method", "kd", *TINY, *words, "--json").document
    assert len(found["classes"]) == 20
    assert sum(one["images"] for one in found["classes"]) == found["images"]
    assert sum(one["images"] * one["shown"] for one in found["classes"]) == pytest.approx(found["images"])
    shown = trained_cli.sakd("report", found["run"]).code
    assert shown == 0
