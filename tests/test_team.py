"""Several teachers: by a plain script, under every router, replayed, resumed; what is refused."""

import copy
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import TINY, CliRunner
from emulator import Emulator
from test_ahead import Halt
from test_engine import CLASSES, DATASET, SIDE
from test_replay import EPOCHS, assert_equal_when_replayed, differing, memory, trainer_of
from test_step import batches, optimizer
from test_step import make as made
from torch.nn import functional as F

from sakd_cli.config.resolve import ConfigSource, nested, resolve
from sakd_cli.engine import checkpoint
from sakd_cli.errors import Stopped
from sakd_cli.models.table import create
from sakd_cli.runs.build import assemble
from sakd_cli.runs.teachers import join, require_team
from sakd_cli.tasks.distill import DistillTask


@pytest.fixture
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sakd_cli.engine.optim.updates_on_device", lambda parameter: True)
    monkeypatch.setattr("sakd_cli.engine.graphs.WARMUP", 1)


def pair_of(method: str, router: str, combine: str) -> DistillTask:
    """A student of two teachers, of tests/test_engine.py's images."""
    words = {"teacher": ["resnet8", "resnet14"], "student": "resnet8", "method.name": method, "router.name": router}
    words |= {"runtime.shapes": "static", "train.epochs": EPOCHS}
    words |= {"router.weights": [[0.3], [0.7]]} if router == "fixed" else {}
    words |= {"router.dose": "published"} if "teacher-" in router and router != "teacher-correct" else {}
    torch.manual_seed(42)
    config = resolve("distill", [ConfigSource("test", nested(words))]).config
    config = config.model_copy(update={"teacher": config.teacher.model_copy(update={"combine": combine})})
    student, *teachers = (create(name, CLASSES) for name in ("resnet8", "resnet8", "resnet14"))
    tasks = [
        assemble(
            config.model_copy(update={"seed": k}), student, one.requires_grad_(False).eval(), SIDE, DATASET.train.labels
        )
        for k, one in enumerate(teachers)
    ]
    require_team(config, tasks[0])
    join(tasks[0], tasks[1:], config)
    return tasks[0]


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("combine", ["mean", "confidence", "draw"])
def test_twenty_steps_are_those_of_a_plain_script(combine: str) -> None:
    task, other = made("fitnet", "always", teacher="resnet8"), made("fitnet", "always")
    other.network = task.network
    student, own = copy.deepcopy(task.network), [copy.deepcopy(one.feature_distiller) for one in (task, other)]
    words = {"teacher": {"source": ["a", "b"], "combine": combine}, "student": "resnet8"}
    config = resolve("distill", [ConfigSource("-", words)])
    join(task, [other], config.config)
    teachers, count = [task.teacher_features.network, other.teacher_features.network], 2
    modules = [student, *own]
    sgd = torch.optim.SGD([p for m in modules for p in m.parameters()], lr=0.05, momentum=0.9, weight_decay=5e-4)
    optim, batch_list = optimizer(task), batches(task, 20)
    optim.begin_epoch(1)
    task.train(), student.train()
    for batch in batch_list:
        optim.step(task(batch).loss)
        ours, seen = student.features(batch.images), [one.features(batch.images) for one in teachers]
        shares = torch.full((count, len(batch.labels)), 1 / count)
        if combine == "confidence":
            wrong = torch.stack([F.cross_entropy(one.logits, batch.labels, reduction="none") for one in seen])
            shares = 1 - wrong.exp() / wrong.exp().sum(dim=0)
        if combine == "draw":
            shares = torch.zeros_like(shares)
            shares[int(batch.noise[0, -1] * count)] = 1
        loss = F.cross_entropy(ours.logits, batch.labels)
        for theirs, share, hint in zip(seen, shares, own, strict=True):
            p, q = (theirs.logits / 4).softmax(1), (ours.logits / 4).log_softmax(1)
            loss = loss + 16 * (share * (p * (p.log() - q)).sum(1)).mean()
            error = (hint.regressors[0](ours.stages[2]) - theirs.stages[2]) ** 2
            loss = loss + (share * error.flatten(1).mean(1)).mean()
        sgd.zero_grad()
        loss.backward()
        sgd.step()
    for a, b in zip(task.network.state_dict().values(), student.state_dict().values(), strict=True):
        assert torch.allclose(a.double(), b.double(), rtol=1e-10, atol=1e-11)


@pytest.mark.usefixtures("_as_on_a_gpu")
@pytest.mark.parametrize(
    ("method", "router", "combine"),
    [
        ("fitnet", "adaptive", "mean"),
        ("at", "soft", "draw"),
        ("kd", "random", "confidence"),
        ("fitnet+rkd", "random", "mean"),
        ("crd", "anti", "draw"),
        ("sp", "teacher-confidence", "confidence"),
    ],
)
def test_a_replayed_and_a_stopped_run_are_the_called_one(
    method: str, router: str, combine: str, tmp_path: Path
) -> None:
    make = partial(pair_of, method, router, combine)
    device, _ = assert_equal_when_replayed(make, tmp_path)
    assert device.replays
    whole, halted = (trainer_of(make(), tmp_path / name, Emulator()) for name in ("whole", "halted"))
    whole.fit()
    halted.reporter = Halt(5)
    with pytest.raises(Stopped):
        halted.fit()
    again = trainer_of(make(), tmp_path / "halted", Emulator())
    again.resume(checkpoint.read(tmp_path / "halted" / "checkpoints" / "last"))
    again.fit()
    assert not differing(memory(again), memory(whole))


def test_every_router_of_a_team_learns_from_its_own_routed_pass() -> None:
    task = pair_of("fitnet", "adaptive", "mean")
    assert [group.name for group in task.groups()] == ["student", "router"]
    batch = batches(task, 1)[0]
    batch = batch.map(lambda x: x[..., :SIDE, :SIDE] if x.dim() == 4 else x % CLASSES if x.dtype == torch.int64 else x)
    output = task.train()(batch)
    output.loss.backward()
    for member in task.members:
        assert member.router.policy.weight.grad.abs().sum() > 0
        assert member.graft.to_teacher[0].state_dict()
    assert output.use is not None
    assert len(output.use.weight) == len(output.use.probability) == 2 * len(task.spots)
    assert (output.use.weight.unflatten(0, (2, -1)).sum(dim=0) <= 1).all()
    assert not [name for name in task.state_dict() if name.startswith("others.") and ".network." in name]


@pytest.fixture(scope="module")
def two(trained_cli: CliRunner) -> CliRunner:
    assert trained_cli.sakd("pretrain-teacher", "resnet14", *TINY).code == 0
    return trained_cli


PAIR = ["distill", "--teacher=resnet8", "--teacher=resnet14", "--student", "resnet8"]


def test_a_run_with_two_teachers_is_resumed_and_reported(two: CliRunner) -> None:
    found = two.sakd(*PAIR, "--method", "fitnet", *TINY, "--set", "teacher.combine=confidence", "--json").document
    assert [one["network"] for one in found["more_teachers"]] == ["resnet14"]
    spots = [spot["name"] for spot in two.sakd("inspect-spots", found["run"], "--json").document["overall"]]
    assert spots == ["stage2/resnet8", "logits/resnet8", "stage2/resnet14", "logits/resnet14"]
    again = two.sakd("distill", "--resume", found["run"], "--epochs", "2", "-q")
    assert again.code == 0, again.err
    changed = two.sakd("distill", "--resume", found["run"], "--set", "teacher.combine=mean")
    assert "teacher.combine was" in changed.err
    assert two.sakd("inspect-spots", found["run"], "--live").err.count("this run has 2 teachers") == 1


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ("--method ft", "teacher: 2 are named, and method ft trains something before, from one"),
        ("--method simkd", "teacher: 2 are named, and method simkd makes another network of the student, of one"),
        ("--router meta", "router: meta is of one teacher, and 2 are named"),
        ("--with-control", "random-matched is of one teacher, and 2 are named"),
        ("--router teacher-entropy", "teacher: 2 are named, and router.dose=selected-mean would undo their shares"),
        ("--method kd --cache-teacher", "teacher: 2 are named, and teacher.cache keeps the answers of one"),
        ("--residual-students 1", "teacher: 2 are named, and residual students complete one"),
        ("--teacher=resnet20", "teacher: no finished resnet20 on shapes in runs"),
        ("--set teacher.combine=median", "teacher.combine"),
    ],
)
def test_what_is_of_one_teacher_costs_a_line(two: CliRunner, words: str, text: str) -> None:
    two.assert_rejects([*PAIR, *TINY, *words.split()], 2, text)
