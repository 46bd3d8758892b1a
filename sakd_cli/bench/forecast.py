"""What a run will cost: the time of a step from a short measurement, and the bytes that it leaves on the disk"""

import time
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import nn

from sakd_cli.bench.steps import RATE, Setup, batch_of, built, calibrated, optimizer_of
from sakd_cli.config.routers import RandomConfig, RandomMatchedConfig
from sakd_cli.config.run import DistillConfig, PretrainConfig, RunConfig
from sakd_cli.engine.runtime import effective, keep_freed_memory, memory_told
from sakd_cli.engine.task import Task
from sakd_cli.errors import UsageError
from sakd_cli.models.cost import cost
from sakd_cli.models.table import create
from sakd_cli.tasks.build import load_images
from sakd_cli.tasks.distill import DistillTask
from sakd_cli.tasks.pretrain import PretrainTask

TRIES = 3  # steps that are timed after one that is not; the fastest counts
CHECKPOINTS = 3  # last, previous, best
SURVEY = 64  # bytes that a distillation keeps of every training image, about


class Forecast(NamedTuple):
    """Steps of a run, seconds of one (`measured`, or in proportion to its work), bytes of its directory."""

    steps: int
    step_seconds: float | None
    measured: bool
    run_bytes: int


class _Seen(NamedTuple):
    steps: int
    work: float
    seconds: float | None
    run_bytes: int


def forecast(configs: Mapping[str, RunConfig], seconds: float, tell: Callable[[str], None]) -> dict[str, Forecast]:
    """A forecast for each kind of run; after so many seconds no further one is timed, but reckoned from the others.

    Only training steps are timed: on images of noise, with networks of random weights. Raises UsageError where a
    method cannot be used for its networks, DataError where the images are missing.
    """
    keep_freed_memory()
    until, sizes, seen = time.monotonic() + seconds, dict[str, tuple[int, int, int]](), dict[str, _Seen]()
    for key, config in configs.items():
        about = config.data.model_dump_json()
        if about not in sizes:
            images = load_images(config.data)
            sizes[about] = len(images.train), len(images.dataset.classes), images.side
        tell(key)
        try:
            seen[key] = _look(config, *sizes[about], timed=not seen or time.monotonic() < until)
        except UsageError as error:
            raise UsageError(f"{key}: {error.message}", error.hint) from None
    rate = _rate(seen.values())
    return {
        key: Forecast(
            one.steps,
            one.seconds if one.seconds is not None or rate is None else rate * one.work,
            one.seconds is not None,
            one.run_bytes,
        )
        for key, one in seen.items()
    }


def _look(config: RunConfig, images: int, classes: int, side: int, *, timed: bool) -> _Seen:
    task, network, setup, work = _task(config, images, classes, side)
    parameters = sum(p.numel() * p.element_size() for p in network.parameters())
    trained = sum(p.numel() * p.element_size() for group in task.groups() for p in group.parameters)
    rest = [tensor for name, tensor in task.state_dict().items() if not name.startswith("network.")]
    state = parameters + trained + sum(tensor.numel() * tensor.element_size() for tensor in rest)
    survey = SURVEY * images if isinstance(task, DistillTask) else 0
    steps = config.train.epochs * -(-images // config.train.batch_size)
    found = _timed(task, setup) if timed else None
    return _Seen(steps, work, found, CHECKPOINTS * state + parameters + survey)


def _task(config: RunConfig, images: int, classes: int, side: int) -> tuple[Task, nn.Module, Setup, float]:
    """The task, what it delivers, and the multiply-accumulates of a step: a pass forward is one, backward two more."""
    size = config.train.batch_size
    if isinstance(config, DistillConfig):
        router = RandomConfig() if isinstance(config.router, RandomMatchedConfig) else config.router
        config = config.model_copy(update={"router": router})
        setup = Setup(config, side, images, classes)
        task = built(setup)
        student, teacher = (cost(network, side).macs for network in calibrated(setup))
        learned = 2 * (student + teacher) if task.graft is not None else 0
        return task, task.network, setup, size * (3.0 * student + teacher + learned)
    assert isinstance(config, PretrainConfig)
    words = config.model_dump(mode="json", include={"data", "train", "runtime", "device", "seed"})
    setup = Setup(DistillConfig.model_validate(words | {"teacher": config.model, "student": config.model}), side)
    setup = setup._replace(images=images, classes=classes)
    network = create(config.model, classes).to(setup.device)
    mode = effective(config.runtime, setup.device)
    alone = PretrainTask(mode.laid_out(network.train()), lr=RATE, weight_decay=5e-4, mode=mode)
    return alone.to(setup.device), network, setup, size * 3.0 * cost(network, side).macs


def _timed(task: Task, setup: Setup) -> float:
    """Seconds of a step, the device waited for."""
    given = batch_of(setup, task, len(task.spots) if isinstance(task, DistillTask) else 0)
    optimizer, best = optimizer_of(task), float("inf")
    with memory_told(setup.size):
        for attempt in range(1 + TRIES):
            begun = time.perf_counter()
            optimizer.step(task(given).loss)
            if setup.device.type != "cpu":
                torch.accelerator.synchronize()
            best = min(best, time.perf_counter() - begun) if attempt else best
    return best


def _rate(seen: Iterable[_Seen]) -> float | None:
    """Seconds per multiply-accumulate, from those that were timed."""
    timed = [(one.seconds, one.work) for one in seen if one.seconds is not None]
    return sum(s for s, _ in timed) / sum(w for _, w in timed) if timed else None
