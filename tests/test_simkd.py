"""SimKD beside the contract of distillers: the network that it delivers, made of two."""

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PAIR, TINY, CliRunner
from ghosts import ghost, without_numbers
from oracles import close, fill
from torch import Tensor, nn
from torch.nn import functional as F

from sakd_cli.batch import Batch
from sakd_cli.config.networks import find_network, find_trainable
from sakd_cli.config.resolve import ConfigSource, nested, resolve
from sakd_cli.config.train import Train
from sakd_cli.engine.optim import Optimizer
from sakd_cli.errors import UsageError
from sakd_cli.models.adapters import build_reused
from sakd_cli.models.staged import StagedModel
from sakd_cli.models.table import create
from sakd_cli.runs.build import assemble
from sakd_cli.tasks.distill import DistillTask

CLASSES, SIDE = 6, 16


@pytest.mark.parametrize(
    ("name", "student", "teacher"),
    [
        ("simkd2-resnet8-resnet20", "resnet8", "resnet20"),
        ("simkd4-vgg8-ResNet50", "vgg8", "ResNet50"),
        ("simkd1-wrn_16_2-simkd2-resnet8-wrn_40_2", "wrn_16_2", "simkd2-resnet8-wrn_40_2"),
    ],
)
def test_the_name_says_what_the_network_is_made_of(name: str, student: str, teacher: str) -> None:
    network = find_network(name)
    assert network.name == name
    assert (network.arguments["student"], network.arguments["teacher"]) == (student, teacher)
    assert (network.kin, network.lr) == (find_network(student).kin, find_network(student).lr)
    with torch.device("meta"):
        assert create(name, 3).name == name
    with pytest.raises(UsageError, match="made by a distillation"):
        find_trainable(name)


@pytest.mark.parametrize("name", ["simkd0-resnet8-resnet20", "simkd2-resnet8", "simkd2-resnet8-resnt20", "simkd2--"])
def test_a_name_of_no_network_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="unknown model"):
        find_network(name)


WIDE_APART = ["resnet8", "wrn_10_2", "vgg8", "ResNet18", "MobileNetV2_half", "ShuffleNetV1", "ShuffleNetV2_0_5"]


@functools.cache
def last_map(name: str, side: int) -> Tensor:
    return ghost(name, CLASSES).eval().features(torch.empty(2, 3, side, side, device="meta")).stages[-2]


@pytest.mark.parametrize("teacher", WIDE_APART)
@pytest.mark.parametrize("student", WIDE_APART)
@without_numbers()
def test_every_pair_has_the_declared_shapes_and_the_teachers_end(student: str, teacher: str) -> None:
    """What is made of the student's stages; those, the pooling aside, are the student's own."""
    ours, theirs = ghost(student, CLASSES), ghost(teacher, CLASSES).eval()
    with torch.device("meta"):
        model = build_reused("made", CLASSES, student=ours, teacher=theirs, factor=2).eval()
    assert (list(model.stages)[:-2], model.infos[:-2]) == (list(ours.stages)[:-1], ours.infos[:-1])
    assert model.infos[-1] == theirs.infos[-1]
    assert model.infos[-2].channels == theirs.infos[-2].channels
    for side in (32, 64):
        projected = model.stages[-2](last_map(student, side))
        pooled = model.stages[-1](projected)
        assert [tuple(x.shape[1:]) for x in (projected, pooled)] == [info.shape(side) for info in model.infos[-2:]]
        assert model.head(pooled).shape == (2, CLASSES)
        high, other = (network.infos[-2].shape(side)[1] for network in (model, theirs))
        assert high <= other * (2 if teacher == "vgg8" and side == 64 else 1), "the loss pools the rest"


@pytest.mark.parametrize("name", WIDE_APART)
def test_a_stage_is_declared_signed_where_its_output_can_be_negative(name: str) -> None:
    model = fill(create(name, CLASSES), 1).eval()
    with torch.no_grad():
        stages = model.features(torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))).stages
    assert [bool((x < 0).any()) for x in stages] == [info.signed for info in model.infos]


def task_of(student: str, teacher: str, router: str, **tokens: Any) -> tuple[DistillTask, StagedModel]:
    tokens |= {"teacher.source": teacher, "student": student, "method.name": "simkd", "router.name": router}
    config = resolve("distill", [ConfigSource("test", nested(tokens))]).config
    torch.manual_seed(3)
    theirs = create(teacher, CLASSES)
    with torch.no_grad():
        theirs.train()(torch.randn(16, 3, SIDE, SIDE))
    theirs.requires_grad_(False).eval()
    return assemble(config, create(student, CLASSES), theirs, SIDE), theirs


def batches(task: DistillTask, count: int) -> list[Batch]:
    made = []
    for k in range(count):
        draw = torch.Generator().manual_seed(k)
        x, noise = torch.randn(6, 3, SIDE, SIDE, generator=draw), torch.rand(6, task.noise_width, generator=draw)
        made.append(Batch(images=x, labels=torch.arange(6), index=torch.arange(6), noise=noise))
    return made


def plain_step(parts: dict[str, nn.Sequential], teacher: StagedModel, x: Tensor) -> Tensor:
    """The published loss on bare layers."""
    s = parts["student"](x)
    with torch.no_grad():
        t = nn.Sequential(*teacher.stages[:-1])(x)
    size = min(s.shape[-1], t.shape[-1])
    s = F.adaptive_avg_pool2d(s, size) if s.shape[-1] > size else s
    t = F.adaptive_avg_pool2d(t, size) if t.shape[-1] > size else t
    return F.mse_loss(parts["projector"](s), t)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("pair", [("resnet8", "resnet14"), ("resnet8", "vgg8"), ("vgg8", "wrn_10_2")], ids="-".join)
def test_always_is_the_published_training(pair: tuple[str, str]) -> None:
    task, teacher = task_of(*pair, "always")
    *body, projector, _ = copy.deepcopy(task.network).stages
    layers = []
    for unit in list(projector)[-3:]:
        layers += [unit.conv, unit.bn, nn.ReLU()]
    kept = layers[:-1] if pair[1] == "wrn_10_2" else layers
    assert [tuple(layer.weight.shape[2:]) for layer in layers[::3]] == [(1, 1), (3, 3), (1, 1)]
    assert {layer.weight.shape[0] for layer in layers[:6:3]} == {teacher.infos[-2].channels // 2}
    parts = {"student": nn.Sequential(*body).train(), "projector": nn.Sequential(*kept).train()}
    sgd = torch.optim.SGD(nn.ModuleDict(parts).parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    optimizer = Optimizer(task.groups(), Train())
    optimizer.begin_epoch(1)
    task.train()
    for batch in batches(task, 3):
        sgd.zero_grad()
        plain_step(parts, teacher, batch.images).backward()
        sgd.step()
        optimizer.step(task(batch).loss)
    *ours, projector, _ = task.network.stages
    state = [*nn.Sequential(*ours).state_dict().values(), *projector.state_dict().values()]
    theirs = [*parts["student"].state_dict().values(), *parts["projector"].state_dict().values()]
    assert all(close(a.double(), b.double(), 1e-10, 1e-13) for a, b in zip(state, theirs, strict=True))


@pytest.mark.parametrize("router", ["adaptive", "always"])
@pytest.mark.parametrize("teacher", ["wrn_10_2", "MobileNetV2_half", "simkd2-resnet8-wrn_10_2"])
def test_what_is_borrowed_never_changes(teacher: str, router: str) -> None:
    task, theirs = task_of("resnet8", teacher, router, **{"method.ce_weight": 1, "method.kl_weight": 1})
    borrowed = [task.network.stages[-1], task.network.head]
    trained = {id(parameter) for group in task.groups() for parameter in group.parameters}
    assert not [p for part in borrowed for p in part.parameters() if id(p) in trained or p.requires_grad]
    assert trained >= {id(p) for stage in task.network.stages[:-1] for p in stage.parameters()}
    optimizer = Optimizer(task.groups(), Train())
    optimizer.begin_epoch(1)
    task.train()
    first = copy.deepcopy(task.network.stages[0].state_dict())
    for batch in batches(task, 2):
        optimizer.step(task(batch).loss)
    for ours, original in zip(borrowed, (theirs.stages[-1], theirs.head), strict=True):
        for a, b in zip(ours.state_dict().values(), original.state_dict().values(), strict=True):
            assert torch.equal(a, b)
            assert a.data_ptr() != b.data_ptr()
    assert not any(torch.equal(a, first[name]) for name, a in task.network.stages[0].state_dict().items())


def test_with_the_teachers_map_it_is_the_teacher() -> None:
    task, teacher = task_of("resnet8", "wrn_10_2", "always")
    x = torch.randn(4, 3, SIDE, SIDE)
    with torch.no_grad():
        met = teacher.run(x, 0, len(teacher.infos) - 1)
        assert torch.equal(task.network.train().run(met, len(task.network.infos) - 1, 99), teacher(x))


@pytest.fixture(scope="module")
def summary(cli: CliRunner, pretrained: Any) -> dict[str, Any]:
    """Of a run on the command line."""
    return cli.sakd(*PAIR, "--method", "simkd", *TINY, "--json").document


def test_what_is_delivered_scores_the_same_and_is_looked_at(cli: CliRunner, summary: dict[str, Any]) -> None:
    run = summary["run"]
    sizes = [word for word in TINY if word not in ("--epochs", "1")]
    scored = cli.sakd("eval", f"{run}/student", *sizes, "--json").document
    assert scored["network"] == summary["network"] == "simkd2-resnet8-resnet8"
    for key in ("top1", "loss"):
        assert scored[key] == summary["last"][key]
    assert (scored["parameters"], scored["macs"]) == (summary["parameters"], summary["macs"])
    spots = cli.sakd("inspect-spots", run, "--json").document["overall"]
    assert [(spot["name"], spot["kind"]) for spot in spots] == [("projector", "map"), ("logits", "logits")]


def test_what_is_delivered_can_teach(cli: CliRunner, summary: dict[str, Any], tmp_path: Path) -> None:
    for method in ("fitnet", "simkd"):
        tokens = ["distill", "--teacher", summary["run"], "--student", "resnet8", "--method", method, *TINY]
        plan = cli.sakd(*tokens, "--dry-run", "--json").document
        assert plan["networks"][0]["name"] == "simkd2-resnet8-resnet8"
