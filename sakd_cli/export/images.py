"""The images that an export is checked, scored and calibrated on."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from sakd_cli.config.datasets import FilesConfig
from sakd_cli.config.preprocessing import height_width
from sakd_cli.config.resolve import ConfigSource, resolve
from sakd_cli.config.training import EvalConfig
from sakd_cli.data.check import find_unreadable
from sakd_cli.data.dataset import Dataset, Split
from sakd_cli.data.decode import Reading
from sakd_cli.data.files import Files, ImageSpec
from sakd_cli.data.loader import EvalLoader
from sakd_cli.engine.reporter import Reporter
from sakd_cli.errors import DataError, UsageError
from sakd_cli.files import expanded
from sakd_cli.models.artifact import NetworkCard
from sakd_cli.rundir import RunDir
from sakd_cli.runs.images import Wanted, images_to_score, load_images
from sakd_cli.runs.locate import settings_of
from sakd_cli.runs.predict import find_pictures
from sakd_cli.torchrun import cpu_count

NOISE, BATCH = 64, 32
UNKNOWN = -1  # label of a picture whose class nobody says
Batch = tuple[Tensor, Tensor]  # pixels [N, 3, H, W] between 0 and 1, labels [N]


class Pictures(NamedTuple):
    """Images that can be read again and again; split None: noise."""

    split: Split | None
    dataset: Dataset | None
    card: NetworkCard

    def batches(self, count: int) -> Iterator[Batch]:
        """At most `count` of them, evenly over all, as pixels between 0 and 1."""
        if self.split is None or self.dataset is None:
            draw = torch.Generator().manual_seed(0)
            yield torch.rand(NOISE, 3, *height_width(self.card.side), generator=draw), torch.full((NOISE,), UNKNOWN)
            return
        count = min(count, len(self.split))
        some = self.split.subset(torch.arange(count) * len(self.split) // max(count, 1))
        plain = replace(self.dataset, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
        yield from EvalLoader(some, plain, device=torch.device("cpu"), batch_size=BATCH)


def pictures_of(
    weights: Path,
    run: RunDir | None,
    card: NetworkCard,
    config: EvalConfig,
    layers: Sequence[ConfigSource],
    reporter: Reporter,
) -> Pictures:
    """The test images; where a folder is named (`--data-root`), its pictures; noise where neither is at hand."""
    data = config.data.model_copy(update={"validation": 0.0, "download": False})
    named = [one.values["data"] for one in layers if isinstance(one.values.get("data"), dict)]
    root = next((expanded(str(one["root"])).absolute() for one in named if one.get("root") is not None), None)
    if root is not None and not root.is_dir():
        raise UsageError(f"{root}: {'not a folder' if root.exists() else 'no such folder'}", "name an unpacked folder")
    try:
        if root is not None and isinstance(data, FilesConfig):
            there = config.model_copy(update={"data": data})
            dataset = images_to_score(weights, run, card, there, Wanted(None, True), reporter, {}).images.dataset
        else:
            dataset = load_images(data).dataset
        if dataset.classes == card.classes and dataset.test.images.shape[-2:] == height_width(card.side):
            return Pictures(dataset.test, dataset, card)
        reason = f"{dataset.name} is of other classes or another size than the network"
    except (DataError, UsageError) as error:
        reason = error.message
    if root is not None and (found := _any_pictures(root, card, reporter)) is not None:
        return found
    reporter.say(f"checked with noise: {reason}")
    return Pictures(None, None, card)


def _any_pictures(root: Path, card: NetworkCard, reporter: Reporter) -> Pictures | None:
    """All pictures below a folder; of the class that a folder above them is named after, where there is such a one."""
    seen = card.seen
    spec = ImageSpec(seen, min(8, cpu_count()), Reading(seen.background, seen.orientation, seen.gray_range))
    try:
        paths = [picture.path for picture in find_pictures([str(root)]) if picture.fault is None]
    except DataError:
        return None
    bad = list(find_unreadable(paths, spec.reading))
    if skipped := [path for path, error in zip(paths, bad, strict=True) if error is not None]:
        reporter.warn(f"pictures that cannot be read and are left out: {len(skipped)}, the first: {skipped[0]}")
    if not (sound := [path for path, error in zip(paths, bad, strict=True) if error is None]):
        return None
    place = {name: number for number, name in enumerate(card.classes)}
    labels = [place.get(Path(path).parent.name, UNKNOWN) for path in sound]
    known = sum(label != UNKNOWN for label in labels)
    reporter.say(f"{root}: pictures: {len(sound)}, {known} of them in a folder named after a class")
    split = Split(Files(tuple(sound), spec, root=str(root)), torch.tensor(labels))
    dataset = Dataset(card.dataset, card.classes, (0.0,) * 3, (1.0,) * 3, 0, False, split, split)
    return Pictures(split, dataset, card)


def calibration_images(
    run: RunDir | None, card: NetworkCard, config: EvalConfig, shown: Pictures, reporter: Reporter
) -> Pictures:
    """Training images to calibrate int8 on: of the run, else of the settings, else the pictures that are at hand.

    Those that it is scored on too are told. Raises UsageError where there is nothing but noise.
    """
    own = resolve("eval", settings_of(run)).config.data if run else config.data
    found = shown
    for data in (own, config.data):
        try:
            images = load_images(data.model_copy(update={"download": False}))
        except (DataError, UsageError):
            continue
        if images.train.images.shape[-2:] == height_width(card.side) and len(images.train):
            found = Pictures(images.train, images.dataset, card)
            break
    if found.split is None:
        raise UsageError("--int8: no training images at hand to calibrate on", "--data-root DIR names the data set")
    used, scored = found.split.images, shown.split.images if shown.split else None
    if isinstance(used, Files) and isinstance(scored, Files) and {*used.paths} & {*scored.paths}:
        reporter.warn("int8 is calibrated on pictures that it is scored on")
    return found
