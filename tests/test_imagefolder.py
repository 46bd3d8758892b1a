"""Folders of pictures: what is found, how it is read, and that neither workers nor a resume change a bit."""

import errno
import multiprocessing
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import CliRunner
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from sakd_cli.config.datasets import DATASETS as CONFIGS
from sakd_cli.config.datasets import FilesConfig, ImageFolderConfig
from sakd_cli.data import imagefolder, published, table
from sakd_cli.data.augment import channel_tensor, normalise
from sakd_cli.data.dataset import Split
from sakd_cli.data.decode import Picture, Reading, Unreadable, read
from sakd_cli.data.files import Files
from sakd_cli.data.loader import EvalLoader, TrainLoader
from sakd_cli.data.pool import Pool, close_pools
from sakd_cli.data.sources import views
from sakd_cli.errors import DataError, MemoryLimitError, UsageError
from sakd_cli.runs.images import Images, load_images

CPU = torch.device("cpu")
SIZES = [(40, 30), (33, 64), (24, 24), (90, 20), (31, 57)]  # width, height


def picture(path: Path, size: tuple[int, int], number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(number)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    coarse.resize(size, Image.Resampling.BICUBIC).save(path)


def folder(root: Path, parts: dict[str, int], classes: tuple[str, ...] = ("ant", "bee", "cat")) -> Path:
    """`parts`: pictures of each class by subfolder, all different; the name "" for one folder without parts."""
    for split, (part, count) in enumerate(parts.items()):
        for place, name in enumerate(classes):
            for number in range(count):
                ending = ("png", "jpg")[number % 2]
                seed = 1000 * split + 100 * place + number
                picture(root / part / name / f"{number}.{ending}", SIZES[number % 5], seed)
    return root


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder(tmp_path_factory.mktemp("own"), {"train": 10, "val": 4})


def loaded(root: Path, **options: Any) -> Images:
    return load_images(ImageFolderConfig(root=root, **({"size": 16, "validation": 0.0, "workers": 0} | options)))


def train(images: Images, *, batch_size: int = 8, seed: int = 0) -> TrainLoader:
    data, split = images.dataset, images.train
    return TrainLoader(split, data, batch_size=batch_size, seed=seed, noise_width=3, device=CPU)


def same(one: Any, other: Any) -> bool:
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in ("images", "labels", "index", "noise"))


FEEDS: dict[str, dict[str, Any]] = {
    "files, resized": {"cache": False, "augment": "crop"},
    "files, border": {"cache": False, "augment": "border"},
    "memory, resized": {"cache": True, "augment": "crop"},
    "memory, border": {"cache": True, "augment": "border"},
}


# --- what is found


def test_a_folder_becomes_a_data_set(root: Path) -> None:
    images = loaded(root)
    assert images.dataset.classes == ("ant", "bee", "cat")
    assert (len(images.train), len(images.dataset.test), images.side) == (30, 12, 16)
    assert images.train.labels.bincount().tolist() == [10, 10, 10]
    few = loaded(root, classes=2, limit=6, validation=0.5)
    assert (len(few.train), len(few.held_out or ()), len(few.dataset.test)) == (3, 3, 8)
    assert set(few.train.origins().tolist()) < set(range(20))


@pytest.mark.parametrize("size", [64, 72])
def test_a_network_for_small_images_is_warned_of_large_ones(cli: CliRunner, root: Path, size: int) -> None:
    options = [
        "--dataset",
        "imagefolder",
        "--data-root",
        str(root),
        "--epochs",
        "1",
        "-q",
        "--set",
        f"data.size={size}",
    ]
    result = cli.sakd("pretrain-teacher", "resnet8", *options)
    assert result.code == 0, result.err
    assert ("is made for images of 32 pixels; those of 72 take 5 times as long" in result.err) == (size == 72)


def test_one_folder_is_cut_in_two(tmp_path: Path) -> None:
    images = loaded(folder(tmp_path, {"": 10}), split=0.3)
    assert images.train.labels.bincount().tolist() == [7, 7, 7]
    assert images.dataset.test.labels.bincount().tolist() == [3, 3, 3]
    paths = [part.images.paths for part in (images.train, images.dataset.test) if isinstance(part.images, Files)]
    assert len(set(paths[0]) | set(paths[1])) == 30


def test_any_kind_of_picture_becomes_rgb(tmp_path: Path) -> None:
    wide = np.linspace(0, 65535, 64).reshape(8, 8).astype(np.uint16)
    Image.fromarray(wide).save(tmp_path / "wide.png")
    colour = Image.fromarray(np.full((8, 8, 3), (200, 100, 50), np.uint8))
    for mode, ending in [("L", "png"), ("1", "png"), ("P", "gif"), ("RGBA", "png"), ("LA", "png"), ("CMYK", "jpg")]:
        colour.convert(mode).save(tmp_path / f"{mode}.{ending}")
    for path in sorted(tmp_path.iterdir()):
        seen = read(str(path), Reading(), Picture.rgb)
        assert isinstance(seen, Image.Image), seen
        assert (seen.mode, seen.size) == ("RGB", (8, 8))
    sixteen = np.asarray(read(str(tmp_path / "wide.png"), Reading(), Picture.rgb))[..., 0]
    assert np.array_equal(sixteen, wide >> 8)


Damage = Callable[[Path], object]
FAULTS: dict[str, tuple[Damage, str]] = {
    "truncated": (lambda d: cut_short(d / "train/bee/1.jpg"), r"train/bee/1.jpg \(class bee\): is damaged"),
    "zero bytes": (lambda d: (d / "train/bee/0.png").write_bytes(b""), r"0.png \(class bee\): is empty"),
    "no image": (lambda d: (d / "val/ant/0.png").write_text("hello"), r"0.png \(class ant\): is no picture"),
    "a folder by an image's name": (lambda d: (d / "val/ant/x.png").symlink_to("nowhere"), "x.png .*no such file"),
    "empty class": (lambda d: (d / "train/dog").mkdir(), "train/dog: holds no picture"),
    "classes differ": (lambda d: picture(d / "val/dog/0.png", (9, 9), 0), "train: lacks dog, which val has"),
    "case": (lambda d: [picture(d / p / "Bee/0.png", (9, 9), 0) for p in ("train", "val")], "differs from class 'Bee'"),
    "loop": (lambda d: (d / "train/ant/again").symlink_to(d / "train"), "train/ant/again: is a link to a folder"),
    "link to itself": (lambda d: (d / "train/ant/o").symlink_to(d / "train/ant/o"), "train/ant/o: too many levels"),
    "no val": (lambda d: (d / "val").rename(d / "odd"), "has a folder train but none of test, val"),
    "no train": (lambda d: (d / "train").rename(d / ".hidden"), "has a folder val but no folder train"),
}


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


@pytest.mark.parametrize("name", FAULTS)
def test_what_is_wrong_is_named(name: str, tmp_path: Path) -> None:
    damage, text = FAULTS[name]
    damage(folder(tmp_path, {"train": 2, "val": 1}))
    with pytest.raises(DataError, match=text):
        loaded(tmp_path).preload()


def test_a_single_class_and_an_empty_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no folder"):
        loaded(tmp_path)
    with pytest.raises(DataError, match=r"has one class only \(ant\)"):
        loaded(folder(tmp_path, {"": 3}, ("ant",)))
    with pytest.raises(DataError, match="no such folder"):
        loaded(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="which folder"):
        load_images(ImageFolderConfig())


def test_hidden_and_other_files_are_no_pictures(tmp_path: Path) -> None:
    folder(tmp_path, {"train": 2, "val": 1})
    for name in ("train/.ipynb_checkpoints/0.png", "train/ant/.DS_Store", "train/ant/._0.png", "train/ant/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("no picture")
    images = loaded(tmp_path)
    images.preload()
    assert (len(images.dataset.classes), len(images.train)) == (3, 6)


@pytest.mark.parametrize("cache", [True, False])
def test_a_bad_picture_in_a_batch_ends_the_epoch_or_is_left_out(tmp_path: Path, cache: bool) -> None:
    folder(tmp_path, {"train": 3, "val": 2})
    cut_short(tmp_path / "train/bee/1.jpg")
    with pytest.raises(DataError, match=r"1\.jpg"):
        list(train(loaded(tmp_path, cache=cache)).epoch(1))
    images = loaded(tmp_path, cache=cache, on_bad_image="skip")
    assert (images.dataset.skipped, len(images.train)) == (1, 8)
    assert sum(len(batch.labels) for batch in train(images).epoch(1)) == 8
    for number in (0, 2):
        (tmp_path / f"train/bee/{number}.png").write_bytes(b"")
    with pytest.raises(DataError, match="class bee: none of its pictures"):
        loaded(tmp_path, on_bad_image="skip")


# --- how it is read


def test_evaluation_is_torchvisions_resize_and_center_crop(root: Path) -> None:
    standard = v2.Compose([v2.Resize(18), v2.CenterCrop(16), v2.PILToTensor()])
    for cache in (True, False):
        test = loaded(root, cache=cache, augment="crop")
        data = test.dataset
        assert isinstance(data.test.images, Files)
        expected = torch.stack([standard(Image.open(path).convert("RGB")) for path in data.test.images.paths])
        assert torch.equal(data.test.pixels, expected)
        seen = EvalLoader(data.test, data, device=CPU, batch_size=5)
        images, labels = (torch.cat(parts) for parts in zip(*seen, strict=True))
        assert len(seen) == 3
        assert torch.equal(images, normalise(expected, channel_tensor(data.mean, CPU), channel_tensor(data.std, CPU)))
        assert torch.equal(labels, data.test.labels)


@pytest.mark.parametrize("name", FEEDS)
def test_an_epoch_taken_up_in_its_middle_goes_on_the_same(name: str, root: Path) -> None:
    images = loaded(root, **FEEDS[name])
    before = torch.get_rng_state()
    whole = list(train(images).epoch(3))
    index = torch.cat([batch.index for batch in whole])
    assert index.sort().values.tolist() == list(range(30))
    assert whole[0].images.shape == (8, 3, 16, 16)
    assert torch.equal(torch.cat([batch.labels for batch in whole]), images.train.labels[index])
    used = train(loaded(root, **FEEDS[name]))
    next(used.epoch(1))
    for start in (0, 2, 4):
        tail = list(used.epoch(3, start))
        assert len(tail) == 4 - start
        assert all(same(one, other) for one, other in zip(whole[start:], tail, strict=True))
    assert torch.equal(torch.get_rng_state(), before)
    otherwise = train(images, batch_size=7).epoch(3)  # however the epoch is cut, a sample is augmented alike
    assert torch.equal(*(torch.cat([batch.images for batch in batches]) for batches in (otherwise, whole)))
    assert not torch.equal(next(train(images, seed=1).epoch(3)).images, whole[0].images)
    assert not torch.equal(next(train(images).epoch(4)).images, whole[0].images)


@pytest.mark.parametrize("augment", ["crop", "border"])
def test_the_number_of_workers_changes_nothing(augment: str, root: Path) -> None:
    alone = train(loaded(root, cache=False, augment=augment))
    two = train(loaded(root, cache=False, augment=augment, workers=2))
    next(two.epoch(1))  # given up in its middle: the same processes go on with another epoch
    assert all(same(one, other) for one, other in zip(alone.epoch(2), two.epoch(2), strict=True))
    assert all(same(one, other) for one, other in zip(alone.epoch(3, 1), two.epoch(3, 1), strict=True))


def test_a_border_crop_is_the_same_from_memory_and_from_files(root: Path) -> None:
    memory, files = (train(loaded(root, cache=cache, augment="border")) for cache in (True, False))
    assert memory.views is not None
    assert files.views is None
    assert all(same(one, other) for one, other in zip(memory.epoch(1), files.epoch(1), strict=True))


def test_a_resized_crop_from_memory_shows_the_same_part_as_from_files(root: Path) -> None:
    both = [train(loaded(root, cache=cache, augment="crop", size=32)) for cache in (True, False)]
    pairs = list(zip(*(loader.epoch(1) for loader in both), strict=True))
    assert all(torch.equal(one.index, other.index) for one, other in pairs)
    one, other = (torch.cat(images) for images in zip(*((a.images, b.images) for a, b in pairs), strict=True))
    flat = torch.stack([one.flatten(1), other.flatten(1)], dim=1)
    for a, b in flat:
        assert torch.corrcoef(torch.stack([a, b]))[0, 1] > 0.95
    assert (one - other).abs().mean() < 0.1  # in standard deviations of the pixels


def test_small_sets_are_held_in_memory_and_large_ones_are_not(root: Path) -> None:
    held = {limit: train(loaded(root, cache_limit=limit, augment="border")).views is not None for limit in (4.0, 1e-5)}
    assert held == {4.0: True, 1e-5: False}
    for options in ({"augment": "crop"}, {"cache": False}):
        images = loaded(root, **options)
        with pytest.raises(UsageError, match=r"teacher\.cache: imagefolder is read from files"):
            views(images.train, images.dataset, CPU)
    images = loaded(root)
    assert views(images.train, images.dataset, CPU).count == 2 * 5**2


def test_a_process_that_is_killed_is_one_line() -> None:
    with pytest.raises(MemoryLimitError, match="was killed"):
        list(Pool(_dies, workers=1, persistent=True, device=CPU)([1, 2, 3]))


@pytest.mark.parametrize("workers", [0, 1])
def test_what_a_reader_lacks_is_told_as_it_is(workers: int) -> None:
    with pytest.raises(MemoryLimitError, match=r"^x\.png: memory ran out") as found:
        list(Pool(_lacks, workers=workers, persistent=True, device=CPU)([1]))
    assert found.value.hint == "fewer"


def test_a_batch_without_room_in_shared_memory_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's own thread would lose it, and the loader wait for ever."""
    monkeypatch.setattr(
        Tensor, "share_memory_", mock.Mock(side_effect=RuntimeError("unable to allocate shared memory"))
    )
    with pytest.raises(MemoryLimitError, match="no room in /dev/shm"):
        list(Pool(_answers, workers=1, persistent=True, device=CPU)([1]))


def test_processes_end_with_what_one_of_them_lacks() -> None:
    """Not with Python, whose signals they wait out for ten seconds."""
    others = {*multiprocessing.active_children()}
    with suppress(MemoryLimitError):
        list(Pool(_lacks, workers=2, persistent=True, device=CPU)([1, 2, 3]))
    assert not {*multiprocessing.active_children()} - others


def test_where_no_process_can_be_had_that_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where there is no /dev/shm; torch's own loader leaves a traceback, which would be a warning here."""

    def fail(*_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("_multiprocessing.SemLock", fail)
    with pytest.raises(MemoryLimitError, match=r"cannot be had.*Read-only file system"):
        list(Pool(_answers, workers=1, persistent=True, device=CPU)([1]))


def test_processes_that_wait_are_ended_before_python_does_it_by_signals() -> None:
    others = {*multiprocessing.active_children()}
    pool = Pool(_answers, workers=1, persistent=True, device=CPU)
    assert len(list(pool([1, 2]))) == 2
    (worker,) = {*multiprocessing.active_children()} - others
    close_pools()
    worker.join(5)
    assert worker.exitcode == 0
    assert len(list(pool([1]))) == 1  # a new one


def _answers(request: int) -> Tensor | Unreadable:
    return torch.zeros(request)


def _lacks(request: int) -> Tensor | Unreadable:
    raise MemoryLimitError("x.png: memory ran out", "fewer")


def _dies(request: int) -> Tensor | Unreadable:
    import os
    import signal

    os.kill(os.getpid(), signal.SIGKILL)
    return torch.zeros(1)


# --- published sets


def small(name: str, monkeypatch: pytest.MonkeyPatch, **counts: int) -> FilesConfig:
    known = published.PUBLISHED[CONFIGS[name]]._replace(**counts)
    monkeypatch.setitem(table.DATASETS.own, name, lambda config: imagefolder.load_published(config, known))
    return CONFIGS[name](validation=0.0, workers=0)


def test_tiny_imagenet_as_its_archive_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home, lines = tmp_path / "tiny-imagenet-200", []
    for place, name in enumerate(("n01", "n02", "n03")):
        for number in range(2):
            picture(home / f"train/{name}/images/{name}_{number}.JPEG", (64, 64), place + number)
        picture(home / f"val/images/val_{2 - place}.JPEG", (64, 64), place)
        lines.append(f"val_{2 - place}.JPEG\t{name}\t0\t0\t62\t62\n")
    (home / "val/val_annotations.txt").write_text("".join(lines))
    (home / "words.txt").write_text("n01\tcrane\nn02\tcrane, machine\nn03\tgoldfish, Carassius auratus\n")
    config = small("tiny-imagenet", monkeypatch, classes=3, train=6, test=3).model_copy(update={"root": tmp_path})
    images = load_images(config)
    assert images.dataset.classes == ("crane (n01)", "crane (n02)", "goldfish")
    assert (images.side, images.dataset.padding, images.dataset.scale) == (64, 8, None)
    assert isinstance(images.dataset.test.images, Files)
    assert [Path(path).name for path in images.dataset.test.images.paths] == ["val_2.JPEG", "val_1.JPEG", "val_0.JPEG"]
    (home / "val/images/val_0.JPEG").unlink()
    with pytest.raises(DataError, match=r"val_0\.JPEG: is listed in val_annotations\.txt as 'n03': no such file"):
        load_images(config)
    result = [one.text for one in published.scan_published(config, published.PUBLISHED[type(config)]).findings]
    assert any("has 200 classes, here are 3; from: tiny-imagenet-200.zip" in text for text in result)


@pytest.mark.parametrize("name", sorted(kind.model_fields["name"].default for kind in published.PUBLISHED))
def test_a_published_set_counts_its_images(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = {"train": 2, "test": 1, "val": 1, "valid": 1}
    folder(tmp_path, parts)
    config = small(name, monkeypatch, classes=3, train=6, test=3).model_copy(update={"root": tmp_path, "cache": False})
    images = load_images(config)
    assert (len(images.train), len(images.dataset.test)) == (6, 3)
    assert images.dataset.mean == published.PUBLISHED[CONFIGS[name]].mean
    with pytest.raises(DataError, match=f"{name} has 7 training images, here are 6; from: "):
        load_images(small(name, monkeypatch, classes=3, train=7, test=3).model_copy(update={"root": tmp_path}))
    with pytest.raises(DataError, match=f"{name}: .*no such folder"):
        load_images(config.model_copy(update={"root": tmp_path / "nowhere"}))


def test_the_splits_of_other_data_sets_are_as_they_were(root: Path) -> None:
    plain = Split(torch.zeros(3, 3, 8, 8, dtype=torch.uint8), torch.arange(3))
    assert (plain.side, plain.pixels is plain.images) == (8, True)
    test = loaded(root).dataset.test
    assert torch.equal(test.subset(torch.tensor([3, 1])).pixels, test.pixels[[3, 1]])
