"""The draw, the policies, the multi-path network and the router's objective."""

import math

import pytest
import torch
from torch.nn import functional as F

from sakd_cli.batch import Batch
from sakd_cli.config.routers import ROUTERS as WORDS
from sakd_cli.models.spot import spots_at
from sakd_cli.models.staged import frozen_view
from sakd_cli.models.table import create
from sakd_cli.routing.graft import Graft, router_loss
from sakd_cli.routing.router import Answers
from sakd_cli.routing.table import ROUTERS, Adaptive, Pair, Random, build, straight_through
from sakd_cli.tasks.criterion import Criterion

PAIR = Pair(spots=3, teacher=5, student=4, matched=torch.tensor([[0.1, 0.5, 0.9], [1.0, 0.0, 0.5]]))


def labelled(labels: torch.Tensor) -> Batch:
    return Batch(images=labels, labels=labels, index=labels, noise=labels)


def noise(samples: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(samples, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("tau", [0.5, 5.0, 50.0])
@pytest.mark.parametrize("gap", [0.0, 1.0, -2.0, 10.0])
def test_the_sampling_rate_is_the_sigmoid_of_the_gap_whatever_tau_is(gap: float, tau: float) -> None:
    draws = 200_000
    scores = torch.tensor([gap, 0.0]).expand(draws, 1, 2)
    rate = straight_through(scores, noise(draws, 2).view(draws, 1, 2), tau).mean().item()
    expected = 1 / (1 + math.exp(-gap))
    spread = math.sqrt(expected * (1 - expected) / draws)
    assert abs(rate - expected) < 5 * spread + 1e-5


def test_gates_are_exactly_zero_or_one_and_finite_at_the_ends_of_the_noise() -> None:
    uniform = torch.cat([noise(1000, 2), torch.zeros(1, 2), torch.full((1, 2), 1 - 2**-24)]).unsqueeze(1)
    gates = straight_through(torch.randn(1002, 1, 2), uniform, 5.0)
    assert set(gates.unique().tolist()) == {0.0, 1.0}


def test_the_gradient_is_that_of_the_tempered_softmax() -> None:
    tau = 5.0
    scores = torch.randn(7, 2, 2, dtype=torch.float64, requires_grad=True)
    uniform = torch.rand(7, 2, 2, dtype=torch.float64)
    straight_through(scores, uniform, tau).sum().backward()
    soft = torch.softmax((scores.detach() - torch.log(-torch.log(uniform))) / tau, -1)
    expected = soft[..., 0] * soft[..., 1] / tau
    assert torch.allclose(scores.grad[..., 0], expected)
    assert torch.allclose(scores.grad[..., 1], -expected)


def test_the_bias_is_added_to_every_teacher_score_and_to_no_other() -> None:
    torch.manual_seed(0)
    plain = Adaptive(3, 5, 4, tau=5.0, teacher_bias=0.0)
    torch.manual_seed(0)
    biased = Adaptive(3, 5, 4, tau=5.0, teacher_bias=10.0)
    difference = (biased.policy.bias - plain.policy.bias).tolist()
    assert difference == pytest.approx([10.0, 0.0] * 3, abs=1e-5)


@pytest.mark.parametrize("name", sorted(ROUTERS))
def test_every_router_gives_weights_of_the_right_shape_between_zero_and_one(name: str) -> None:
    router = build(WORDS[name](), PAIR)
    router.begin_epoch(1)
    answers = [Answers(torch.randn(6, 7), torch.randn(6, 7), torch.arange(6))] if router.needs_answers else []
    decision = router(torch.randn(6, 5), torch.randn(6, 4), noise(6, router.noise_width), *answers)
    assert decision.weight.shape == (3, 6)
    assert not decision.weight.requires_grad
    assert ((decision.weight >= 0) & (decision.weight <= 1)).all()
    if decision.gate is not None:
        assert decision.gate.shape == (6, 3)
        assert decision.gate.requires_grad
    if decision.probability is not None:
        assert decision.probability.shape == (3, 6)


def test_always_is_one_and_never_is_zero() -> None:
    for name, value in (("always", 1.0), ("never", 0.0)):
        decision = build(WORDS[name](), PAIR)(torch.randn(6, 5), torch.randn(6, 4), noise(6, 0))
        assert (decision.weight == value).all()
        assert decision.gate is None


def test_anti_distils_exactly_where_adaptive_does_not_and_routes_alike() -> None:
    torch.manual_seed(0)
    adaptive = build(WORDS["adaptive"](teacher_bias=0.0), PAIR)
    torch.manual_seed(0)
    anti = build(WORDS["anti"](teacher_bias=0.0), PAIR)
    arguments = torch.randn(50, 5), torch.randn(50, 4), noise(50, 6)
    ours, theirs = adaptive(*arguments), anti(*arguments)
    assert torch.equal(ours.weight + theirs.weight, torch.ones(3, 50))
    assert torch.equal(ours.gate, theirs.gate)
    assert 0 < ours.weight.mean() < 1


def test_random_spots_are_independent_coins_of_the_given_rate() -> None:
    router = build(WORDS["random"](rate=0.3), PAIR)
    weight = router(torch.randn(40_000, 5), torch.randn(40_000, 4), noise(40_000, 3)).weight
    assert weight.mean(dim=1).tolist() == pytest.approx([0.3] * 3, abs=0.015)
    assert torch.corrcoef(weight).fill_diagonal_(0).abs().max() < 0.03


def test_matched_coins_follow_the_rates_of_the_epoch_and_then_keep_the_last() -> None:
    router = Random(PAIR.matched)
    for epoch, expected in ((1, [0.1, 0.5, 0.9]), (2, [1.0, 0.0, 0.5]), (7, [1.0, 0.0, 0.5]), (1, [0.1, 0.5, 0.9])):
        router.begin_epoch(epoch)
        weight = router(torch.randn(20_000, 5), torch.randn(20_000, 4), noise(20_000, 3)).weight
        assert weight.mean(dim=1).tolist() == pytest.approx(expected, abs=0.02)


def routed_loss(
    routed: torch.Tensor, labels: torch.Tensor, ce: torch.Tensor, gate: torch.Tensor, fraction: float
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    return router_loss(
        routed, labelled(labels), ce, gate, gamma=2.0, min_teacher_fraction=fraction, criterion=Criterion()
    )


@pytest.mark.parametrize(("better", "factor"), [(True, 0.5), (False, 2.0)])
def test_gamma_raises_a_worse_and_lowers_a_better_routed_network(better: bool, factor: float) -> None:
    routed = torch.randn(8, 5, requires_grad=True)
    labels = torch.arange(8) % 5
    ce = F.cross_entropy(routed, labels).detach()
    other = ce + 1 if better else ce - 1
    loss, events = routed_loss(routed, labels, other, torch.ones(8, 2), 0.5)
    assert loss.item() == pytest.approx(factor * ce.item())
    flags = events["router_loss_scaled_down"].item(), events["router_loss_scaled_up"].item()
    assert flags == ((1.0, 0.0) if better else (0.0, 1.0))
    equal, _ = routed_loss(routed, labels, ce, torch.ones(8, 2), 0.5)
    assert equal.item() == pytest.approx(ce.item())


def test_the_count_term_is_a_count_of_missing_teachers_at_the_last_spot() -> None:
    routed, labels = torch.zeros(8, 5), torch.zeros(8, dtype=torch.long)
    ce = F.cross_entropy(routed, labels)
    for teachers, missing in ((0, 4.0), (3, 1.0), (4, 0.0), (8, 0.0)):
        gate = torch.zeros(8, 3)
        gate[:teachers, -1] = 1
        gate.requires_grad_()
        loss, events = routed_loss(routed, labels, ce, gate, 0.5)
        assert loss.item() == pytest.approx(ce.item() + missing)
        assert events["count_penalty_active"].item() == float(missing > 0)
        (gradient,) = torch.autograd.grad(loss, gate, allow_unused=True)
        assert gradient[:, -1].tolist() == [-1.0 if missing else 0.0] * 8
        assert gradient[:, :-1].abs().sum() == 0
    off, _ = routed_loss(routed, labels, ce, torch.zeros(8, 3), 0.0)
    assert off.item() == pytest.approx(ce.item())


def test_adapters_learn_only_from_the_samples_that_use_them_and_networks_not_at_all() -> None:
    torch.manual_seed(0)
    student, teacher = create("resnet8", 4), create("wrn_10_1", 4).requires_grad_(False).eval()
    graft = Graft(spots_at(student, teacher, [(2, 2)], 32), frozen_view(student).run, teacher.run)
    x = torch.randn(4, 3, 32, 32)
    features = teacher.features(x)
    for gate, unused in ((torch.ones(4, 2), graft.to_teacher), (torch.zeros(4, 2), graft.to_student)):
        graft.zero_grad()
        graft(x, features, gate.requires_grad_()).square().sum().backward()
        assert all(parameter.grad.abs().sum() == 0 for parameter in unused.parameters())
        assert gate.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in student.parameters())
