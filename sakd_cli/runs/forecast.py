"""What a run will cost: the time of a step from a short measurement, and the bytes that it leaves on the disk"""

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import nn

from sakd_cli.batch import Batch
from sakd_cli.config.effective import steps_of_run
from sakd_cli.config.networks import find_network
from sakd_cli.config.preprocessing import ImageSize, height_width
from sakd_cli.config.routers import AlwaysConfig, RandomConfig, RandomMatchedConfig
from sakd_cli.config.sweep import is_path
from sakd_cli.config.train import Train
from sakd_cli.config.training import DistillConfig, PretrainConfig, RunConfig
from sakd_cli.engine.graphs import WARMUP, Cuda, GraphedStep
from sakd_cli.engine.optim import Optimizer
from sakd_cli.engine.runtime import keep_freed_memory, pick_device, resolve_mode, translate_oom
from sakd_cli.engine.step import TrainStep
from sakd_cli.engine.task import Task
from sakd_cli.errors import UsageError
from sakd_cli.models import artifact
from sakd_cli.models.staged import StagedModel
from sakd_cli.models.table import cost_of, create
from sakd_cli.runs.build import assemble
from sakd_cli.runs.images import load_images
from sakd_cli.runs.locate import weights_at
from sakd_cli.tasks.distill import DistillTask
from sakd_cli.tasks.pretrain import PretrainTask

ENOUGH = 200  # images for a method to draw from
RATE = 1e-9  # learning rate of the timed steps: those of a config would let random weights run away
TRIES = 3  # steps that are timed after those that are not; the fastest counts
CHECKPOINTS = 3  # last, previous, best
SURVEY = 64  # bytes that a distillation keeps of every training image, about


class Workbench:
    """Builds tasks to be thrown away, of networks that are made once and shared."""

    def __init__(self, side: ImageSize = 32, classes: int = 100, images: int = ENOUGH) -> None:
        self.side, self.classes, self.images = side, classes, images
        self._networks: dict[tuple[str, str, str], StagedModel] = {}

    def refusal(self, config: DistillConfig) -> str | None:
        """Why these settings cannot be; None where they can."""
        try:
            self.task(config.model_copy(update={"router": AlwaysConfig(), "device": "cpu"}))
        except UsageError as error:
            return error.message
        return None

    def task(self, config: DistillConfig) -> DistillTask:
        """The task on its device; coins that would match a run's rates are fair ones. UsageError where it cannot be."""
        if isinstance(config.router, RandomMatchedConfig):
            config = config.model_copy(update={"router": RandomConfig()})
        student = self.network("student", config.student, config.device)
        teacher = self.network("teacher", teacher_name(config), config.device)
        labels = torch.arange(self.images) % self.classes
        task = assemble(config, student, teacher.requires_grad_(False).eval(), self.side, labels)
        return task.to(pick_device(config.device)).train()

    def network(self, role: str, name: str, device: str) -> StagedModel:
        """A network with random weights, one for each role."""
        key = role, name, device
        if key not in self._networks:
            self._networks[key] = create(name, self.classes, self.side).to(pick_device(device))
        return self._networks[key]

    def macs(self, name: str) -> int:
        """Multiply-accumulates of a network for one image."""
        return cost_of(name, self.classes, self.side).macs


def teacher_name(config: DistillConfig) -> str:
    """The teacher's network, also where a run or a weights file is named. UsageError where there is none."""
    if config.teacher.weights not in (None, "library") or is_path(config.teacher.source):
        path = weights_at(config.teacher.weights or config.teacher.source, "teacher")
        if path.is_dir() or artifact.is_ours(path):
            return artifact.read_card(path).architecture
    return find_network(config.teacher.source).name


class Forecast(NamedTuple):
    """Steps of a run, seconds of one (`measured`, or in proportion to its work in MACs), bytes of its directory."""

    steps: int
    work: float
    step_seconds: float | None
    measured: bool
    run_bytes: int


def forecast(configs: Mapping[str, RunConfig], seconds: float) -> dict[str, Forecast]:
    """A forecast for each kind of run; after so many seconds no further one is timed, but estimated from the others.

    Only training steps are timed: on images of noise, with networks of random weights. Raises UsageError where a
    method cannot be used for its networks, DataError where the images are missing.
    """
    keep_freed_memory()
    until, benches, seen = time.monotonic() + seconds, dict[str, Workbench](), dict[str, Forecast]()
    for key, config in configs.items():
        about = config.data.model_dump_json()
        if about not in benches:
            images = load_images(config.data.model_copy(update={"download": False}))
            benches[about] = Workbench(images.side, len(images.dataset.classes), len(images.train))
        try:
            seen[key] = _forecast_of(config, benches[about], 0.0 if not seen else until)
        except UsageError as error:
            raise UsageError(f"{key}: {error.message}", error.hint) from None
    timed = [one for one in seen.values() if one.step_seconds is not None]
    rate = sum(one.step_seconds or 0.0 for one in timed) / sum(one.work for one in timed) if timed else None
    if rate is None:
        return seen
    return {key: one if one.measured else one._replace(step_seconds=rate * one.work) for key, one in seen.items()}


def _forecast_of(config: RunConfig, bench: Workbench, until: float) -> Forecast:
    """One kind; it is timed as long as it is not `until` (0: however late it is)."""
    task, network, work = _task(config, bench)
    parameters = sum(p.numel() * p.element_size() for p in network.parameters())
    trained = sum(p.numel() * p.element_size() for group in task.groups() for p in group.parameters)
    rest = [tensor for name, tensor in task.state_dict().items() if not name.startswith("network.")]
    state = parameters + trained + sum(tensor.numel() * tensor.element_size() for tensor in rest)
    survey = SURVEY * bench.images if isinstance(task, DistillTask) else 0
    steps = steps_of_run(config, bench.images)
    found = _timed(config, task, bench, until) if until == 0 or time.monotonic() < until else None
    return Forecast(steps, work, found, found is not None, CHECKPOINTS * state + parameters + survey)


def _task(config: RunConfig, bench: Workbench) -> tuple[Task, nn.Module, float]:
    """The task, what it delivers, and the multiply-accumulates of a step: a pass forward is one, backward two more."""
    size = config.train.batch_size
    if isinstance(config, DistillConfig):
        task = bench.task(config)
        student, teacher = bench.macs(config.student), bench.macs(teacher_name(config))
        learned = 2 * (student + teacher) if task.graft is not None else 0
        return task, task.network, size * (3.0 * student + teacher + learned)
    assert isinstance(config, PretrainConfig)
    network = bench.network("alone", config.model, config.device)
    mode = resolve_mode(config.runtime, pick_device(config.device))
    alone = PretrainTask(mode.to_memory_format(network.train()), lr=RATE, weight_decay=5e-4, mode=mode)
    return alone, network, size * 3.0 * bench.macs(config.model)


def _timed(config: RunConfig, task: Task, bench: Workbench, until: float) -> float:
    """Seconds of a step as a training makes it, replayed where that captures its steps; the device is waited for."""
    device, size = pick_device(config.device), config.train.batch_size
    # The learning rates of the settings would let random weights run away; the arithmetic is the same.
    groups = [group._replace(lr=RATE) for group in task.groups()]
    optimizer, best = Optimizer(groups, Train()), float("inf")
    optimizer.begin_epoch(1)
    step = TrainStep(task, optimizer, None)
    step.guard.every_step = False  # on noise and random weights, numbers that explode are nobody's mistake
    graphed = resolve_mode(config.runtime, device).graphed
    advance = GraphedStep(step, Cuda(device), tuple, lambda reason: None) if graphed else step
    first = WARMUP + 1 if graphed else 1
    x = torch.randn(size, 3, *height_width(bench.side))
    index = torch.arange(size) % bench.images
    noise = torch.rand(size, task.noise_width)
    labels = index % bench.classes
    given = Batch(x.to(device), labels.to(device), index.to(device), noise.to(device))
    with translate_oom(size):
        for attempt in range(first + TRIES):
            begun = time.perf_counter()
            advance(replace(given, held_out=given))  # for a router that learns from such
            if device.type != "cpu":
                torch.accelerator.synchronize()
            best = min(best, time.perf_counter() - begun) if attempt >= first else best
            if attempt >= first and time.monotonic() > until:
                break
    return best
