"""How fast a network is on a device: latency of one image, throughput of many, what the device's memory saw."""

import statistics
import time
from typing import Any

import torch
from torch import nn

WARM_UP, LEAST = 2, 3  # passes before the clock starts, passes that are timed at least


def speed(network: nn.Module, side: int, device: torch.device, *, batch: int, seconds: float) -> dict[str, Any]:
    """Forward passes in fp32, without gradients, after a warm-up; `seconds` are spent on each of the two.

    latency     milliseconds for one image        median, and the quartiles as low and high
    throughput  images per second in batches      likewise
    memory      bytes that the device's allocator held at most in the second; None on a CPU, which does not say
    """
    single = _times(network, side, device, 1, seconds)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    many = _times(network, side, device, batch, seconds)
    memory = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "threads": torch.get_num_threads(),
        "latency": {"batch": 1, "runs": len(single)} | _spread([1e3 * time for time in single]),
        "throughput": {"batch": batch, "runs": len(many)} | _spread([batch / time for time in many]),
        "memory": memory,
    }


@torch.inference_mode()
def _times(network: nn.Module, side: int, device: torch.device, batch: int, seconds: float) -> list[float]:
    """Seconds per forward pass, repeated until `seconds` are over; the first passes choose kernels and fill caches."""
    images = torch.zeros(batch, 3, side, side, device=device)
    network.eval()
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


def _spread(values: list[float]) -> dict[str, float]:
    low, median, high = statistics.quantiles(values, n=4, method="inclusive") if values[1:] else values * 3
    return {"median": median, "low": low, "high": high}
