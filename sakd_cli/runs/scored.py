"""Which images an evaluation is of: a part of the run's own or all of another folder; how many were trained on."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from sakd_cli.config.base import own_name, own_row
from sakd_cli.config.datasets import DATASETS, DataConfig, FilesConfig, ImageFolderConfig
from sakd_cli.config.resolve import ConfigSource, resolve
from sakd_cli.config.training import PROCEDURES, DistillConfig, EvalConfig, RunConfig
from sakd_cli.data import fingerprint, table
from sakd_cli.data.dataset import Split, join_splits
from sakd_cli.data.fingerprint import Fingerprint
from sakd_cli.data.imagefolder import load_labelled
from sakd_cli.engine.reporter import Reporter
from sakd_cli.errors import DataError, UsageError
from sakd_cli.files import folder_of, read_about
from sakd_cli.models.artifact import NetworkCard
from sakd_cli.rundir import RunDir
from sakd_cli.runs.images import Images, load_images

SplitName = Literal["train", "val", "test", "all"]
# Settings of the data that choose images; the others say how they are read and shown.
CHOICE = {"name", "classes", "limit", "validation", "split_seed", "split", "split_by", "train", "test", "seed"}


class Scored(NamedTuple):
    """images: `dataset.test` is what is evaluated; trained_on: how many of them were trained on, None: not known."""

    images: Images
    split: SplitName
    trained_on: int | None


class Wanted(NamedTuple):
    """What is asked for: a part (None: the test images), and whether a folder was named for it."""

    split: SplitName | None = None
    folder: bool = False
    matrix: bool = False


def config_of(
    card: NetworkCard, layers: Sequence[ConfigSource], reporter: Reporter, more: Mapping[str, Any] | None = None
) -> EvalConfig:
    """The settings of an evaluation: the layers over what the network's card says. A difference asked for is named.

    more  settings below the layers
    """
    given = [one.values.get("data") for one in layers]
    names = [data if isinstance(data, str) else data.get("name") for data in given if isinstance(data, str | dict)]
    name = [card.dataset, *(own_name(name, DATASETS) for name in names if isinstance(name, str))][-1] or card.dataset
    kind = DATASETS.get(own_row(name, DATASETS) or "")
    data = {"name": name} | (card.seen.model_dump() if kind and issubclass(kind, FilesConfig) else {})
    own = ConfigSource("the network's card", dict(more or {}) | {"data": data})
    config: EvalConfig = resolve("eval", [own, *layers]).config
    if isinstance(config.data, FilesConfig):
        for difference in config.data.seen.differences(card.seen):
            reporter.warn(difference)
    return config


def images_to_score(
    weights: Path,
    run: RunDir | None,
    card: NetworkCard,
    config: EvalConfig,
    wanted: Wanted,
    reporter: Reporter,
    loaded: dict[Hashable, Images],
) -> Scored:
    """The images to evaluate a network on; those in `loaded` are not read again.

    A folder that was named and does not hold the network's own test images is scored as a whole. Raises DataError where
    images of the run have changed or are missing, UsageError where there is no such part.
    """
    then = None if run is None else fingerprint.read(run.path)
    data, split = config.data, wanted.split or "test"
    if wanted.folder and isinstance(data, ImageFolderConfig) and wanted.split in (None, "all"):
        own = None if wanted.split == "all" else _own_test_images(data, weights, then)
        return Scored(own, "test", 0 if then else None) if own else _labelled(data, card, then, reporter)
    chosen = data if split != "test" else data.model_copy(update={"validation": 0.0})
    trained = config if run is None else _trained(run)
    aside = trained.aside if isinstance(trained, DistillConfig) and split != "test" else None
    key = (chosen, aside)
    images = loaded[key] if key in loaded else loaded.setdefault(key, load_images(chosen, aside))
    parts: dict[str, Split] = {name: part for name, part in images.parts.items() if split in (name, "all")}
    if not parts:
        raise UsageError(f"{weights}: there is no validation part (data.validation is 0)", "--split test, or all")
    now = _taken(data, images.dataset.classes, parts, then)
    same_choice = trained.data.model_dump(include=CHOICE) == data.model_dump(include=CHOICE)
    if then is not None and not wanted.folder and same_choice:
        found = fingerprint.changed_images(then, now)[:1] if then.classes != now.classes else []
        found += [text for part in parts for text in fingerprint.lost(then, now, part)]
        where = f"{data.name} in {data.root}" if data.root else data.name
        fingerprint.require_none(found, where, "--data-root DIR scores a folder as it is")
        if new := now.contents(*parts) - then.contents(*parts):
            reporter.warn(f"{split} images that are new since the run began: {len(new)}")
    shown = replace(images, dataset=replace(images.dataset, test=join_splits(list(parts.values()))))
    if (known := _trained_on(then, now)) and split == "test":
        reporter.warn(f"{known} of the {len(shown.dataset.test)} test images were trained on")
    return Scored(shown, split, known)


def _trained(run: RunDir) -> RunConfig:
    task = run.config.get("task")
    without = ("method", "router")  # which may be code of others, and say nothing of the images
    own = ConfigSource(f"{run.path}", {key: value for key, value in run.config.items() if key not in without})
    return resolve(task if task in PROCEDURES else "distill", [own]).config


def _taken(
    data: DataConfig, classes: tuple[str, ...], parts: dict[str, Split], then: Fingerprint | None
) -> Fingerprint:
    return fingerprint.of_images(classes, parts, fingerprint.mode_of(data, then))


def _trained_on(then: Fingerprint | None, now: Fingerprint) -> int | None:
    """How many images are known to be training images; None where that is not known."""
    if then is None or any(not image.file for images in now.parts.values() for image in images):
        return None
    known = then.contents("train")
    return sum(image.content in known for images in now.parts.values() for image in images)


def _own_test_images(data: DataConfig, weights: Path, then: Fingerprint | None) -> Images | None:
    """The images of a folder whose test part is that which the network was trained beside; None where it is not."""
    card = read_about(folder_of(weights)).get("fingerprint")
    expected = then.sum("test") if then else card.get("test") if isinstance(card, dict) else None
    try:
        images = load_images(data.model_copy(update={"validation": 0.0}))
    except DataError:
        return None
    now = _taken(data, images.dataset.classes, {"test": images.dataset.test}, then)
    return images if now.sum("test") == expected else None


def _labelled(data: ImageFolderConfig, card: NetworkCard, then: Fingerprint | None, reporter: Reporter) -> Scored:
    """All labelled images of a folder, for the classes of the network."""
    dataset = table.apply_overrides(load_labelled(data, card.classes), data.model_copy(update={"classes": None}))
    counts = dataset.test.labels.bincount(minlength=len(dataset.classes)).tolist()
    for note in dataset.notes:
        reporter.warn(note)
    where = data.manifest or data.root
    reporter.say(f"{where}: all of its {len(dataset.test)} labelled images (--split test: its test part alone)")
    if lacking := [name for name, count in zip(dataset.classes, counts, strict=True) if not count]:
        more = f" and {len(lacking) - 9} more" if len(lacking) > 9 else ""
        reporter.warn(f"{where}: has no image of {', '.join(lacking[:9])}{more}")
    if known := _trained_on(then, _taken(data, dataset.classes, {"all": dataset.test}, then)):
        reporter.warn(f"{known} of these {len(dataset.test)} images were trained on")
    return Scored(Images(dataset, dataset.train, None), "all", known)
