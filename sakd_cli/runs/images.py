"""The images of a run, cut into what trains, what chooses and what tests; and which an evaluation is of."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from sakd_cli.config.base import own_name, own_row
from sakd_cli.config.datasets import DATASETS, DataConfig, FilesConfig, ImageFolderConfig
from sakd_cli.config.preprocessing import ImageSize, Preprocessing, height_width, size_text
from sakd_cli.config.resolve import ConfigSource, resolve
from sakd_cli.config.routers import MetaConfig
from sakd_cli.config.training import PROCEDURES, DistillConfig, EvalConfig, ResidualConfig, RunConfig
from sakd_cli.data import fingerprint
from sakd_cli.data import table as datasets
from sakd_cli.data.augment import Changes, Mixing
from sakd_cli.data.check import find_unreadable
from sakd_cli.data.dataset import Dataset, Split, balanced_rates, hold_out, join_splits, limit_train
from sakd_cli.data.files import Files, ImageSpec
from sakd_cli.data.fingerprint import Fingerprint
from sakd_cli.data.imagefolder import load_labelled
from sakd_cli.data.pictures import Finding, pictures_below
from sakd_cli.data.sources import cache_policy, preload, shown_to_both
from sakd_cli.engine.reporter import Reporter
from sakd_cli.errors import DataError, UsageError
from sakd_cli.files import folder_of, read_about
from sakd_cli.models.artifact import NetworkCard
from sakd_cli.rundir import RunDir

SMALL = 64  # pixels a side
SplitName = Literal["train", "val", "test", "all"]
# Settings of the data that choose images; the others say how they are read and shown.
CHOICE = {"name", "classes", "limit", "validation", "split_seed", "split", "split_by", "train", "test", "seed"}


@dataclass(frozen=True)
class Images:
    """A data set cut into what trains, what chooses the best epoch (None: the test set does) and what tests.

    calibration   where there are residual students: decides when to stop and who leaves early
    """

    dataset: Dataset
    train: Split
    held_out: Split | None
    calibration: Split | None = None
    unlabeled: Split | None = None

    @property
    def shown(self) -> Split:
        """What training shows: its images, and behind them those without labels."""
        return self.train if self.unlabeled is None else join_splits([self.train, self.unlabeled])

    @property
    def parts(self) -> dict[str, Split]:
        """The parts that there are."""
        parts = {"train": self.train, "val": self.held_out, "calibration": self.calibration, "test": self.dataset.test}
        parts["unlabeled"] = self.unlabeled
        return {name: part for name, part in parts.items() if part is not None}

    @property
    def teacher_sees(self) -> Preprocessing | None:
        """As what a teacher sees the crops of the training images; None: as the student does."""
        return self.train.images.spec.also if isinstance(self.train.images, Files) else None

    @property
    def teacher_side(self) -> ImageSize:
        """Side of a teacher's images in training, or their height and width."""
        return self.side if self.teacher_sees is None else self.teacher_sees.size

    def fingerprint(self, config: DataConfig, begun: Path | None = None) -> Fingerprint:
        """Which images these are.

        begun  a run that goes on with them: DataError, naming the first differences, where it had others
        """
        then = None if begun is None else fingerprint.read(begun)
        now = fingerprint.of_images(self.dataset.classes, self.parts, fingerprint.mode_of(config, then))
        if then is not None:
            hint = "put them back; if the folder has moved: --data-root DIR; or start a new run"
            fingerprint.require_none(fingerprint.changed_images(then, now), str(begun), hint)
        return now

    @property
    def side(self) -> ImageSize:
        """Side of the square images in pixels, or their height and width."""
        return self.train.side

    def preload(self) -> None:
        """Decode what is to be held in memory, before anything else. Raises DataError naming a file that is bad."""
        preload(self.train, scale=self.dataset.scale)
        if self.unlabeled is not None:
            preload(self.unlabeled, scale=self.dataset.scale)
        for split in (self.held_out, self.calibration, self.dataset.test):
            if split is not None:
                preload(split)


def load_images(
    config: DataConfig, aside: ResidualConfig | MetaConfig | None = None, teacher: Preprocessing | None = None
) -> Images:
    """Load, limit and cut a data set; what sets images aside takes a calibration split from what would train.

    teacher  how a teacher sees pictures: in training the same crops as the student, at its own size
    """
    dataset = datasets.load(config)
    if teacher is not None and isinstance(config, FilesConfig):
        also = config.seen.at(teacher)
        if also is not None and config.geometry != "crop" and not also.alike(config.seen):
            raise UsageError(
                f"data.size: {size_text(also.size)} pixels of the teacher and {size_text(config.size)} of the student "
                "are of other proportions: no crop from a border is the same for both",
                "--set data.augment=crop; or sizes of the same proportions",
            )
        if also is not None and config.erase:
            raise UsageError("data.erase: no box is the same for a teacher of another size", "--set data.erase=0")
        if also is not None and config.policy == "trivialaugment":
            reason = "trivialaugment shifts by pixels, which are not the same for a teacher of another size"
            raise UsageError(f"data.augment: {reason}", "--set data.augment=randaugment")
        dataset = dataset.map(partial(shown_to_both, also=also))
    dataset = limit_train(dataset, config.limit, config.split_seed)
    train, held_out = dataset.train, dataset.val
    if held_out is None:
        train, held_out = hold_out(dataset, config.validation, config.split_seed)
    calibration = None
    if aside is not None and (share := aside.set_aside(len(train))):
        train, calibration = hold_out(replace(dataset, train=train), share, config.split_seed, "calibration")
    there = {"train": train, "test": dataset.test, "held_out": held_out, "calibration": calibration}
    cut = {name: split for name, split in there.items() if split is not None}
    placed = dict(zip(cut, cache_policy(list(cut.values()), dataset, config), strict=True))
    mixing = Mixing(config.mixup, config.cutmix) if config.mixup or config.cutmix else None
    large = max(height_width(dataset.train.side)) > SMALL
    changes = Changes(config.policy, *config.randaugment, config.jitter, config.erase, dataset.mean, large)
    wanted = config.policy or config.jitter or config.erase
    classes = len(dataset.classes)
    threshold = (config.balance_threshold or 1 / classes) if config.balance == "repeated-factor" else None
    rates = partial(balanced_rates, classes=classes, threshold=threshold) if config.balance else None
    dataset = replace(dataset, test=placed["test"], rates=rates, mixing=mixing, changes=changes if wanted else None)
    return Images(dataset, placed["train"], placed.get("held_out"), placed.get("calibration"))


def with_unlabeled(images: Images, config: DataConfig) -> Images:
    """The same with the pictures of `data.unlabeled`. DataError where there are none, or one cannot be read.

    With `on_bad_image: skip` those are left out, and counted with the labelled ones that were.
    """
    if (folder := config.unlabeled) is None:
        return images
    findings = list[Finding]()
    paths = tuple(pictures_below(folder, findings))
    if findings or not paths:
        text = findings[0].text if findings else "holds no picture"
        raise DataError(f"data.unlabeled: {findings[0].path if findings else folder}: {text}")
    if isinstance(own := images.train.images, Files):
        if isinstance(config, FilesConfig) and config.on_bad_image == "skip":
            faults, before = find_unreadable(paths, own.spec.reading), len(paths)
            if not (paths := tuple(path for path, fault in zip(paths, faults, strict=True) if fault is None)):
                raise DataError(f"data.unlabeled: {folder}: none of its pictures can be read")
            skipped = images.dataset.skipped + before - len(paths)
            images = replace(images, dataset=replace(images.dataset, skipped=skipped))
        shown: Files | Tensor = Files(paths, own.spec, cached=own.cached, root=str(folder))
    else:
        side = height_width(images.side)
        try:
            shown = Files(paths, ImageSpec(Preprocessing(size=side, resize=min(side)), 0), root=str(folder)).read()
        except DataError as error:
            raise DataError(f"data.unlabeled: {error.message}") from None
    return replace(images, unlabeled=Split(shown, torch.full((len(paths),), -1)))


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
    loaded: dict[str, Images],
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
    trained = config if run is None else _settings_of_run(run)
    aside = trained.aside if isinstance(trained, DistillConfig) and split != "test" else None
    key = f"{chosen!r} {aside!r}"  # settings of own code may be lists, which have no hash
    images = loaded[key] if key in loaded else loaded.setdefault(key, load_images(chosen, aside))
    parts: dict[str, Split] = {name: part for name, part in images.parts.items() if split in (name, "all")}
    if not parts:
        raise UsageError(f"{weights}: there is no validation part (data.validation is 0)", "--split test, or all")
    now = _fingerprint_of(data, images.dataset.classes, parts, then)
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


def _settings_of_run(run: RunDir) -> RunConfig:
    """As far as they choose its images."""
    task = run.config.get("task")
    without = ("method", "router")  # which may be code of others, and say nothing of the images
    own = ConfigSource(f"{run.path}", {key: value for key, value in run.config.items() if key not in without})
    return resolve(task if task in PROCEDURES else "distill", [own]).config


def _fingerprint_of(
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
    now = _fingerprint_of(data, images.dataset.classes, {"test": images.dataset.test}, then)
    return images if now.sum("test") == expected else None


def _labelled(data: ImageFolderConfig, card: NetworkCard, then: Fingerprint | None, reporter: Reporter) -> Scored:
    """All labelled images of a folder, for the classes of the network."""
    dataset = datasets.apply_overrides(load_labelled(data, card.classes), data.model_copy(update={"classes": None}))
    counts = dataset.test.labels.bincount(minlength=len(dataset.classes)).tolist()
    for note in dataset.notes:
        reporter.warn(note)
    where = data.manifest or data.root
    reporter.say(f"{where}: all of its {len(dataset.test)} labelled images (--split test: its test part alone)")
    if lacking := [name for name, count in zip(dataset.classes, counts, strict=True) if not count]:
        more = f" and {len(lacking) - 9} more" if len(lacking) > 9 else ""
        reporter.warn(f"{where}: has no image of {', '.join(lacking[:9])}{more}")
    if known := _trained_on(then, _fingerprint_of(data, dataset.classes, {"all": dataset.test}, then)):
        reporter.warn(f"{known} of these {len(dataset.test)} images were trained on")
    return Scored(Images(dataset, dataset.train, None), "all", known)
