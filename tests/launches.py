"""Where the launches of a training step are, by part and line: `python tests/launches.py [METHOD] [--precision fp32]`.

A launch is an operation that PyTorch dispatches and that a GPU would have to start a kernel for: all but views, bare
allocations and what has no elements. Counted over a whole iteration of the trainer's loop (loader, step, guard, meter,
recorder) between two log points, on the CPU, so without a clock.
"""

import argparse
import collections
import sys
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sakd_cli.bench.steps import Setup, adaptive_task
from sakd_cli.config.resolve import ConfigSource, nested, resolve
from sakd_cli.config.train import Train
from sakd_cli.data.dataset import Dataset, Split
from sakd_cli.data.loader import TrainLoader
from sakd_cli.engine.look_ahead import LookAhead
from sakd_cli.engine.optim import Optimizer
from sakd_cli.engine.recorder import SpotRecorder
from sakd_cli.engine.reporter import NullReporter
from sakd_cli.engine.trainer import Trainer
from sakd_cli.rundir import RunDir

# Operations that start no kernel although they are no views.
FREE = {"detach", "alias", "empty", "empty_like", "new_empty", "new_empty_strided", "empty_strided", "lift_fresh"}
FREE |= {"set_", "resize_", "promote_types", "_unsafe_view"}
ROOT = Path(__file__).parents[1]
PARTS = (  # the innermost of our functions that stands in the way from the loop to the launch
    ("teacher", ("tasks/distill.py:__call__", "tasks/distill.py:precompute")),
    ("loader", ("data/loader.py:", "engine/look_ahead.py:")),
    ("guard", (":inspect",)),
    ("recorder", ("engine/recorder.py:add", "engine/recorder.py:top1", "engine/trainer.py:_count")),
    ("optimizer", ("optimizer",)),
    ("router and graft", ("routing/", "tasks/distill.py:_route")),
    ("distillers", ("distillers/",)),
    ("networks", ("models/",)),
)


class Launch(NamedTuple):
    """One launch: the operation, the part of the step it is in, the line of ours behind it, forward or backward."""

    name: str
    part: str
    place: str
    backward: bool


def leaves(*values: Any) -> Iterator[Any]:
    """What operations are given and give, out of their lists and keywords; in 0.4 of the time of torch's pytree."""
    for value in values:
        if isinstance(value, list | tuple):
            yield from leaves(*value)
        elif isinstance(value, dict):
            yield from leaves(*value.values())
        else:
            yield value


class Launches(TorchDispatchMode):
    """Notes every launch made while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Launch] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        touched = [x for x in leaves(args, kwargs, given) if isinstance(x, Tensor)]
        starts = not func.is_view and name not in FREE and func.namespace != "profiler"
        if starts and any(x.numel() for x in touched):
            self.seen.append(launch(name))
        return given


def launch(name: str) -> Launch:
    """Attribute an operation that is being dispatched; one of a backward pass to the line whose backward it is."""
    node = torch._C._current_autograd_node()
    if node is not None and "traceback_" in node.metadata:
        frames = [line.split("\n")[0] for line in node.metadata["traceback_"]]
        ours = [frame for frame in frames if "sakd_cli" in frame]
        places = [place_of(*parsed(frame)) for frame in ours]
    else:
        stack = traceback.extract_stack()
        node_here = node is not None
        places = [place_of(f.filename, f.lineno or 0, f.name) for f in stack if "/sakd_cli/" in f.filename]
        if any("torch/optim" in f.filename for f in stack):
            places.append("optimizer")
        if node_here:
            places.append("accumulation of gradients")
    return Launch(name, part_of(places), places[-1] if places else "?", node is not None)


def parsed(frame: str) -> tuple[str, int, str]:
    """`  File "x", line 3, in f` to x, 3, f."""
    pieces = frame.strip().split('"')
    rest = pieces[2].split()
    return pieces[1], int(rest[2].rstrip(",")), rest[-1]


def place_of(filename: str, line: int, function: str) -> str:
    return f"{filename.rpartition('/sakd_cli/')[2]}:{function}:{line}"


def part_of(places: list[str]) -> str:
    for part, marks in PARTS:
        if any(mark in place for place in places for mark in marks):
            return part
    return "task"


class Watching(NullReporter):
    """Turns the count on for whole iterations: from the end of a step to the end of the next, or of a later one."""

    def __init__(self, launches: Launches, step: int, steps: int = 1) -> None:
        self.launches, self.step, self.steps = launches, step, steps

    def advance(self, step: int) -> None:
        if step == self.step:
            self.launches.__enter__()
        if step == self.step + self.steps:
            self.launches.__exit__(None, None, None)


def setup_of(method: str = "fitnet", precision: str = "bf16", batch: int = 8, **more: Any) -> Setup:
    """The published pair, in fixed shapes as on a GPU."""
    settings = {"teacher": "wrn40_2", "student": "wrn16_2", "method.name": method, "train.batch_size": batch}
    settings |= {"runtime.shapes": "static", "runtime.precision": precision, "device": "cpu"} | more
    return Setup(resolve("distill", [ConfigSource("launches", nested(settings))]).config, images=4 * batch, classes=10)


def pictures(setup: Setup) -> Dataset:
    draw = torch.Generator().manual_seed(1)
    pixels = torch.randint(256, (setup.images, 3, setup.side, setup.side), generator=draw, dtype=torch.uint8)
    split = Split(pixels, torch.arange(setup.images) % setup.classes)
    names = tuple(map(str, range(setup.classes)))
    return Dataset("noise", names, (0.5,) * 3, (0.3,) * 3, padding=4, flip=True, train=split, test=split)


def launches(setup: Setup, ahead: int = 1) -> list[Launch]:
    """Those of the third iteration of the trainer's loop: nothing of it is done for the first time.

    ahead  steps of one pass of the teacher: then of as many iterations, with one such pass
    """
    seen = Launches()
    task, dataset, device = adaptive_task(setup), pictures(setup), torch.device("cpu")
    loader: Any = TrainLoader(
        dataset.train, dataset, batch_size=setup.size, seed=0, noise_width=task.noise_width, device=device
    )
    if ahead > 1:
        loader = LookAhead(loader, task.precompute, steps=ahead, device=device)
    watching = Watching(seen, max(2, ahead), ahead)
    recorder = SpotRecorder([(spot.name, spot.kind) for spot in task.spots], setup.classes, setup.images, device)
    optimizer = Optimizer(task.groups(), Train())
    for settings in optimizer.parts[0][0].param_groups:  # as on CUDA
        settings["foreach"], settings["fused"] = False, True
    with tempfile.TemporaryDirectory() as folder, torch.autograd.set_detect_anomaly(True, check_nan=False):
        trainer = Trainer(
            task, loader, optimizer, RunDir(Path(folder)), watching, epochs=1, log_every=4 * ahead, recorder=recorder
        )
        trainer.guard.every_step = False  # as on CUDA: nothing is read back while looking
        trainer.fit()
    return seen.seen


def table(seen: list[Launch], places: int) -> Iterator[str]:
    yield f"{len(seen)} launches, {len([one for one in seen if one.part != 'loader'])} without the loader"
    for key, count in collections.Counter((one.part, one.backward) for one in seen).most_common():
        yield f"{count:6}  {key[0]}{', backward' if key[1] else ''}"
    for (place, backward, name), count in collections.Counter((o.place, o.backward, o.name) for o in seen).most_common(
        places
    ):
        yield f"{count:6}  {name:32} {place}{', backward' if backward else ''}"


if __name__ == "__main__":
    torch.set_num_threads(1)
    words = argparse.ArgumentParser()
    words.add_argument("method", nargs="?", default="fitnet")
    words.add_argument("--precision", default="bf16")
    words.add_argument("--places", type=int, default=60)
    given = words.parse_args()
    sys.stdout.writelines(
        f"{line}\n" for line in table(launches(setup_of(given.method, given.precision)), given.places)
    )
