"""The routers beside the published one: what each decides, and what a spot that rests costs."""

import copy
import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_dose import one_step
from test_step import batches, make, optimizer
from torch import Tensor
from torch.nn import functional as F

from sakd_cli.config.effective import router_start
from sakd_cli.config.resolve import ConfigSource, nested, resolve
from sakd_cli.config.routers import ROUTERS
from sakd_cli.config.train import Train
from sakd_cli.distillers.logits import softened_kl
from sakd_cli.errors import UsageError
from sakd_cli.routing.router import Answers
from sakd_cli.routing.table import Pair, build
from sakd_cli.tasks import ahead

PAIR = Pair(spots=3, teacher=8, student=4, epochs=8)
N = 5


pytestmark = pytest.mark.usefixtures("float64")


def router(name: str, **settings: Any) -> Any:
    return build(ROUTERS[name](**settings), PAIR)


def decided(one: Any, epoch: int) -> list[list[float]]:
    """Weights by spot in an epoch, of which every sample has the same."""
    one.begin_epoch(epoch)
    weight: Tensor = one(torch.zeros(N, 8), torch.zeros(N, 4), torch.rand(N, 8)).weight
    assert (weight == weight[:, :1]).all()
    return weight[:, 0].tolist()


def test_a_fixed_weight_is_per_spot_or_a_table_by_epoch() -> None:
    assert decided(router("fixed", weights=[0.25]), 1) == [0.25, 0.25, 0.25]
    assert decided(router("fixed", weights=[0, 0.5, 1]), 7) == [0, 0.5, 1]
    table = router("fixed", weights=[[1, 1, 1], [0.5], [0, 0, 1]])
    assert [decided(table, epoch) for epoch in (1, 2, 3, 9)] == [[1, 1, 1], [0.5] * 3, [0, 0, 1], [0, 0, 1]]
    with pytest.raises(UsageError, match=r"router.weights: 2 numbers for 3 spots; the last spot is the logits"):
        router("fixed", weights=[1, 0])


def test_a_schedule_starts_and_stops_spots_by_fractions_of_the_run() -> None:
    hint = router("scheduled", start=[0, 0.25, 0], stop=[0.625, 0.5, 1])
    epochs = [decided(hint, epoch) for epoch in range(1, 9)]
    assert [row[0] for row in epochs] == [1, 1, 1, 1, 1, 0, 0, 0]
    assert [row[1] for row in epochs] == [0, 0, 1, 1, 0, 0, 0, 0]
    assert [row[2] for row in epochs] == [1] * 8
    assert hint.active == (False, False, True), "known without a look at the device"
    for epochs in range(1, 30):
        one = build(ROUTERS["scheduled"](), PAIR._replace(epochs=epochs))
        last = sum(decided(one, epoch)[0] for epoch in range(1, epochs + 1))
        assert last == (Train(epochs=epochs).decay_epochs() or (1,))[0], "the default: where the rate first falls"
    with pytest.raises(UsageError, match=r"router.start: 0.9 is behind router.stop, 0.1"):
        router("scheduled", start=[0.9], stop=[0.1])


@pytest.mark.parametrize("text", ["0.5,1", "[0.5, 1]", "[[0.5, 1], [0, 1]]"])
def test_weights_are_read_from_text(text: str) -> None:
    given = {"teacher": "resnet14", "student": "resnet8", "router.name": "fixed", "router.weights": text}
    config = resolve("distill", [ConfigSource("test", nested(given))]).config
    assert build(config.router, PAIR._replace(spots=2)).weights[0] == [0.5, 1.0]


@pytest.mark.parametrize("method", ["at", "fitnet", "reviewkd", "crd", "kd"])
def test_what_rests_costs_nothing_and_gives_what_a_weight_of_0_gives(method: str) -> None:
    more = {"method.negatives": 9} if method == "crd" else {}
    task = make(method, "never", **more)
    given = make(method, "never", **more)
    given.router.active = None
    given._rest()
    calls: list[str] = []
    for part in filter(None, (task.feature_distiller, task.logit_distiller)):
        part.register_forward_hook(lambda module, *_: calls.append(type(module).__name__))
    (_, ours), (_, theirs) = one_step(task), one_step(given)
    assert all(torch.equal(ours[name], gradient) for name, gradient in theirs.items())
    assert not calls


def test_one_spot_rests_while_another_does_not() -> None:
    one, all_of = make("at", "fixed", **{"router.weights": [0, 1, 0, 1]}), make("at", "always")
    assert one.feature_distiller.active == (False, True, False)
    looked: list[int] = []
    plain = one.feature_distiller.spot_loss
    one.feature_distiller.spot_loss = lambda k, *rest: looked.append(k) or plain(k, *rest)
    one_step(one)
    assert looked == [1]
    assert all_of.feature_distiller.active == (True, True, True)


def test_a_hint_that_stops_leaves_its_regressor_as_it_is() -> None:
    task = make("fitnet", "scheduled", **{"router.stop": [0.5, 1], "train.epochs": 4})
    optim, seen, told = optimizer(task), [], []
    for epoch in range(1, 5):
        task.train().begin_epoch(epoch)
        optim.begin_epoch(epoch)
        for batch in batches(task, 2, seed=epoch):
            optim.step(task(batch).loss)
        seen.append([p.detach().clone() for p in task.feature_distiller.parameters()])
        told.append(task.constants)
    changed = [any(not torch.equal(a, b) for a, b in zip(*two, strict=True)) for two in itertools.pairwise(seen)]
    assert changed == [True, False, False]
    assert told[0] == told[1] != told[2] == told[3], "a captured step is made anew once"


@pytest.mark.parametrize("method", ["fitnet", "rkd", "sp", "kd"])
def test_the_dose_of_the_selected_is_their_mean(method: str) -> None:
    """A mask of n ones of N: the published loss times N/n; none selected: nothing."""
    plain = make(method, "adaptive", **{"router.teacher_bias": 0})
    mean = make(method, "adaptive", **{"router.teacher_bias": 0, "router.dose": "selected-mean"})
    batch = batches(plain, 1, size=8)[0]
    ours, theirs = (task.train()(batch) for task in (mean, plain))
    n = theirs.use.weight.sum(dim=1)
    assert torch.equal(ours.use.weight, theirs.use.weight), "what is recorded stays a fraction"
    assert 0 < n[-1] < 8
    torch.testing.assert_close(ours.parts["logit"], theirs.parts["logit"] * 8 / n[-1])
    if method != "kd":
        torch.testing.assert_close(ours.parts["feature"], theirs.parts["feature"] * 8 / n[0])
    none = make(method, "adaptive", **{"router.teacher_bias": -300, "router.dose": "selected-mean"})
    assert float(none.train()(batch).parts["logit"]) == 0.0


def config_of(epochs: int, **settings: Any) -> Any:
    given = {"teacher": "resnet56", "student": "resnet20", "train.epochs": epochs}
    return resolve("distill", [ConfigSource("test", nested(given | settings))]).config


@pytest.mark.parametrize(
    ("epochs", "steps", "settings", "lr", "bias"),
    [
        (240, 704, {}, 0.025, 10.0),
        (60, 704, {}, 0.025, 10.0),
        (12, 57, {}, 2e-4, 0.0),
        (12, 57, {"router.recipe": "published"}, 0.025, 10.0),
        (12, 57, {"router.lr": 0.01, "router.teacher_bias": 3}, 0.01, 3.0),
        (240, 704, {"router.teacher_bias": 0}, 0.025, 0.0),
    ],
)
def test_a_short_run_has_a_router_that_can_act(
    epochs: int, steps: int, settings: dict[str, Any], lr: float, bias: float
) -> None:
    start = router_start(config_of(epochs, **settings), one_family=True, steps=steps)
    assert (start.lr, start.bias) == (pytest.approx(lr), bias)


def test_what_is_left_of_a_prior_is_what_sgd_leaves_of_it() -> None:
    config = config_of(5, **{"router.recipe": "published", "train.milestones": [2, 3]})
    start = router_start(config, one_family=True, steps=400)
    weight = torch.nn.Parameter(torch.tensor(10.0))
    sgd = torch.optim.SGD([weight], lr=start.lr, momentum=0.9, weight_decay=1e-3)
    for epoch in range(1, 6):
        sgd.param_groups[0]["lr"] = start.lr * 0.1 ** sum(epoch > m for m in (2, 3))
        for _ in range(400):
            weight.grad = torch.zeros(())
            sgd.step()
    assert start.end == pytest.approx(weight.item(), rel=0.02)


def test_a_router_that_cannot_act_says_so_before_the_run() -> None:
    short = router_start(config_of(12, **{"router.recipe": "published"}), one_family=True, steps=57)
    assert "the router cannot act: its prior of 10 at the teacher only falls to" in str(short.note)
    assert "--set router.recipe=auto" in str(short.note)
    for epochs, steps, settings in ((240, 704, {"router.recipe": "published"}), (12, 57, {})):
        assert router_start(config_of(epochs, **settings), one_family=True, steps=steps).note is None
    assert router_start(config_of(12), one_family=True, steps=None).note is None, "unknown"


LOGITS = torch.tensor([[4.0, 0, 0], [0, 1, 0], [0, 0, 9], [1, 1, 1]])
ANSWERS = Answers(LOGITS, LOGITS.roll(1, dims=0), torch.tensor([0, 1, 0, 2]))


def weighed(name: str, **settings: Any) -> Tensor:
    one = router(name, **settings)
    weight: Tensor = one(torch.zeros(4, 8), torch.zeros(4, 4), torch.rand(4, 8), ANSWERS).weight
    assert weight.shape == (3, 4)
    assert (weight == weight[:1]).all()
    return weight[0].double()


def test_what_the_networks_answer_weighs_the_samples_by_the_formulas() -> None:
    p = LOGITS.double().softmax(dim=1)
    assert weighed("teacher-correct").tolist() == [1, 1, 0, 0]
    confidence = p.amax(dim=1) / p.amax(dim=1).mean()
    torch.testing.assert_close(
        weighed("teacher-confidence", cap=1.2), confidence.clamp(max=1.2) / 1.2, rtol=1e-5, atol=1e-7
    )
    certainty = 1 + (p * p.log()).sum(dim=1) / torch.log(torch.tensor(3.0))
    expected = (certainty / certainty.mean()).clamp(max=1.5) / 1.5
    torch.testing.assert_close(weighed("teacher-entropy", cap=1.5), expected, rtol=1e-5, atol=1e-7)
    ce = [F.cross_entropy(logits.double(), ANSWERS.labels, reduction="none") for logits in ANSWERS[:2]]
    torch.testing.assert_close(weighed("wsld"), 1 - torch.exp(-ce[1] / ce[0]), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["teacher-confidence", "teacher-entropy"])
def test_weights_by_certainty_have_a_mean_of_one(name: str) -> None:
    """So that the loss is that of another weighing and not of another dose."""
    task, plain = make("kd", name), make("kd", "always")
    batch = batches(task, 1, size=8)[0]
    ours, theirs = task.train()(batch), plain.train()(batch)
    weight = ours.use.weight[0]
    assert weight.max() <= 1
    assert weight.std() > 0
    logits = plain.network.train()(batch.images), plain.teacher_features(batch).logits
    losses = softened_kl(logits[0], logits[1], 4.0)
    torch.testing.assert_close(ours.parts["logit"], (losses * weight / weight.mean()).mean())
    torch.testing.assert_close(theirs.parts["logit"], losses.mean())


@pytest.mark.parametrize("balance", [0.0, 1.0])
def test_a_hint_that_points_against_its_samples_task_is_left_out(balance: float) -> None:
    task = make("fitnet", "gradient-agreement", **{"method.balance": balance})
    network, place = copy.deepcopy(task.network).train(), task.spots[0].student
    distiller = copy.deepcopy(task.feature_distiller)
    batch = batches(task, 1, size=12)[0]
    task.train()
    output = task(batch)
    output.loss.backward()
    gradients = {name: p.grad for name, p in task.network.named_parameters()}

    feature = network.run(batch.images, 0, place + 1)
    leaf = feature.detach().requires_grad_()
    logits = network.run(leaf, place + 1, len(network.stages) + 1)
    theirs = task.teacher_features(batch)
    hint = distiller.spot_loss(0, leaf, theirs.stages[task.spots[0].teacher], torch.ones(12))
    (of_hint,) = torch.autograd.grad(hint, leaf)
    ce, kl = F.cross_entropy(logits, batch.labels), softened_kl(logits, theirs.logits, 4.0).mean()
    of_ce, of_kl = (torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in (ce, kl))
    kept_logits = (of_ce * of_kl).sum(dim=1) >= 0
    (of_task,) = torch.autograd.grad(logits, leaf, of_ce + of_kl * kept_logits[:, None])
    kept = (of_task * of_hint).flatten(1).sum(dim=1) >= 0
    assert output.use.weight.tolist() == [kept.double().tolist(), kept_logits.double().tolist()]
    assert 0 < kept.sum() < 12
    of_hint = of_hint * kept[:, None, None, None]
    feature.backward(of_task + of_hint * (balance * of_task.norm() / of_hint.norm() if balance else 1))
    for name, p in network.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(gradients[name], p.grad, rtol=1e-9, atol=1e-13)


def test_soft_gates_are_the_probabilities_and_their_exact_gradient() -> None:
    torch.manual_seed(0)
    one = build(ROUTERS["soft"](tau=2.0), PAIR)
    x = torch.randn(N, 8), torch.randn(N, 4)
    decision = one(*x, torch.rand(N, 8))
    scores = one.policy(torch.cat(x, dim=1)).unflatten(1, (3, 2))
    torch.testing.assert_close(decision.gate, torch.sigmoid((scores[..., 0] - scores[..., 1]) / 2))
    assert torch.equal(decision.weight, decision.gate.detach().T)
    task = make("fitnet", "soft", **{"router.lr": 0.01})
    assert not task.graft.dynamic_shapes, "a sample follows both networks"
    output = task.train()(batches(task, 1)[0])
    output.loss.backward()
    assert float(task.router.policy.weight.grad.abs().sum()) > 0


@pytest.mark.parametrize("sees", ["features", "class"])
def test_a_meta_router_learns_where_distilling_lowers_the_loss_of_held_out_images(
    sees: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ahead, "STEP", 1e-7)
    task = make("fitnet", "meta", **{"router.sees": sees})
    plain = make("fitnet", "always")
    batch = replace(batches(task, 1, size=12)[0], held_out=batches(task, 1, seed=1)[0])
    weights = [p for p in plain.network.parameters() if p.requires_grad]
    held_out = F.cross_entropy(plain.network.eval()(batch.held_out.images), batch.held_out.labels, reduction="sum")
    way = torch.autograd.grad(held_out, weights)
    of_its_own = plain.eval().sample_losses(batch)
    student, teacher = plain.student_features(batch.images), plain.teacher_features(batch)
    products = torch.zeros(2, 12)
    for i, k in itertools.product(range(12), range(2)):
        one = torch.zeros(2, 12)
        one[k, i] = 12
        loss = [
            d(student, teacher, part, batch)
            for d, part in ((plain.feature_distiller, one[:1]), (plain.logit_distiller, one[1:]))
        ]
        total = plain.factors.feature * loss[0].sum() + plain.factors.logit * loss[1].sum()
        torch.testing.assert_close(total, of_its_own[k, i])
        found = torch.autograd.grad(total, weights, retain_graph=True, materialize_grads=True, allow_unused=True)
        products[k, i] = sum((a * b).sum() for a, b in zip(found, way, strict=True))
    products /= products.square().mean(dim=1, keepdim=True).sqrt()

    before = copy.deepcopy(task.network.state_dict())
    output = task.train()(batch)
    output.loss.backward()
    assert (output.use.weight == 0.5).all(), "it knows nothing yet"
    pushed = -products.T / 4 / 12  # of a sigmoid at 1/2
    if sees == "class":
        seen = F.one_hot(batch.labels, task.router.classes).double()
    else:
        seen = torch.cat(
            [teacher.embedding, make("fitnet", "always").train().student_features(batch.images).embedding], 1
        )
    torch.testing.assert_close(task.router.policy.weight.grad, pushed.T @ seen, rtol=1e-3, atol=1e-4)  # over kinks
    changed = [name for name, value in task.network.state_dict().items() if not torch.equal(value, before[name])]
    assert all("running" in name or "tracked" in name for name in changed)
    assert all(module.training for module in task.network.modules())


def test_a_meta_router_is_refused_where_it_cannot_be() -> None:
    with pytest.raises(UsageError, match=r"router meta: the loss of crd depends on a memory of earlier batches"):
        make("crd", "meta")
    settings = {"teacher": "resnet14", "student": "resnet8", "router.name": "meta", "residual.students": 1}
    with pytest.raises(UsageError, match=r"router meta has images set aside for one student"):
        resolve("distill", [ConfigSource("test", nested(settings))])
