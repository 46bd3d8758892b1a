"""Data sets of torchvision by name: laid out in files as torchvision has them, and read by its own classes."""

import shlex
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from conftest import CliRunner
from PIL import Image
from test_imagefolder import picture

from sakd_cli.config.datasets import TorchvisionConfig
from sakd_cli.data import torchvision_sets
from sakd_cli.data.files import Files
from sakd_cli.errors import DataError, UsageError
from sakd_cli.runs.images import Images, load_images

RUN = "--set data.size=16 --set data.workers=0 --batch-size 10 --epochs 1 -q --set data.download=false"


def pets(root: Path) -> Path:
    """Oxford-IIIT Pet with two breeds."""
    home, lines = root / "oxford-iiit-pet", {"trainval": "", "test": ""}
    (home / "annotations").mkdir(parents=True)
    for breed, name in ((1, "Abyssinian"), (2, "american_bulldog")):
        for number in range(9):
            picture(home / "images" / f"{name}_{number}.jpg", (30, 40), 100 * breed + number)
            lines["test" if number > 5 else "trainval"] += f"{name}_{number} {breed} 1 1\n"
    for part, text in lines.items():
        (home / "annotations" / f"{part}.txt").write_text(text)
    return root


def digits(root: Path) -> Path:
    """MNIST with 30 and 20 images."""
    raw, rng = root / "MNIST" / "raw", np.random.default_rng(0)
    raw.mkdir(parents=True)
    for part, count in (("train", 30), ("t10k", 20)):
        pixels = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = np.arange(count, dtype=np.uint8) % 10
        (raw / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 2051, count, 28, 28) + pixels.tobytes())
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 2049, count) + labels.tobytes())
    return root


def loaded(name: str, root: Path, **options: Any) -> Images:
    given: dict[str, Any] = {"size": 16, "validation": 0.0, "workers": 0, "download": False, "cache": False} | options
    return load_images(TorchvisionConfig(name=f"torchvision/{name}", root=root, **given))


def test_a_set_in_files_is_read_as_torchvision_reads_it(tmp_path: Path) -> None:
    images = loaded("OxfordIIITPet", pets(tmp_path))
    theirs = torchvision.datasets.OxfordIIITPet(tmp_path, split="test")
    test = images.dataset.test
    assert images.dataset.classes == ("Abyssinian", "American Bulldog") == tuple(theirs.classes)
    assert (len(images.train), len(test)) == (12, 6)
    assert isinstance(test.images, Files)
    assert test.labels.tolist() == [label for _, label in theirs]
    for path, (theirs_picture, _) in zip(test.images.paths, theirs, strict=True):
        assert np.array_equal(np.asarray(Image.open(path).convert("RGB")), np.asarray(theirs_picture))
    assert Image.open.__module__ == "PIL.Image"  # pictures can be opened again


def test_a_set_in_memory_has_torchvisions_pixels_and_is_not_mirrored(tmp_path: Path) -> None:
    images = loaded("mnist", digits(tmp_path), size=28)
    theirs = torchvision.datasets.MNIST(tmp_path, train=False)
    test = images.dataset.test
    assert (images.dataset.name, images.dataset.flip) == ("torchvision/MNIST", False)
    assert (len(images.train), len(test), len(images.dataset.classes)) == (30, 20, 10)
    assert torch.equal(test.pixels[:, 1], theirs.data)
    assert torch.equal(test.labels, theirs.targets)
    assert loaded("MNIST", tmp_path, size=32).side == 32
    with pytest.raises(DataError, match=r"50 images of 4096x4096 pixels need 2\.5 GB"):
        loaded("MNIST", tmp_path, size=4096, cache_limit=1.0)


def test_what_is_missing_or_unknown_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"torchvision/OxfordPet: unknown data set 'OxfordPet'; did you mean 'OxfordI"):
        loaded("OxfordPet", tmp_path)
    with pytest.raises(DataError, match=f"torchvision/DTD: not read from {tmp_path}: Dataset not found"):
        loaded("DTD", tmp_path)


def test_every_name_is_a_class_of_torchvision_with_these_arguments() -> None:
    import inspect

    for name, known in torchvision_sets.KNOWN.items():
        kind = getattr(torchvision.datasets, name)
        parameters = inspect.signature(kind.__init__).parameters
        for arguments in (known.train, known.val, known.test):
            assert (arguments or {}).keys() <= parameters.keys() or "kwargs" in parameters, name


def test_from_the_command_line(tmp_path: Path) -> None:
    cli = CliRunner(tmp_path)
    pets(tmp_path / "files")
    fields = ["--dataset", "torchvision/OxfordIIITPet", "--data-root", "files", *shlex.split(RUN)]
    result = cli.sakd("pretrain-teacher", "resnet8", *fields, "--run-dir", "run")
    assert result.code == 0, result.err
    scored = cli.sakd("eval", "run", "--json", "-q", "--set", "timing_seconds=0").document
    assert (scored["images"], scored["dataset"]) == (6, "torchvision/OxfordIIITPet")
    checked = cli.sakd("data", "check", "torchvision/OxfordIIITPet", "--data-root", "files", "--json", "-q")
    assert (checked.code, [part["images"] for part in checked.document["parts"]]) == (0, [12, 6])
    cli.assert_rejects(["pretrain-teacher", "resnet8", "--dataset", "torchvision/None"], 2, "unknown data set 'None'")
