"""A run goes on, and is evaluated, with the images it began with; any other folder is scored as a whole."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import CliRunner, Result
from test_splits import CLASSES, folder, paint

OPTIONS = ["--dataset", "imagefolder", "--set", "data.size=8", "--batch-size", "20", "-q"]


def recoloured(root: Path) -> Path:
    """Other pictures than `folder` paints."""
    for number, path in enumerate(sorted(root.rglob("*.png"))):
        paint(path, 40000 + number)
    return root


@pytest.fixture(scope="module")
def home(cli: CliRunner) -> CliRunner:
    """A folder `photos` with train and val, and a run of it that was stopped before its last epoch: `stopped`."""
    folder(cli.path / "photos", ("train", "val"), 8)
    result = cli.sakd(
        "pretrain-teacher", "resnet8", *OPTIONS, "--data-root", "photos", "--epochs", "2", "--run-dir", "run"
    )
    assert result.code == 0, result.err
    shutil.copytree(cli.path / "run", cli.path / "stopped")
    (cli.path / "stopped/summary.json").unlink()
    shutil.rmtree(cli.path / "stopped/checkpoints/last")
    (cli.path / "stopped/checkpoints/previous").rename(cli.path / "stopped/checkpoints/last")
    return cli


def weights(run: Path) -> bytes:
    return (run / "teacher/model.safetensors").read_bytes()


Change = Callable[[Path], object]
CHANGES: dict[str, tuple[Change, str]] = {
    "replaced": (lambda d: paint(d / "train/ant/3.png", 999), "train/ant/3.png: another content"),
    "renamed": (
        lambda d: (d / "train/ant/0.png").rename(d / "train/ant/zz.png"),
        "train/ant/0.png: missing; train/ant/zz.png: new",
    ),
    "missing": (lambda d: (d / "val/bee/1.png").unlink(), "val/bee/1.png: missing"),
    "new": (lambda d: paint(d / "train/cat/99.png", 999), "train/cat/99.png: new"),
    "class renamed": (
        lambda d: [(d / part / "ant").rename(d / part / "zebra") for part in ("train", "val")],
        "the classes were ant, bee, cat and are bee, cat, zebra",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_run_does_not_go_on_with_other_images(name: str, home: CliRunner, tmp_path: Path) -> None:
    change, text = CHANGES[name]
    shutil.copytree(home.path / "photos", tmp_path / "photos")
    change(tmp_path / "photos")
    moved = ["pretrain-teacher", "--resume", "stopped", "--data-root", str(tmp_path / "photos")]
    home.assert_rejects(moved, 3, f"stopped: not the images that the run began with: {text}")


def test_a_moved_folder_goes_on_to_the_same_bits(home: CliRunner, tmp_path: Path) -> None:
    for name in ("photos", "stopped"):
        shutil.copytree(home.path / name, tmp_path / name)
    cli = CliRunner(tmp_path)
    result = cli.sakd("pretrain-teacher", "--resume", "stopped", "--data-root", "photos")
    assert result.code == 0, result.err
    assert weights(tmp_path / "stopped") == weights(home.path / "run")
    assert "root: photos" in (tmp_path / "stopped/config.yaml").read_text()
    listing = tmp_path / "stopped/images.json"
    assert json.loads(listing.read_text())["classes"] == list(CLASSES)
    listing.write_text(listing.read_text().replace("0.png", "1.png", 1))
    longer = ["pretrain-teacher", "--resume", "stopped", "--epochs", "3"]
    cli.assert_rejects(longer, 4, "made with other images than images.json lists")
    listing.unlink()  # no way around, either
    cli.assert_rejects(longer, 4, "made with other images than images.json lists")


# --- evaluation


def scored(cli: CliRunner, *words: str) -> tuple[Result, dict[str, object]]:
    result = cli.sakd("eval", *words, "--json", "--set", "timing_seconds=0")
    document = result.document
    return result, {key: document[key] for key in ("split", "images", "trained_on")}


def test_the_parts_of_a_run(home: CliRunner) -> None:
    assert scored(home, "run")[1] == {"split": "test", "images": 24, "trained_on": 0}
    train, val, every = (scored(home, "run", "--split", part)[1] for part in ("train", "val", "all"))
    assert (train["split"], train["trained_on"]) == ("train", train["images"])
    assert val["trained_on"] == 0
    assert int(str(train["images"])) + int(str(val["images"])) == 24
    assert every == {"split": "all", "images": 48, "trained_on": train["images"]}
    shapes = ["--dataset", "shapes", "--set", "data.train=60", "--set", "data.test=20", "--epochs", "1", "-q"]
    assert home.sakd("pretrain-teacher", "resnet8", *shapes, "--validation", "0", "--run-dir", "shapes").code == 0
    assert scored(home, "shapes", "--split", "all")[1] == {"split": "all", "images": 80, "trained_on": None}
    home.assert_rejects(["eval", "shapes", "--split", "val"], 2, "there is no validation part")


def test_other_test_images_are_refused_and_more_are_told(home: CliRunner, tmp_path: Path) -> None:
    own = CliRunner(tmp_path)
    for name in ("photos", "run"):
        shutil.copytree(home.path / name, tmp_path / name)
    config = tmp_path / "run/config.yaml"
    config.write_text(config.read_text().replace(str(home.path), str(tmp_path)))
    paint(tmp_path / "photos/train/ant/0.png", 999)  # not among those that are evaluated
    (tmp_path / "photos/val/ant/0.png").rename(tmp_path / "photos/val/ant/x.png")  # the same image
    assert scored(own, "run")[1]["images"] == 24
    shutil.copy(tmp_path / "photos/train/bee/2.png", tmp_path / "photos/val/bee/copy.png")
    result, found = scored(own, "run")
    assert found["images"] == 25
    assert "test images that are new since the run began: 1" in result.err
    if found["trained_on"]:
        assert "1 of the 25 test images were trained on" in result.err
    for part in ("train", "val"):
        (tmp_path / "photos" / part / "ant").rename(tmp_path / "photos" / part / "zebra")
    own.assert_rejects(["eval", "run"], 3, "the classes were ant, bee, cat and are bee, cat, zebra")
    for part in ("train", "val"):
        (tmp_path / "photos" / part / "zebra").rename(tmp_path / "photos" / part / "ant")
    paint(tmp_path / "photos/val/bee/1.png", 999)
    own.assert_rejects(["eval", "run"], 3, "not the images that the run began with: val/bee/1.png: another content")
    assert scored(own, "run", "--data-root", "photos")[1]["split"] == "all"


def test_a_moved_folder_is_the_runs_own_and_any_other_is_scored_whole(home: CliRunner, tmp_path: Path) -> None:
    shutil.copytree(home.path / "photos", tmp_path / "moved")
    assert scored(home, "run", "--data-root", str(tmp_path / "moved"))[1]["split"] == "test"
    shutil.copytree(home.path / "run/teacher", tmp_path / "alone")
    assert scored(home, str(tmp_path / "alone"), "--data-root", "photos")[1] == {
        "split": "test",
        "images": 24,
        "trained_on": None,
    }
    others = recoloured(folder(tmp_path / "others", count=5))
    shutil.rmtree(others / "bee")
    result, found = scored(home, "run", "--data-root", str(others))
    assert found == {"split": "all", "images": 10, "trained_on": 0}
    assert "has no image of bee" in result.err
    shutil.copytree(home.path / "photos/train/bee", others / "bee")
    result, found = scored(home, "run", "--data-root", str(others))
    assert (found["images"], 5 < int(str(found["trained_on"])) <= 8) == (18, True)
    assert f"{found['trained_on']} of these 18 images were trained on" in result.err


# --- from an extreme image to its photo


def test_every_image_of_an_inspection_has_its_file(home: CliRunner) -> None:
    photos = ["--data-root", "photos", "--epochs", "1", *OPTIONS]
    words = ["distill", "--teacher", "./run", "--student", "resnet8", "--method", "fitnet", *photos]
    for router in ("adaptive", "random"):
        assert home.sakd(*words, "--router", router, "--run-dir", router).code == 0
        for split in ("train", "test"):
            out = ["--split", split, "--samples", f"{router}-{split}.jsonl", "-q"]
            result = home.sakd("inspect-spots", router, *out)
            assert result.code == 0, result.err
            rows = [json.loads(line) for line in (home.path / f"{router}-{split}.jsonl").read_text().splitlines()]
            part = "train" if split == "train" else "val"
            assert len({row["file"] for row in rows}) == len(rows)
            for row in rows:
                assert row["file"].startswith(f"{part}/{CLASSES[row['label']]}/") if "label" in row else True
                assert (home.path / "photos" / row["file"]).is_file()
    document = home.sakd("inspect-spots", "adaptive", "--json", "--html", "page.html").document
    (ends, *_) = document["measured"]["extremes"]
    names = {image["file"] for image in ends["highest"] + ends["lowest"]}
    assert all((home.path / "photos" / name).is_file() for name in names)
    page = (home.path / "page.html").read_text()
    assert all(name in page for name in names)
