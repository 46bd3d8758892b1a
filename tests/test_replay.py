"""Training as CUDA graphs would do it, on a CPU (`emulator.py`): recorded and replayed steps are the called ones."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from emulator import Called, Emulator
from launches import leaves
from test_ahead import Halt
from test_engine import CLASSES, DATASET, SAMPLES, SIDE
from test_idle import heard
from test_imagefolder import FEEDS, loaded
from test_imagefolder import folder as pictures
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sakd_cli.batch import Loader
from sakd_cli.bench.steps import count
from sakd_cli.config.methods import METHODS, DFAConfig
from sakd_cli.config.resolve import ConfigSource, nested, resolve
from sakd_cli.config.routers import ROUTERS
from sakd_cli.config.train import Train
from sakd_cli.config.training import FriendlyConfig, ResidualConfig
from sakd_cli.data.dataset import Dataset, Split
from sakd_cli.data.loader import EvalLoader, HeldOutLoader, TrainLoader
from sakd_cli.distillers import table as distillers
from sakd_cli.distillers.dfa import mixable_blocks
from sakd_cli.engine import checkpoint
from sakd_cli.engine.evaluate import evaluate
from sakd_cli.engine.graphs import Capturer
from sakd_cli.engine.look_ahead import LookAhead
from sakd_cli.engine.optim import Optimizer
from sakd_cli.engine.recorder import SpotRecorder
from sakd_cli.engine.reporter import NullReporter
from sakd_cli.engine.runtime import Mode
from sakd_cli.engine.task import Task
from sakd_cli.engine.trainer import Trainer
from sakd_cli.errors import Stopped
from sakd_cli.models.branches import Branches
from sakd_cli.models.staged import StagedModel
from sakd_cli.models.table import create
from sakd_cli.rundir import RunDir
from sakd_cli.runs.build import assemble
from sakd_cli.tasks.distill import DistillTask, PlainPass
from sakd_cli.tasks.pretrain import PretrainTask, SftnTask, WarmupTask
from sakd_cli.tasks.residual import ResidualTask
from sakd_cli.tasks.search import SearchTask, Sought, batches

CPU = torch.device("cpu")
EPOCHS, SIZE = 2, 6  # of 20 images: three whole batches and one of 2; the rate falls after the first epoch
RECIPE: Any = {"lr": 0.01, "weight_decay": 1e-4, "mode": Mode(autocast_dtype=torch.bfloat16)}
SETTINGS: dict[str, dict[str, Any]] = {
    "crd": {"method.negatives": 9},
    "fitnet+crd": {"method.crd.negatives": 9, "method.weight_warmup": 2},
    "fitnet+rkd": {"method.balance": 1.0, "method.weight_warmup": 2},
    "dfa": {"method.weights": "uniform"},
    "kdsvd": {"method.extra": 0},  # one decomposition of many launches for each map
    "simkd": {"method.ce_weight": 1.0},
    "fixed": {"router.weights": [[0.3], [0.7]]},
}


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fused updates, one step in front of a capture, and a record of rates for who asks for one."""
    monkeypatch.setattr("sakd_cli.engine.optim.updates_on_device", lambda parameter: True)
    monkeypatch.setattr("sakd_cli.engine.graphs.WARMUP", 1)
    rates = lambda config, spots: torch.linspace(0.2, 0.8, EPOCHS * spots).view(EPOCHS, spots)  # noqa: E731
    monkeypatch.setattr(
        "sakd_cli.runs.build._matched_rates", lambda c, n: rates(c, n) if c.router.name == "random-matched" else None
    )


def task_of(method: str, router: str, precision: str = "fp32") -> DistillTask:
    words = {"teacher": "resnet8", "student": "resnet8", "method.name": method, "router.name": router}
    words |= {"runtime.shapes": "static", "runtime.precision": precision, "train.epochs": EPOCHS}
    words |= SETTINGS.get(method, {}) | SETTINGS.get(router, {})
    torch.manual_seed(42)
    student, teacher = (create("resnet8", CLASSES) for _ in range(2))
    config = resolve("distill", [ConfigSource("test", nested(words))]).config
    return assemble(config, student, teacher.requires_grad_(False).eval(), SIDE, DATASET.train.labels)


def trainer_of(task: Task, folder: Path, graphs: Capturer | None, size: int = SIZE, **parts: Any) -> Trainer:
    folder.mkdir(exist_ok=True)
    if isinstance(task, SearchTask):
        settings = task.settings
        half = partial(LookAhead, forward=task.precompute, steps=2, device=CPU)
        loader: Loader = batches(settings, DATASET, DATASET.train, batch_size=4, seed=3, device=CPU, wrap=half)
        optimizer: Any = task.optimizer(momentum=0.9)
    else:
        loader = TrainLoader(DATASET.train, DATASET, batch_size=size, seed=3, noise_width=task.noise_width, device=CPU)
        optimizer = Optimizer(task.groups(), Train(milestones=(1,)))
        if isinstance(task, DistillTask) and task.router.meta:
            other = TrainLoader(DATASET.test, DATASET, batch_size=4, seed=4, noise_width=0, device=CPU)
            loader = HeldOutLoader(loader, other)
        if hasattr(task, "precompute"):
            loader = LookAhead(loader, task.precompute, steps=2, device=CPU)
    if isinstance(task, DistillTask):
        names = [(spot.name, spot.kind) for member in task.members for spot in member.spots]
        parts["recorder"] = SpotRecorder(names, CLASSES, SAMPLES, CPU)
    parts = {"reporter": NullReporter(), "epochs": EPOCHS, "log_every": 5} | parts
    trainer = Trainer(task, loader, optimizer, RunDir(folder), graphs=graphs, **parts)
    trainer.guard.every_step = False
    return trainer


def memory(trainer: Trainer) -> dict[str, Tensor]:
    """All that training changes."""
    return trainer._tensors() | {"found": trainer.guard.found, "steps": trainer.guard._steps}


def differing(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> list[str]:
    assert ours.keys() == theirs.keys()
    return [name for name in ours if not torch.equal(ours[name], theirs[name])]


def trained(task: Task, folder: Path, graphs: Capturer, size: int) -> tuple[Trainer, list[str]]:
    """After some epochs; and the names by which the host read the device in their steps."""
    trainer, read = trainer_of(task, folder, graphs, size), list[str]()
    for epoch in range(1, EPOCHS + 1):
        with heard() as names:
            trainer._train(epoch)
        read += names
        if trainer.recorder is not None:
            trainer.recorder.close_epoch(epoch)
    return trainer, read


def assert_equal_when_replayed(make: Callable[[], Task], folder: Path, size: int = SIZE) -> tuple[Emulator, list[str]]:
    """And nothing in a step would be wrong on a GPU."""
    device = Emulator()
    called, _ = trained(make(), folder / "called", Called(), size)
    recorded, read = trained(make(), folder / "recorded", device, size)
    assert not differing(memory(recorded), memory(called))
    assert list(recorded.run.lines("metrics.jsonl")) == list(called.run.lines("metrics.jsonl"))
    assert not [fault for tape in device.tapes for fault in tape.faults]
    return device, read


@pytest.mark.parametrize("method", [*METHODS, "fitnet+crd", "fitnet+rkd", "at+dkd"])
def test_every_method(method: str, tmp_path: Path) -> None:
    """Over the end of an epoch, a short batch and another learning rate."""
    device, read = assert_equal_when_replayed(partial(task_of, method, "adaptive"), tmp_path)
    assert (len(device.tapes), device.replays) == (2, 4), "of 8 steps; a whole and a short batch are called before"
    assert read == ["item", "tolist"] * 3, "at log points alone: whether all is finite, and the means"


PAIRS = [(method, router) for method in METHODS for router in sorted(ROUTERS.keys() - {"adaptive"})]


@pytest.mark.parametrize(("method", "router"), [pair for pair in PAIRS if pair != ("crd", "meta")])  # is refused
def test_every_method_under_every_other_router(method: str, router: str, tmp_path: Path) -> None:
    """Two whole batches an epoch; the rate falls after the first, and some routers do otherwise then."""
    device, read = assert_equal_when_replayed(partial(task_of, method, router), tmp_path, size=10)
    assert device.tapes
    assert device.replays == (0 if router == "scheduled" else 2), "a spot that rests is no part of a graph"
    assert read == ["item", "tolist"] * 2


def test_a_hint_that_starts_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its adapter has no gradient before, and no momentum then, unlike the others' parameters."""
    monkeypatch.setitem(SETTINGS, "scheduled", {"router.start": [0.5, 0.0], "router.stop": [1.0]})
    device, _ = assert_equal_when_replayed(partial(task_of, "fitnet", "scheduled"), tmp_path)
    assert len(device.tapes) == 2


@pytest.mark.parametrize("method", ["fitnet", "kdsvd", "crd", "simkd"])
def test_steps_in_bf16(method: str, tmp_path: Path) -> None:
    """As on a GPU by default: weights are converted within the step."""
    device, _ = assert_equal_when_replayed(partial(task_of, method, "adaptive", "bf16"), tmp_path)
    assert device.replays >= 2


def networks(*names: str) -> list[StagedModel]:
    torch.manual_seed(42)
    return [create(name, CLASSES, SIDE) for name in names]


def warmup(method: str) -> Task:
    task = task_of(method, "always")
    assert isinstance(task.teacher_features, PlainPass)
    teacher, warmup = task.teacher_features.network, task.distillers.warmup
    return WarmupTask(task.network, teacher, warmup, **RECIPE)


def search(*, second_order: bool) -> Task:
    student, teacher = networks("resnet8", "resnet14")
    settings = DFAConfig(search_epochs=EPOCHS, second_order=second_order)
    method = distillers.build(settings, student, teacher.requires_grad_(False).eval(), SIDE)
    sought = [Sought(k, method.spots[k], mixable_blocks(teacher, method.spots[k].teacher)) for k in range(2)]
    students = networks("resnet8", "resnet8")
    return SearchTask(
        students, partial(teacher.features, want="blocks"), sought, settings, lambda *found: None, RECIPE["mode"]
    )


def friendly() -> Task:
    (network,) = networks("resnet8")
    branches = Branches(network, ["resnet8"], SIDE, share=False)
    return SftnTask(network, branches, FriendlyConfig(students=("resnet8",)), **RECIPE)


def residual() -> Task:
    network, teacher, base = networks("resnet8", "resnet8", "resnet8")
    frozen = (other.requires_grad_(False).eval().forward for other in (teacher, base))
    return ResidualTask(network, *frozen, ResidualConfig(), **RECIPE)


OTHERS: dict[str, Callable[[], Task]] = {
    "pretrain": lambda: PretrainTask(*networks("resnet8"), **RECIPE),
    "student-friendly": friendly,
    "residual": residual,
    **{f"warm-up of {method}": partial(warmup, method) for method in ("ft", "ab", "fsp")},
    "search": partial(search, second_order=False),
    "search, second order": partial(search, second_order=True),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_trained_before_and_beside_a_distillation(name: str, tmp_path: Path) -> None:
    device, _ = assert_equal_when_replayed(OTHERS[name], tmp_path)
    assert len(device.tapes) == (4 if "search" in name else 2), "two batch sizes, at each level"
    assert device.replays >= 2


@pytest.mark.parametrize(
    ("method", "router"),
    [
        ("crd", "adaptive"),
        ("dfa", "random-matched"),
        ("kd", "scheduled"),
        ("at", "meta"),
        ("fitnet+crd", "adaptive"),
        ("fitnet+rkd", "gradient-agreement"),
    ],
)
def test_a_stopped_run_goes_on_with_a_graph_of_its_own(method: str, router: str, tmp_path: Path) -> None:
    make, names = partial(task_of, method, router), ("whole", "halted")
    whole, halted = (trainer_of(make(), tmp_path / name, Emulator()) for name in names)
    whole.fit()
    halted.reporter = Halt(5)
    with pytest.raises(Stopped):
        halted.fit()
    device = Emulator()
    again = trainer_of(make(), tmp_path / "halted", device)
    again.resume(checkpoint.read(tmp_path / "halted" / "checkpoints" / "last"))
    again.fit()
    assert (again.step, len(device.tapes)) == (2 * 4, 1), "whole batches: a called one, a recorded one"
    assert not differing(memory(again), memory(whole))
    assert list(again.run.lines("metrics.jsonl")) == list(whole.run.lines("metrics.jsonl"))


class Beside(TorchDispatchMode):
    """In the place of `Fork`: notes what was made in this step outside of it, is read inside, and was not named."""

    def __init__(self, task: DistillTask) -> None:
        super().__init__()
        kept = [*task.parameters(), *task.buffers(), *task._converted._converted]
        self.kept, self.named = {x.untyped_storage().data_ptr() for x in kept}, set[int]()
        self.made, self.inside, self.unnamed = list[Tensor](), False, list[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = func(*args, **(kwargs or {}))
        if not self.inside:
            self.made += [x for x in leaves(given) if isinstance(x, Tensor)]
            return given
        outside = {x.untyped_storage().data_ptr() for x in self.made} - self.kept - self.named
        read = [x for x in leaves(args, kwargs or {}) if isinstance(x, Tensor) and x.numel()]
        self.unnamed += [f"{func}, {tuple(x.shape)}" for x in read if x.untyped_storage().data_ptr() in outside]
        return given

    @contextmanager
    def beside(self, shared: Sequence[Tensor]) -> Iterator[None]:
        self.named, self.inside = {x.untyped_storage().data_ptr() for x in shared}, True
        yield
        self.inside = False

    def join(self, results: Iterable[Tensor]) -> None:
        return


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["adaptive", "soft", "meta", "residual"])
def test_what_a_second_stream_reads_is_named_to_it(kind: str, precision: str, tmp_path: Path) -> None:
    """Else its memory is given to the first one again, in the backward pass, before it has been read."""
    task = task_of("fitnet", "adaptive" if kind == "residual" else kind, precision)
    if kind == "residual":
        task.offset = lambda images: images.flatten(1)[:, :CLASSES] * 2
    batch = next(trainer_of(task, tmp_path, None).loader.epoch(1))
    task(batch)  # what is made once is there
    task._fork = fork = Beside(task)  # type: ignore[assignment]
    with fork:
        task(batch)
    assert fork.named
    assert not fork.unnamed


def test_an_evaluation_is_read_once() -> None:
    test = EvalLoader(DATASET.test, DATASET, device=CPU, batch_size=5)
    with heard() as names:
        found = count(lambda: evaluate(networks("resnet8")[0], test, CLASSES), [])
    assert names == ["cpu", "tolist"], "what is listed lies in main memory then"
    assert found.reads == 0


class Copies(TorchDispatchMode):
    """Notes operations that take a tensor of the CPU to another device, and whether the host would wait for them."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = func(*args, **(kwargs or {}))
        of, to = ({x.device.type for x in leaves(side) if isinstance(x, Tensor)} for side in (args, given))
        if "cpu" in of and "meta" in to:
            self.seen.append("asynchronous" if (kwargs or {}).get("non_blocking") else "pageable")
        return given


def copies_of(split: Split, dataset: Dataset) -> tuple[list[str], list[str]]:
    """For the first of some batches, and for two more. Another device is played by `meta`, which has no numbers."""
    loader = TrainLoader(split, dataset, batch_size=SIZE, seed=3, noise_width=2, device=torch.device("meta"))
    epoch = loader.epoch(1)
    with Copies() as at_its_begin:
        next(epoch)
    with Copies() as later:
        for _ in range(2):
            next(epoch)
    return at_its_begin.seen, later.seen


def test_images_in_memory_are_copied_to_the_device_at_an_epochs_begin_only() -> None:
    first, later = copies_of(DATASET.train, DATASET)
    assert first
    assert not later


@pytest.mark.parametrize("feed", FEEDS)
def test_of_images_in_files_their_pixels_alone_are_copied_in_a_step_and_nobody_waits(feed: str, tmp_path: Path) -> None:
    images = loaded(pictures(tmp_path, {"": 10}), split=0.2, **FEEDS[feed])
    _, later = copies_of(images.train, images.dataset)
    assert later == (["asynchronous"] * 2 if "files" in feed else [])


def wrong_on_a_gpu(x: Tensor) -> None:
    positive = x[x > 0]
    pooled = nn.functional.adaptive_avg_pool2d(x, 3)
    (pooled.sum() + positive.sum()).backward()
    x.new_tensor([1.0])
    torch.zeros(2)


def test_the_tape_names_what_would_be_wrong_on_a_gpu() -> None:
    device = Emulator()
    x = torch.randn(1, 1, 4, 4, requires_grad=True)
    device.capture(lambda: wrong_on_a_gpu(x))
    assert {fault.partition(",")[0] for fault in device.tapes[0].faults} == {
        "the host waits: index",
        "the host waits: index_put",
        "not deterministic: _adaptive_avg_pool2d_backward",
        "made on the CPU: lift_fresh",
        "made on the CPU: zeros",
    }


def test_a_number_of_the_host_that_changes_is_no_graph() -> None:
    """As a learning rate that Python hands over: the replay does not know it."""
    device, rate, x = Emulator(), [1.0], torch.ones(2)
    replay = device.capture(lambda: x.add_(rate[0]))
    rate[0] = 5.0
    replay()
    replay()
    assert x.tolist() == [3.0, 3.0]
