"""Captured steps: the same numbers as called ones, through the same buffers. Here a capture is played by a stand-in."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from test_engine import CLASSES, DATASET, SAMPLES, SIDE, FileDelivery

from sakd_cli.batch import Batch
from sakd_cli.config.resolve import ConfigSource, nested, resolve
from sakd_cli.config.train import Train
from sakd_cli.config.training import Runtime
from sakd_cli.data.loader import EvalLoader, TrainLoader
from sakd_cli.engine.graphs import WARMUP, Capturer, Cuda, GraphedStep
from sakd_cli.engine.look_ahead import LookAhead
from sakd_cli.engine.optim import Optimizer
from sakd_cli.engine.recorder import SpotRecorder
from sakd_cli.engine.reporter import NullReporter
from sakd_cli.engine.runtime import resolve_mode, set_backends
from sakd_cli.engine.trainer import EvaluationData, Trainer, TrainingOutput
from sakd_cli.errors import UsageError
from sakd_cli.models.table import create
from sakd_cli.rundir import RunDir
from sakd_cli.runs import forecast
from sakd_cli.runs.build import assemble

CPU = torch.device("cpu")
METHODS = "fitnet kd at sp crd nst rkd pkt cc vid dkd dist ls reviewkd ofd simkd ft kdsvd ab fsp dfa"
Call = Callable[[], None]


class StandIn:
    """Captures nothing but the call, with the tensors that it was captured with, as a graph does."""

    def __init__(self) -> None:
        self.warmed = self.captured = self.replayed = 0

    def warm_up(self, call: Call) -> None:
        self.warmed += 1
        call()

    def capture(self, call: Call) -> Call:
        self.captured += 1

        def replay() -> None:
            self.replayed += 1
            call()

        return replay


def of_many_steps(method: str, folder: Path, graphs: Capturer | None, device: torch.device = CPU) -> Trainer:
    """Six whole batches of 3 and one of 2 in each of 3 epochs; the rate falls after the second."""
    settings = {"teacher": "resnet8", "student": "resnet8", "method.name": method, "runtime.shapes": "static"}
    settings |= {"runtime.graph": graphs is not None, "device": str(device)}
    settings |= {"crd": {"method.negatives": 9}, "dfa": {"method.weights": "last"}}.get(method, {})
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
        Optimizer(task.groups(), Train(milestones=(2,))),
        RunDir(folder),
        NullReporter(),
        epochs=3,
        log_every=5,
        output=TrainingOutput(EvaluationData("test", test, test, CLASSES), FileDelivery(task.network)),
        recorder=SpotRecorder([(spot.name, spot.kind) for spot in task.spots], CLASSES, SAMPLES, device),
        graphs=graphs,
    )


def test_replayed_steps_are_the_steps_bit_for_bit(tmp_path: Path) -> None:
    device = StandIn()
    plain, graphed = (
        of_many_steps("crd", tmp_path / name, how) for name, how in (("plain", None), ("graphed", device))
    )
    assert plain.fit()["last"] == graphed.fit()["last"]
    assert (device.captured, device.warmed) == (2, 2 * WARMUP + 3), "one for each learning rate; no size is warm yet"
    assert device.replayed == 3 * 6 - 2 * WARMUP, "the small last batch of an epoch comes once in an epoch"
    for ours, theirs in zip(graphed._tensors().items(), plain._tensors().items(), strict=True):
        assert ours[0] == theirs[0]
        assert torch.equal(ours[1], theirs[1]), ours[0]
    for log in ("metrics.jsonl", "spots.jsonl"):
        assert list(graphed.run.lines(log)) == list(plain.run.lines(log))


def batch_of(size: int) -> Batch:
    return Batch(torch.rand(size, 3, 2, 2), torch.zeros(size), torch.arange(size), torch.rand(size, 0))


def test_every_size_has_a_graph_that_reads_its_own_tensors_and_all_are_made_anew_for_other_rates() -> None:
    device, rate, given = StandIn(), [1.0], []

    def step(batch: Batch) -> None:
        given.append((batch, batch.images.sum()))

    graphed = GraphedStep(step, device, lambda: rate[0], pytest.fail)
    for size in (2, 4, 4, 4, 4, 2, 4, 2, 2, 2):
        made = batch_of(size)
        graphed(made)
        assert torch.equal(given[-1][1], made.images.sum())
    batches = [batch for batch, _ in given]
    assert batches[4] is batches[6], "of 4"
    assert batches[8] is batches[9], "of 2"
    assert device.captured == 2
    rate[0] = 0.1
    for _ in range(WARMUP + 2):
        graphed(batch_of(4))
    assert given[-1][0] is given[-2][0] is not batches[6]


def test_no_graph_is_freed_while_others_are_replayed() -> None:
    """With it torch 2.14 frees what cuBLAS works in, on the stream on which the others were captured as well."""
    device, kinds = StandIn(), range(2, 2 + 2 * 2**4)  # two sizes, and four spots of which any may rest
    graphed = GraphedStep(lambda batch: None, device, tuple, pytest.fail)
    for _ in range(WARMUP + 2):
        for size in kinds:
            graphed(batch_of(size))
    assert (device.captured, device.replayed) == (len(kinds), 2 * len(kinds))


def test_a_step_that_cannot_be_captured_is_called_and_memory_that_is_short_is_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reasons, seen, device = list[str](), list[int](), StandIn()
    graphed = GraphedStep(lambda batch: seen.append(len(batch.labels)), device, tuple, reasons.append)

    def refused(call: Call) -> Call:
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    monkeypatch.setattr(device, "capture", refused)
    for _ in range(WARMUP + 2):
        graphed(batch_of(4))
    assert reasons == ["operation not permitted when stream is capturing"], "once"
    assert seen == [4] * (WARMUP + 2)
    for short in (torch.OutOfMemoryError(), RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling")):
        monkeypatch.setattr(device, "capture", Mock(side_effect=short))
        graphed = GraphedStep(lambda batch: None, device, tuple, pytest.fail)
        for _ in range(WARMUP):
            graphed(batch_of(4))
        with pytest.raises(type(short)):
            graphed(batch_of(4))


def test_a_graph_is_for_cuda_and_for_fixed_shapes() -> None:
    settings = Runtime(precision="bf16")
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
        device, device_index = CPU, 0

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
    begun = lambda **how: log.append(f"begin {how['capture_error_mode']}")  # noqa: E731
    graph = Mock(capture_begin=begun, capture_end=lambda: log.append("end"), replay=lambda: log.append("replay"))
    for name, stand_in in (
        ("CUDAGraph", lambda: graph),
        ("graph_pool_handle", Mock()),
        ("synchronize", Mock()),
        ("empty_cache", Mock()),
    ):
        monkeypatch.setattr(f"torch.cuda.{name}", stand_in)
    device = Cuda(torch.device("cuda"))
    device.warm_up(lambda: log.append("step"))
    assert log == ["side waits for main", "in side", "step", "out", "main waits for side"]
    log.clear()
    device.capture(lambda: log.append("step"))()
    assert log == ["in side", "begin thread_local", "step", "end", "out", "replay"]

    def fails() -> None:
        raise RuntimeError("the step's own error")

    graph.capture_end = Mock(side_effect=RuntimeError("another error, of the capture"))
    graph.reset = lambda: log.append("reset")
    for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
        monkeypatch.setattr(f"torch._C.{name}", lambda index, pool, name=name: log.append(f"{name}({index})"))
    draws = Mock(clone_state=lambda: "as it was", graphsafe_set_state=log.append)
    monkeypatch.setattr("torch.cuda.default_generators", (draws,))
    for call, told in ((fails, "the step's own error"), (lambda: None, "another error")):  # or it ends in an error
        log.clear()
        with pytest.raises(RuntimeError, match=told):
            device.capture(call)
        given_up = ["reset", "_cuda_endAllocateToPool(0)", "_cuda_releasePool(0)", "as it was"]
        assert log == ["in side", "begin thread_local", *given_up]


@pytest.fixture
def exact() -> Iterator[None]:
    """cuDNN chooses the same algorithm every time, and fp32 is fp32."""
    set_backends(Runtime(deterministic=True))
    yield
    set_backends(Runtime())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here: no step is captured in truth")
@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("method", METHODS.split())
def test_on_a_gpu_captured_steps_are_the_called_ones_bit_for_bit(tmp_path: Path, method: str) -> None:
    gpu, states = torch.device("cuda"), []
    for name, graphs in (("called", None), ("graphed", Cuda(gpu))):
        trainer = of_many_steps(method, tmp_path / name, graphs, gpu)
        trainer.fit()
        states.append(trainer._tensors())
    differ = {
        name: float((tensor.double() - states[1][name].double()).abs().max())
        for name, tensor in states[0].items()
        if not torch.equal(tensor, states[1][name])
    }
    assert not differ


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here: no step is captured in truth")
def test_on_a_gpu_a_step_that_reads_back_is_called_and_others_are_captured_behind_it() -> None:
    gpu, reasons, drawn = torch.device("cuda"), list[str](), list[float]()

    def reads(batch: Batch) -> None:
        drawn.append(float(torch.rand(4, device=gpu).sum()))

    total = torch.zeros((), device=gpu)
    for step in (reads, lambda batch: total.add_(torch.rand((), device=gpu))):
        graphed = GraphedStep(step, Cuda(gpu), tuple, reasons.append)
        for _ in range(WARMUP + 3):
            graphed(batch_of(4).map(lambda x: x.to(gpu)))
    assert len(reasons) == 1
    assert len(set(drawn)) == WARMUP + 3
    assert 0 < float(total) < WARMUP + 3


@pytest.mark.parametrize("router", ["adaptive", "meta"])
def test_a_forecast_times_replayed_steps_where_a_training_replays_them(
    monkeypatch: pytest.MonkeyPatch, router: str
) -> None:
    """Called ones take a multiple of the time on a GPU, and so would the hours that a sweep is told to take."""
    device = StandIn()
    monkeypatch.setattr(forecast, "Cuda", lambda where: device)
    monkeypatch.setattr(forecast, "resolve_mode", lambda *given: resolve_mode(*given)._replace(graphed=True))
    words = {"teacher": "resnet8", "student": "resnet8", "method": "fitnet", "data": {"name": "shapes", "train": 60}}
    words |= {"router": router}
    config = resolve("distill", [ConfigSource("test", words | {"runtime": {"shapes": "static"}})]).config
    found = forecast.forecast({"one": config}, 60)["one"]
    assert found.measured
    assert found.step_seconds is not None
    assert found.step_seconds > 0
    assert (device.warmed, device.captured, device.replayed) == (WARMUP, 1, 2), "of the first kind one step is timed"
