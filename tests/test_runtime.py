"""How a run computes: number types, layout, shapes, compilation, and that each says what it is."""

import json
import shlex
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PAIR, TINY, CliRunner
from test_engine import distiller_of
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters

from sakd_cli.batch import Batch
from sakd_cli.config.methods import METHODS
from sakd_cli.config.resolve import ConfigSource, nested, resolve
from sakd_cli.config.train import Train
from sakd_cli.config.training import Runtime
from sakd_cli.engine.optim import Optimizer
from sakd_cli.engine.runtime import (
    as_in_new_process,
    compile_task,
    compiled,
    pick_device,
    resolve_mode,
    set_backends,
)
from sakd_cli.errors import UsageError
from sakd_cli.models.table import create
from sakd_cli.runs.build import assemble
from sakd_cli.tasks.distill import DistillTask

CLASSES = 10


def make(method: str, teacher: str = "resnet8", **runtime: Any) -> DistillTask:
    settings = {"teacher": teacher, "student": "resnet8", "method.name": method, "router.teacher_bias": 0.0}
    settings |= {f"runtime.{name}": word for name, word in runtime.items()}
    settings |= {"method.negatives": 9} if method == "crd" else {}
    torch.manual_seed(3)
    ours, theirs = create("resnet8", CLASSES), create(teacher, CLASSES)
    theirs.train()(torch.randn(16, 3, 16, 16))
    config = resolve("distill", [ConfigSource("test", nested(settings))]).config
    return assemble(config, ours, theirs.requires_grad_(False).eval(), 16, torch.arange(60) % CLASSES).train()


def batch(task: DistillTask, size: int = 8, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    x, noise = (
        torch.randn(size, 3, 16, 16, generator=generator),
        torch.rand(size, task.noise_width, generator=generator),
    )
    return Batch(images=x, labels=torch.arange(size) % CLASSES, index=torch.arange(size), noise=noise)


def optimizer(task: DistillTask) -> Optimizer:
    made = Optimizer(task.groups(), Train())
    made.begin_epoch(1)
    return made


@pytest.mark.parametrize(
    ("settings", "device", "message"),
    [
        ({}, "cpu", "fp32, channels_last, dynamic shapes"),
        ({}, "cuda", "fp32, channels_last, static shapes, graph, look-ahead 8"),
        ({"graph": False}, "cuda", "fp32, channels_last, static shapes, look-ahead 8"),
        ({}, "mps", "fp32, contiguous, static shapes"),
        ({"compile": True, "precision": "bf16"}, "cpu", "bf16, channels_last, static shapes, compiled"),
        ({"channels_last": False, "shapes": "dynamic", "look_ahead": 1}, "cuda", "fp32, contiguous, dynamic shapes"),
        ({"look_ahead": 3}, "cpu", "fp32, channels_last, dynamic shapes, look-ahead 3"),
    ],
)
def test_what_the_words_mean_depends_on_the_device(settings: dict[str, Any], device: str, message: str) -> None:
    assert str(resolve_mode(Runtime(**settings), torch.device(device))) == message


def test_a_card_that_is_named_is_the_one_that_everything_is_asked_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its clocks wait for it, and no context is opened on the first one; behind a call it is the program's again."""
    asked, answers = list[Any](), {"is_available": True, "is_initialized": True, "device_count": 2, "current_device": 0}
    for name, answer in answers.items():
        monkeypatch.setattr(f"torch.cuda.{name}", lambda answer=answer: answer)
    monkeypatch.setattr("torch.cuda.set_device", asked.append)
    monkeypatch.setattr("torch.random.fork_rng", lambda cards: nullcontext())
    with as_in_new_process():
        for name in ("cpu", "auto", "cuda", "cuda:0", "cuda:1"):
            pick_device(name)
    assert asked == [torch.device("cuda:1"), 0]


def test_a_compiled_step_cannot_be_pruned() -> None:
    settings = nested(
        {"teacher": "resnet8", "student": "resnet8", "runtime.compile": True, "runtime.shapes": "dynamic"}
    )
    with pytest.raises(UsageError, match="runtime: a compiled or captured step"):
        resolve("distill", [ConfigSource("test", settings)])


@pytest.mark.parametrize("method", ["fitnet", "vid"])
def test_channels_last_reaches_every_map_and_the_routed_pass_shares_the_students_weights(method: str) -> None:
    task = make(method, channels_last=True)
    maps = [p for p in task.parameters() if p.dim() == 4]
    assert maps
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in maps)
    view = task.graft.run_student.__self__
    for ours, routed in zip(task.network.parameters(), view.parameters(), strict=True):
        assert ours.data_ptr() == routed.data_ptr()
        assert not routed.requires_grad
    optim, seen = optimizer(task), []
    task.network.stages[1].register_forward_hook(lambda module, x, y: seen.append(y))
    optim.step(task(batch(task)).loss)
    assert seen[0].is_contiguous(memory_format=torch.channels_last)
    again = optimizer(task)
    again.load_tensors({name: tensor.contiguous() for name, tensor in optim.tensors().items()})
    for name, tensor in again.tensors().items():
        assert torch.equal(tensor, optim.tensors()[name])
        assert tensor.dim() < 4 or tensor.is_contiguous(memory_format=torch.channels_last), "as its parameter lies"


TRANSLATING = {"fitnet", "vid", "ofd", "reviewkd", "ft", "dfa"}


@pytest.mark.parametrize("method", sorted(METHODS))
def test_bf16_is_for_the_networks_and_what_translates_between_them_alone(method: str) -> None:
    exact, task = make(method), make(method, precision="bf16")
    types: list[torch.dtype] = []
    for network in (task.network, task.teacher_features.network, task.graft.run_student.__self__):
        network.stages[0].register_forward_hook(lambda module, x, y: types.append(y.dtype))
    translators = [] if task.feature_distiller is None else task.feature_distiller.modules()
    of_translators = set[torch.dtype]()
    for layer in translators:
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            layer.register_forward_hook(lambda module, x, y: of_translators.add(y.dtype))
    given = batch(task)
    output, expected = task(given), exact(given)
    output.loss.backward()
    assert set(types) == {torch.bfloat16}
    assert len(types) == 3
    assert of_translators == ({torch.bfloat16} if method in TRANSLATING else set())
    tensors = [output.loss, output.logits, output.use.weight, *output.parts.values()]
    tensors += [p.grad for group in task.groups() for p in group.parameters if p.grad is not None]
    tensors += [m.running_var for m in task.modules() if isinstance(m, nn.BatchNorm2d)]
    assert {tensor.dtype for tensor in tensors} == {torch.float32}
    assert all(tensor.isfinite().all() for tensor in tensors)
    assert torch.equal(output.use.weight, expected.use.weight)
    assert float(output.parts["ce"]) == pytest.approx(float(expected.parts["ce"]), rel=0.03)


def same_as_eager(method: str, backend: str, tolerance: float, **runtime: Any) -> None:
    """Two epochs of three batches, the last one smaller: two graphs in the first, nothing new in the second."""
    torch._dynamo.reset()
    counters.clear()
    task, eager = (make(method, compile=True, **runtime) for _ in range(2))
    compile_task(task, pytest.fail, backend=backend)
    ours, theirs = optimizer(task), optimizer(eager)
    for _ in range(2):
        for size in (8, 8, 3):
            given = batch(task, size)
            loss, expected = task(given).loss, eager(given).loss
            torch.testing.assert_close(loss, expected, rtol=tolerance, atol=0.0)
            ours.step(loss)
            theirs.step(expected)
        assert counters["stats"]["unique_graphs"] == 2 * len(task.regions)
    assert not counters["graph_break"]
    assert not counters["recompile_limit"]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch asks, and hides it
def test_a_compiled_step_has_one_graph_per_batch_size_and_eager_numbers() -> None:
    same_as_eager("fitnet", "aot_eager", 1e-6, precision="bf16")


def test_what_cannot_be_compiled_backward_either_is_called_after_one_line() -> None:
    def lower(module: Any, inputs: Any) -> Any:
        raise ValueError("no kernel for this backward pass")

    torch._dynamo.reset()
    task, eager, said = make("fitnet", compile=True), make("fitnet", compile=True), []
    compile_task(task, said.append, backend=aot_autograd(fw_compiler=lambda module, inputs: module, bw_compiler=lower))
    given = batch(task)
    optimizer(task).step(task(given).loss)
    optimizer(eager).step(eager(given).loss)
    assert [line.split(" (")[0] for line in said] == [
        f"runtime.compile: {name} cannot be compiled" for name in ("learn", "decide", "route", "objective")
    ]
    ours, theirs = task.state_dict(), eager.state_dict()
    assert not [name for name in ours if not torch.equal(ours[name], theirs[name])]
    said.clear()
    look = compiled(task.precompute, said.append, backend=aot_autograd(fw_compiler=lower))
    assert torch.equal(look(given.images).logits, eager.precompute(given.images).logits)
    assert len(said) == 1


def test_more_graphs_than_are_kept_is_told_and_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where many spots rest in turn, each with batches of several sizes."""
    torch._dynamo.reset()
    monkeypatch.setattr("sakd_cli.engine.runtime.GRAPHS", 3)
    said: list[str] = []
    double = compiled(lambda x: 2 * x, said.append, backend="eager")
    assert [double(torch.ones(k)).sum().item() for k in range(2, 8)] == [2.0 * k for k in range(2, 8)]
    assert len(said) == 1


@pytest.mark.battery
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch asks, and hides it
@pytest.mark.parametrize("method", ["fitnet", "crd"])
def test_a_step_compiled_for_this_machine_has_eager_numbers(method: str) -> None:
    same_as_eager(method, "inductor", 1e-3)


def test_a_run_says_how_it_computes(cli: CliRunner, pretrained: Any) -> None:
    few = shlex.split("--set data.train=64 --set runtime.channels_last=off --precision bf16")
    result = cli.sakd(*PAIR, "--method", "kd", *TINY, *few)
    assert "(bf16, contiguous, dynamic shapes)" in result.err
    run = cli.path / result.out.strip().splitlines()[-1].removeprefix("run: ")
    assert json.loads((run / "env.json").read_text())["mode"] == "bf16, contiguous, dynamic shapes"


def test_what_a_run_reports_is_computed_without_tf32(tmp_path: Path) -> None:
    """As `sakd eval` computes it; what chooses the best epoch is computed as the run does."""
    trainer, seen = distiller_of("kd", "always", tmp_path, 1), list[bool]()
    trainer.task.network.register_forward_pre_hook(
        lambda network, _: None if network.training else seen.append(torch.backends.cudnn.allow_tf32)
    )
    set_backends(Runtime(tf32=True))
    try:
        trainer.fit()
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        set_backends(Runtime())
    assert (seen[0], seen[-1]) == (True, False)
