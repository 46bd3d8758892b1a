"""The images of a run: loaded, limited, and cut into what trains, what chooses and what tests."""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from sakd_cli.config.datasets import DataConfig, FilesConfig
from sakd_cli.config.preprocessing import ImageSize, Preprocessing, height_width, size_text
from sakd_cli.config.routers import MetaConfig
from sakd_cli.config.training import ResidualConfig
from sakd_cli.data import fingerprint
from sakd_cli.data import table as datasets
from sakd_cli.data.augment import Changes, Mixing
from sakd_cli.data.check import find_unreadable
from sakd_cli.data.dataset import Dataset, Split, balanced_rates, hold_out, join_splits, limit_train
from sakd_cli.data.files import Files, ImageSpec
from sakd_cli.data.fingerprint import Fingerprint
from sakd_cli.data.pictures import Finding, pictures_below
from sakd_cli.data.sources import cache_policy, preload, shown_to_both
from sakd_cli.errors import DataError, UsageError

SMALL = 64  # pixels a side


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
