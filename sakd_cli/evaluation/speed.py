"""How fast a network is on a device: latency of one image, throughput of many, what the device's memory saw."""

import logging
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sakd_cli.config.preprocessing import ImageSize, height_width
from sakd_cli.documents.evaluation import Quartiles, Speed

if TYPE_CHECKING:
    from torch.utils.benchmark import Timer

Network = Callable[[Tensor], Tensor]  # in evaluation mode
LEAST = 5  # turns at least, of one timing or more; each is of so many passes that the clock's own time does not count
SETTLED = 0.1  # interquartile range over the median up to which a measurement is settled


def speed(network: Network, side: ImageSize, device: torch.device, *, batch: int, seconds: float) -> Speed:
    """Latency of one image and throughput of batches in fp32, about `seconds` spent on each; no memory on a CPU.

    Timed by torch.utils.benchmark with the threads that this process has; longer, up to four times, where timings
    differ. What other programs take of the machine's cores meanwhile is measured too.
    """
    before = _cores_used()
    single, batches = _timer(network, side, device, 1), _timer(network, side, device, batch)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    one, many = list[float](), list[float]()
    turns, began = 0, time.perf_counter()
    # In turns, so that what goes on meanwhile meets both, and is seen in both.
    while turns < LEAST or time.perf_counter() - began < (2 if _settled(one) and _settled(many) else 8) * seconds:
        for timer, times in ((single, one), (batches, many)):
            times += timer.blocked_autorange(min_run_time=seconds / LEAST).times
        turns += 1
    after = _cores_used()
    memory = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return Speed(
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        threads=torch.get_num_threads(),
        latency=_quartiles(1, [1e3 * seconds for seconds in one]),
        throughput=_quartiles(batch, [batch / seconds for seconds in many]),
        memory=memory,
        busy=None if before is None or after is None else _others(before, after),
        cores=os.cpu_count(),
    )


def _timer(network: Network, side: ImageSize, device: torch.device, batch: int) -> "Timer":
    """Times forward passes; the first ones, which choose kernels and fill caches, are done."""
    images = torch.zeros(batch, 3, *height_width(side), device=device)

    @torch.inference_mode()
    def run() -> None:
        network(images)
        if device.type == "mps":
            torch.accelerator.synchronize(device)

    # What its import says of a compiler without a GPU is no news here.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    from torch.utils.benchmark import Timer

    run()
    return Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())


def _settled(times: list[float]) -> bool:
    low, median, high = statistics.quantiles(times, n=4, method="inclusive")
    return high - low <= SETTLED * median


def _quartiles(batch: int, values: list[float]) -> Quartiles:
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Quartiles(batch=batch, runs=len(values), median=median, low=low, high=high)


def _cores_used() -> tuple[float, float, float] | None:
    """The time, and the seconds that all cores and that this process were busy since they began; None but on Linux."""
    try:
        ticks = [int(value) for value in Path("/proc/stat").read_text().partition("\n")[0].split()[1:9]]
    except (OSError, ValueError):
        return None
    idle = ticks[3] + ticks[4]  # idle, and waiting for a disk
    return time.perf_counter(), (sum(ticks) - idle) / os.sysconf("SC_CLK_TCK"), time.process_time()


def _others(before: tuple[float, float, float], after: tuple[float, float, float]) -> float:
    """How many cores other programs used in between."""
    wall, everyone, own = (b - a for a, b in zip(before, after, strict=True))
    return max(0.0, (everyone - own) / max(wall, 1e-3))
