"""Who leaves an ensemble early: bounds, monotony, the calibration's guarantee, and that skipped work is not done."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sakd_cli.config.training import ResidualConfig
from sakd_cli.engine.evaluate import evaluate
from sakd_cli.evaluation.early_exit import EarlyExit, exit_curve, never, pareto
from sakd_cli.models.ensemble import MEASURES, NEVER, RANGES, Ensemble, Exits, exit_stage, fit, mean_macs

MACS = [50, 30, 10, 5]


class Spied(nn.Module):
    """A linear network of 3x4x4 images that remembers what it was given."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.layer = nn.Linear(48, classes)
        self.seen: list[Tensor] = []

    def forward(self, images: Tensor) -> Tensor:
        self.seen.append(images)
        return self.layer(images.flatten(1))


def exits_at(exits: Exits, stages: Tensor) -> Tensor:
    """Logits after each stage [M+1, N, K] to the stage [N] at which each sample leaves."""
    return exit_stage(exits.uncertainties(stages[:-1]), exits.thresholds)


def made(members: int = 3, classes: int = 6, samples: int = 40) -> tuple[Any, Tensor, Tensor]:
    torch.manual_seed(members)
    ensemble = Ensemble([Spied(classes) for _ in range(members)]).eval()
    return ensemble, torch.randn(samples, 3, 4, 4), torch.randint(classes, (samples,))


def exits(*thresholds: float, uncertainty: str = "entropy") -> Exits:
    return Exits(uncertainty, RANGES.get(uncertainty, (-9.0, 0.0)), thresholds)


@pytest.mark.parametrize("name", MEASURES)
def test_an_uncertainty_lies_between_0_and_1_and_falls_with_confidence(name: str) -> None:
    logits = torch.randn(4, 50, 7) * torch.tensor([0.0, 1.0, 5.0, 100.0])[:, None, None]
    uncertainty = exits(uncertainty=name).uncertainties(logits)
    assert bool(((uncertainty >= 0) & (uncertainty <= 1)).all())
    assert uncertainty[0].min() > uncertainty[3].median()


@pytest.mark.parametrize("name", [name for name in MEASURES if name in RANGES])
def test_a_constant_per_sample_moves_no_exit(name: str) -> None:
    logits = torch.randn(3, 200, 7)
    shift = 3 * torch.randn(3, 200, 1)
    assert torch.allclose(
        exits(uncertainty=name).uncertainties(logits), exits(uncertainty=name).uncertainties(logits + shift), atol=1e-5
    )


def test_the_cost_of_every_sample_lies_between_the_first_member_and_all() -> None:
    uncertainties = torch.rand(3, 100)
    assert exit_stage(uncertainties, [2.0] * 3).eq(0).all()
    assert exit_stage(uncertainties, [NEVER] * 3).eq(3).all()
    for thresholds in itertools.product((NEVER, 0.2, 0.5, 1.0), repeat=3):
        assert MACS[0] <= mean_macs(exit_stage(uncertainties, thresholds), MACS) <= sum(MACS)


def test_a_higher_threshold_makes_no_sample_dearer() -> None:
    uncertainties = torch.rand(3, 100)
    for thresholds in itertools.product((NEVER, 0.3, 0.6), repeat=3):
        before = exit_stage(uncertainties, thresholds)
        for stage in range(3):
            raised = [limit + 0.25 * (place == stage) for place, limit in enumerate(thresholds)]
            assert bool((exit_stage(uncertainties, raised) <= before).all())


def test_with_two_members_the_samples_that_differ_only_grow_with_the_threshold() -> None:
    stages = torch.randn(2, 300, 5).cumsum(0)
    uncertainties, predictions = exits(NEVER).uncertainties(stages[:-1]), stages.argmax(dim=-1)
    differing = torch.zeros(300, dtype=torch.bool)
    for theta in torch.linspace(-0.1, 1, 40).tolist():
        answers = predictions.gather(0, exit_stage(uncertainties, [theta])[None])[0]
        now = answers != predictions[-1]
        assert bool((now | ~differing).all())
        differing = now


@pytest.mark.parametrize("rounded", [False, True], ids=["exact", "ties"])
@pytest.mark.parametrize("delta", [0.0, 0.02, 0.1, 0.5, 1.0])
def test_agreement_holds_its_bound_on_the_images_it_was_fitted_on(delta: float, rounded: bool) -> None:
    arguments = ResidualConfig(rule="agreement", delta=delta)
    for seed, (members, classes) in enumerate(itertools.product((2, 3, 4), (2, 5, 20))):
        torch.manual_seed(seed)
        stages = (2 * torch.randn(members, 150, classes)).cumsum(0)
        stages = stages.round() if rounded else stages
        fitted = fit(arguments, stages, torch.zeros(150).long(), MACS[:members], None)
        left, predictions = exits_at(fitted, stages), stages.argmax(dim=-1)
        answers = predictions.gather(0, left[None])[0]
        assert float((answers != predictions[-1]).double().mean()) <= delta
        if delta == 1:
            assert left.eq(0).all()


@pytest.mark.parametrize("delta", [0.0, 0.05, 0.3])
def test_accuracy_may_fall_by_delta_only(delta: float) -> None:
    for seed in range(8):
        torch.manual_seed(seed)
        labels = torch.randint(5, (200,))
        stages = (torch.randn(3, 200, 5) + 0.7 * nn.functional.one_hot(labels, 5)).cumsum(0)
        fitted = fit(ResidualConfig(rule="accuracy", delta=delta), stages, labels, MACS[:3], None)
        right = (stages.argmax(dim=-1) == labels).double()
        kept = right.gather(0, exits_at(fitted, stages)[None])[0].mean()
        assert float(right[-1].mean() - kept) <= delta + 1e-9


def test_a_budget_is_kept_as_closely_as_a_shared_threshold_can() -> None:
    stages, teacher = torch.randn(3, 400, 5).cumsum(0), 100
    for budget in (0.1, 0.5, 0.55, 0.7, 0.9, 2.0):
        fitted = fit(ResidualConfig(rule="budget", budget=budget), stages, torch.zeros(400).long(), MACS[:3], teacher)
        cost = mean_macs(exits_at(fitted, stages), MACS[:3]) / teacher
        assert cost <= max(budget, MACS[0] / teacher)
        uncertainties = fitted.uncertainties(stages[:-1])
        dearer = [theta for theta in [NEVER, *uncertainties.unique().tolist()] if theta < fitted.thresholds[0]]
        assert not dearer or mean_macs(exit_stage(uncertainties, [dearer[-1]] * 2), MACS[:3]) / teacher > budget


@pytest.mark.parametrize("name", MEASURES)
def test_fixed_thresholds_are_taken_as_they_are_and_energy_is_scaled_by_what_was_seen(name: str) -> None:
    stages = torch.randn(3, 50, 5)
    fitted = fit(ResidualConfig(rule="fixed", theta=0.3, uncertainty=name), stages, torch.zeros(50), MACS[:3], None)
    assert fitted.thresholds == (0.3, 0.3)
    assert (fitted.scale == (0.0, 1.0)) == (name in RANGES)
    if name not in RANGES:
        uncertainty = fitted.uncertainties(stages)
        assert (float(uncertainty.min()), float(uncertainty.max())) == (0.0, 1.0)


@pytest.mark.parametrize("thresholds", [(0.0, 0.0), (0.8, 0.6), (1.0, 0.0), (0.5, 1.0)])
def test_what_is_skipped_is_not_computed_and_batches_do_not_matter(thresholds: tuple[float, float]) -> None:
    ensemble, images, labels = made()
    chosen = exits(*thresholds)
    with torch.no_grad():
        stages = ensemble.stages(images)
    left = exits_at(chosen, stages)
    dense = stages.gather(0, left[None, :, None].expand(1, -1, stages.shape[-1]))[0]
    for size in (1, 7, len(images)):
        for member in ensemble.members:
            member.seen.clear()
        pieces = list(zip(images.split(size), labels.split(size), strict=True))
        early = EarlyExit(ensemble, chosen).eval()
        evaluate(early, pieces, 6)
        assert torch.equal(torch.cat(early.left), left)
        for place, member in enumerate(ensemble.members):
            alive = images[left >= place]
            assert torch.equal(torch.cat([*member.seen, images[:0]]), alive)
            assert all(len(seen) for seen in member.seen), "called for nobody"
        with torch.no_grad():
            logits = torch.cat([ensemble.adaptive(part, chosen)[0] for part, _ in pieces])
        assert torch.allclose(logits, dense, atol=1e-6)


def test_the_logits_are_the_sum_and_every_prefix_of_it() -> None:
    ensemble, images, _ = made(4)
    with torch.no_grad():
        own = [member(images) for member in ensemble.members]
        stages = ensemble.stages(images)
        assert torch.equal(stages[0], own[0])
        for stage in range(1, 4):
            assert torch.equal(stages[stage], stages[stage - 1] + own[stage])
        assert torch.equal(ensemble(images), stages[-1])
        backwards = Ensemble(list(ensemble.members)[::-1])
        assert torch.allclose(backwards(images), ensemble(images), atol=1e-6)


def test_a_curve_goes_from_all_members_to_the_first_alone() -> None:
    ensemble, images, labels = made(3, samples=200)
    points = exit_curve(ensemble, exits(0.5, 0.5), [(images, labels)], MACS[:3], 100)
    first, last = points[0], points[-1]
    assert (first.theta, first.exits, first.agreement, first.cost) == (None, [0, 0, 200], 100.0, 0.9)
    assert (last.exits, last.cost) == ([200, 0, 0], 0.5)
    assert [point.macs for point in points] == sorted((point.macs for point in points), reverse=True)
    all_members = evaluate(EarlyExit(ensemble, never(exits(0.5, 0.5))), [(images, labels)], 6)
    assert first.top1 == pytest.approx(all_members.top1)
    on_front = [(point.macs, point.top1) for point in points if point.pareto]
    rising = sorted(on_front)
    assert [top1 for _, top1 in rising] == sorted(top1 for _, top1 in rising)
    best = max(points, key=lambda point: point.top1)
    assert best.top1 == rising[-1][1]


def test_the_pareto_front_of_known_points() -> None:
    points = [(1.0, 10.0), (2.0, 30.0), (3.0, 31.0), (4.0, 50.0), (5.0, 40.0), (2.0, 20.0)]
    assert pareto(points) == {0, 1, 3}
    assert pareto([(1.0, 5.0)]) == {0}


def test_a_student_alone_is_an_ensemble_without_residual_students() -> None:
    ensemble, images, labels = made(1)
    early = EarlyExit(ensemble, exits())
    scores = evaluate(early, [(images, labels)], 6)
    assert (scores.images, torch.cat(early.left).tolist()) == (40, [0] * 40)
    assert len(exit_curve(ensemble, exits(), [(images, labels)], MACS[:1], None)) == 1
