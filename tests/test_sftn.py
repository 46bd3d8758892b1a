"""Student-friendly teachers: who gets which gradient, figures by hand, shapes of pairs, a teacher that stays plain."""

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from ghosts import ghost, without_numbers
from test_engine import trainer_of
from torch import Tensor, nn
from torch.nn import functional as F

from sakd_cli.batch import Batch
from sakd_cli.config.methods import METHODS
from sakd_cli.config.networks import NETWORKS
from sakd_cli.config.resolve import ConfigSource, resolve
from sakd_cli.config.train import Train
from sakd_cli.config.training import FriendlyConfig
from sakd_cli.documents.base import rounded
from sakd_cli.engine import checkpoint
from sakd_cli.engine.evaluate import evaluate
from sakd_cli.engine.optim import Optimizer
from sakd_cli.engine.reporter import NullReporter
from sakd_cli.models import artifact
from sakd_cli.models.adapters import ConvAdapter, Transform
from sakd_cli.models.artifact import NetworkCard
from sakd_cli.models.branches import Branches, Tail
from sakd_cli.models.staged import StagedModel
from sakd_cli.models.table import create
from sakd_cli.runs import build, launch
from sakd_cli.runs.branches import branch_rows
from sakd_cli.runs.locate import locate_inputs
from sakd_cli.runs.resume import ResumePlan
from sakd_cli.tasks.pretrain import PretrainTask, SftnTask, imitation

CLASSES, SIDE = 4, 8
CARD = NetworkCard("resnet14", "noise", tuple("abcd"), (0.5,) * 3, (0.3,) * 3, SIDE)


def sftn(seed: int = 0, students: tuple[str, ...] = ("resnet8",), **arguments: Any) -> SftnTask:
    friendly = FriendlyConfig(students=students, **arguments)
    torch.manual_seed(seed)
    network = create("resnet14", CLASSES)
    branches = Branches(network, friendly.students, SIDE, share=friendly.share_branches)
    return SftnTask(network, branches, friendly, lr=0.05, weight_decay=5e-4)


def batch_of(count: int, seed: int = 0) -> Batch:
    """Noise around one picture per class."""
    draw = torch.Generator().manual_seed(seed)
    classes = torch.randn(CLASSES, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(99))
    labels = torch.randint(CLASSES, (count,), generator=draw)
    images = 0.5 * classes[labels] + torch.randn(count, 3, SIDE, SIDE, generator=draw)
    return Batch(images, labels, torch.arange(count), torch.zeros(count, 0))


def reached(network: StagedModel) -> list[bool]:
    """Whether stem, every stage of maps, and the head got a gradient that is not zero."""
    parts = [*list(network.stages)[:-1], network.head]
    return [any(p.grad is not None and bool(p.grad.any()) for p in part.parameters()) for part in parts]


@pytest.mark.parametrize("branch", [0, 1])
def test_a_branch_teaches_the_stages_in_front_of_it_and_no_other(branch: int) -> None:
    task, batch = sftn(), batch_of(6)
    logits = task.branches(task.network.features(batch.images).stages)
    F.cross_entropy(logits[branch], batch.labels).backward()
    stage = branch + 1
    assert reached(task.network) == [place <= stage for place in range(4)] + [False]


def test_every_part_of_every_branch_is_trained_and_none_is_idle() -> None:
    task = sftn(students=("resnet8", "wrn_16_1"))
    task(batch_of(6)).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in task.branches.parameters())
    grouped = [id(parameter) for group in task.groups() for parameter in group.parameters]
    assert sorted(grouped) == sorted(id(parameter) for parameter in task.parameters())


@pytest.mark.parametrize("detached", [True, False])
def test_the_imitation_reaches_the_whole_teacher_unless_its_target_is_detached(detached: bool) -> None:
    task = sftn(lambda_t=0, lambda_ce=0, detach_target=detached)
    task(batch_of(6)).loss.backward()
    assert reached(task.network) == [True, True, True, not detached, not detached]


def test_fully_detached_branches_leave_the_teachers_gradient_as_it_is() -> None:
    task = sftn(detach_features=True, detach_target=True)
    plain = PretrainTask(sftn().network, lr=0.05, weight_decay=5e-4)
    for each in (task, plain):
        each(batch_of(6)).loss.backward()
    for ours, theirs in zip(task.network.parameters(), plain.network.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)
    assert all(p.grad is not None and p.grad.any() for p in task.branches.transforms.parameters() if p.ndim == 4)


def job(tmp_path: Path, task: str = "pretrain", **arguments: Any) -> build.Job:
    tiny = {"data": {"name": "shapes", "train": 200, "test": 100}, "train": {"epochs": 1}, "runs_dir": str(tmp_path)}
    config = resolve(task, [ConfigSource("tiny", tiny), ConfigSource("test", arguments)]).config
    return build.pretraining(config) if task == "pretrain" else build.distillation(locate_inputs(config))


def test_branches_that_weigh_nothing_leave_no_trace_in_the_teacher(tmp_path: Path) -> None:
    nothing = {"students": "resnet8", "lambda_kl": 0, "lambda_ce": 0}
    jobs = [job(tmp_path, model="resnet8"), job(tmp_path, model="resnet8", friendly=nothing)]
    for each in jobs:
        launch.launch(each, launch.run_extensions(each), ResumePlan(), NullReporter())
    ours, theirs = (each.network.state_dict() for each in jobs)
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def test_the_branches_come_from_the_seed_of_the_run_alone(tmp_path: Path) -> None:
    made = []
    for noise, seed in ((1, 0), (2, 0), (2, 1)):
        torch.manual_seed(noise)
        made.append(job(tmp_path, model="resnet8", friendly="resnet8", seed=seed).task.branches)
        assert torch.initial_seed() == noise
    first, again, other = (branches.tails[1].head.weight for branches in made)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first, made[0].tails[0].head.weight), "each branch starts with weights of its own"


def test_a_branch_is_scored_without_changing_the_teachers_mode() -> None:
    task = sftn()
    network, images = task.network.eval(), batch_of(6).images
    rows = branch_rows(network, task.branches.eval(), [(images, batch_of(6).labels)])
    assert not any(module.training for module in network.modules())
    with torch.no_grad():
        logits = task.branches(network.features(images).stages)
    losses = [F.cross_entropy(each, batch_of(6).labels).item() for each in logits]
    assert [row.loss for row in rows] == pytest.approx(losses, rel=1e-5)


@without_numbers()
def test_every_pair_of_networks_has_transforms_to_the_students_shapes() -> None:
    shapes = {
        (teacher.infos[stage].shape(32), student.infos[stage].shape(32))
        for teacher, student in itertools.product(map(ghost, NETWORKS), repeat=2)
        for stage in range(1, min(len(teacher.map_stages), len(student.map_stages)))
    }
    assert {source[1] / target[1] for source, target in shapes} >= {0.5, 1, 2}
    for source, target in shapes:
        with torch.device("meta"):
            assert Transform(source, target)(torch.empty(2, *source)).shape == (2, *target)


@pytest.mark.parametrize("name", NETWORKS)
@without_numbers()
def test_every_network_has_tails_from_its_own_shapes_to_logits(name: str) -> None:
    student = ghost(name)
    for stage in student.map_stages[:-1]:
        x = torch.empty(2, *student.infos[stage].shape(32), device="meta")
        assert Tail(student, stage + 1)(x, stage).shape == (2, 100)


@pytest.mark.parametrize(
    ("h1", "h2", "geometry"),
    [
        (8, 8, "conv 1x1"),
        (8, 4, "conv 3x3 /2"),
        (4, 8, "up-conv 4x4 x2"),
        (16, 4, "conv 3x3 /2 conv 3x3 /2"),
        (2, 16, "up-conv 4x4 x2 up-conv 4x4 x2 up-conv 4x4 x2"),
        (12, 4, "mean conv 1x1"),
        (8, 5, "mean conv 1x1"),
        (5, 8, "mean conv 1x1"),
    ],
)
def test_the_transform_follows_the_ratio_of_the_sides_and_norms_the_students_width(
    h1: int, h2: int, geometry: str
) -> None:
    transform = Transform((12, h1, h1), (20, h2, h2))
    assert transform.geometry == geometry
    out = transform(torch.randn(3, 12, h1, h1))
    assert out.shape == (3, 20, h2, h2)
    assert out.min() == 0
    norms = [module.num_features for module in transform.modules() if isinstance(module, nn.BatchNorm2d)]
    assert set(norms) == {20}, (
        "the width is reached in the first step; the one public implementation norms the teacher's"
    )
    assert len(norms) == sum(isinstance(module, ConvAdapter) for module in transform.modules())


@pytest.mark.parametrize("name", ["resnet8", "wrn_16_1", "vgg8", "MobileNetV2_half", "ShuffleNetV1", "ResNet18"])
def test_a_tail_behind_its_own_features_is_the_whole_network(name: str) -> None:
    network = create(name, CLASSES).eval()
    with torch.no_grad():
        features = network.features(torch.randn(2, 3, 32, 32))
        for stage in network.map_stages[:-1]:
            assert torch.equal(Tail(network, stage + 1)(features.stages[stage], stage), features.logits)
            assert torch.equal(Tail(network, 2)(features.stages[stage], stage), features.logits)


def test_there_is_a_branch_behind_every_common_stage_but_the_last() -> None:
    places = [(place.student, place.stage) for place in sftn(students=("resnet8", "vgg8")).branches.places]
    assert places == [("resnet8", 1), ("resnet8", 2), ("vgg8", 1), ("vgg8", 2)]
    with torch.device("meta"):
        assert len(Branches(create("vgg13", 5), ("vgg8",), 32, share=False).places) == 3


@pytest.mark.parametrize("reverse", [False, True])
def test_the_imitation_by_hand(reverse: bool) -> None:
    teacher = torch.tensor([[0.0, math.log(3.0)]])  # 1/4, 3/4
    branch = torch.tensor([[0.0, 0.0]])  # 1/2, 1/2
    forward = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    backward = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    wanted = backward if reverse else forward
    for count in (1, 4):
        found = imitation(teacher, branch.expand(count, 1, 2), 1.0, reverse=reverse)
        assert found.item() == pytest.approx(wanted, rel=1e-6), "the mean over branches, however many"
    hot = imitation(3 * teacher, 3 * branch[None], 3.0, reverse=reverse)
    assert hot.item() == pytest.approx(9 * wanted, rel=1e-6)
    assert imitation(teacher, teacher[None], 2.0, reverse=reverse).item() == 0
    assert abs(forward - backward) > 0.01


class Fixed(nn.Module):
    """Branches that say ever the same."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, stages: Any) -> Tensor:
        return self.logits


@pytest.mark.parametrize("count", [1, 2, 5])
def test_the_whole_loss_is_the_weighted_sum_of_means(count: int) -> None:
    task, batch = sftn(lambda_t=0.5, lambda_kl=2, lambda_ce=0.25, tau=2), batch_of(6)
    branch = torch.randn(6, CLASSES, generator=torch.Generator().manual_seed(5))
    task.branches = Fixed(branch.expand(count, 6, CLASSES))
    output = task.eval()(batch)
    teacher = task.network(batch.images)
    kl = F.kl_div((branch / 2).log_softmax(1), (teacher / 2).softmax(1), reduction="batchmean")
    ce, own = F.cross_entropy(teacher, batch.labels), F.cross_entropy(branch, batch.labels)
    assert output.loss.item() == pytest.approx((0.5 * ce + 2 * 4 * kl + 0.25 * own).item(), rel=1e-5)
    assert output.parts.keys() == {"ce", "branch_kl", "branch_ce", "loss"}
    assert torch.equal(output.logits, teacher)


def test_the_teacher_is_saved_plain_and_every_method_distils_from_it(tmp_path: Path) -> None:
    task = sftn()
    task(batch_of(6))
    assert task.network.state_dict().keys() == create("resnet14", CLASSES).state_dict().keys()
    artifact.save_weights(tmp_path / "teacher", task.network, CARD)
    teacher = artifact.load(tmp_path / "teacher").model.requires_grad_(False).eval()
    images = torch.randn(4, 3, 32, 32)
    assert torch.equal(teacher(images), task.network.eval()(images))
    for method in METHODS:
        arguments = {"teacher": "resnet14", "student": "resnet8", "method": method}
        config = resolve("distill", [ConfigSource("test", arguments)]).config
        labels = torch.arange(CLASSES).repeat(3)
        distillation = build.assemble(config, create("resnet8", CLASSES), teacher, 32, labels)
        noise = torch.full((4, distillation.noise_width), 0.5)
        output = distillation(Batch(images, labels[:4], torch.arange(4), noise))
        assert output.loss.isfinite(), method


def distance_after(steps: int, **arguments: Any) -> float:
    """KL between the teacher and its branches in nats, on new images, after so many steps."""
    task = sftn(**arguments)
    optimizer = Optimizer(task.groups(), Train())
    optimizer.begin_epoch(1)
    for step in range(steps):
        optimizer.step(task(batch_of(32, step)).loss)
    task.eval()
    with torch.no_grad():
        features = task.network.features(batch_of(256, 10_000).images)
        return imitation(features.logits, task.branches(features.stages), 1.0, reverse=False).item()


def test_a_friendly_teacher_is_nearer_to_its_branches_the_more_so_the_more_it_weighs() -> None:
    detached = distance_after(40, detach_features=True, detach_target=True)
    distances = [detached, *(distance_after(40, lambda_kl=weight) for weight in (1.0, 10.0))]
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] < 0.5 * distances[0]


def test_fine_tuning_starts_where_the_saved_network_ended(tmp_path: Path) -> None:
    first = job(tmp_path, model="resnet8")
    summary = launch.launch(first, launch.run_extensions(first), ResumePlan(), NullReporter())
    again = job(tmp_path, model="resnet8", init_from=str(summary.run), friendly="resnet8", seed=1)
    assert (again.config.train.lr, again.task.groups()[1].lr) == (0.01, 0.01)
    saved, loaded = first.network.state_dict(), again.network.state_dict()
    assert all(torch.equal(saved[name], loaded[name]) for name in saved)
    evaluation = launch.evaluation_data(again, NullReporter())
    scores = evaluate(again.network, evaluation.test, evaluation.classes)
    assert rounded(scores.metrics()) == {key: getattr(summary.last, key) for key in ("top1", "top5", "loss")}
    trainer_of(again.task, tmp_path / "none", 0, output=None).fit()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in again.network.state_dict().items())


def test_fine_tuning_is_short_and_slow_unless_told_otherwise() -> None:
    def train(**arguments: Any) -> tuple[int, float | None, tuple[int, ...]]:
        found = resolve("pretrain", [ConfigSource("test", {"model": "resnet8"} | arguments)]).config.train
        return found.epochs, found.lr, found.decay_epochs()

    assert train(init_from="x") == (60, 0.01, (37, 45, 52))
    assert train(init_from="x", train={"epochs": 16, "lr": 0.1}) == (16, 0.1, (10, 12, 14))
    assert train() == (240, None, (150, 180, 210))


def test_shared_branches_are_one_student_that_learns_from_all() -> None:
    task = sftn(share_branches=True, lambda_t=0, lambda_kl=0)
    student = create("resnet8", CLASSES)
    tail = sum(p.numel() for module in [*student.stages[2:], student.head] for p in module.parameters())
    transforms = sum(p.numel() for p in task.branches.transforms.parameters())
    assert sum(p.numel() for p in task.branches.parameters()) == tail + transforms
    batch = batch_of(6)
    logits = task.branches(task.network.features(batch.images).stages)
    head = task.branches.tails[0].head.weight
    alone = [torch.autograd.grad(F.cross_entropy(each, batch.labels), head, retain_graph=True)[0] for each in logits]
    (both,) = torch.autograd.grad(task(batch).loss, head)
    assert torch.allclose(both, sum(alone) / 2, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("share", [False, True])
def test_a_run_that_was_interrupted_goes_on_bit_for_bit(tmp_path: Path, share: bool) -> None:
    whole = trainer_of(sftn(share_branches=share), tmp_path / "whole", 4)
    whole.fit()
    trainer_of(sftn(share_branches=share), tmp_path / "halves", 2).fit()
    resumed = trainer_of(sftn(seed=1, share_branches=share), tmp_path / "halves", 4)
    resumed.resume(checkpoint.read(tmp_path / "halves" / "checkpoints" / "last"))
    resumed.fit()
    for ours, theirs in (
        (resumed.task.state_dict(), whole.task.state_dict()),
        (resumed.optimizer.tensors(), whole.optimizer.tensors()),
    ):
        assert ours.keys() == theirs.keys()
        assert not [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert list(resumed.run.lines("metrics.jsonl")) == list(whole.run.lines("metrics.jsonl"))
