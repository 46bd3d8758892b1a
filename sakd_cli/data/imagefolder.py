"""Data sets that are folders of pictures: your own, Tiny ImageNet, CINIC-10, ImageNet"""

from dataclasses import replace
from pathlib import Path

import torch

from sakd_cli.config.datasets import FilesConfig, ImageFolderConfig
from sakd_cli.data import published
from sakd_cli.data.check import find_unreadable
from sakd_cli.data.dataset import Channels, Dataset, Split, first_classes, hold_out
from sakd_cli.data.files import Files, ImageSpec
from sakd_cli.data.fingerprint import content_hashes
from sakd_cli.data.pictures import FolderContents, SplitContents, raise_on_findings
from sakd_cli.data.published import IMAGENET
from sakd_cli.errors import DataError
from sakd_cli.torchrun import cpu_count


def load_imagefolder(config: ImageFolderConfig) -> Dataset:
    """Folders train and val, or one folder of classes cut in two. DataError names what is wrong with them."""
    found = raise_on_findings(published.scan_imagefolder(config))
    return dataset_of(config, found, published.own_root(config), found.classes, *IMAGENET, share=config.split)


def load_labelled(config: ImageFolderConfig, classes: tuple[str, ...]) -> Dataset:
    """All labelled pictures of a folder as test images, for a network of these classes; it may lack some of them.

    Raises DataError where a folder is of another class, or something is wrong with one.
    """
    found = raise_on_findings(published.scan_labelled_images(config, classes))
    every = SplitContents(found.train.folder, {name: found.train.files.get(name, []) for name in classes})
    found, config = found._replace(train=every, test=every), config.model_copy(update={"classes": None})
    return dataset_of(config, found, published.own_root(config), classes, *IMAGENET)


def load_published(config: FilesConfig, known: published.PublishedSet | None = None) -> Dataset:
    """A published set; DataError where something is missing. known: what is known of it; None: as in `PUBLISHED`."""
    known = known or published.PUBLISHED[type(config)]
    found = raise_on_findings(published.scan_published(config, known))
    root = published.published_root(config, known)
    names = found.classes if known.names is None else known.names(root, found.classes)
    return dataset_of(config, found, root, names, known.mean, known.std)


def dataset_of(
    config: FilesConfig,
    found: FolderContents,
    root: Path,
    names: tuple[str, ...],
    mean: Channels,
    std: Channels,
    share: float = 0.0,
) -> Dataset:
    """The data set that these files make; share: of the images, for testing where there is no test part."""
    workers = min(8, cpu_count()) if config.workers is None else config.workers
    spec = ImageSpec(config.seen, workers, published.reading_of(config))
    parts = [_split(config, root, spec, *part.pairs(found.classes)) for part in found.parts]
    scale = None if config.bordered or config.geometry == "none" else config.crop
    plain = Dataset(config.name, names, mean, std, config.border, config.flip, parts[0], parts[-1], scale)
    plain = first_classes(replace(plain, val=parts[1] if found.val else None), config.classes)
    plain = replace(plain, seen=config.seen, notes=tuple(f"{one.path}: {one.text}" for one in found.notes))
    if config.on_bad_image == "skip":
        plain = _without_bad(plain, one_part=found.test is None)
    if found.test is None:
        train, test = hold_out(plain, share, config.split_seed, "split")
        assert test is not None, "a share of 0 is refused"
        plain = replace(plain, train=train, test=test)
    return plain


def _split(config: FilesConfig, root: Path, spec: ImageSpec, paths: tuple[str, ...], labels: list[int]) -> Split:
    keys = content_hashes(paths) if config.split_by == "content" else ()
    return Split(Files(paths, spec, root=str(root), keys=keys), torch.tensor(labels, dtype=torch.int64))


def _without_bad(dataset: Dataset, *, one_part: bool) -> Dataset:
    """The data set without the files that cannot be read. DataError where a class loses all of its images."""
    splits, skipped = [], 0
    there = [dataset.train, *(() if dataset.val is None else (dataset.val,)), *(() if one_part else (dataset.test,))]
    for split in there:
        assert isinstance(split.images, Files)
        good = torch.tensor(
            [error is None for error in find_unreadable(split.images.paths, split.images.spec.reading)],
            dtype=torch.bool,
        )
        skipped += len(good) - int(good.sum())
        readable = split.subset(good.nonzero().squeeze(1))
        before, counts = (one.labels.bincount(minlength=len(dataset.classes)) for one in (split, readable))
        if bool((lost := (before > 0) & (counts == 0)).any()):
            name = dataset.classes[int(lost.int().argmax())]
            raise DataError(f"{dataset.name}: class {name}: none of its pictures can be read", "sakd data check DIR")
        splits.append(readable)
    val = None if dataset.val is None else splits[1]
    return replace(dataset, train=splits[0], test=splits[-1], val=val, skipped=skipped)
