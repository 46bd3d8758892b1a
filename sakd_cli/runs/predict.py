"""What a trained network answers for pictures: files, folders, patterns or a list, shown to it as its card says."""

import glob
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from sakd_cli.config.preprocessing import height_width
from sakd_cli.config.resolve import ConfigSource, resolve
from sakd_cli.config.training import EvalConfig
from sakd_cli.data.augment import normalise
from sakd_cli.data.decode import Reading, Unreadable
from sakd_cli.data.files import ImageSpec, load_eval_image, v2
from sakd_cli.data.loader import MAX_BYTES
from sakd_cli.data.pictures import Finding, legible, pictures_below
from sakd_cli.documents.evaluation import ClassProbability, Prediction, Predictions
from sakd_cli.engine.reporter import Reporter, reporting
from sakd_cli.engine.runtime import exact_mode, pick_device
from sakd_cli.errors import DataError, NonFiniteError
from sakd_cli.evaluation.early_exit import never
from sakd_cli.runs.evaluate import opened
from sakd_cli.torchrun import cpu_count


class Picture(NamedTuple):
    """A picture that is asked for, and why it is none where that is known before it is opened."""

    path: str
    fault: str | None = None


def find_pictures(named: Sequence[str]) -> list[Picture]:
    """The pictures that paths mean, in their order.

    A file is taken whatever its name; of a folder all below it that are named like pictures; `*`, `?` and `**` are
    filled in where there is no file of that name; `-` reads paths from stdin, one a line. Raises DataError where there
    is not one.
    """
    found: list[Picture] = []
    for name in named:
        lines = [line.rstrip("\r\n").removeprefix("\ufeff") for line in sys.stdin] if name == "-" else [name]
        for path in filter(None, lines):
            fits = [path] if os.path.lexists(path) else sorted(glob.glob(path, recursive=True))
            found += [picture for one in fits for picture in _at(one)]
            if not fits:
                pattern = glob.has_magic(path)
                found.append(Picture(path, "no file fits this pattern" if pattern else "no such file or directory"))
    if not found:
        raise DataError(f"{', '.join(map(legible, named[:3]))}: no pictures there", "sakd predict NETWORK PATH...")
    return found


def _at(path: str) -> Iterator[Picture]:
    if not os.path.isdir(path):
        yield Picture(path)
        return
    findings: list[Finding] = []
    for below in pictures_below(Path(path), findings):
        yield Picture(below)
    yield from (Picture(one.path, one.text) for one in findings)


MOST_TOLD = 20  # pictures that cannot be read, each on a line; a folder that vanishes has thousands


@torch.inference_mode()
def predict(
    weights: Path,
    pictures: Sequence[Picture],
    layers: Sequence[ConfigSource],
    reporter: Reporter,
    top: int,
    early: bool,
) -> Predictions:
    """The `top` likeliest classes of every picture, as `sakd eval` has them of the same files.

    early  images leave an ensemble where they may. What cannot be read is told, and costs no other picture.
    """
    network = opened(weights)
    card, exits = network.card, network.exits if early else never(network.exits)
    config: EvalConfig = resolve("eval", layers).config
    device = pick_device(config.device)
    model = exact_mode(device).to_memory_format(network.ensemble.to(device)).eval()
    mean, std = (torch.tensor(values, device=device).view(-1, 1, 1) for values in (card.mean, card.std))
    height, width = height_width(card.side)
    size = max(1, min(config.batch_size, MAX_BYTES // (12 * height * width)))
    seen = card.seen
    spec = ImageSpec(seen, 0, Reading(seen.background, seen.orientation, seen.gray_range))
    found: list[Prediction] = []
    begun, failed = time.perf_counter(), 0
    with reporting(reporter, f"pictures: {len(pictures)}", len(pictures)):
        for batch, images in _read(pictures, spec, size):
            answers: Iterator[tuple[list[ClassProbability], int]] = iter(())
            if sound := [image for image in images if isinstance(image, Tensor)]:
                logits, left = model.adaptive(normalise(torch.stack(sound).to(device), mean, std), exits)
                best = logits.float().softmax(dim=1).topk(min(top, len(card.classes)), dim=1)
                answers = zip(_named(weights, best.values, best.indices, card.classes), left.tolist(), strict=True)
            for picture, image in zip(batch, images, strict=True):
                if isinstance(image, Unreadable):
                    reason = image.reason.partition(": --set")[0]  # a setting of trainings
                    if (failed := failed + 1) <= MOST_TOLD:
                        reporter.warn(f"{legible(picture.path)}: {reason}")
                    found.append(Prediction(file=legible(picture.path), classes=[], error=reason))
                else:
                    classes, stage = next(answers)
                    last = stage if exits.thresholds else None
                    found.append(Prediction(file=legible(picture.path), classes=classes, exit=last))
            reporter.advance(len(found))
    seconds = time.perf_counter() - begun
    if failed > MOST_TOLD:
        reporter.warn(f"and {failed - MOST_TOLD} more that could not be read; --json names them all")
    return Predictions(
        weights=str(weights),
        sha256=network.sha256,
        network=" + ".join(str(member.name) for member in model.members),
        dataset=card.dataset,
        device=str(device),
        images=len(found),
        failed=failed,
        seconds=seconds,
        images_per_second=(len(found) - failed) / seconds if seconds else None,
        predictions=found,
    )


def _named(weights: Path, values: Tensor, places: Tensor, classes: Sequence[str]) -> list[list[ClassProbability]]:
    """The most probable classes of each picture. NonFiniteError where the network gives none."""
    if not values.isfinite().all():
        raise NonFiniteError(f"{weights}: the network's outputs are not finite for these pictures")
    rows = zip(values.tolist(), places.tolist(), strict=True)
    return [[ClassProbability(class_=classes[k], probability=p) for p, k in zip(*row, strict=True)] for row in rows]


def _read(
    pictures: Sequence[Picture], spec: ImageSpec, size: int
) -> Iterator[tuple[Sequence[Picture], list[Tensor | Unreadable]]]:
    """Batches of pictures and what they are; the next is decoded by threads while one is looked at."""
    v2()  # imported before the threads start

    def made(picture: Picture) -> Tensor | Unreadable:
        if picture.fault is not None:
            return Unreadable(picture.path, picture.fault)
        return load_eval_image(picture.path, spec)

    with ThreadPoolExecutor(min(32, cpu_count())) as pool:
        batches = [pictures[first : first + size] for first in range(0, len(pictures), size)]
        coming = pool.map(made, batches[0])
        for batch, after in pairwise([*batches, []]):
            images, coming = coming, pool.map(made, after)
            yield batch, list(images)
