"""Which image belongs to which part, whatever else lies in the folder, and what a run remembers of its images."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sakd_cli.config.datasets import ImageFolderConfig, ShapesConfig
from sakd_cli.config.training import ResidualConfig
from sakd_cli.data import fingerprint
from sakd_cli.data.files import Files
from sakd_cli.data.imagefolder import load_labelled
from sakd_cli.errors import DataError
from sakd_cli.rundir import IMAGES
from sakd_cli.runs.images import Images, load_images

CLASSES = ("ant", "bee", "cat")


def paint(path: Path, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (number % 251, number // 251, 7)).save(path)


def folder(root: Path, parts: tuple[str, ...] = ("",), count: int = 40) -> Path:
    """`count` pictures of each class and part, each of another colour."""
    for number, (part, name) in enumerate((part, name) for part in parts for name in CLASSES):
        for place in range(count):
            paint(root / part / name / f"{place}.png", 1000 * number + place)
    return root


def load(root: Path, **settings: Any) -> Images:
    residual = ResidualConfig(students=1, calibration_min=1, calibration=0.2)
    return load_images(ImageFolderConfig(root=root, size=8, workers=0, **settings), residual)


def parts_of(images: Images) -> dict[str, str]:
    """The part of each file, by its name."""
    found = {}
    for part, split in images.parts.items():
        assert isinstance(split.images, Files)
        found |= dict.fromkeys(split.images.names, part)
    return found


CHANGES: dict[str, Callable[[Path], object]] = {
    "a file more": lambda root: [paint(root / name / f"{place}.png", 9000) for name in CLASSES for place in (-1, 99)],
    "a file less": lambda root: [(root / name / "7.png").unlink() for name in CLASSES],
    "a file renamed": lambda root: (root / "ant/0.png").rename(root / "ant/zz.png"),
    "a class more": lambda root: [paint(root / "aaa" / f"{place}.png", 9000 + place) for place in range(9)],
    "a class less": lambda root: shutil.rmtree(root / "ant"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_no_other_image_moves(change: str, tmp_path: Path) -> None:
    before = parts_of(load(folder(tmp_path)))
    assert set(before.values()) == {"train", "val", "calibration", "test"}
    CHANGES[change](tmp_path)
    after = parts_of(load(tmp_path))
    common = before.keys() & after.keys()
    assert len(common) >= 2 * 40
    assert {name: after[name] for name in common} == {name: before[name] for name in common}


def test_a_split_by_content_follows_a_renamed_image(tmp_path: Path) -> None:
    where: list[dict[str, str]] = []
    for rename in (False, True):
        if rename:
            for name in CLASSES:
                for file in sorted((tmp_path / name).iterdir()):
                    file.rename(file.with_name(f"x{file.name}"))
        else:
            folder(tmp_path)
        where.append(
            {
                Path(file).name.lstrip("x"): part
                for file, part in parts_of(load(tmp_path, split_by="content")).items()
                if file.startswith("bee")
            }
        )
    assert where[0] == where[1]
    assert set(where[0].values()) == {"train", "val", "calibration", "test"}


def test_each_class_gives_about_its_fraction_and_at_least_one(tmp_path: Path) -> None:
    images = load(folder(tmp_path, count=200), split=0.25, validation=0.0)
    share = images.dataset.test.labels.bincount() / 200
    assert ((share > 0.15) & (share < 0.35)).all()  # 3 standard deviations are 0.092
    for count in (2, 3, 5):
        few = load_images(
            ImageFolderConfig(root=folder(tmp_path / str(count), count=count), size=8, validation=0.0, split=0.3)
        )
        assert (few.dataset.test.labels.bincount(minlength=3) > 0).all()
        assert (few.train.labels.bincount(minlength=3) > 0).all()


def test_a_limit_takes_the_same_images_as_far_as_it_can(tmp_path: Path) -> None:
    few, more = (set(parts_of(load(folder(tmp_path), limit=limit, validation=0.0))) for limit in (30, 60))
    assert few < more
    paint(tmp_path / "ant/new.png", 5)
    again = set(parts_of(load(tmp_path, limit=30, validation=0.0)))
    assert len(few - again) <= 1


# --- which folders are parts and classes


def test_val_chooses_the_epoch_and_test_gives_the_result(tmp_path: Path) -> None:
    images = load_images(ImageFolderConfig(root=folder(tmp_path, ("train", "val", "test"), 4), size=8))
    assert {part: len(split) for part, split in images.parts.items()} == {"train": 12, "val": 12, "test": 12}
    assert all(name.startswith(f"{part}/") for name, part in parts_of(images).items())
    few = load_images(ImageFolderConfig(root=tmp_path, size=8, classes=2))
    assert {part: len(split) for part, split in few.parts.items()} == {"train": 8, "val": 8, "test": 8}


@pytest.mark.parametrize("flat", [True, False])
def test_an_unlabelled_test_folder_is_left_out_and_told(tmp_path: Path, flat: bool) -> None:
    folder(tmp_path, ("train", "val"), 4)
    paint(tmp_path / "test" / ("1.png" if flat else "images/1.png"), 1)
    images = load_images(ImageFolderConfig(root=tmp_path, size=8, validation=0.25))
    assert {name for name, part in parts_of(images).items() if part == "test"} == {
        f"val/{name}/{place}.png" for name in CLASSES for place in range(4)
    }
    assert [note.partition(": ")[2] for note in images.dataset.notes] == ["has no folder of a class of train: not used"]


def test_what_programs_write_is_no_class(tmp_path: Path) -> None:
    folder(tmp_path, count=4)
    for name in ("runs/20261126-120000-pretrain", "reports", ".hidden"):
        paint(tmp_path / name / "plot.png", 1)
    for name in ("config.yaml", "env.json"):
        (tmp_path / "mine/run-1").mkdir(parents=True, exist_ok=True)
        (tmp_path / "mine/run-1" / name).write_text("")
    paint(tmp_path / "mine/plot.png", 1)
    images = load_images(ImageFolderConfig(root=tmp_path, size=8))
    assert images.dataset.classes == CLASSES
    assert [Path(note.partition(": ")[0]).name for note in images.dataset.notes] == ["mine", "reports", "runs"]
    folder(tmp_path / "other", ("train", "val"), 2)
    for part in ("train", "val"):  # a part has nothing but classes in it
        paint(tmp_path / "other" / part / "reports/1.png", 1)
    assert load_images(ImageFolderConfig(root=tmp_path / "other", size=8)).dataset.classes == (*CLASSES, "reports")


# --- any folder that has labels


def labelled(root: Path, classes: tuple[str, ...] = CLASSES) -> tuple[int, list[int]]:
    test = load_labelled(ImageFolderConfig(root=root, size=8), classes).test
    return len(test), test.labels.bincount(minlength=len(classes)).tolist()


def test_all_of_a_labelled_folder_is_test_images(tmp_path: Path) -> None:
    assert labelled(folder(tmp_path / "flat", count=5)) == (15, [5, 5, 5])
    assert labelled(folder(tmp_path / "val", ("val",), 3)) == (9, [3, 3, 3])
    three = folder(tmp_path / "three", ("train", "val", "test"), 2)
    assert labelled(three) == (18, [6, 6, 6])
    unlabelled = folder(tmp_path / "unlabelled", ("train", "val"), 2)
    paint(unlabelled / "test/images/1.png", 1)
    assert labelled(unlabelled) == (12, [4, 4, 4])
    shutil.rmtree(tmp_path / "flat/bee")
    assert labelled(tmp_path / "flat") == (10, [5, 0, 5])
    with pytest.raises(DataError, match="bee is no class of the network"):
        labelled(three, ("ant", "cat"))
    with pytest.raises(DataError, match="has no picture of a class of the network"):
        labelled(tmp_path / "flat", ("dog",))


# --- fingerprints


def taken(root: Path, **settings: Any) -> fingerprint.Fingerprint:
    images = load(root, **settings)
    return fingerprint.of_images(images.dataset.classes, images.parts)


def test_a_fingerprint_is_the_same_when_it_is_read_and_where_the_folder_has_moved(tmp_path: Path) -> None:
    then = taken(folder(tmp_path / "here", count=6))
    (tmp_path / IMAGES).write_text(then.text)
    assert fingerprint.read(tmp_path) == then
    assert fingerprint.read(tmp_path / "here") is None
    (tmp_path / "here").rename(tmp_path / "there")
    now = taken(tmp_path / "there")
    assert (now.digest, fingerprint.changed_images(then, now)) == (then.digest, [])


def test_of_many_bytes_the_sizes_alone_are_kept(tmp_path: Path) -> None:
    images = load(folder(tmp_path, count=6))
    sizes = fingerprint.of_images(images.dataset.classes, images.parts, "sizes")
    assert (sizes.mode, taken(tmp_path).mode) == ("sizes", "content")
    Image.new("RGB", (30, 30), (1, 2, 3)).save(tmp_path / "bee/3.png")
    images = load(tmp_path)
    now = fingerprint.of_images(images.dataset.classes, images.parts, sizes.mode)
    assert fingerprint.changed_images(sizes, now) == ["bee/3.png: another content"]


def test_images_in_memory_have_one_sum_for_each_part() -> None:
    few, other = (load_images(ShapesConfig(train=40, test=20, seed=seed)) for seed in (0, 1))
    then, now = (fingerprint.of_images(one.dataset.classes, one.parts) for one in (few, other))
    assert {part: images[0].label for part, images in then.parts.items()} == {"train": 36, "val": 4, "test": 20}
    assert fingerprint.changed_images(then, then) == []
    assert fingerprint.changed_images(then, now) == [f"{part}: another content" for part in ("train", "val", "test")]


DIFFERENCES: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "replaced": (lambda root: paint(root / "bee/3.png", 4321), ["bee/3.png: another content"]),
    "missing": (lambda root: (root / "bee/3.png").unlink(), ["bee/3.png: missing"]),
    "new": (lambda root: paint(root / "bee/new.png", 4321), ["bee/new.png: new"]),
    "renamed": (lambda root: (root / "bee/3.png").rename(root / "bee/z.png"), ["bee/3.png: missing", "bee/z.png: new"]),
    "class renamed": (
        lambda root: (root / "ant").rename(root / "dog"),
        ["the classes were ant, bee, cat and are bee, cat, dog"],
    ),
}


@pytest.mark.parametrize("change", DIFFERENCES)
def test_what_has_changed_is_named(change: str, tmp_path: Path) -> None:
    act, expected = DIFFERENCES[change]
    then = taken(folder(tmp_path, count=8))
    act(tmp_path)
    assert fingerprint.changed_images(then, taken(tmp_path)) == expected
