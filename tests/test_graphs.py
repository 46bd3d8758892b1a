"""Captured steps: the same numbers as called ones, through the same buffers. Here a capture is played by a stand-in."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from test_engine import CLASSES, DATASET, SAMPLES, SIDE, FileDelivery, distiller_of

from sakd_cli.batch import Batch
from sakd_cli.config.resolve import ConfigSource, nested, resolve
from sakd_cli.config.training import Runtime
from sakd_cli.data.loader import EvalLoader, TrainLoader
from sakd_cli.engine.graphs import WARMUP, Cuda, Device, GraphedStep
from sakd_cli.engine.look_ahead import LookAhead
from sakd_cli.engine.optim import Optimizer
from sakd_cli.engine.recorder import SpotRecorder
from sakd_cli.engine.reporter import NullReporter
from sakd_cli.engine.runtime import resolve_mode
from sakd_cli.engine.task import StepOutput
from sakd_cli.engine.trainer import EvaluationData, Trainer, TrainingOutput
from sakd_cli.errors import UsageError
from sakd_cli.models.table import create
from sakd_cli.rundir import RunDir
from sakd_cli.runs.build import assemble

CPU = torch.device("cpu")
Call = Callable[[], StepOutput]


class StandIn:
    """Captures nothing but the call, and answers into ever the same tensors, as a graph does."""

    def __init__(self) -> None:
        self.warmed = self.captured = self.replayed = 0

    def warm_up(self, call: Call) -> StepOutput:
        self.warmed += 1
        return call()

    def capture(self, call: Call) -> Call:
        self.captured += 1
        held: list[StepOutput] = []

        def replay() -> StepOutput:
            self.replayed += 1
            output = call()
            if not held:
                held.append(output)
                return output
            held[0].loss.copy_(output.loss)
            held[0].logits.copy_(output.logits)
            for name, part in output.parts.items():
                held[0].parts[name].copy_(part)
            for ours, new in zip((held[0].use.weight, held[0].use.probability), output.use[:2], strict=True):
                ours.copy_(new)
            for name, event in output.use.events.items():
                held[0].use.events[name].copy_(event)
            return held[0]

        return replay


def of_many_steps(method: str, folder: Path, graphs: Device | None, device: torch.device = CPU) -> Trainer:
    """Six whole batches of 3 and one of 2 in each of 3 epochs; the rate falls after the second."""
    settings = {"teacher": "resnet8", "student": "resnet8", "method.name": method, "runtime.shapes": "static"}
    settings |= {"method.negatives": 9} if method == "crd" else {}
    torch.manual_seed(42)
    student, teacher = (create("resnet8", CLASSES).to(device) for _ in range(2))
    config = resolve("distill", [ConfigSource("test", nested(settings))]).config
    labels = DATASET.train.labels
    task = assemble(config, student, teacher.requires_grad_(False).eval(), SIDE, labels).to(device)
    plain = TrainLoader(DATASET.train, DATASET, batch_size=3, seed=3, noise_width=task.noise_width, device=device)
    loader = LookAhead(plain, task.precompute, steps=2, device=device)
    test = EvalLoader(DATASET.test, DATASET, device=device)
    folder.mkdir()
    return Trainer(
        task,
        loader,
        Optimizer(task.groups(), momentum=0.9, milestones=(2,), decay=0.1),
        RunDir(folder),
        NullReporter(),
        epochs=3,
        log_every=5,
        output=TrainingOutput(EvaluationData("test", test, test, CLASSES), FileDelivery(student)),
        recorder=SpotRecorder([(spot.name, spot.kind) for spot in task.spots], CLASSES, SAMPLES, device),
        graphs=graphs,
    )


def test_replayed_steps_are_the_steps_bit_for_bit(tmp_path: Path) -> None:
    device = StandIn()
    plain, graphed = (
        of_many_steps("crd", tmp_path / name, how) for name, how in (("plain", None), ("graphed", device))
    )
    assert plain.fit()["last"] == graphed.fit()["last"]
    assert (device.captured, device.warmed) == (2, 2 * WARMUP), "one for each learning rate"
    assert device.replayed == 3 * 6 - 2 * WARMUP, "the small last batch of an epoch is not replayed"
    for ours, theirs in zip(graphed._tensors().items(), plain._tensors().items(), strict=True):
        assert ours[0] == theirs[0]
        assert torch.equal(ours[1], theirs[1]), ours[0]
    for log in ("metrics.jsonl", "spots.jsonl"):
        assert list(graphed.run.lines(log)) == list(plain.run.lines(log))


def test_a_graph_reads_its_own_tensors_and_is_made_anew_for_larger_batches_and_other_rates() -> None:
    device, rate, given = StandIn(), [1.0], []

    def step(batch: Batch) -> StepOutput:
        given.append(batch)
        return StepOutput(batch.images.sum(), None, {})

    device.capture = lambda call: call  # type: ignore[method-assign]
    graphed = GraphedStep(step, device, lambda: rate[0])

    def batch(size: int) -> Batch:
        return Batch(torch.rand(size, 3, 2, 2), torch.zeros(size), torch.arange(size), torch.rand(size, 0))

    for size in (2, 4, 4, 4, 4, 2, 4):
        made = batch(size)
        assert torch.equal(graphed(made).loss, made.images.sum())
    assert given[4] is given[6]
    assert given[5] is not given[4]
    rate[0] = 0.1
    for _ in range(WARMUP + 2):
        graphed(batch(4))
    assert given[-1] is given[-2] is not given[6]


def test_what_a_step_gives_holds_no_autograd_graph(tmp_path: Path) -> None:
    trainer = distiller_of("fitnet", "adaptive", tmp_path, 1)
    trainer.task.train()
    trainer.optimizer.begin_epoch(1)
    output = trainer._step(next(trainer.loader.epoch(1)))
    tensors = [output.loss, output.logits, *output.parts.values(), *output.use[:2], *output.use.events.values()]
    assert not any(tensor.requires_grad for tensor in tensors)


def test_a_graph_is_for_cuda_and_for_fixed_shapes() -> None:
    settings = Runtime(graph=True, precision="bf16")
    assert str(resolve_mode(settings, CPU)) == "bf16, channels_last, dynamic shapes"
    assert (
        str(resolve_mode(settings, torch.device("cuda"))) == "bf16, channels_last, static shapes, graph, look-ahead 8"
    )
    dynamic = nested({"teacher": "resnet8", "student": "resnet8", "runtime.graph": True, "runtime.shapes": "dynamic"})
    with pytest.raises(UsageError, match="runtime: a compiled or captured step needs static shapes"):
        resolve("distill", [ConfigSource("test", dynamic)])


def test_a_capture_on_cuda_is_asked_for_as_torchs_notes_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of the calls; whether they do what they should only a GPU can tell."""
    log: list[str] = []

    class Stream:
        device = CPU

        def __init__(self, name: str) -> None:
            self.name = name

        def wait_stream(self, other: "Stream") -> None:
            log.append(f"{self.name} waits for {other.name}")

    @contextmanager
    def inside(name: str) -> Iterator[None]:
        log.append(f"in {name}")
        yield
        log.append("out")

    main = Stream("main")
    monkeypatch.setattr("torch.cuda.Stream", lambda device: Stream("side"))
    monkeypatch.setattr("torch.cuda.current_stream", lambda device: main)
    monkeypatch.setattr("torch.cuda.stream", lambda stream: inside(stream.name))
    monkeypatch.setattr("torch.cuda.CUDAGraph", lambda: Mock(replay=lambda: log.append("replay")))
    monkeypatch.setattr("torch.cuda.graph", lambda graph, stream: inside(f"a capture on {stream.name}"))
    device, output = Cuda(torch.device("cuda")), StepOutput(torch.ones(()), None, {})

    def step() -> StepOutput:
        log.append("step")
        return output

    assert device.warm_up(step) is output
    assert log == ["side waits for main", "in side", "step", "out", "main waits for side"]
    log.clear()
    assert device.capture(step)() is output
    assert log == ["in a capture on side", "step", "out", "replay"]

    def assert_rejects() -> StepOutput:
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    with pytest.raises(UsageError, match=r"runtime.graph: .* cannot be captured \(operation not permitted when stream"):
        device.capture(assert_rejects)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here: no step is captured in truth")
@pytest.mark.parametrize("method", ["fitnet", "at", "crd"])
def test_on_a_gpu_21_captured_steps_are_the_called_ones(tmp_path: Path, method: str) -> None:
    gpu, states = torch.device("cuda"), []
    for name, graphs in (("called", None), ("graphed", Cuda(gpu))):
        trainer = of_many_steps(method, tmp_path / name, graphs, gpu)
        trainer.fit()
        states.append(trainer._tensors())
    for name, tensor in states[0].items():
        if tensor.is_floating_point():
            torch.testing.assert_close(states[1][name], tensor, rtol=1e-3, atol=1e-5, msg=name)
