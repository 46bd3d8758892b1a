"""The steps that a bench compares, ready to be called, and what each costs when it is counted instead of timed.

Networks have random weights, and learning rates are near 0.
"""

import importlib
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import swa_utils

from sakd_cli.batch import Batch, Loader
from sakd_cli.bench.literal import PUBLISHED, LiteralRouting
from sakd_cli.config.methods import KDConfig
from sakd_cli.config.networks import find_network
from sakd_cli.config.routers import AdaptiveConfig, AlwaysConfig
from sakd_cli.config.train import Train
from sakd_cli.config.training import DistillConfig
from sakd_cli.data.dataset import Dataset, Split
from sakd_cli.data.loader import TrainLoader
from sakd_cli.distillers.relations import CRD
from sakd_cli.engine.graphs import Cuda, GraphedStep
from sakd_cli.engine.look_ahead import LookAhead
from sakd_cli.engine.optim import Optimizer
from sakd_cli.engine.recorder import SpotRecorder
from sakd_cli.engine.runtime import compile_task, compiled, pick_device, resolve_mode
from sakd_cli.engine.step import TrainStep
from sakd_cli.engine.task import Task
from sakd_cli.errors import UsageError
from sakd_cli.models.cost import Flops
from sakd_cli.models.staged import StagedModel
from sakd_cli.models.table import create
from sakd_cli.runs.build import assemble
from sakd_cli.tasks.distill import DistillTask, PlainPass
from sakd_cli.tasks.pretrain import PretrainTask

# Operations whose result, or its shape, the host must wait for.
READS = {"_local_scalar_dense", "item", "nonzero", "is_nonzero", "masked_select"}
READS |= {"_unique2", "unique_dim", "equal", "bincount"}


class Count(NamedTuple):
    """flops: 2 per multiply-add of products and convolutions; saved_bytes: for the backward pass; reads by the host."""

    flops: int
    saved_bytes: int
    reads: int
    operations: int


def by_mask(name: str, arguments: Sequence[Any]) -> bool:
    """Whether an operation of this name chooses rows by a mask, whose number the host must know."""
    given = arguments[1] if name.startswith("index") and len(arguments) > 1 else ()
    rows = given if isinstance(given, list | tuple) else ()
    return any(isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in rows)


class _Dispatched(Flops):
    reads = operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.reads += by_mask(name, args) or name in READS
        self.operations += 1
        return super().__torch_dispatch__(func, types, args, kwargs)


def count(step: Callable[[], Any], given: Iterable[Tensor]) -> Count:
    """Carry out `step` once and count.

    given  what is there anyway (weights, buffers, images): not counted as saved. Every storage that the step saves for
           its backward pass is counted once, from its first saving to the end of the step, whatever is freed meanwhile.
    """
    # Storages stay alive while counting, so that no address stands for two of them.
    free = {tensor.untyped_storage()._cdata for tensor in given}
    saved: dict[int, Any] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in free:
            saved[storage._cdata] = storage
        return tensor

    dispatched = _Dispatched()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), dispatched:
        step()
    saved_bytes = sum(storage.nbytes() for storage in saved.values())
    return Count(dispatched.total, saved_bytes, dispatched.reads, dispatched.operations)


OURS = "adaptive"  # the step that all others are compared with
PIXELS = 4_200_000  # of the noise that stands for images: 4,096 of 32x32
RATE = 1e-9  # learning rate: the arithmetic of every step is that of the first


class Setup(NamedTuple):
    """What is timed: a distillation, on so many images of `side` pixels and so many classes."""

    config: DistillConfig
    side: int = 32
    images: int = 50_000
    classes: int = 100

    @property
    def size(self) -> int:
        return self.config.train.batch_size

    @property
    def device(self) -> torch.device:
        return pick_device(self.config.device)

    @property
    def settings(self) -> dict[str, Any]:
        """teacher, student, method: names; batch, side, classes: numbers."""
        config, sizes = self.config, {"batch": self.size, "side": self.side, "classes": self.classes}
        return {"teacher": config.teacher.source, "student": config.student, "method": config.method.name} | sizes


class Step(NamedTuple):
    """A step ready to be called, and what one costs when it is counted; none is known of a peer's."""

    name: str
    about: str
    call: Callable[[], object]
    counted: Count | None = None


def half_routed(spots: int, size: int) -> Tensor:
    """Noise that sends half of the samples to the teacher at every spot, and all pairs of ways equally often."""
    ways = torch.tensor(list(itertools.product((0, 1), repeat=2)) * -(-size // 4))[:size]
    gates = torch.stack([ways[:, k % 2] for k in reversed(range(spots))], dim=1).bool()
    both = torch.stack([gates, ~gates], dim=2)
    return torch.where(both, 1 - 1e-6, 1e-6).flatten(1)


def calibrated_networks(setup: Setup) -> tuple[StagedModel, StagedModel]:
    """Student, and teacher in evaluation mode, whose BatchNorms know the images: activations of ordinary size."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        names = setup.config.student, find_network(setup.config.teacher.source).name
        networks = [create(name, setup.classes, setup.side) for name in names]
        images = torch.randn(min(setup.size, 64), 3, setup.side, setup.side)
    for network in networks:
        swa_utils.update_bn([images], network)
        network.to(setup.device)
    return networks[0], networks[1].requires_grad_(False).eval()


def batch_of(setup: Setup, task: Task) -> Batch:
    """One batch; its noise sends half of the samples to the teacher at every spot of a router that learns."""
    draw, size = torch.Generator().manual_seed(1), setup.size
    x = torch.randn(size, 3, setup.side, setup.side, generator=draw)
    if isinstance(task, DistillTask) and task.graft is not None:
        noise = half_routed(len(task.spots), size)
    else:
        noise = torch.rand(size, task.noise_width, generator=draw)
    index = torch.arange(size) % setup.images
    return Batch(x, index % setup.classes, index, noise).map(lambda tensor: tensor.to(setup.device))


def build_task(setup: Setup, **settings: Any) -> DistillTask:
    """The task of a setup with other settings, its policy without weights: the noise alone decides."""
    student, teacher = calibrated_networks(setup)
    train = setup.config.train.model_copy(update={"lr": RATE})
    config = setup.config.model_copy(update={"train": train} | settings)
    labels = torch.arange(setup.images) % setup.classes
    task = assemble(config, student, teacher, setup.side, labels).to(setup.device).train()
    if task.graft is not None:
        for parameter in task.router.parameters():
            nn.init.zeros_(parameter)
    return task


def plain_optimizer(task: Task) -> Optimizer:
    made = Optimizer(task.groups(), Train())
    made.begin_epoch(1)
    return made


def noise_loader(setup: Setup, noise_width: int = 0) -> TrainLoader:
    """The trainer's loader on an epoch of random images, cropped and mirrored; all batches are whole."""
    draw = torch.Generator().manual_seed(2)
    count = setup.size * max(2, min(setup.images, PIXELS // setup.side**2) // setup.size)
    pixels = torch.randint(256, (count, 3, setup.side, setup.side), dtype=torch.uint8, generator=draw)
    split, names = Split(pixels, torch.arange(count) % setup.classes), tuple(map(str, range(setup.classes)))
    data = Dataset("noise", names, (0.5,) * 3, (0.29,) * 3, setup.side // 8, flip=True, train=split, test=split)
    return TrainLoader(split, data, batch_size=setup.size, seed=0, noise_width=noise_width, device=setup.device)


def endless(loader: TrainLoader, epoch: int = 1) -> Iterator[Batch]:
    """The batches of this epoch and of all that follow."""
    return itertools.chain.from_iterable(map(loader.epoch, itertools.count(epoch)))


class NoiseLoader:
    """Epochs of noise without end, every batch with the draws of `given`."""

    def __init__(self, setup: Setup, given: Batch) -> None:
        self.given, self._loader = given, noise_loader(setup)
        self.steps_per_epoch = self._loader.steps_per_epoch

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        batches = endless(self._loader, epoch)
        return (replace(batch, noise=self.given.noise, index=self.given.index) for batch in batches)


def make_step(setup: Setup, name: str, about: str, task: Task) -> Step:
    """The trainer's own step of a task; counted before it is compiled or captured, if it is to be."""
    given, mode = batch_of(setup, task), resolve_mode(setup.config.runtime, setup.device)
    recorder = None
    if isinstance(task, DistillTask):
        names = [(spot.name, spot.kind) for spot in task.spots]
        recorder = SpotRecorder(names, setup.classes, setup.images, setup.device)
    step = TrainStep(task, plain_optimizer(task), recorder)
    step.guard.every_step = False  # as on a GPU: what is counted on a CPU is what a GPU does
    batches: Iterator[Batch] = itertools.repeat(given)

    def call() -> None:
        advance(next(batches))

    advance: Callable[[Batch], None] = step

    there = [given.images, given.labels, given.index, given.noise, *task.state_dict().values()]
    if isinstance(task, DistillTask) and isinstance(task.teacher_features, PlainPass):
        there += task.teacher_features.network.state_dict().values()
    cuda, counts = Cuda(setup.device) if mode.graphed else None, list[Count]()
    counting: Callable[[], None] = lambda: counts.append(count(call, there))  # noqa: E731
    # Where a parameter was first used autograd accumulates its gradients: on the stream that is captured later.
    counting() if cuda is None else cuda.warm_up(counting)
    if mode.compiled:
        compile_task(task, _refused)
    loader: Loader = NoiseLoader(setup, given)
    if isinstance(task, DistillTask) and mode.ahead > 1:
        look = compiled(task.precompute, _refused) if mode.compiled else task.precompute
        loader = LookAhead(loader, look, steps=mode.ahead, device=setup.device)
    batches = loader.epoch(1)
    if cuda is not None:
        advance = GraphedStep(step, cuda, tuple, _refused)
    return Step(name, about, call, counts[0])


def _refused(reason: str) -> None:
    raise UsageError(f"this step cannot be timed as asked for ({reason})", "--set runtime.graph=false, or compile")


def adaptive_task(setup: Setup, **settings: Any) -> DistillTask:
    return build_task(setup, router=AdaptiveConfig(teacher_bias=0.0), **settings)


def adaptive(setup: Setup) -> Step:
    return make_step(setup, OURS, f"{setup.config.method.name}, adaptive router", adaptive_task(setup))


def plain_distillation(setup: Setup) -> Step:
    return make_step(setup, "kd", "kd, every sample", build_task(setup, method=KDConfig(), router=AlwaysConfig()))


def steps(setup: Setup) -> list[Step]:
    """All that are compared, the literal published step last where the method has one."""
    student, _ = calibrated_networks(setup)
    mode = resolve_mode(setup.config.runtime, setup.device)
    everywhere = build_task(setup, router=AlwaysConfig())
    alone = PretrainTask(mode.to_memory_format(student.train()), lr=RATE, weight_decay=5e-4, mode=mode)
    return [
        make_step(setup, "plain", "the student alone", alone),
        plain_distillation(setup),
        make_step(setup, "always", f"{setup.config.method.name}, every sample", everywhere),
        *balanced(setup),
        adaptive(setup),
        *_literal(setup),
    ]


def balanced(setup: Setup) -> list[Step]:
    """Distillation of every sample at the balanced dose; none of a method without a task to be balanced by."""
    if not setup.config.method.ce_weight:
        return []
    method = setup.config.method.model_copy(update={"balance": 1.0})
    task = build_task(setup, router=AlwaysConfig(), method=method)
    return [make_step(setup, "balanced", f"{method.name}, every sample, balanced dose", task)]


def _literal(setup: Setup) -> list[Step]:
    """The published step in fp32; none for methods that it is not written for."""
    runtime = setup.config.runtime.model_copy(update={"precision": "fp32", "channels_last": False, "compile": False})
    task = adaptive_task(setup, runtime=runtime)
    features = task.feature_distiller
    if features is not None and type(features) not in PUBLISHED:
        return []
    assert isinstance(task.teacher_features, PlainPass)
    teacher = task.teacher_features.network
    slow, given = LiteralRouting(task, teacher), batch_of(setup, task)
    contrast = features.draw(given.index, given.labels) if isinstance(features, CRD) else None

    def call() -> None:
        slow.step(given.images, given.labels, given.noise, contrast)

    there = [given.images, given.labels, given.noise, *([] if contrast is None else [contrast])]
    there += [*slow.student.state_dict().values(), *teacher.state_dict().values()]
    there += [*slow.compared.state_dict().values(), *slow.router_parameters]
    return [Step("literal", f"{setup.config.method.name}, as published", call, count(call, there))]


def load_peer_step(path: Path, entry: str, setup: Setup) -> Step:
    """A peer's step, from a local checkout: what its `module:function` makes of some settings, called for each step.

    settings  `Setup.settings` with names as ours, and the device as torch has it
    Raises UsageError where that does not load or does not run.
    """
    if not path.is_dir():
        raise UsageError(f"--peer {path}: no such folder")
    module, colon, function = entry.partition(":")
    if not (module and colon and function):
        raise UsageError(f"--peer-entry {entry}: must be module:function, such as sakd_peer:step")
    settings = setup.settings | {"device": str(setup.device)}
    folder = str(path.resolve())
    sys.path.insert(0, folder)  # it stays there: the peer's code may import more while it runs
    try:
        call = getattr(importlib.import_module(module), function)(settings)
        call()
    except (Exception, SystemExit) as error:  # whatever foreign code may do
        sys.path.remove(folder)
        hint = f"its {function} gets a dict ({', '.join(settings)}) and gives a callable"
        text = f"--peer {path}: {entry} does not load ({type(error).__name__}: {error})"
        raise UsageError(text, hint) from None
    return Step("peer", f"{path.resolve().name}, {entry}", call)
