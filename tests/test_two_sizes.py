"""A teacher and a student that see the same crops at sizes of their own."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CliRunner
from test_imagefolder import folder
from torch import Tensor
from torch.nn import functional as F

from sakd_cli.config.datasets import ImageFolderConfig
from sakd_cli.config.preprocessing import Preprocessing
from sakd_cli.data.loader import TrainLoader
from sakd_cli.errors import UsageError
from sakd_cli.models import artifact
from sakd_cli.runs.images import Images, load_images

CPU = torch.device("cpu")
TEACHER = Preprocessing(size=48, resize=56, interpolation="bicubic")
FEEDS: dict[str, dict[str, Any]] = {
    "files, resized": {"cache": False, "augment": "crop"},
    "files, border": {"cache": False, "augment": "border"},
    "memory, resized": {"cache": True, "augment": "crop"},
    "memory, border": {"cache": True, "augment": "border"},
}


@pytest.fixture(scope="module")
def root(cli: CliRunner) -> Path:
    return folder(cli.path / "photos", {"train": 8, "val": 3})


def loaded(root: Path, teacher: Preprocessing, **options: Any) -> Images:
    data = ImageFolderConfig(root=root, validation=0.0, **({"size": 24, "workers": 0} | options))
    return load_images(data, None, teacher)


def epoch(images: Images) -> list[Any]:
    loader = TrainLoader(images.train, images.dataset, batch_size=10, seed=0, noise_width=1, device=CPU)
    return list(loader.epoch(1))


def test_changes_of_both_are_the_same_or_are_refused(root: Path) -> None:
    changes = loaded(root, Preprocessing(size=96, resize=96), augment=["border", "autoaugment"]).dataset.changes
    assert changes is not None
    assert not changes.large, "what AutoAugment has learned of images of the student's size"
    for options, text in (
        ({"erase": 0.1}, "data.erase: no box is the same"),
        ({"augment": "trivialaugment"}, "data.augment: trivialaugment shifts by pixels"),
    ):
        with pytest.raises(UsageError, match=text):
            loaded(root, TEACHER, **options)


@pytest.mark.parametrize(("size", "other"), [(24, 48), ((24, 32), (48, 64)), (24, (30, 30)), ((32, 24), 20)])
@pytest.mark.parametrize("feed", FEEDS)
def test_both_see_the_same_crops(feed: str, size: Any, other: Any, root: Path) -> None:
    if size == (32, 24) and "border" in feed:
        with pytest.raises(UsageError, match="20x20 pixels of the teacher and 32x24 of the student are of other"):
            loaded(root, Preprocessing(size=20, resize=20), size=size, **FEEDS[feed])
        return
    teacher = Preprocessing(size=other, resize=min((other, other) if isinstance(other, int) else other))
    images = loaded(root, teacher, size=size, **FEEDS[feed])
    alone = loaded(root, images.train.images.spec.seen, size=size, **FEEDS[feed])  # type: ignore[union-attr]
    for batch, plain in zip(epoch(images), epoch(alone), strict=True):
        assert torch.equal(batch.images, plain.images)
        assert plain.teacher_images is None
        assert plain.for_teacher is plain.images
        theirs: Tensor = batch.for_teacher
        assert theirs.shape[2:] == ((other, other) if isinstance(other, int) else other)
        seen = F.interpolate(theirs, batch.images.shape[2:], mode="bilinear", antialias=True)
        a, b = (x.flatten(1) - x.flatten(1).mean(dim=1, keepdim=True) for x in (seen, batch.images))
        assert (F.cosine_similarity(a, b) > 0.93).all()


def test_the_number_of_workers_changes_nothing(root: Path) -> None:
    for augment in ("crop", "border"):
        none, two = (epoch(loaded(root, TEACHER, cache=False, augment=augment, workers=n)) for n in (0, 2))
        for one, other in zip(none, two, strict=True):
            assert torch.equal(one.images, other.images)
            assert torch.equal(one.for_teacher, other.for_teacher)


@pytest.mark.parametrize(("size", "router"), [("24", "adaptive"), ("24,40", "always")])
def test_a_student_learns_from_a_teacher_of_another_size(cli: CliRunner, root: Path, size: str, router: str) -> None:
    data = ["--dataset", "imagefolder", "--data-root", str(root), "--epochs", "1", "-q"]
    name = f"teacher-{router}"
    large = {"24": "48", "24,40": "48,80"}[size]
    shown = ["--set", f"data.size={large}", "--set", "data.interpolation=bicubic"]
    assert cli.sakd("pretrain-teacher", "resnet8", *data, *shown, "--run-dir", name).code == 0
    words = ["distill", "--teacher", f"./{name}", "--student", "resnet8", "--method", "fitnet", "--router", router]
    result = cli.sakd(*words, *data, "--set", f"data.size={size}", "--run-dir", router, "--json")
    summary = result.document
    card = artifact.load(cli.path / router / "student").card
    assert card.seen.interpolation == "bicubic"  # as its teacher's card says; its size is what was asked for
    assert card.side == (24 if size == "24" else (24, 40))
    about = json.loads((cli.path / name / "teacher/config.json").read_text())
    assert summary["teacher"]["top1"] == about["top1"]  # it is scored as its own card says
    document = cli.sakd("eval", router, "--json", "--set", "timing_seconds=0").document
    assert document["teacher"]["top1"] == about["top1"]
    assert document["teacher"]["macs"] > 3 * document["macs"]


def test_a_student_takes_the_preprocessing_of_its_teacher(cli: CliRunner, root: Path) -> None:
    data = ["--dataset", "imagefolder", "--data-root", str(root), "--epochs", "1", "-q"]
    shown = "size=20 resize=23 resize_mode=squash interpolation=lanczos background=1,2,3"
    options = [part for setting in shown.split() for part in ("--set", f"data.{setting}")]
    assert cli.sakd("pretrain-teacher", "resnet8", *data, *options, "--run-dir", "squashed").code == 0
    words = ["distill", "--teacher", "./squashed", "--student", "resnet8", "--method", "kd", "--router", "always"]
    assert cli.sakd(*words, *data, "--run-dir", "like").code == 0
    one, other = (artifact.load(cli.path / path).card for path in ("squashed/teacher", "like/student"))
    assert one.seen == other.seen
    own = cli.sakd(*words, *data, "--set", "data.interpolation=nearest", "--run-dir", "own")
    assert own.code == 0
    assert "interpolation nearest; the teacher's card says lanczos" in own.err
    assert artifact.load(cli.path / "own/student").card.seen == one.seen.model_copy(update={"interpolation": "nearest"})


@pytest.mark.parametrize("method", ["at", "fsp", "ofd", "reviewkd", "kdsvd", "sp"])
def test_maps_of_two_sides_are_compared(cli: CliRunner, root: Path, method: str) -> None:
    data = ["--dataset", "imagefolder", "--data-root", str(root), "--epochs", "1", "-q", "--batch-size", "8"]
    shape = ["--set", "data.size=24,40", "--dry-run"]
    words = ["distill", "--teacher", "./teacher-always", "--student", "resnet8", "--method", method, *data, *shape]
    result = cli.sakd(*words)
    assert result.code == 0, result.err


def test_a_run_is_found_again_before_and_after_its_teacher_was_trained(cli: CliRunner, root: Path) -> None:
    data = ["--dataset", "imagefolder", "--data-root", str(root), "--epochs", "1", "-q", "--set", "data.size=20"]
    words = ["distill", "--teacher", "resnet8", "--pretrain", "--student", "resnet8", "--method", "kd", *data]
    for _ in range(2):
        again = cli.sakd(*words, "--router", "always", "--runs-dir", "found", "--resume", "auto")
        assert again.code == 0, again.err
        assert len(list((cli.path / "found").glob("*/config.yaml"))) == 2


def test_what_needs_one_size_says_so(cli: CliRunner, root: Path) -> None:
    data = ["--dataset", "imagefolder", "--data-root", str(root), "--epochs", "1", "-q", "--set", "data.size=16"]
    words = ["distill", "--teacher", "./teacher-adaptive", "--student", "resnet8", *data]
    cli.assert_rejects(
        [*words, "--method", "kd", "--cache-teacher", "--router", "always"], 2, "a teacher cache is for one size"
    )
    cli.assert_rejects([*words, "--residual-students", "1"], 2, "residual students need one size")
