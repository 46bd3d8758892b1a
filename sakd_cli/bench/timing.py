"""Reliable timing: variants in turn, ratios within a round, and none reported where they scatter."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

SCATTER = 0.25  # of the median: ratios that scatter more are not reported
BUSY = 1.5  # wall time over CPU time: above it the machine was doing something else


class Ratio(NamedTuple):
    """Median, smallest and largest of `rounds` ratios; `busy`: median of wall time over CPU time."""

    median: float
    low: float
    high: float
    rounds: int
    busy: float

    @property
    def stable(self) -> bool:
        """Whether it may be reported."""
        return (self.high - self.low) <= SCATTER * self.median and self.busy <= BUSY

    def __str__(self) -> str:
        noisy = "" if self.stable else ", too noisy to report"
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f}, n={self.rounds}{noisy})"


class Times(NamedTuple):
    """Seconds per call of every variant and round: CPU time of the process, and wall time.

    waited  the variants wait for a device: wall time counts, and says nothing of the machine's load
    """

    cpu: dict[str, list[float]]
    wall: dict[str, list[float]]
    waited: bool = False

    @property
    def counting(self) -> dict[str, list[float]]:
        """The times that count."""
        return self.wall if self.waited else self.cpu

    def ratio(self, above: str, below: str) -> Ratio:
        """Time of one variant over that of another, round by round."""
        ratios = [a / b for a, b in zip(self.counting[above], self.counting[below], strict=True)]
        pairs = [(w, c) for name in (above, below) for w, c in zip(self.wall[name], self.cpu[name], strict=True)]
        busy = 1.0 if self.waited else statistics.median(w / c for w, c in pairs)
        return Ratio(statistics.median(ratios), min(ratios), max(ratios), len(ratios), busy)

    def milliseconds(self, name: str) -> float:
        """Median time of a call."""
        return 1000 * statistics.median(self.counting[name])


def interleaved(
    variants: Mapping[str, Callable[[], object]], *, rounds: int = 7, warmup: int = 2, waited: bool = False
) -> Times:
    """Call every variant once per round, in reversed order every other round; `warmup` rounds are not counted.

    The machine's other load meets all variants of a round alike. With `waited` a variant waits for its device.
    """
    times = Times({name: [] for name in variants}, {name: [] for name in variants}, waited)
    for turn in range(warmup + rounds):
        for name in list(variants)[:: -1 if turn % 2 else 1]:
            wall, cpu = time.perf_counter(), time.process_time()
            variants[name]()
            spent_cpu, spent_wall = time.process_time() - cpu, time.perf_counter() - wall
            if turn >= warmup:
                times.cpu[name].append(spent_cpu)
                times.wall[name].append(spent_wall)
    return times
