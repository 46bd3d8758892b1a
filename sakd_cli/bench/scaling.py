"""A benchmark as it is asked for, and how the time of a step grows along one axis at a time."""

import re
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch

from sakd_cli.bench import measure
from sakd_cli.bench.measure import timed
from sakd_cli.bench.steps import OURS, Setup, Step, adaptive, calibrated_networks, load_peer_step, plain_distillation
from sakd_cli.config.networks import find_network
from sakd_cli.config.sweep import is_path
from sakd_cli.distillers.table import DISTILLERS, every_map, every_map_and_pooled
from sakd_cli.documents.bench import Bench, Scaling, ScalingPoint
from sakd_cli.engine.graphs import WARMUP as CALLED
from sakd_cli.errors import UsageError, unknown
from sakd_cli.models.spot import align_stages

DEPTHS = (8, 11, 13, 14, 16, 18, 19, 20, 22, 28, 32, 34, 40, 44, 50, 56, 101, 110, 152)
Points = list[tuple[Any, Setup]]  # the values of an axis, and what is timed for each


def _batch(setup: Setup) -> Points:
    return [(n, _with(setup, train=setup.config.train.model_copy(update={"batch_size": n}))) for n in (16, 64, 256)]


def _bank(setup: Setup) -> Points:
    if not DISTILLERS[setup.config.method.name].needs_labels:
        raise UsageError(f"--scaling bank: method {setup.config.method.name} keeps no bank of images; crd does")
    return [(n, setup._replace(images=n)) for n in (10_000, 50_000, 100_000)]


def _spots(setup: Setup) -> Points:
    maps = align_stages(*calibrated_networks(setup))
    if DISTILLERS[setup.config.method.name].places not in (every_map, every_map_and_pooled):
        raise UsageError(f"--scaling spots: method {setup.config.method.name} has spots of a fixed number; at has not")
    return [(k, _with(setup, stage_map=tuple(maps[:k]))) for k in range(1, len(maps) + 1)]


def _depth(setup: Setup) -> Points:
    """Teachers of the same family from the student's depth to the teacher's, four at most."""
    name, found = setup.config.teacher.source, []
    for depth in DEPTHS:
        other = re.sub(r"\d+", str(depth), name, count=1)
        try:
            network = find_network(other)
        except UsageError:
            continue
        if network.family == find_network(name).family and network.name not in found:
            found.append(network.name)
        if network.name == find_network(name).name:
            break
    teacher = setup.config.teacher
    return [(n, _with(setup, teacher=teacher.model_copy(update={"source": n}))) for n in found[-4:]]


AXES: dict[str, Callable[[Setup], Points]] = {
    "batch": _batch,
    "side": lambda setup: [(n, setup._replace(side=n)) for n in (32, 64)],
    "spots": _spots,
    "images": lambda setup: [(n, setup._replace(images=n)) for n in (5_000, 50_000, 100_000)],
    "bank": _bank,
    "depth": _depth,
    "runs": lambda setup: [(n, setup) for n in (1, 2, 4)],
}


def _with(setup: Setup, **settings: Any) -> Setup:
    return setup._replace(config=setup.config.model_copy(update=settings))


def scaled(axis: str, points: Points, rounds: int, say: Callable[[str], None]) -> Scaling:
    """Time our step and plain distillation at each value of the axis."""
    found: list[ScalingPoint] = []
    for value, setup in points:
        say(f"{axis} {value}")
        if axis == "runs":
            found.append(ScalingPoint(value=value, ms=_at_once(setup, value, rounds)))
            continue
        times, _ = timed(setup, [plain_distillation(setup), adaptive(setup)], rounds)
        ratio = times.ratio(OURS, "kd")
        ms = {"ms": times.milliseconds(OURS), "kd_ms": times.milliseconds("kd")}
        known = {"ratio": ratio.median, "low": ratio.low, "high": ratio.high}
        found.append(ScalingPoint(value=value, stable=ratio.stable, **ms, **known))
    return Scaling(axis=axis, points=found)


def _at_once(setup: Setup, several: int, rounds: int) -> float:
    """Wall time in ms of one step of one run, where so many run beside each other, each with a thread and a stream."""
    made = [adaptive(setup) for _ in range(several)]
    gpu = setup.device.type == "cuda"

    def steps(step: Step, times: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream(setup.device) if gpu else None):
            for _ in range(times):
                step.call()
        if gpu:
            torch.cuda.synchronize(setup.device)

    for step in made:  # in turn: while a thread captures its step, no other one may wait for the device
        steps(step, CALLED + 1)
    with ThreadPoolExecutor(several) as pool:
        begin = time.perf_counter()
        list(pool.map(partial(steps, times=rounds), made))
        return 1000 * (time.perf_counter() - begin) / (rounds * several)


def run_bench(config: Any, options: Mapping[str, Any], say: Callable[[str], None]) -> Bench:
    """Time the steps of a distillation's settings with the options of `sakd bench`."""
    if config.teacher.others:
        raise UsageError("bench: times one teacher, as was published")
    if len(config.method.parts) > 1:
        raise UsageError(f"bench: times one method, as it was published; {config.method.name} is several")
    setup, rounds, axis = Setup(config), options["rounds"], options["scaling"]
    # Everything is checked before minutes are spent.
    if is_path(source := config.teacher.source):
        raise UsageError(f"bench: {source}: an architecture is timed, with random weights", "give its name")
    if axis and axis not in AXES:
        raise UsageError(unknown("axis", axis, AXES))
    points = AXES[axis](setup) if axis else []
    before = measure.earlier(options["compare"]) if options["compare"] else None
    with measure.one_thread():
        if before is not None:
            measure.require_comparable(before, measure.machine(setup), measure.bench_setup(setup, rounds))
        peers = [load_peer_step(options["peer"], options["peer_entry"], setup)] if options["peer"] else []
        found = measure.measured(setup, rounds, peers, say)
        axes = scaled(axis, points, rounds, say) if points else None
    change = None if before is None else measure.comparison(before, found)
    return found.model_copy(update={"scaling": axes, "comparison": change})
