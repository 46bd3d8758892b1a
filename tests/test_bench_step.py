"""Timings of the training step and of batch preparation: `python -m pytest -m bench -s`; minutes, on one thread.

The bars are ratios of CPU time, with the C library's allocator as it is by default for both sides: the published code
asked for nothing else, and what a run of ours asks for (`keep_freed_memory`) anyone can. A ratio that scatters is
printed and judges nothing.
"""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from PIL import Image
from published import published
from test_cost_of_step import CLASSES, IMAGES, PAIRS, networks
from torch import nn
from torch.utils.data import DataLoader
from torchvision import transforms

from sakd_cli.batch import Batch
from sakd_cli.bench.measure import interleaved
from sakd_cli.bench.steps import half_routed
from sakd_cli.config.resolve import ConfigSource, nested, resolve
from sakd_cli.config.train import Train
from sakd_cli.data.dataset import Dataset, Split
from sakd_cli.data.loader import TrainLoader
from sakd_cli.documents.bench import TimedRatio
from sakd_cli.engine.optim import Optimizer
from sakd_cli.runs.build import assemble

pytestmark = pytest.mark.bench

SIZE = 64
FP32 = {"fitnet": 1.6, "sp": 1.8, "at": 1.3, "crd": 2.3}
BF16 = {"fitnet": 2.8, "sp": 3.1, "at": 2.2, "crd": 4.3}


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def calibrated(pair: str) -> list[nn.Module]:
    """Student and teacher; the teacher's BatchNorm knows the images, so that its numbers are of ordinary size."""
    student, teacher = (copy.deepcopy(network) for network in networks(pair))
    with torch.no_grad():
        teacher.train()(torch.randn(SIZE, 3, 32, 32))
    return [student, teacher.eval()]


def step(pair: str, method: str, *, literal: bool = False, **options: Any) -> Callable[[], Any]:
    """One step of ours or the published one, half of the samples routed to the teacher, at a learning rate near 0."""
    student, teacher = calibrated(pair)
    options = {
        "teacher": PAIRS[pair][0],
        "student": PAIRS[pair][1],
        "method.name": method,
        "train.lr": 1e-9,
    } | options
    if literal:
        options |= {"router.teacher_bias": 0.0, "runtime.channels_last": False}
    labels = torch.arange(IMAGES) % CLASSES
    config = resolve("distill", [ConfigSource("bench", nested(options))]).config
    task = assemble(config, student, teacher, 32, labels).train()
    if task.graft is not None:
        nn.init.zeros_(task.router.policy.weight)
        nn.init.zeros_(task.router.policy.bias)
    x, index, noise = torch.randn(SIZE, 3, 32, 32), torch.arange(SIZE), half_routed(len(task.spots), SIZE)
    if literal:
        slow = published(task, method)
        rows = task.feature_distiller.draw(index, labels[:SIZE]) if method == "crd" else None
        return lambda: slow.step(x, labels[:SIZE], noise, rows)
    batch = Batch(images=x, labels=labels[:SIZE], index=index, noise=noise)
    optimizer = Optimizer(task.groups(), Train())
    optimizer.begin_epoch(1)
    return lambda: optimizer.step(task(batch).loss)


def judged(ratio: TimedRatio, bar: float) -> None:
    assert not ratio.stable or ratio.median >= bar


@pytest.mark.parametrize("method", FP32)
@pytest.mark.parametrize("pair", PAIRS)
def test_step_against_the_published_step_and_plain_distillation(pair: str, method: str) -> None:
    variants = {
        "published": step(pair, method, literal=True),
        "plain fp32": step(pair, "kd", **{"router": "always", "runtime.channels_last": False}),
        "ours fp32": step(pair, method),
        "ours bf16": step(pair, method, **{"runtime.precision": "bf16"}),
    }
    times = interleaved(variants)
    print(f"\n{pair} {method}:", ", ".join(f"{name} {times.milliseconds(name):.0f} ms" for name in variants))
    for name in ("ours fp32", "ours bf16"):
        print(f"  published / {name}: {times.ratio('published', name)}")
        print(f"  plain fp32 / {name}: {times.ratio('plain fp32', name)}")
    judged(times.ratio("published", "ours fp32"), FP32[method])
    judged(times.ratio("published", "ours bf16"), BF16[method])


class Pictures(torch.utils.data.Dataset[Any]):
    """Images as the field prepares them: PIL, one at a time."""

    def __init__(self, images: torch.Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        self.images = images.permute(0, 2, 3, 1).numpy()
        steps = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip()]
        self.change = transforms.Compose([*steps, transforms.ToTensor(), transforms.Normalize(mean, std)])

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[Any, int, int]:
        return self.change(Image.fromarray(self.images[i])), i % CLASSES, i


def test_batch_preparation_against_pil() -> None:
    images = torch.randint(256, (40 * SIZE, 3, 32, 32), dtype=torch.uint8)
    mean, std = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)
    split = Split(images, torch.arange(len(images)) % CLASSES)
    dataset = Dataset("bench", tuple(map(str, range(CLASSES))), mean, std, 4, True, split, split)
    ours = TrainLoader(split, dataset, batch_size=SIZE, seed=0, noise_width=4, device=torch.device("cpu"))
    theirs = DataLoader(Pictures(images, mean, std), SIZE, shuffle=True)
    times = interleaved({"PIL": lambda: list(theirs), "ours": lambda: list(ours.epoch(1))})
    ratio = times.ratio("PIL", "ours")
    print(f"\none batch: PIL {times.milliseconds('PIL') / 40:.2f} ms, ours {times.milliseconds('ours') / 40:.2f} ms")
    print(f"  PIL / ours: {ratio}")
    judged(ratio, 15)
