"""How much is distilled: the balanced dose against its formula, and what is recorded of gradients."""

import copy
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PAIR, TINY, CliRunner
from test_distillers import METHOD, N, trial
from test_step import batches, fit, make
from torch import Tensor
from torch.nn import functional as F

from sakd_cli.batch import Batch
from sakd_cli.config.methods import METHODS
from sakd_cli.config.resolve import ConfigSource, nested, resolve
from sakd_cli.distillers.table import DISTILLERS
from sakd_cli.engine.runtime import compile_task
from sakd_cli.errors import UsageError
from sakd_cli.models.spot import Spot
from sakd_cli.models.staged import Layout
from sakd_cli.routing.dose import Doses
from sakd_cli.tasks.distill import DistillTask

FEATURES = ["at", "cc", "crd", "fitnet", "ft", "kdsvd", "nst", "ofd", "pkt", "reviewkd", "rkd", "sp", "vid"]


pytestmark = pytest.mark.usefixtures("float64")


def one_step(task: DistillTask, seed: int = 0) -> tuple[Batch, dict[str, Tensor]]:
    """Gradients of the student's parameters in one step."""
    batch = batches(task, 1, seed=seed)[0]
    for parameter in task.parameters():
        parameter.grad = None
    task.train()(batch).loss.backward()
    return batch, {name: p.grad.clone() for name, p in task.network.named_parameters() if p.grad is not None}


def by_hand(task: DistillTask, batch: Batch, balance: float) -> tuple[dict[str, Tensor], list[float]]:
    """The gradients stage by stage from the last to the first, and |g_hint| / |g_task| at every feature spot."""
    network, spots = task.network.train(), task.spots[:-1]
    with torch.no_grad():
        theirs = task.teacher_features(batch)
    values, x = [], batch.images
    for stage in network.stages:
        values.append(stage(x))
        x = values[-1].detach().requires_grad_()
        values.append(x)
    features = [x for x in values if x.is_leaf]
    logits = network.head(x)
    ours = task.network.features(batch.images)._replace(stages=tuple(features), logits=logits)
    ones = torch.ones(len(task.spots), len(batch.labels))
    hint = task.factors.feature * task.feature_distiller(ours, theirs, ones[:-1], batch).sum()
    hints = torch.autograd.grad(hint, [features[spot.student] for spot in spots])
    loss = F.cross_entropy(logits, batch.labels) + task.logit_distiller(ours, theirs, ones[-1:], batch).sum()
    found, ratios = {}, []
    names = {parameter: name for name, parameter in network.named_parameters()}

    def back(value: Tensor, gradient: Tensor | None, inputs: list[Tensor]) -> list[Tensor]:
        given = torch.autograd.grad(value, inputs, gradient, retain_graph=True, allow_unused=True)
        found.update({names[p]: g for p, g in zip(inputs, given, strict=True) if p in names and g is not None})
        return [g for p, g in zip(inputs, given, strict=True) if p not in names]

    (g,) = back(loss, None, [features[-1], *network.head.parameters()])
    for place in reversed(range(len(network.stages))):
        for spot, h in zip(spots, hints, strict=True):
            if spot.student == place:
                ratios.insert(0, float(h.norm() / g.norm()))
                g = g + balance / len(spots) * g.norm() / h.norm() * h
        entered = [features[place - 1]] if place else []
        (g, *_) = [*back(values[2 * place], g, [*entered, *network.stages[place].parameters()]), g]
    return found, ratios


@pytest.mark.parametrize("method", ["fitnet", "at", "vid", "rkd", "sp", "fitnet+rkd", "at+vid"])
def test_the_balanced_gradient_is_that_of_the_formula(method: str) -> None:
    task = make(method, "always", **{"method.balance": 0.7})
    expected, ratios = by_hand(copy.deepcopy(task), batches(task, 1)[0], 0.7)
    _, gradients = one_step(task)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-9, atol=1e-13)
    of_task, of_hint = task.doses.lengths.T
    assert (of_hint / of_task)[:-1].tolist() == pytest.approx(ratios)


@pytest.mark.parametrize("method", [*FEATURES, "fitnet+at"])
def test_the_weight_cancels(method: str) -> None:
    more = {"method.balance": 1.0} | ({"method.negatives": 9} if method == "crd" else {})
    task = make(method, "adaptive", **more)
    heavy = copy.deepcopy(task)
    heavy.factors = heavy.factors._replace(feature=heavy.factors.feature * 1000)
    (_, plain), (_, scaled) = one_step(task), one_step(heavy)
    for name, gradient in plain.items():
        torch.testing.assert_close(scaled[name], gradient, rtol=1e-6, atol=1e-9)
    ratio = [of_hint / of_task for of_task, of_hint in task.doses.lengths[:-1].tolist()]
    assert [h / t / 1000 for t, h in heavy.doses.lengths[:-1].tolist()] == pytest.approx(ratio)


@pytest.mark.parametrize("method", ["kd", "dkd", "dist", "ls"])
def test_where_the_logits_are_all_there_is_they_are_balanced(method: str) -> None:
    task, plain = make(method, "always", **{"method.balance": 1.0}), make(method, "always")
    batch, gradients = one_step(task)
    logits = plain.network.train()(batch.images)
    ce = F.cross_entropy(logits, batch.labels)
    with torch.no_grad():
        theirs = plain.teacher_features(batch)
    ours = theirs._replace(logits=logits)
    kl = plain.logit_distiller(ours, theirs, torch.ones(1, len(batch.labels)), batch).sum()
    of_task, of_hint = (torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in (ce, kl))
    logits.backward(of_task + of_task.norm() / of_hint.norm() * of_hint)
    for name, parameter in plain.network.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("method", FEATURES)
def test_a_balanced_run_without_distillation_is_plain_training(method: str) -> None:
    more = {"method.negatives": 9} if method == "crd" else {}
    task, plain = (make(method, "never", **more, **{"method.balance": rho}) for rho in (1.0, 0.0))
    (_, ours), (_, theirs) = one_step(task), one_step(plain)
    assert all(torch.equal(ours[name], gradient) for name, gradient in theirs.items())
    assert task.doses.lengths[:, 1].tolist() == [0.0] * len(task.spots)


@pytest.mark.parametrize(("precision", "bound"), [("fp32", 1e-5), ("bf16", 2e-2)])
def test_lengths_are_balanced_in_every_precision(precision: str, bound: float) -> None:
    torch.set_default_dtype(torch.float32)
    found = []
    for weight in (0.0, 1.0, 1e-3, 1e-30):
        task = make("fitnet", "always", **{"runtime.precision": precision, "method.balance": 1.0})
        task.factors = task.factors._replace(feature=weight)
        found.append(one_step(task)[1]["stages.2.0.conv1.weight"])
    plain, heavy, light, lost = found
    assert 0.2 < float((heavy - plain).norm() / plain.norm()) < 5
    assert float((light - heavy).norm() / heavy.norm()) < bound
    assert float((lost - plain).norm() / plain.norm()) < bound, "too weak for fp32: no harm is done"


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch asks, and hides it
def test_a_balanced_step_is_one_graph_with_the_same_numbers() -> None:
    torch._dynamo.reset()
    settings = {"runtime.compile": True, "method.balance": 1.0}
    task, eager = make("at", "always", **settings), make("at", "always", **settings)
    compile_task(task, pytest.fail, backend="aot_eager")
    losses = [torch.stack(fit(one, batches(one, 3))) for one in (task, eager)]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-8, atol=0)
    torch.testing.assert_close(task.doses.lengths, eager.doses.lengths, rtol=1e-8, atol=0)


AUTO_WEIGHT = {"method": {"weight": "auto"}}
PAIR_OF = {"teacher": "resnet14", "student": "resnet8"}


def settings_of(**given: Any) -> Any:
    values = {"teacher": "resnet14", "student": "resnet8"} | {k.replace("__", "."): v for k, v in given.items()}
    return resolve("distill", [ConfigSource("test", nested(values))]).config.method


@pytest.mark.parametrize("method", sorted(METHODS))
def test_auto_is_the_methods_own_weight_in_balance(method: str) -> None:
    auto, plain = settings_of(method__name=method, method__weight="auto"), settings_of(method__name=method)
    rho = 0.3 if method in ("rkd", "crd") else 1.0  # measured: guide `compare`, "How much"
    assert (auto.balance, plain.balance) == (rho, 0.0)
    assert auto == plain.model_copy(update={"balance": rho})
    assert settings_of(method__name=method, method__weight="auto", method__balance=0.5).balance == 0.5
    layers = PAIR_OF, {"method": plain.model_dump()}, AUTO_WEIGHT  # over a config that a run has written
    assert resolve("distill", [ConfigSource("test", layer) for layer in layers]).config.method == auto


@pytest.mark.parametrize(("method", "rho"), [("rkd+crd", 0.3), ("fitnet+crd", 1.0)])
def test_auto_of_several_is_that_of_the_strongest(method: str, rho: float) -> None:
    assert settings_of(method__name=method, method__weight="auto").balance == rho


def test_a_weight_that_would_cancel_is_a_mistake() -> None:
    with pytest.raises(UsageError, match="method: weight 10 cancels under balance 1: leave one of them out"):
        settings_of(method__weight=10, method__balance=1)
    for method in ("simkd", "kd"):
        with pytest.raises(UsageError, match=r"method.balance: \w+ has the cross-entropy with factor 0"):
            make(method, "always", **{"method.balance": 1.0, "method.ce_weight": 0})


def test_a_run_records_the_ratio_and_says_when_a_weight_is_far_off(
    cli: CliRunner, pretrained: Any, tmp_path: Path
) -> None:
    notes, ratios = {}, {}
    for name, weight in {"weak": "1e-4", "strong": "1e5", "auto": "auto"}.items():
        run = f"{tmp_path}/{name}"
        made = cli.sakd(*PAIR, *TINY, "--router", "always", "--loss-weight", weight, "-q", "--run-dir", run)
        assert made.code == 0, made.err
        assert ("Warning" in made.out) == (name != "auto"), "told at the end of the run already"
        shown = cli.sakd("inspect-spots", run)
        notes[name] = " ".join(shown.out.split())
        (record,) = map(json.loads, (Path(run) / "spots.jsonl").read_text().splitlines())
        document = cli.sakd("inspect-spots", run, "--json").document
        (ratios[name], _), epoch = (spot["gradient_ratio"] for spot in record["spots"]), document["by_epoch"][0]
        assert epoch["gradient_ratio"] == pytest.approx([s["gradient_ratio"] for s in document["overall"]])
    assert "Warning: the loss at stage2 hardly acts: its gradient is" in notes["weak"]
    assert "Warning: the loss at stage2 drowns the task: its gradient is" in notes["strong"]
    assert "--loss-weight auto balances it" in notes["weak"]
    assert "before it was balanced to 1 over 1 at each feature spot" in notes["auto"]
    assert ratios["weak"] < 0.05 < ratios["auto"] < 20 < ratios["strong"]
    assert len(set(itertools.chain(ratios.values()))) == 3


@pytest.mark.parametrize("weights", [[0.5], [0.5, 1], [[1, 1], [0.2, 1]]])
def test_weights_that_would_cancel_are_a_mistake_too(weights: list[Any]) -> None:
    with pytest.raises(UsageError, match="weights between 0 and 1 cancel at feature spots"):
        make("fitnet", "fixed", **{"router.weights": weights, "method.balance": 1.0})
    make("fitnet", "fixed", **{"router.weights": weights})
    make("fitnet", "fixed", **{"router.weights": [1, 0.5], "method.balance": 1.0})


def test_a_balance_has_no_state() -> None:
    task = make("at", "adaptive", **{"method.balance": 1.0})
    assert not [name for name in task.state_dict() if name.startswith("doses")]


@pytest.mark.parametrize("balance", [0.0, 0.5])
def test_tokens_of_no_place_are_no_part_of_what_is_balanced(balance: float) -> None:
    layout, shape = Layout("tokens", prefix=1), (3, 2, 2)
    spot = Spot("stage1", "map", 0, 0, shape, shape, layout, layout)
    logits = Spot("logits", "logits", 1, 1, (4,), (4,))
    doses, marks = Doses([spot, logits], balance), dict[int, torch.Tensor]()
    doses.begin()
    x, task_way, hint_way = torch.randn(6, 5, 3, requires_grad=True), torch.randn(6, 5, 3), torch.randn(6, 3, 2, 2)
    on = doses.mark(marks, 0, x * 1)
    compared = doses.compare(marks, 0, layout.to_map(on, shape))
    ((on * task_way).sum() + (compared * hint_way).sum()).backward()
    of_task = layout.to_map(task_way, shape).norm()
    factor = balance * of_task / hint_way.norm() if balance else 1.0
    expected = task_way.clone()
    layout.to_map(expected, shape).add_(factor * hint_way)
    torch.testing.assert_close(x.grad, expected)
    torch.testing.assert_close(doses.lengths[0], torch.stack([of_task, hint_way.norm()]))


def test_every_method_that_trains_the_student_beside_its_losses_says_so() -> None:
    beside = {name for name, row in DISTILLERS.items() if row.network is not None} | {"ab", "fsp"}
    assert {name for name, kind in METHODS.items() if kind.trains_student} == beside


@METHOD
@pytest.mark.parametrize("share", [0.5, 0.01])
def test_the_same_weight_for_all_samples_is_a_factor_of_the_loss(name: str, share: float) -> None:
    found = []
    for weight in (1.0, share):
        case = trial(name)
        losses = case.losses(torch.full((len(case.distiller.spots), N), weight)) / weight
        found.append([losses, *torch.autograd.grad(losses.sum(), case.leaves)])
    for whole, part in zip(*found, strict=True):
        torch.testing.assert_close(part, whole, rtol=1e-8, atol=1e-12)
