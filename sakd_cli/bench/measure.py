"""One measurement: every step counted and timed in turn, where the time of ours goes, the machine it was done on.

Variants are timed in turn, ratios are taken within a round, and none is reported where they scatter.
"""

import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from sakd_cli.bench.steps import OURS, Setup, Step, adaptive_task, endless, noise_loader, plain_optimizer, steps
from sakd_cli.documents import bench as doc
from sakd_cli.engine.runtime import environment, resolve_mode
from sakd_cli.errors import UsageError
from sakd_cli.files import read_document

FLAGS = ("avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16", "sve")
SLOWER = 0.85  # of the earlier ratio: below it in two results in a row is a regression
MACHINE = ("cpu", "cpu_flags", "cores", "device", "chip", "threads", "torch", "mode")
COUNTED = ("gflop", "synchronisations", "saved_bytes")
SCATTER = 0.25  # of the median: ratios that scatter more are not reported
BUSY = 1.5  # wall time over CPU time: above it the machine was doing something else
WARMUP = 2  # rounds that are not counted
STEPS_OF_A_ROUND = 200  # on a GPU, which is waited for at a round's end only
PHASES = ("teacher pass", "student forward", "routed pass", "losses", "backward", "update", "data")


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


def phases(setup: Setup, rounds: int) -> dict[str, float]:
    """Seconds of a step per phase, mean of `rounds`; the step is that of `adaptive`, eager."""
    task, watch = adaptive_task(setup), Stopwatch(setup.device)
    batches = endless(noise_loader(setup, task.noise_width))
    optimizer = plain_optimizer(task)
    task.teacher_features = watch.phase("teacher pass")(task.teacher_features)
    task.student_features = watch.phase("student forward")(task.student_features)
    assert task.graft is not None
    task.graft.forward = watch.phase("routed pass")(task.graft.forward)  # type: ignore[method-assign]
    for turn in range(WARMUP + rounds):
        if turn == WARMUP:
            watch.seconds = dict.fromkeys(PHASES, 0.0)
        begin = watch.now()
        batch = next(batches)
        batch = replace(batch, index=batch.index % setup.images)
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


class Times(NamedTuple):
    """Seconds per call of every variant and round: CPU time of the process, and wall time.

    waited  the variants wait for a device: wall time counts, and says nothing of the machine's load
    """

    cpu: dict[str, list[float]]
    wall: dict[str, list[float]]
    waited: bool = False

    @property
    def counting(self) -> dict[str, list[float]]:
        return self.wall if self.waited else self.cpu

    def ratio(self, above: str, below: str) -> doc.TimedRatio:
        """Time of one variant over that of another, round by round; `stable`: it may be reported."""
        ratios = [a / b for a, b in zip(self.counting[above], self.counting[below], strict=True)]
        pairs = [(w, c) for name in (above, below) for w, c in zip(self.wall[name], self.cpu[name], strict=True)]
        busy = 1.0 if self.waited else statistics.median(w / c for w, c in pairs)
        median, low, high = statistics.median(ratios), min(ratios), max(ratios)
        found = {"median": median, "low": low, "high": high, "busy": busy}
        stable = high - low <= SCATTER * median and busy <= BUSY
        return doc.TimedRatio(above=above, below=below, rounds=len(ratios), stable=stable, **found)

    def milliseconds(self, name: str) -> float:
        """Median time of a call."""
        return 1000 * statistics.median(self.counting[name])


def interleaved(variants: Mapping[str, Callable[[], object]], rounds: int = 7, *, waited: bool = False) -> Times:
    """Call every variant once per round, in reversed order every other round; `WARMUP` rounds are not counted.

    The machine's other load meets all variants of a round alike. With `waited` a variant waits for its device.
    """
    times = Times({name: [] for name in variants}, {name: [] for name in variants}, waited)
    for turn in range(WARMUP + rounds):
        for name in list(variants)[:: -1 if turn % 2 else 1]:
            wall, cpu = time.perf_counter(), time.process_time()
            variants[name]()
            spent_cpu, spent_wall = time.process_time() - cpu, time.perf_counter() - wall
            if turn >= WARMUP:
                times.cpu[name].append(spent_cpu)
                times.wall[name].append(spent_wall)
    return times


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread, so that CPU time is work done."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def measured(setup: Setup, rounds: int, peers: list[Step], say: Callable[[str], None]) -> doc.Bench:
    """Ratios are of every step over ours (`adaptive`), so that more is better for us."""
    begin = time.perf_counter()
    say("building and counting the steps")
    compared = [*steps(setup), *peers]
    first = time.perf_counter() - begin
    say(f"{WARMUP} + {rounds} rounds of {', '.join(step.name for step in compared)}")
    times, peaks = timed(setup, compared, rounds)
    ratios = [times.ratio(step.name, OURS) for step in compared if step.name != OURS]
    spent = phases(setup, rounds)
    total = sum(spent.values())
    return doc.Bench(
        environment=machine(setup),
        setup=bench_setup(setup, rounds),
        steps=[_step(setup, step, times, peaks) for step in compared],
        ratios=ratios,
        reported=reported(ratios),
        phases=[doc.PhaseTime(name=name, ms=1000 * s, fraction=s / total) for name, s in spent.items()],
        seconds_to_first_step=first,
    )


def bench_setup(setup: Setup, rounds: int) -> doc.BenchSetup:
    return doc.BenchSetup(**setup.settings, images=setup.images, rounds=rounds, warmup=WARMUP)


def timed(setup: Setup, compared: list[Step], rounds: int) -> tuple[Times, dict[str, int]]:
    """Times per step, and on a GPU the most memory that each took."""
    gpu, peaks = setup.device.type == "cuda", dict[str, int]()
    if not gpu:
        return interleaved({step.name: step.call for step in compared}, rounds), peaks

    def rounds_of(step: Step) -> Callable[[], None]:
        def several() -> None:
            torch.cuda.reset_peak_memory_stats(setup.device)
            for _ in range(STEPS_OF_A_ROUND):
                step.call()
            torch.cuda.synchronize(setup.device)
            peaks[step.name] = torch.cuda.max_memory_allocated(setup.device)

        return several

    found = interleaved({step.name: rounds_of(step) for step in compared}, rounds, waited=True)
    cpu, wall = ({n: [t / STEPS_OF_A_ROUND for t in of] for n, of in one.items()} for one in (found.cpu, found.wall))
    return Times(cpu, wall, waited=True), peaks


def _step(setup: Setup, step: Step, times: Times, peaks: dict[str, int]) -> doc.TimedStep:
    milliseconds = [1000 * seconds for seconds in times.counting[step.name]]
    median, counted = times.milliseconds(step.name), step.counted
    return doc.TimedStep(
        name=step.name,
        about=step.about,
        ms=median,
        ms_low=min(milliseconds),
        ms_high=max(milliseconds),
        images_per_second=1000 * setup.size / median,
        gflop=counted and counted.flops / 1e9,
        gflop_per_second=counted and counted.flops / 1e6 / median,
        operations=counted and counted.operations,
        synchronisations=counted and counted.reads,
        saved_bytes=counted and counted.saved_bytes,
        peak_bytes=peaks.get(step.name),
    )


def reported(ratios: Sequence[doc.TimedRatio]) -> doc.ReportedRatio:
    """The published step over ours (without one, plain distillation over ours), or why it is none."""
    known = {ratio.above: ratio for ratio in ratios}
    ratio = known.get("literal") or known["kd"]
    reason = None
    if ratio.busy > BUSY:
        reason = f"wall time is {ratio.busy:.1f} times CPU time: the machine was busy"
    elif not ratio.stable:
        width = 100 * (ratio.high - ratio.low) / ratio.median
        reason = f"the rounds scatter by {width:.0f} %, above {100 * SCATTER:g} %"
    return doc.ReportedRatio(above=ratio.above, median=None if reason else ratio.median, reason=reason)


def machine(setup: Setup) -> dict[str, Any]:
    """What the figures depend on beside the code."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.is_file() else []
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = (fields.get("flags") or fields.get("Features") or "").split()
    return environment(setup.device, resolve_mode(setup.config.runtime, setup.device)) | {
        "cpu": fields.get("model name"),
        "cpu_flags": [flag for flag in FLAGS if flag in flags],
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "process_peak_bytes": _peak_of_process(),
    }


def _peak_of_process() -> int | None:
    """Most main memory the process ever had; None where the system does not say."""
    status = Path("/proc/self/status")
    lines = status.read_text(encoding="utf-8").splitlines() if status.is_file() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM")), None)


def earlier(path: Path) -> doc.Bench:
    """A result from a file. Raises UsageError where it is none."""
    try:
        return read_document(path, doc.Bench)
    except UsageError as error:
        raise UsageError(f"--compare {error.message}", "a file that `sakd bench --json` has printed") from None


def require_comparable(before: doc.Bench, environment: Mapping[str, Any], setup: doc.BenchSetup) -> None:
    """Raise UsageError where an earlier result is of another machine or of another setup."""
    machine = [key for key in MACHINE if before.environment.get(key) != environment[key]]
    changed = [key for key, value in setup if getattr(before.setup, key) != value]
    for what, different in (("machine or mode", machine), ("setup", changed)):
        if different:
            raise UsageError(f"--compare: another {what} (differs in {', '.join(different)})")


def comparison(before: doc.Bench, now: doc.Bench) -> doc.BenchComparison:
    """Ratios and counters then and now; the results `require_comparable`.

    A ratio is slow where it is 15 % below what was recorded; `base` is what it is compared with, and stays the same
    while it is slow. It has regressed where it was slow in the earlier result already. A counter has where it rose.
    """
    slow = {one.name: one.base for one in before.comparison.ratios if one.slow} if before.comparison else {}
    bases = {ratio.above: ratio.median for ratio in before.ratios} | slow
    ratios = []
    for name, median in ((ratio.above, ratio.median) for ratio in now.ratios if ratio.above in bases):
        falls = median < SLOWER * bases[name]
        change = doc.RatioChange(name=name, base=bases[name], now=median, slow=falls, regressed=falls and name in slow)
        ratios.append(change)
    old = {step.name: step for step in before.steps}
    risen = [
        doc.RisenCounter(name=step.name, counter=key, before=then, now=count)
        for step in now.steps
        if step.name in old
        for key in COUNTED
        if (then := getattr(old[step.name], key)) is not None
        if (count := getattr(step, key)) is not None and count > then
    ]
    regressed = bool(risen) or any(ratio.regressed for ratio in ratios)
    return doc.BenchComparison(ratios=ratios, risen=risen, regressed=regressed)
