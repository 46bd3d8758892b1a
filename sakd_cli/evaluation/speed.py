"""How fast a network is on a device: latency of one image, throughput of many, what the device's memory saw."""

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from sakd_cli.config.preprocessing import ImageSize, height_width
from sakd_cli.documents.evaluation import Quartiles, Speed

Network = Callable[[Tensor], Tensor]  # in evaluation mode
WARM_UP, LEAST = 2, 3  # passes before the clock starts, passes that are timed at least


def speed(network: Network, side: ImageSize, device: torch.device, *, batch: int, seconds: float) -> Speed:
    """Latency of one image and throughput of batches in fp32, `seconds` spent on each; no memory on a CPU."""
    single = _times(network, side, device, 1, seconds)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    many = _times(network, side, device, batch, seconds)
    memory = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return Speed(
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        threads=torch.get_num_threads(),
        latency=_quartiles(1, [1e3 * seconds for seconds in single]),
        throughput=_quartiles(batch, [batch / seconds for seconds in many]),
        memory=memory,
    )


@torch.inference_mode()
def _times(network: Network, side: ImageSize, device: torch.device, batch: int, seconds: float) -> list[float]:
    """Seconds per forward pass, repeated until `seconds` are over; the first passes choose kernels and fill caches."""
    images = torch.zeros(batch, 3, *height_width(side), device=device)
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < WARM_UP + LEAST or time.perf_counter() - began < seconds:
        start = time.perf_counter()
        network(images)
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        times.append(time.perf_counter() - start)
        if len(times) == WARM_UP:
            began = time.perf_counter()
    return times[WARM_UP:]


def _quartiles(batch: int, values: list[float]) -> Quartiles:
    low, median, high = statistics.quantiles(values, n=4, method="inclusive") if values[1:] else values * 3
    return Quartiles(batch=batch, runs=len(values), median=median, low=low, high=high)
