"""CIFAR from torchvision's files: found, missing, damaged, hostile."""

import pickle
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torchvision import datasets as torchvision_datasets

from sakd_cli.config.datasets import CIFAR10Config, CIFAR100Config
from sakd_cli.data import table, torchvision_sets
from sakd_cli.data.dataset import seeded_generator
from sakd_cli.errors import DataError
from sakd_cli.runs import own


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every attempt to download fails and is written down."""
    asked: list[str] = []

    def refuse(url: str, root: str, **_: str) -> None:
        asked.append(url)
        print("Downloading", url)
        (Path(root) / "half.tar.gz").write_bytes(b"half")
        raise OSError("Network is\nunreachable")

    monkeypatch.setattr(torchvision_datasets.utils, "download_and_extract_archive", refuse)
    return asked


@pytest.fixture
def official(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A tiny CIFAR-100 of two training images and one test image that torchvision takes for the official one."""
    folder = tmp_path / "data" / "cifar-100-python"
    folder.mkdir(parents=True)
    pixels = torch.randint(0, 256, (3, 3072), dtype=torch.uint8, generator=seeded_generator(0, "tiny")).numpy()
    contents = {
        "train": {"data": pixels[:2], "fine_labels": [1, 0]},
        "test": {"data": pixels[2:], "fine_labels": [1]},
        "meta": {"fine_label_names": ["apple", "bear"]},
    }
    for name, content in contents.items():
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
    kind = torchvision_datasets.CIFAR100
    md5 = {name: torchvision_datasets.utils.calculate_md5(folder / name) for name in contents}
    monkeypatch.setattr(kind, "train_list", [["train", md5["train"]]])
    monkeypatch.setattr(kind, "test_list", [["test", md5["test"]]])
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": md5["meta"]})
    return folder.parent


def test_cifar_reads_what_is_there(official: Path, no_network: list[str]) -> None:
    dataset = torchvision_sets.load_cifar(CIFAR100Config(root=official))
    entry = pickle.loads((official / "cifar-100-python" / "train").read_bytes())
    assert torch.equal(dataset.train.images, torch.from_numpy(entry["data"]).view(2, 3, 32, 32))
    assert dataset.train.images.is_contiguous()
    assert dataset.train.labels.tolist() == [1, 0]
    assert len(dataset.test) == 1
    assert dataset.classes == ("apple", "bear")
    inside = torchvision_sets.load_cifar(CIFAR100Config(root=official / "cifar-100-python"))
    assert torch.equal(inside.train.images, dataset.train.images)
    assert no_network == []


@pytest.mark.parametrize(("name", "config"), [("cifar10", CIFAR10Config), ("cifar100", CIFAR100Config)])
@pytest.mark.parametrize("download", [True, False])
def test_cifar_missing(
    tmp_path: Path, no_network: list[str], capfd: pytest.CaptureFixture[str], name: str, config: Any, download: bool
) -> None:
    root = tmp_path / "a" / "b"
    with pytest.raises(DataError) as caught:
        table.load(config(root=root, download=download))
    assert caught.value.message.startswith(f"{name}: files not found in {root}")
    assert "\n" not in caught.value.message
    assert ("Network is unreachable" in caught.value.message) == download
    assert caught.value.hint is not None
    assert "--data-root" in caught.value.hint
    assert len(no_network) == download
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr().out == ""


def test_a_failed_download_leaves_an_existing_root_as_it_was(tmp_path: Path, no_network: list[str]) -> None:
    (tmp_path / "mine").touch()
    with pytest.raises(DataError):
        torchvision_sets.load_cifar(CIFAR100Config(root=tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_an_interrupted_download_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(url: str, root: str, **_: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(torchvision_datasets.utils, "download_and_extract_archive", interrupt)
    with pytest.raises(KeyboardInterrupt):
        torchvision_sets.load_cifar(CIFAR100Config(root=tmp_path / "new"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("lost", [["train", "test", "meta"], ["meta"]])
def test_a_download_completes_the_folder(official: Path, monkeypatch: pytest.MonkeyPatch, lost: list[str]) -> None:
    archive = {path.name: path.read_bytes() for path in (official / "cifar-100-python").iterdir()}
    for name in lost:
        (official / "cifar-100-python" / name).unlink()

    def deliver(url: str, root: str, **_: str) -> None:
        folder = Path(root) / "cifar-100-python"
        folder.mkdir()
        for name, content in archive.items():
            (folder / name).write_bytes(content)

    monkeypatch.setattr(torchvision_datasets.utils, "download_and_extract_archive", deliver)
    assert len(torchvision_sets.load_cifar(CIFAR100Config(root=official)).train) == 2
    assert [path.name for path in official.iterdir()] == ["cifar-100-python"]


def test_a_part_of_the_files_is_named(official: Path) -> None:
    (official / "cifar-100-python" / "meta").unlink()
    with pytest.raises(DataError, match="meta of cifar-100-python not found in"):
        torchvision_sets.load_cifar(CIFAR100Config(root=official, download=False))


@pytest.mark.parametrize("name", ["train", "test", "meta"])
def test_one_changed_byte_is_seen(official: Path, no_network: list[str], name: str) -> None:
    path = official / "cifar-100-python" / name
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"cifar100: damaged file .*cifar-100-python: its checksum differs"):
        torchvision_sets.load_cifar(CIFAR100Config(root=official))
    assert no_network == []
    assert path.read_bytes() == content


@pytest.mark.parametrize("name", ["train", "test", "meta"])
@pytest.mark.parametrize("left", [0, 1, -1])
def test_a_file_that_was_cut_is_seen(official: Path, no_network: list[str], name: str, left: int) -> None:
    path = official / "cifar-100-python" / name
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(DataError, match=f"damaged file '{name}'"):
        torchvision_sets.load_cifar(CIFAR100Config(root=official))
    assert no_network == []


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("train", {"data": None, "fine_labels": [0, 2]}, "train files in .*: label 2 where there are 2 classes"),
        ("test", {"data": None, "fine_labels": [-1]}, "test files in .*: label -1 where there are 2 classes"),
        ("test", {"data": None, "fine_labels": []}, "test files in .*: 1 images and 0 labels"),
        ("meta", {"fine_label_names": ["apple", "apple"]}, "meta: two classes of one name"),
        ("meta", {"fine_label_names": ["apple"]}, "train files in .*: label 1 where there are 1 classes"),
    ],
)
def test_sound_files_of_wrong_content_are_seen(
    official: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: dict[str, Any], text: str
) -> None:
    path = official / "cifar-100-python" / name
    pixels = pickle.loads(path.read_bytes()).get("data")
    path.write_bytes(pickle.dumps({key: pixels if value is None else value for key, value in content.items()}))
    kind = torchvision_datasets.CIFAR100
    md5 = torchvision_datasets.utils.calculate_md5(path)
    for files in ("train_list", "test_list"):
        monkeypatch.setattr(kind, files, [[file, md5 if file == name else old] for file, old in getattr(kind, files)])
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": md5 if name == "meta" else kind.meta["md5"]})
    with pytest.raises(DataError, match=text):
        torchvision_sets.load_cifar(CIFAR100Config(root=official))


@pytest.mark.parametrize("fault", ["not an archive", "cut", "another file", "without the images"])
def test_a_wrong_archive_is_told_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    archive = tmp_path / "cifar-100-python.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("readme"))
    if fault in ("not an archive", "cut"):
        archive.write_bytes(b"<html>" if fault == "not an archive" else archive.read_bytes()[:20])
    kind = torchvision_datasets.CIFAR100
    monkeypatch.setattr(kind, "url", archive.as_uri())
    if fault != "another file":  # the hash of the archive is the official one elsewhere
        monkeypatch.setattr(kind, "tgz_md5", torchvision_datasets.utils.calculate_md5(archive))
    with pytest.raises(DataError, match=r"cifar100: files not found in .*; the download failed: "):
        torchvision_sets.load_cifar(CIFAR100Config(root=tmp_path / "new"))
    assert [path.name for path in tmp_path.iterdir()] == [archive.name]


class Canary:
    """Unpickling it writes a word into `sys`."""

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, ("import sys; sys._sakd_canary = 'sang'",)


@pytest.mark.parametrize("name", ["train", "test", "meta"])
def test_a_replaced_pickle_never_runs(official: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(sys, "_sakd_canary", "silent", raising=False)
    path = official / "cifar-100-python" / name
    path.write_bytes(pickle.dumps(Canary()))
    with pytest.raises(DataError, match="damaged"):
        torchvision_sets.load_cifar(CIFAR100Config(root=official))
    # torchvision's own check, should the file change after ours
    with pytest.raises(RuntimeError, match="corrupted"):
        torchvision_datasets.CIFAR100(official, train=True)
    assert sys._sakd_canary == "silent"  # type: ignore[attr-defined]
    pickle.loads(path.read_bytes())
    assert sys._sakd_canary == "sang"  # type: ignore[attr-defined]


def test_default_root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for value in ("", "relative/cache"):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert torchvision_sets.default_root() == tmp_path / ".cache" / "sakd" / "data"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert torchvision_sets.default_root() == tmp_path / ".cache" / "sakd" / "data"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert torchvision_sets.default_root() == tmp_path / "cache" / "sakd" / "data"
    monkeypatch.setenv("XDG_STATE_HOME", "relative/state")
    assert own._file() == tmp_path / ".local/state/sakd/runs.json"


def test_the_real_cifar100() -> None:
    root = Path(__file__).parents[2] / "shared" / "data"
    if not (root / "cifar-100-python").is_dir():
        pytest.skip("the CIFAR-100 files are not on this machine")
    dataset = torchvision_sets.load_cifar(CIFAR100Config(root=root, download=False))
    assert dataset.train.images.shape == (50_000, 3, 32, 32)
    assert dataset.train.labels.bincount().tolist() == [500] * 100
    assert dataset.test.labels.bincount().tolist() == [100] * 100
    assert dataset.classes[:2] == ("apple", "aquarium_fish")
    # The published constants are a little off the exact ones; a wrong channel order would be off by 0.02.
    pixels = dataset.train.images[::10].float() / 255
    assert pixels.mean((0, 2, 3)).tolist() == pytest.approx(dataset.mean, abs=0.005)
    assert pixels.std((0, 2, 3)).tolist() == pytest.approx(dataset.std, abs=0.005)
