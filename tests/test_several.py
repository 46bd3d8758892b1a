"""Several methods at once, weights with a schedule: by plain scripts, and what is refused."""

import copy
from typing import Any

import pytest
import torch
from conftest import PAIR, TINY, CliRunner
from test_step import CLASSES, batches, make
from torch import nn
from torch.nn import functional as F

from sakd_cli.config.methods import METHODS
from sakd_cli.config.resolve import option_sources, preset_source, resolve
from sakd_cli.config.train import Train
from sakd_cli.distillers import table as distillers
from sakd_cli.distillers.distiller import Composed
from sakd_cli.engine.optim import Optimizer
from sakd_cli.errors import UsageError
from sakd_cli.tasks.distill import DistillTask


def fit_epochs(task: DistillTask, made: list[Any], epochs: int) -> None:
    """The batches in so many epochs of the task's own schedule."""
    optim = Optimizer(task.groups(), Train())
    task.train()
    each = len(made) // epochs
    for step, batch in enumerate(made):
        if step % each == 0:
            task.begin_epoch(step // each + 1)
            optim.begin_epoch(step // each + 1)
        optim.step(task(batch).loss)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", ["fitnet+crd", "at+vid+dkd", "rkd+sp"])
def test_twenty_steps_are_those_of_a_plain_script(name: str) -> None:
    """Each loss as it is alone, with its own weight; all of them rise over two of five epochs, crd over three."""
    words = {"method.weight": 2.0, "train.epochs": 5, "method.weight_warmup": 2, "method.weight_schedule": "cosine"}
    crd = {"method.crd.negatives": 9, "method.crd.weight": 0.3, "method.crd.weight_warmup": 3}
    task = make(name, "always", **words | (crd if "crd" in name else {}))
    student, teacher, made = copy.deepcopy(task.network), task.teacher_features.network, batches(task, 20)
    composed = copy.deepcopy(task.feature_distiller)
    assert isinstance(composed, Composed)
    alone: list[tuple[float, nn.Module, int]] = []
    for part, kept in zip((part for part in name.split("+") if part != "dkd"), composed.parts, strict=True):
        own = METHODS[part](**({"negatives": 9} if part == "crd" else {}))
        built = distillers.build(own, student, teacher, 32, labels=torch.arange(60) % CLASSES).features
        assert built is not None
        built.load_state_dict(kept.state_dict())
        alone.append((0.3 if part == "crd" else own.weight, built, 3 if part == "crd" else 0))
    parameters = [*student.parameters(), *(p for _, module, _ in alone for p in module.parameters())]
    sgd = torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=5e-4)
    student.train()
    for step, batch in enumerate(made):
        epoch = step // 4 + 1
        rise = min(epoch / 2, 1) * (1 + torch.tensor(torch.pi * max(epoch - 3, 0) / 3).cos()) / 2
        ours, theirs = student.features(batch.images), teacher.features(batch.images)
        loss = F.cross_entropy(ours.logits, batch.labels)
        loss = loss + rise * task.logit_distiller(ours, theirs, torch.ones(1, len(batch.labels)), batch).sum()
        for weight, module, warmup in alone:
            ones = torch.ones(len(module.spots), len(batch.labels))
            own_rise = min(epoch / warmup, 1) if warmup else 1
            loss = loss + 2 * rise * own_rise * weight * module(ours, theirs, ones, batch).sum()
        sgd.zero_grad()
        loss.backward()
        sgd.step()
    fit_epochs(task, made, 5)
    for a, b in zip(task.network.state_dict().values(), student.state_dict().values(), strict=True):
        assert torch.allclose(a.double(), b.double(), rtol=1e-10, atol=1e-11)


def test_dkd_rises_as_published() -> None:
    schedule = METHODS["dkd"](weight_warmup=20).schedule(240)
    assert [schedule(epoch) for epoch in (1, 10, 20, 21, 240)] == [0.05, 0.5, 1.0, 1.0, 1.0]
    assert METHODS["dkd"]().schedule(240) is None, "the default stays as it is"
    falling = METHODS["kd"](weight_schedule="linear").schedule(4)
    assert [falling(epoch) for epoch in (1, 2, 3, 4)] == [1.0, 0.75, 0.5, 0.25]


@pytest.mark.usefixtures("float64")
def test_a_schedule_scales_a_balanced_dose() -> None:
    """In the first of two epochs of a rise the balance is half of it."""
    words = {"train.epochs": 4, "method.balance": 1.0}
    tasks = [make("fitnet", "always", **words, **more) for more in ({"method.weight_warmup": 2}, {})]
    tasks.append(make("fitnet", "always", **words | {"method.balance": 0.5}))
    gradients = []
    for task, epoch in zip(tasks, (1, 2, 1), strict=True):
        task.train().begin_epoch(epoch)
        # The logit loss, which nothing balances, is scaled as well.
        task.factors = task.factors._replace(logit=0.0)
        task(batches(task, 1)[0]).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in task.network.parameters() if p.grad is not None]))
    rising, whole, half = gradients
    assert torch.allclose(rising, half, rtol=1e-10, atol=1e-14)
    assert not torch.allclose(rising, whole)


def test_every_loss_hears_of_an_epoch() -> None:
    task, heard = make("fitnet+at", "always"), list[int]()
    assert isinstance(task.feature_distiller, Composed)
    for one in (*task.feature_distiller.parts, task.logit_distiller):
        one.begin_epoch = heard.append
    task.begin_epoch(3)
    assert heard == [3, 3, 3]


def test_shared_spots_are_routed_once() -> None:
    task = make("fitnet+at", "adaptive", **{"runtime.shapes": "static"})
    names = [spot.name for spot in task.spots]
    assert names == [spot.name for spot in make("at", "adaptive").spots]
    composed = task.feature_distiller
    assert isinstance(composed, Composed)
    assert composed.rows == [[1], [0, 1, 2]]
    composed.active = (False, True, True)
    assert [part.active for part in composed.parts] == [(True,), (False, True, True)]
    composed.dynamic_shapes = True
    assert all(part.dynamic_shapes for part in composed.parts)


@pytest.mark.parametrize(
    ("method", "settings", "text"),
    [
        ("fitnet+simkd", [], "method fitnet+simkd: simkd makes another network of the student, and goes with no other"),
        ("dfa+at", [], "method dfa+at: dfa has a search of its own"),
        ("ft+ab", [], "method ft+ab: ft and ab both train something before"),
        ("at+at", [], "method 'at+at': names one twice"),
        ("dkd+dist", [], "method dkd+dist: two of these replace the softened logits"),
        ("dkd+kd", [], "method dkd+kd: two of these replace the softened logits"),
        ("at+dkd", ["method.dkd.weight=2"], "weight 2 is of a feature loss, and dkd has none"),
        ("fitnet+ofd", [], "method fitnet+ofd: one compares in front of an activation"),
        ("fitnet+crdd", [], "unknown method 'fitnet+crdd'"),
        ("fitnet+crd", ["method.stage=1"], "unknown key 'method.stage'; did you mean 'method.fitnet.stage'?"),
        ("fitnet+crd", ["method.crd.negative=1"], "did you mean 'method.crd.negatives'?"),
        ("fitnet+crd", ["method.crd.temperature=2"], "crd.temperature is of all parts together: --set method.temp"),
        ("fitnet+at", ["method.at.weight_warmup=2", "method.balance=1"], "of the whole method under a balance"),
    ],
)
def test_what_does_not_go_together_costs_a_line(
    trained_cli: CliRunner, method: str, settings: list[str], text: str
) -> None:
    words = [word for setting in settings for word in ("--set", setting)]
    trained_cli.assert_rejects([*PAIR, "--method", method, *TINY, *words], 2, text)


def test_a_composed_run_and_its_reports(trained_cli: CliRunner) -> None:
    words = ["--method", "FitNet+RKD", *TINY, "--set", "method.rkd.weight=0.5", "--set", "method.rkd.angle=10"]
    found = trained_cli.sakd(*PAIR, *words, "--set", "save_every=1", "--json").document
    config = (trained_cli.path / found["run"] / "config.yaml").read_text()
    assert "fitnet+rkd" in config
    assert trained_cli.sakd("distill", "--resume", found["run"], "-q").code == 0
    for command in (["inspect-spots", found["run"]], ["runs"]):
        assert trained_cli.sakd(*command, "--json").code == 0
    assert trained_cli.sakd("config", "show", "--preset", "quickstart", "--method", "fitnet+rkd").code == 0


@pytest.mark.parametrize(
    ("command", "text"),
    [
        ("bench --method fitnet+rkd", "bench: times one method, as it was published; fitnet+rkd is several"),
        ("show method fitnet+rkd", "unknown method 'fitnet+rkd'"),
    ],
)
def test_what_is_of_one_method_says_so(trained_cli: CliRunner, command: str, text: str) -> None:
    trained_cli.assert_rejects(command.split(), 2, text)


def test_an_unknown_row_is_an_error_of_ours() -> None:
    with pytest.raises(UsageError):
        distillers.DISTILLERS.row("fitnet+crd")


@pytest.mark.usefixtures("float64")
def test_hard_distillation_is_the_cross_entropy_with_the_teachers_answer() -> None:
    for name in ("kd", "fitnet+kd"):
        key = "method.hard" if name == "kd" else "method.kd.hard"
        task = make(name, "always", **{key: True})
        batch = batches(task, 1)[0]
        ours, theirs = task.network.eval().features(batch.images), task.teacher_features(batch)
        found = task.logit_distiller(ours, theirs, torch.ones(1, len(batch.labels)), batch)
        assert torch.allclose(found[0], F.cross_entropy(ours.logits, theirs.logits.argmax(1)))


@pytest.mark.parametrize("name", ["imagenet-resnet18", "vit-deit", "finetune-small", "dfa-cifar100"])
def test_a_preset_shrinks_with_its_epochs(name: str) -> None:
    whole = resolve("distill", [preset_source(name)]).config.train
    short = resolve("distill", [preset_source(name), *option_sources({"epochs": "4"})]).config.train
    assert short.warmup_epochs == pytest.approx(whole.warmup_epochs * 4 / whole.epochs)
    assert all(0 < milestone < 4 for milestone in short.decay_epochs())
    if whole.schedule == "step":
        given = option_sources({"epochs": "4", "milestones": "3"})
        assert resolve("distill", [preset_source(name), *given]).config.train.milestones == (3,)


def test_vit_deit_is_the_published_recipe() -> None:
    config = resolve("distill", [preset_source("vit-deit")]).config
    assert (config.train.lr, config.train.weight_decay, config.train.warmup_epochs) == (1e-3, 0.05, 5)
    assert (config.data.mixup, config.data.cutmix, config.data.erase) == (0.8, 1.0, 0.25)
    assert (config.method.hard, config.method.ce_weight, config.method.kl_weight) == (True, 0.5, 0.5)


def test_what_has_fallen_to_its_end_or_has_ended_early_is_not_extended(trained_cli: CliRunner) -> None:
    for words, text in (
        (
            ["method.weight_schedule=linear", "method.name=kd"],
            "weight_schedule linear has fallen to its end in 1 epochs",
        ),
        (["router.name=scheduled", "train.epochs=2"], "router.start and stop: [0, 1] in a run of 2"),
        (["train.patience=1", "train.lr=1e-9", "train.epochs=3"], "has ended by train.patience=1: no better top1"),
    ):
        settings = [word for setting in words for word in ("--set", setting)]
        run = trained_cli.sakd(*PAIR, *TINY[:-2], "--set", "train.epochs=1", *settings, "--json").document["run"]
        trained_cli.assert_rejects(["distill", "--resume", run, "--epochs", "5", "-q"], 2, text)
