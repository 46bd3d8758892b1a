"""Teacher look-ahead: the same steps whatever their number in a group, bit for bit after a stop inside of one."""

import shlex
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from conftest import PAIR, TINY, CliRunner
from test_engine import CLASSES, DATASET, SIDE, distiller_of
from test_step import batches, fit, make
from torch import Tensor

from sakd_cli.batch import Batch
from sakd_cli.config.methods import METHODS
from sakd_cli.config.training import ResidualConfig
from sakd_cli.data.loader import TrainLoader
from sakd_cli.engine import checkpoint
from sakd_cli.engine.look_ahead import LookAhead
from sakd_cli.engine.reporter import NullReporter
from sakd_cli.engine.runtime import compile_task, full_fp32
from sakd_cli.engine.trainer import Trainer
from sakd_cli.errors import Stopped
from sakd_cli.models.staged import Features
from sakd_cli.models.table import create
from sakd_cli.tasks.distill import DistillTask
from sakd_cli.tasks.residual import ResidualTask

CPU = torch.device("cpu")
WAYS = [*((method, "adaptive") for method in sorted(METHODS)), ("ofd", "always"), ("dfa", "random"), ("at", "anti")]


class Given(NamedTuple):
    """A loader of one epoch of these batches."""

    made: list[Batch]
    steps_per_epoch: int = 2

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        return iter(self.made[start:])


@pytest.mark.parametrize(("method", "router"), WAYS)
def test_steps_with_a_teacher_that_looks_ahead_are_those_without(method: str, router: str) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        arguments: dict[str, Any] = {"train.lr": 0.05} | ({"method.negatives": 9} if method == "crd" else {})
        arguments |= {"method.weights": "uniform"} if method == "dfa" else {}
        plain, ahead = (make(method, router, teacher="resnet8", **arguments) for _ in range(2))
        made = [*batches(plain, 1, size=3), *batches(plain, 1, size=2, seed=1)]
        expected = fit(plain, made)
        loader = LookAhead(Given(made), ahead.precompute, steps=2, device=CPU)
        given = list(loader.epoch(1))
        assert [len(batch.labels) for batch in given] == [3, 2]
        losses = fit(ahead, given)
        assert max(abs(float(a / b) - 1) for a, b in zip(losses, expected, strict=True)) < 1e-12
        for ours, theirs in zip(ahead.state_dict().values(), plain.state_dict().values(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    finally:
        torch.set_default_dtype(torch.float32)


HELD = {  # spots 1 to 3 are maps, 4 is the pooled vector: (stages, stages in front of their activation, stages' blocks)
    "kd": ({4}, set(), set()),
    "fitnet": ({2, 4}, set(), set()),
    "ofd": ({1, 4}, {1, 2, 3}, set()),
    "dfa": ({1, 4}, set(), {1, 2, 3}),
}


@pytest.mark.parametrize("method", HELD)
def test_what_no_step_reads_is_not_held(tmp_path: Path, method: str) -> None:
    seen = distiller_of(method, "adaptive", tmp_path, 1).task.precompute(torch.zeros(2, 3, SIDE, SIDE))
    held = [{k for k, x in enumerate(of) if len(x)} for of in (seen.stages, seen.preactivations, seen.blocks)]
    assert tuple(held) == HELD[method]


def loader_of(task: DistillTask, size: int, device: torch.device = CPU) -> TrainLoader:
    return TrainLoader(DATASET.train, DATASET, batch_size=size, seed=3, noise_width=task.noise_width, device=device)


def looking(task: DistillTask, steps: int, size: int = 3, device: torch.device = CPU) -> LookAhead:
    return LookAhead(loader_of(task, size, device), task.precompute, steps=steps, device=device)


def tensors(batch: Batch) -> list[Tensor]:
    assert batch.view is not None
    return [batch.images, batch.labels, batch.index, batch.noise, batch.view]


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 50])
def test_an_epoch_is_the_loaders_own_from_any_step_on(tmp_path: Path, steps: int) -> None:
    task = distiller_of("fitnet", "adaptive", tmp_path, 1).task
    plain, ahead = loader_of(task, 3), looking(task, steps)
    assert ahead.steps_per_epoch == plain.steps_per_epoch == 7
    known = [batch.precomputed for batch in ahead.epoch(2)]
    for start in range(8):
        found, expected = list(ahead.epoch(2, start)), list(plain.epoch(2, start))
        assert len(found) == len(expected) == 7 - start
        for batch, other in zip(found, expected, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(tensors(batch), tensors(other), strict=True))
        for batch, whole in zip(found, known[start:], strict=True):
            assert torch.equal(batch.precomputed.logits, whole.logits), "the very bits, wherever the epoch is taken up"
            assert torch.equal(batch.precomputed.stages[2], whole.stages[2])


class Halt(NullReporter):
    """Stops a run after so many steps."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def advance(self, step: int) -> None:
        self.left -= 1

    def stop(self) -> int:
        return 15 * (self.left <= 0)


def trainer_that_looks_ahead(folder: Path, seed: int = 0) -> Trainer:
    trainer = distiller_of("fitnet", "adaptive", folder, 2, seed)
    trainer.loader = looking(trainer.task, 3)
    trainer.steps = 2 * trainer.loader.steps_per_epoch
    return trainer


@pytest.mark.parametrize("stop", [4, 8])
def test_a_run_stopped_inside_of_a_group_goes_on_bit_for_bit(tmp_path: Path, stop: int) -> None:
    whole, halted = (trainer_that_looks_ahead(tmp_path / name) for name in ("whole", "halted"))
    whole.fit()
    halted.reporter = Halt(stop)
    with pytest.raises(Stopped):
        halted.fit()
    again = trainer_that_looks_ahead(tmp_path / "halted", seed=1)
    again.resume(checkpoint.read(tmp_path / "halted" / "checkpoints" / "last"))
    assert again.step == stop
    again.fit()
    for ours, theirs in zip(again.task.state_dict().values(), whole.task.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch asks, and hides it
def test_a_compiled_step_has_one_graph_per_batch_size_wherever_a_slice_begins(tmp_path: Path) -> None:
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    trainer = distiller_of("fitnet", "always", tmp_path, 1)
    trainer.task.feature_distiller.dynamic_shapes = False
    compile_task(trainer.task.train(), pytest.fail, backend="eager")
    for epoch in (1, 2):
        for batch in looking(trainer.task, 3).epoch(epoch):
            trainer.task(batch)
    assert counters["stats"]["unique_graphs"] <= 2 * len(trainer.task.regions)
    assert not counters["recompile_limit"]


def test_a_run_says_how_far_its_teacher_looks_ahead(trained_cli: CliRunner, teacher: Path, tmp_path: Path) -> None:
    """Also a residual student's; a bank needs no look."""
    arguments = [*PAIR, *TINY, "--method", "kd", "--teacher", str(teacher), "--runs-dir", str(tmp_path)]
    ahead, chain = ["--set", "runtime.look_ahead=3"], shlex.split("--residual-students 1 --set residual.max_cost=9")
    inner = shlex.split("--set residual.loss=inner --set residual.architectures=[resnet8]")
    plain, ours = trained_cli.sakd(*arguments, "--json").document, trained_cli.sakd(*arguments, *ahead, "--json")
    assert "look-ahead 3)" in ours.err
    assert ours.document["last"]["loss"] == pytest.approx(plain["last"]["loss"], rel=1e-3)
    assert trained_cli.sakd(*arguments, *ahead, *chain, *inner, "--set", "data.train=40").code == 0
    assert trained_cli.sakd(*arguments, *ahead, "--cache-teacher", "--set", "data.train=10").code == 0


def test_a_residual_student_is_told_its_targets_ahead_too() -> None:
    torch.manual_seed(0)
    networks = [create("resnet8", CLASSES).eval().forward for _ in range(2)]
    arguments = ResidualConfig(students=1, loss="kl")
    made = []
    for steps in (1, 3):
        torch.manual_seed(1)
        task = ResidualTask(create("resnet8", CLASSES), *networks, arguments, lr=0.05, weight_decay=0.0)
        plain = TrainLoader(DATASET.train, DATASET, batch_size=3, seed=3, noise_width=0, device=CPU)
        loader = LookAhead(plain, task.precompute, steps=steps, device=CPU)
        made.append(fit(task, list(loader.epoch(1) if steps > 1 else plain.epoch(1))))
    torch.testing.assert_close(made[1], made[0], rtol=1e-4, atol=1e-5)


class Stream:
    """What is asked of a stream, in order, beside what else happens."""

    device = CPU

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def wait_stream(self, other: "Stream") -> None:
        self.log.append(f"{self.name} waits for {other.name}")

    def wait_event(self, event: str) -> None:
        self.log.append(f"{self.name} waits for {event}")

    def record_event(self) -> str:
        self.log.append(f"{self.name} notes")
        return "the note"


def test_on_cuda_a_group_is_asked_for_before_the_one_in_front_of_it_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The order of the calls; whether they do what they should only a GPU can tell."""
    log: list[str] = []
    main, used = Stream("main", log), []
    monkeypatch.setattr("torch.cuda.Stream", lambda device: Stream("side", log))
    monkeypatch.setattr("torch.cuda.current_stream", lambda device: main)
    monkeypatch.setattr("torch.cuda.stream", lambda stream: nullcontext())
    monkeypatch.setattr(Tensor, "record_stream", lambda tensor, stream: used.append((tensor.data_ptr(), stream.name)))
    task = distiller_of("fitnet", "adaptive", tmp_path, 1).task

    def seen(images: Tensor) -> Features:
        log.append("teacher")
        return task.precompute(images)

    ahead = LookAhead(loader_of(task, 3), seen, steps=2, device=torch.device("cuda"))
    for batch in ahead.epoch(1):
        log.append(f"step of {len(batch.labels)}")
        held = {tensor.untyped_storage().data_ptr() for tensor in (batch.precomputed.logits, batch.images)}
        assert held <= {place for place, name in used if name == "main"}
    given = ["main waits for the note", "step of 3", "step of 3"]
    asked = ["teacher", "side notes"]
    last = ["side notes", "main waits for the note", "step of 2"]
    assert log == ["side waits for main", *asked, *asked, *given, *asked, *given, *asked, *given, *last]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here: the second stream is not tried")
def test_what_is_prepared_on_a_second_stream_is_what_one_stream_gives(tmp_path: Path) -> None:
    device = torch.device("cuda")
    task = distiller_of("fitnet", "adaptive", tmp_path, 1).task.to(device)
    task.teacher_features.network.to(device)
    ahead, plain = looking(task, 2, device=device), loader_of(task, 3, device)
    with full_fp32():  # by default some convolutions are rounded to 10 bits, others are not
        for epoch in range(1, 30):
            for batch, other in zip(ahead.epoch(epoch), plain.epoch(epoch), strict=True):
                scratch = torch.full((1 << 20,), 7.0, device=device)  # takes memory that was given up too soon
                expected = task.precompute(other.images)
                torch.testing.assert_close(batch.precomputed.logits, expected.logits, rtol=1e-4, atol=1e-5)
                assert all(torch.equal(a, b) for a, b in zip(tensors(batch), tensors(other), strict=True))
                del scratch
