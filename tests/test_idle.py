"""Nothing waits and nothing grows: the host reads the device at log points only, and memory stays flat."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest
import torch
from test_engine import SAMPLES, distiller_of
from torch import Tensor

from sakd_cli.bench.steps import count
from sakd_cli.data.loader import TrainLoader
from sakd_cli.engine.trainer import Trainer

READERS = ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__")
PAGE = os.sysconf("SC_PAGE_SIZE")


@contextmanager
def heard() -> Iterator[list[str]]:
    """Names of the methods of a tensor by which the host reads, as they are called."""
    names: list[str] = []

    def noted(name: str) -> object:
        plain = getattr(Tensor, name)

        def read(self: Tensor, *more: object, **arguments: object) -> object:
            names.append(name)
            return plain(self, *more, **arguments)

        return read

    with mock.patch.multiple(Tensor, **{name: noted(name) for name in READERS}):
        yield names


def trainer_of_many_steps(folder: Path, log_every: int, shapes: str = "static") -> Trainer:
    """20 steps in an epoch."""
    trainer = distiller_of("at", "adaptive", folder, 1)
    trainer.task.graft.dynamic_shapes = shapes == "dynamic"
    old = trainer.loader
    trainer.loader = TrainLoader(
        old.views.dataset.train,
        old.views.dataset,
        batch_size=1,
        seed=0,
        noise_width=trainer.task.noise_width,
        device=torch.device("cpu"),
    )
    trainer.log_every = log_every
    return trainer


@pytest.mark.parametrize("points", [2, 5])
def test_the_device_is_read_at_log_points_only(tmp_path: Path, points: int) -> None:
    trainer = trainer_of_many_steps(tmp_path, SAMPLES // points)
    trainer.guard.every_step = False  # as on a GPU
    trainer._train(1)  # what is set up once
    trainer.step = 0
    with heard() as names:
        found = count(lambda: trainer._train(1), [])
    assert names == ["item", "tolist"] * points, (
        "whether all is finite, and the means; the spots wait for the epoch's end"
    )
    assert found.reads == points


def test_an_evaluation_reads_the_device_once(tmp_path: Path) -> None:
    trainer = distiller_of("at", "adaptive", tmp_path, 1)
    assert trainer.output is not None
    with heard() as names:
        trainer._evaluate_epoch(1, trainer.output.evaluation)
    assert names == ["cpu", "tolist"], "one copy to the host, of which the scores and the states are taken"


def resident() -> int:
    """Bytes of main memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


def growth(folder: Path, steps: int) -> int:
    """Bytes by which the process grows from the second tenth of so many steps to the last; its size is printed."""
    trainer = trainer_of_many_steps(folder, 10, "dynamic")
    levels = []
    for _ in range(steps // SAMPLES):
        trainer.step = 0
        trainer._train(1)
        levels.append(resident())
    tenth = max(len(levels) // 10, 1)
    print(
        f"\n{levels[tenth - 1] / 2**20:.1f} MiB after a tenth of {steps} steps, {levels[-1] / 2**20:.1f} MiB at the end"
    )
    return min(levels[-tenth:]) - max(levels[tenth : 2 * tenth])


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the system does not say how large a process is")
@pytest.mark.parametrize("steps", [300, pytest.param(10_000, marks=pytest.mark.battery)])
def test_memory_is_flat(tmp_path: Path, steps: int) -> None:
    grown = growth(tmp_path, steps)
    print(f"{steps} steps: {grown / 2**20:+.2f} MiB")
    assert grown < 4 * 2**20
