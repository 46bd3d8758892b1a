"""Where the time of a step goes: teacher pass, student forward, routed pass, losses, backward, update, data."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from sakd_cli.bench.steps import Setup, adaptive_task, optimizer_of
from sakd_cli.data.dataset import Dataset, Split
from sakd_cli.data.loader import TrainLoader

PHASES = ("teacher pass", "student forward", "routed pass", "losses", "backward", "update", "data")
LOADED = 5_000  # images that batches are drawn from: more would not make a batch dearer


class Stopwatch:
    """Seconds per phase: of the process on a CPU, on the wall of a device that is waited for."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds = dict.fromkeys(PHASES, 0.0)

    def now(self) -> float:
        """The time, when all that was asked of the device is done."""
        if self.device.type != "cuda":
            return time.process_time()
        torch.cuda.synchronize(self.device)
        return time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time what runs inside; as a decorator, every call of a function."""
        begin = self.now()
        try:
            yield
        finally:
            self.seconds[name] += self.now() - begin


def phases(setup: Setup, *, rounds: int, warmup: int) -> dict[str, float]:
    """Seconds of a step per phase, mean of `rounds`; the step is that of `adaptive`, eager."""
    task, watch = adaptive_task(setup), Stopwatch(setup.device)
    loader = _loader(setup, task.noise_width)
    optimizer = optimizer_of(task)
    task.teacher_features = watch.phase("teacher pass")(task.teacher_features)
    task.student_features = watch.phase("student forward")(task.student_features)
    assert task.graft is not None
    task.graft.forward = watch.phase("routed pass")(task.graft.forward)  # type: ignore[method-assign]
    for turn in range(warmup + rounds):
        if turn == warmup:
            watch.seconds = dict.fromkeys(PHASES, 0.0)
        begin = watch.now()
        batch = next(loader)
        ready = watch.now()
        inside = sum(watch.seconds.values())
        loss = task(batch).loss
        done = watch.now()
        stamps: list[float] = []

        def look(gradients: list[torch.Tensor], stamps: list[float] = stamps) -> torch.Tensor:
            stamps.append(watch.now())
            return torch.zeros((), device=setup.device)

        optimizer.step(loss, look)
        end = watch.now()
        inside = sum(watch.seconds.values()) - inside
        spent = {"data": ready - begin, "losses": done - ready - inside, "backward": stamps[0] - done}
        for phase, seconds in (spent | {"update": end - stamps[0]}).items():
            watch.seconds[phase] += seconds
    return {phase: seconds / rounds for phase, seconds in watch.seconds.items()}


def _loader(setup: Setup, width: int) -> Any:
    """Endless batches of random images, cropped and mirrored as CIFAR's; `index` stays within the setup's images."""
    count = max(setup.size, min(LOADED, setup.images))
    draw = torch.Generator().manual_seed(2)
    images = torch.randint(256, (count, 3, setup.side, setup.side), generator=draw, dtype=torch.uint8)
    split = Split(images, torch.arange(count) % setup.classes)
    names = tuple(map(str, range(setup.classes)))
    dataset = Dataset("noise", names, (0.5,) * 3, (0.25,) * 3, padding=4, flip=True, train=split, test=split)
    batches = TrainLoader(split, dataset, batch_size=setup.size, seed=0, noise_width=width, device=setup.device)
    number = 0
    while True:
        number += 1
        yield from (batch for batch in batches.epoch(number) if len(batch.labels) == setup.size)
