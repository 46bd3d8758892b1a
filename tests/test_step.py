"""The routed step: against the oracles, against the literal published step, and its invariants."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from oracles import close, fill, image, oracle, samples, tensors_of
from published import published
from torch import Tensor, nn
from torch.nn import functional as F

from sakd_cli.batch import Batch
from sakd_cli.bench.steps import count
from sakd_cli.config.methods import METHODS
from sakd_cli.config.resolve import ConfigSource, nested, resolve
from sakd_cli.config.train import Train
from sakd_cli.engine.optim import Optimizer
from sakd_cli.engine.runtime import compile_task
from sakd_cli.models.table import create
from sakd_cli.routing.table import Anti
from sakd_cli.runs.build import assemble
from sakd_cli.tasks.distill import DistillTask
from sakd_cli.tasks.pretrain import PretrainTask

CLASSES, SIDE = 10, 16
LITERAL = ("kd", "fitnet", "at", "nst", "vid", "sp", "pkt", "rkd", "cc", "ft", "crd")  # written out in published.py

pytestmark = pytest.mark.usefixtures("float64")


def make(method: str, router: str, student: str = "resnet8", teacher: str = "resnet14", **more: Any) -> DistillTask:
    """A task on two freshly drawn networks with BatchNorm statistics that are not the initial ones."""
    arguments = {"teacher.source": teacher, "student": student, "method.name": method, "router.name": router, **more}
    config = resolve("distill", [ConfigSource("test", nested(arguments))]).config
    torch.manual_seed(3)
    ours, theirs = create(student, CLASSES), create(teacher, CLASSES)
    with torch.no_grad():
        for model in (ours, theirs):
            model.train()(torch.randn(16, 3, SIDE, SIDE))
    return assemble(config, ours, theirs.requires_grad_(False).eval(), SIDE, torch.arange(60) % CLASSES)


def batches(task: DistillTask, count: int, size: int = 6, seed: int = 0) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        x = torch.randn(size, 3, SIDE, SIDE, generator=generator)
        y = torch.randint(CLASSES, (size,), generator=generator)
        noise = torch.rand(size, task.noise_width, generator=generator)
        made.append(Batch(images=x, labels=y, index=torch.arange(size), noise=noise))
    if task.router.meta:
        made = [replace(batch, held_out=made[0]) for batch in made]
    return made


def optimizer(task: Any) -> Optimizer:
    return Optimizer(task.groups(), Train())


def fit(task: Any, made: list[Batch]) -> list[Tensor]:
    optim = optimizer(task)
    optim.begin_epoch(1)
    task.train()
    losses = []
    for batch in made:
        output = task(batch)
        optim.step(output.loss)
        losses.append(output.loss.detach())
    return losses


# Biases by which about half of the samples, all and none are sent to the teacher.
HALF = [(method, shapes, 0.0) for method in LITERAL for shapes in ("static", "dynamic")]
ALL_OR_NONE = [(method, "dynamic", bias) for method in ("kd", "fitnet", "sp", "crd") for bias in (10.0, -300.0)]


@pytest.mark.parametrize(("method", "shapes", "bias"), HALF + ALL_OR_NONE)
def test_four_steps_equal_the_literal_published_step(method: str, shapes: str, bias: float) -> None:
    arguments = {"router.teacher_bias": bias, "train.lr": 0.05, "runtime.shapes": shapes, "router.recipe": "published"}
    task = make(method, "adaptive", **arguments | ({"method.negatives": 9} if method == "crd" else {}))
    slow, optim = published(task, method), optimizer(task)
    optim.begin_epoch(1)
    task.train()
    for batch in batches(task, 4):
        rows = task.feature_distiller.draw(batch.index, batch.labels) if method == "crd" else None
        told = slow.step(batch.images, batch.labels, batch.noise, rows)
        output = task(batch)
        optim.step(output.loss)
        for name, value in told.items():
            assert float(output.parts[name]) == pytest.approx(value, rel=1e-10)
    modules = [(task.network, slow.student)]
    modules += [
        *zip(task.graft.to_teacher, slow.to_teacher, strict=True),
        *zip(task.graft.to_student, slow.to_student, strict=True),
    ]
    tensors = [pair for a, b in modules for pair in zip(a.buffers(), b.buffers(), strict=True)]
    sgds = zip(task.groups(), (slow.student_sgd, slow.router_sgd), strict=True)
    for group, sgd in sgds:
        for a, b in zip(group.parameters, sgd.param_groups[0]["params"], strict=True):
            tensors += [(a, b), (optim.parts[0][0].state[a]["momentum_buffer"], sgd.state[b]["momentum_buffer"])]
    if method == "crd":
        banks = slow.compared[0].banks
        tensors += [(task.feature_distiller.bank_s, banks["s"]), (task.feature_distiller.bank_t, banks["t"])]
    assert all(close(a, b, 1e-10, 1e-13) for a, b in tensors)


def wants(task: DistillTask) -> tuple[Any, Any]:
    """What the features of student and teacher must hold."""
    distiller = task.feature_distiller
    want = "stages" if distiller is None else distiller.want
    return "preactivations" if want == "preactivations" else "stages", want


def routing_case() -> tuple[DistillTask, Batch, dict[str, Any], dict[str, Tensor]]:
    cases, _ = oracle("routing")
    case = cases[0]
    given = tensors_of("routing", case["id"], "in")
    arguments = {
        "teacher": case["teacher"],
        "student": case["student"],
        "method": {"name": case["method"].lower(), "weight": case["beta"], "temperature": case["T"]},
        "router": {"name": "adaptive", "gamma": case["gamma"]},
    }
    config = resolve("distill", [ConfigSource("test", arguments)]).config
    salts = case["salts"]
    teacher = fill(create(case["teacher"], case["num_classes"]), salts["teacher"]).requires_grad_(False).eval()
    student = fill(create(case["student"], case["num_classes"]), salts["student"])
    task = assemble(config, student, teacher, 32)
    fill(task.router, salts["policy"])
    fill(task.graft.to_teacher, salts["hint"])
    fill(task.graft.to_student, salts["anti_hint"])
    n = case["batch"]
    batch = Batch(
        images=image((n, 3, 32, 32), salts["input"]),
        labels=given["target"],
        index=torch.arange(n),
        noise=given["uniform"].double().reshape(n, -1),
    )
    return task, batch, case, tensors_of("routing", case["id"], "f64")


def test_routed_step_agrees_with_the_oracle() -> None:
    task, batch, case, f64 = routing_case()
    task.train()
    output = task(batch)
    output.loss.backward()
    assert close(output.use.weight.T, f64["gates"], 0.0)
    assert output.use.weight.sum(dim=1).int().tolist() == case["selected_per_gate"]
    assert close(output.logits, f64["student_logits"], 1e-9)
    assert close(output.parts["router"], f64["routed_total"], 1e-9)
    assert close(output.parts["ce"], f64["student_ce"], 1e-9)
    assert close(output.parts["logit"], f64["kl_gated"], 1e-9)
    assert close(output.parts["feature"], case["beta"] * f64["distill_gated"], 1e-9)
    assert close(output.parts["loss"], f64["total_loss"], 1e-9)
    policy = task.router.policy
    assert close(policy.weight.grad, f64["grad_policy_weight"], 1e-8)
    assert close(policy.bias.grad, f64["grad_policy_bias"], 1e-8)
    compared = 0
    for kind, modules in (("hint", task.graft.to_teacher), ("anti_hint", task.graft.to_student)):
        for k, module in enumerate(modules):
            norm = torch.cat([parameter.grad.flatten() for parameter in module.parameters()]).norm()
            assert close(norm, f64[f"grad_{kind}_{k}_l2"], 1e-8)
            for i, parameter in enumerate(module.parameters()):
                if (expected := f64.get(f"grad_{kind}_{k}_p{i}_samples")) is not None:
                    assert close(samples(parameter.grad, len(expected)), expected, 1e-8)
                    compared += 1
    assert compared == 18
    student = [parameter.grad.flatten() for parameter in task.network.parameters()]
    assert close(torch.cat(student).norm(), f64["grad_student_l2"], 1e-8)
    assert close(torch.cat(student).abs().sum(), f64["grad_student_l1"], 1e-8)
    assert close(task.network.head.bias.grad, f64["grad_student_classifier_bias"], 1e-8)
    norms = [module for module in task.network.modules() if isinstance(module, nn.BatchNorm2d)]
    sums = [x for name in ("running_mean", "running_var") for x in _sums([getattr(norm, name) for norm in norms])]
    assert close(torch.stack(sums), f64["student_bn_after"].flatten(), 1e-9)


def _sums(tensors: list[Tensor]) -> list[Tensor]:
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    return [flat.sum(), flat.square().sum()]


def test_anti_agrees_with_the_oracle() -> None:
    task, batch, case, f64 = routing_case()
    task.router = Anti(task.router)
    output = task.train()(batch)
    output.loss.backward()
    assert close(output.parts["feature"], case["beta"] * f64["reverse_distill_gated"], 1e-9)
    assert close(output.parts["logit"], f64["reverse_kl_gated"], 1e-9)
    assert close(output.parts["loss"], f64["reverse_total_loss"], 1e-9)
    student = torch.cat([parameter.grad.flatten() for parameter in task.network.parameters()])
    assert close(student.norm(), f64["reverse_grad_student_l2"], 1e-8)
    assert close(task.router.inner.policy.weight.grad, f64["grad_policy_weight"], 1e-8)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_always_is_ordinary_distillation_bit_for_bit(method: str) -> None:
    task = make(method, "always")
    student, teacher = copy.deepcopy(task.network), task.teacher_features.network
    distiller = copy.deepcopy(task.feature_distiller)
    ours_want, theirs_want = wants(task)
    made = batches(task, 3)
    modules = nn.ModuleList([student] + ([distiller] if distiller else []))
    plain = torch.optim.SGD(modules.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    student.train()
    for batch in made:
        with torch.no_grad():
            theirs = teacher.features(batch.images, theirs_want)
        ours = student.features(batch.images, ours_want)
        ones = torch.ones(len(task.spots), len(batch.labels))
        loss = task.factors.ce * F.cross_entropy(ours.logits, batch.labels)
        loss = loss + task.factors.logit * task.logit_distiller(ours, theirs, ones[-1:], batch).sum()
        if distiller is not None:
            loss = loss + task.factors.feature * distiller(ours, theirs, ones[:-1], batch).sum()
        plain.zero_grad()
        loss.backward()
        plain.step()
    fit(task, made)
    for a, b in zip(task.network.state_dict().values(), student.state_dict().values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_only_what_compares_preactivations_or_blocks_asks_for_them(method: str) -> None:
    task = make(method, "always")
    assert (task.student_features.keywords["want"], task.teacher_features.want) == wants(task)
    assert task.student_features.func.__self__ is task.network
    assert copy.deepcopy(task).student_features.func.__self__ is not task.network


@pytest.mark.parametrize("method", sorted(METHODS))
def test_never_is_plain_training_bit_for_bit(method: str) -> None:
    task = make(method, "never", **{"method.ce_weight": 1})
    plain = PretrainTask(copy.deepcopy(task.network), lr=0.05, weight_decay=5e-4)
    made = batches(task, 3)
    fit(task, made)
    fit(plain, made)
    for a, b in zip(task.network.state_dict().values(), plain.network.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_each_group_gets_the_gradient_of_its_own_loss_only() -> None:
    task, alone = make("at", "adaptive").train(), make("at", "adaptive").train()
    batch = batches(task, 1)[0]
    student, router = (group.parameters for group in task.groups())
    output = task(batch)
    of_student = torch.autograd.grad(output.loss, student, retain_graph=True)
    of_router = torch.autograd.grad(output.loss, router)
    alone.graft = None  # no routed pass, hence no router's loss
    expected = torch.autograd.grad(alone(batch).loss, alone.groups()[0].parameters)
    assert all(torch.equal(a, b) for a, b in zip(of_student, expected, strict=True))
    assert all(gradient.abs().sum() > 0 for gradient in of_router[:2])


def test_teacher_is_untouched_and_the_student_normalised_once_per_step() -> None:
    task = make("fitnet", "adaptive")
    teacher = task.teacher_features.network
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    tracked = next(module for module in task.network.modules() if isinstance(module, nn.BatchNorm2d))
    seen = int(tracked.num_batches_tracked)
    fit(task, batches(task, 3))
    assert all(torch.equal(before[name], tensor) for name, tensor in teacher.state_dict().items())
    assert int(tracked.num_batches_tracked) == seen + 3


@pytest.mark.parametrize("method", sorted(METHODS))
def test_all_teacher_and_all_student_paths_are_the_networks_themselves(method: str) -> None:
    task = make(method, "adaptive")
    assert task.graft is not None
    teacher = task.teacher_features.network
    x = batches(task, 1)[0].images
    with torch.no_grad():
        theirs = teacher.features(x)
        for value, network in ((1.0, teacher), (0.0, copy.deepcopy(task.network).eval())):
            routed = task.graft(x, theirs, torch.full((len(x), len(task.spots)), value))
            assert torch.equal(routed, network(x))


def test_a_pruned_step_reads_the_device_once_per_way() -> None:
    task = make("at", "adaptive", **{"runtime.shapes": "dynamic"}).train()
    batch = batches(task, 1)[0]
    assert count(lambda: task(batch).loss.backward(), []).reads == 3


# Every method's own part of it: test_distillers.py.
@pytest.mark.parametrize("method", ["fitnet", "crd", "simkd"])
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch asks, and hides it
def test_every_region_of_the_step_is_one_graph(method: str) -> None:
    torch._dynamo.reset()
    task = make(method, "adaptive", **{"runtime.compile": True}).train()
    made = batches(task, 1)[0]
    before = copy.deepcopy(task.state_dict())
    called = task(made).loss.detach()
    task.load_state_dict(before)
    compile_task(task, pytest.fail, backend="eager")
    assert close(task(made).loss, called, 1e-12)


def test_a_router_that_is_trained_in_every_second_step_decides_in_all() -> None:
    """The student learns in every step; the router where it has its turn."""
    task = make("fitnet", "adaptive", **{"router.update_every": 2}).train()
    optimizer, seen = Optimizer(task.groups(), Train()), []
    optimizer.begin_epoch(1)
    parts = [torch.cat([p.detach().flatten() for p in part.parameters()]) for part in (task.router, task.network)]
    for step, given in enumerate(batches(task, 4)):
        task.begin_step(step)
        output = task(given)
        optimizer.step(output.loss)
        now = [torch.cat([p.detach().flatten() for p in part.parameters()]) for part in (task.router, task.network)]
        moved = [not torch.equal(before, after) for before, after in zip(parts, now, strict=True)]
        seen.append((*moved, "router" in output.parts, output.use.probability is not None))
        parts = now
    assert seen == [(True, True, True, True), (False, True, False, True)] * 2
