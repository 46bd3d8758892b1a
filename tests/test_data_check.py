"""`sakd data check`, and runs on own images from the command line: trained, resumed, evaluated, normalised apart."""

import json
import os
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CliRunner
from PIL import Image
from safetensors.torch import load_file
from test_imagefolder import cut_short, folder, picture

from sakd_cli.config.training import DistillConfig
from sakd_cli.data.check import find_unreadable
from sakd_cli.data.decode import Reading
from sakd_cli.documents.table import DataCheck
from sakd_cli.models.table import create
from sakd_cli.runs import build
from sakd_cli.runs.locate import locate_inputs

RUN = "--dataset imagefolder --data-root photos --set data.size=16 --set data.workers=0 --batch-size 10 --epochs 2 -q"


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> CliRunner:
    """A folder with pictures and a teacher for them."""
    cli = CliRunner(tmp_path_factory.mktemp("lab"))
    folder(cli.path / "photos", {"train": 10, "val": 4})
    result = cli.sakd("pretrain-teacher", "resnet8", *shlex.split(RUN), "--set", "data.mean=[0.4,0.5,0.6]")
    assert result.code == 0, result.err
    return cli


def test_nothing_is_wrong_with_a_sound_folder(lab: CliRunner) -> None:
    document = lab.sakd("data", "check", "photos", "--json", "-q").document
    DataCheck.model_validate(document)
    assert (document["findings"], document["read"], document["classes"]) == ([], 42, 3)
    assert [part["images"] for part in document["parts"]] == [30, 12]
    result = lab.sakd("data", "check", "photos")
    assert (result.code, "nothing is wrong" in result.out) == (0, True)


def test_everything_that_is_wrong_is_named_at_once(tmp_path: Path) -> None:
    folder(tmp_path / "photos", {"train": 3, "val": 2})
    train, val = tmp_path / "photos/train", tmp_path / "photos/val"
    (train / "dog").mkdir()
    picture(val / "Bee/0.png", (9, 9), 0)
    cut_short(train / "ant/1.jpg")
    (val / "cat/0.png").write_bytes(b"")
    (val / "cat/[red].png").write_text("no picture")
    (val / "ant/loop").symlink_to(val)
    result = CliRunner(tmp_path).sakd("data", "check", "photos", "--json", "-q")
    assert (result.code, result.err) == (3, "")
    document = json.loads(result.out)
    DataCheck.model_validate(document)
    assert (document["read"], sum(part["images"] for part in document["parts"])) == (14, 17)
    found = {(one["kind"], Path(one["path"]).name): one["text"] for one in document["findings"]}
    assert found.keys() == {
        ("empty-class", "dog"),
        ("case", "bee"),
        ("classes-differ", "train"),
        ("classes-differ", "val"),
        ("loop", "loop"),
        ("unreadable", "1.jpg"),
        ("unreadable", "0.png"),
        ("unreadable", "[red].png"),
    }
    assert found["unreadable", "0.png"] == "is empty"
    assert found["classes-differ", "train"] == "lacks Bee, which val has"
    table = CliRunner(tmp_path).sakd("data", "check", "photos", COLUMNS="200")
    assert (table.code, "unreadable 3" in table.out, "[red].png" in table.out) == (3, True, True)


def notes_of(document: dict[str, Any]) -> dict[tuple[str, str], str]:
    return {(one["kind"], Path(one["path"]).name): one["text"] for one in document["notes"]}


def test_what_is_no_fault_is_told_too(tmp_path: Path) -> None:
    photos = folder(tmp_path / "photos", {"train": 3, "val": 2})
    train = photos / "train"
    with Image.open(train / "ant/1.jpg") as photo:
        photo.rotate(90).save(train / "ant/turned.jpg", exif=turned(6))
        photo.rotate(10).save(train / "ant/two.gif", save_all=True, append_images=[photo.rotate(20)])
        photo.rotate(30).resize((1, 400)).save(train / "bee/strip.png")
    wide = np.linspace(0, 900, 64).reshape(8, 8).astype(np.uint16)
    Image.fromarray(wide).save(train / "cat/dark.png")
    for name in ("ant/notes.txt", "ant/list.txt", "bee/.hidden.png", "cat/README"):
        (train / name).write_text("no picture")
    for part in ("train", "val"):
        picture(photos / part / "odd\tname/0.png", (9, 9), len(part))
    cli = CliRunner(tmp_path)
    document = cli.sakd("data", "check", "photos", "--json", "-q", "--set", "data.gray_range=0,4095").document
    DataCheck.model_validate(document)
    assert document["findings"] == []
    assert notes_of(document) == {
        ("not-taken", "train"): "holds files that are not taken: 2 *.txt, 1 hidden, 1 without an ending",
        ("turned", "train"): "1 of its pictures are photographs stored turned: turned upright",
        ("frames", "train"): "1 of its pictures have several frames or pages: the first is taken",
        ("strip", "strip.png"): "has 1x400 pixels: only its middle is seen",
        ("range", "dark.png"): "holds greys from 0 to 900, where data.gray_range is 0 to 4095",
        ("name", "train"): r"the class 'odd\tname' has spaces or signs that are not seen",
        ("name", "val"): r"the class 'odd\tname' has spaces or signs that are not seen",
    }
    refused = json.loads(cli.sakd("data", "check", "photos", "--json", "-q").out)["findings"]
    assert [(one["kind"], Path(one["path"]).name) for one in refused] == [("unreadable", "dark.png")]
    run = cli.sakd("pretrain-teacher", "resnet8", *shlex.split(RUN), "--set", "data.gray_range=0,4095", "--epochs", "1")
    assert run.code == 0, run.err
    assert "holds files that are not taken: 2 *.txt" in run.err


def test_pictures_beside_the_parts_and_the_classes_are_told(tmp_path: Path) -> None:
    cli, photos = CliRunner(tmp_path), folder(tmp_path / "photos", {"train": 3, "val": 2})
    for name in ("train/stray.JPG", "train/stray.png", "a.png", "valid/ant/0.png", "Train/ant/0.png", "more/0.png"):
        picture(photos / name, (9, 9), len(name))
    document = cli.sakd("data", "check", "photos", "--json", "-q").document
    assert [part["images"] for part in document["parts"]] == [9, 6]
    beside = "is no part of the data set: not used"
    assert document["findings"] == []
    assert notes_of(document) == {
        ("not-taken", "train"): "2 of its pictures, first stray.JPG, lie in no folder of a class: not used",
        ("not-taken", "photos"): "1 of its pictures, first a.png, lie in no folder of a class: not used",
        **{("not-taken", name): beside for name in ("Train", "more", "valid")},
    }
    run = cli.sakd("pretrain-teacher", "resnet8", *shlex.split(RUN), "--epochs", "1", "--run-dir", "run")
    assert (run.code, run.err.count(beside)) == (0, 3), run.err
    (photos / "a.png").rename(tmp_path / "photos/val/a.png")
    scored = cli.sakd("eval", "run", "--data-root", "photos", "--split", "all", "--set", "timing_seconds=0", "--json")
    assert scored.document["images"] == 17
    assert scored.err.count(beside) == 1, "valid and Train have labels"


def turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[274] = orientation
    return exif.tobytes()


def test_the_same_picture_in_two_places_is_found_whatever_its_file(tmp_path: Path) -> None:
    photos = folder(tmp_path / "photos", {"train": 3, "val": 2})
    with Image.open(photos / "train/ant/0.png") as picture_:
        picture_.save(photos / "val/ant/copy.bmp")
        picture_.transpose(Image.Transpose.ROTATE_90).save(photos / "val/bee/turned.png", exif=turned(6))
    shutil.copy(photos / "train/cat/1.jpg", photos / "train/bee/1b.jpg")
    shutil.copy(photos / "train/cat/2.png", photos / "train/cat/2b.png")  # of one class: no matter
    result = CliRunner(tmp_path).sakd("data", "check", "photos", "--json", "-q")
    assert result.code == 3
    found = {Path(one["path"]).name: one["text"] for one in json.loads(result.out)["findings"]}
    assert found.keys() == {"0.png", "1b.jpg"}
    assert found["0.png"].endswith("val/ant/copy.bmp and 1 more")
    assert found["1b.jpg"].endswith("train/cat/1.jpg")


def test_names_that_are_no_text_are_refused_before_training(tmp_path: Path) -> None:
    photos = os.fsencode(folder(tmp_path / "photos", {"train": 3, "val": 2}))
    os.rename(photos + b"/train/ant/0.png", photos + b"/train/ant/caf\xe9.png")
    for part in (b"train", b"val"):
        os.rename(photos + b"/" + part + b"/bee", photos + b"/" + part + b"/caf\xe9")
    cli = CliRunner(tmp_path)
    result = cli.sakd("data", "check", "photos", "--json", "-q")
    found = {Path(one["path"]).name: one["text"] for one in json.loads(result.out)["findings"]}
    assert result.code == 3
    assert found.keys() == {r"caf\xe9", r"caf\xe9.png"}
    assert found[r"caf\xe9"] == "the name of this class is not UTF-8, as of an archive from Windows: rename it"
    fields = ["pretrain-teacher", "resnet8", *shlex.split(RUN)]
    cli.assert_rejects(fields, 3, r"caf\xe9.png: its name is not UTF-8")
    os.rename(photos, photos + b"\xe9")
    cli.assert_rejects([*fields, "--data-root", os.fsdecode(photos + b"\xe9")], 3, r"photos\xe9: its name is not UTF-8")


def test_signs_that_are_not_seen_are_shown(tmp_path: Path) -> None:
    bad = folder(tmp_path / "photos", {"train": 3, "val": 2}) / "train/ant/a\nb\t\u202e c.png"
    bad.write_text("no picture")
    cli = CliRunner(tmp_path)
    (found,) = json.loads(cli.sakd("data", "check", "photos", "--json", "-q").out)["findings"]
    assert found["path"].endswith(r"train/ant/a\nb\t\u202e c.png")
    cli.assert_rejects(
        ["pretrain-teacher", "resnet8", *shlex.split(RUN)], 3, r"a\nb\t\u202e c.png (class ant): is no picture"
    )


def test_a_named_set_is_checked_too(tmp_path: Path) -> None:
    cli = CliRunner(tmp_path)
    assert cli.sakd("data", "check", "shapes", "--set", "data.train=40", "--set", "data.test=20", "--json").code == 0
    result = cli.sakd("data", "check", "cifar100", "--data-root", "nowhere", "--json")
    assert (result.code, json.loads(result.out)["findings"][0]["kind"]) == (3, "missing")
    cli.assert_rejects(["data", "check", "nowhere"], 3, "nowhere: no such folder")
    folder(tmp_path, {"train": 2, "test": 1})
    result = cli.sakd("data", "check", "cinic10", "--data-root", ".", "--json", "-q")
    texts = [one["text"] for one in json.loads(result.out)["findings"]]
    assert [text.split("; ")[0] for text in texts] == [
        "cinic10 has 10 classes, here are 3",
        "cinic10 has 90,000 training images, here are 6",
        "cinic10 has 90,000 test images, here are 3",
    ]


def test_many_files_are_read_by_several_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    picture(tmp_path / "good.png", (8, 8), 0)
    (tmp_path / "bad.png").write_bytes(b"")
    good, bad = (str(tmp_path / name) for name in ("good.png", "bad.png"))
    faults = list(find_unreadable([good] * 250 + [bad] + [good] * 50, Reading()))
    assert [place for place, fault in enumerate(faults) if fault] == [250]


# --- runs


def student(lab: CliRunner, run: str) -> dict[str, torch.Tensor]:
    return load_file(lab.path / run / "student" / "model.safetensors")


@pytest.mark.parametrize("feed", ["on", "off"])
def test_a_run_on_own_images_goes_on_to_the_same_bits(lab: CliRunner, feed: str) -> None:
    fields = shlex.split(f"distill --teacher resnet8 --student resnet8 {RUN} --set data.cache={feed}")
    fields += shlex.split("--set data.augment=crop --set save_every=2 --set data.validation=0.2")
    assert lab.sakd(*fields, "--run-dir", f"whole-{feed}").code == 0
    run = f"cut-{feed}"
    with pytest.MonkeyPatch.context() as patch:
        from sakd_cli.cli.console import ConsoleReporter

        asked = iter([0] * 5)
        patch.setattr(ConsoleReporter, "stop", lambda self: next(asked, 2))
        assert lab.sakd(*fields, "--run-dir", run).code == 130
    assert lab.sakd("distill", "--resume", run, "-q").code == 0
    one, other = student(lab, f"whole-{feed}"), student(lab, run)
    assert all(torch.equal(one[name], other[name]) for name in one)
    about = json.loads((lab.path / run / "student/config.json").read_text())
    assert (about["side"], about["classes"], about["dataset"]) == (16, ["ant", "bee", "cat"], "imagefolder")


def test_a_bad_picture_is_refused_before_anything_is_written(lab: CliRunner, tmp_path: Path) -> None:
    bad = folder(tmp_path / "photos", {"train": 4, "val": 1})
    cut_short(bad / "train/bee/1.jpg")
    fields = ["pretrain-teacher", "resnet8", *shlex.split(RUN), "--set", "data.validation=0"]
    cli = CliRunner(tmp_path)
    result = cli.assert_rejects(fields, 3, "train/bee/1.jpg (class bee): is damaged")
    assert "sakd data check" in result.err
    left = cli.sakd(*fields, "--set", "data.on_bad_image=skip", "--json")
    assert left.document["skipped_images"] == 1
    assert "files that could not be read and are left out: 1 (" in left.err


def test_the_teacher_sees_images_by_its_own_normalisation(lab: CliRunner) -> None:
    (run,) = (lab.path / "runs").glob("*pretrain*")
    fields = {"data": {"name": "imagefolder", "root": lab.path / "photos", "size": 16}, "student": "resnet8"}
    job = build.distillation(locate_inputs(DistillConfig.model_validate(fields | {"teacher": str(run)})))
    assert job.teacher is not None
    mean, std = job.images.dataset.mean, job.images.dataset.std
    assert job.teacher.card.mean == (0.4, 0.5, 0.6) != mean == job.card.mean
    pixels = torch.rand(5, 3, 16, 16)

    def normal(by: tuple[float, ...]) -> torch.Tensor:
        return (pixels - torch.tensor(by).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)

    plain = create("resnet8", 3).eval()
    plain.load_state_dict(job.teacher.model.state_dict())
    expected = plain.features(normal((0.4, 0.5, 0.6)))
    teacher = job.teacher.model.cpu()
    seen = [teacher.features(normal(mean)), teacher.features(normal(mean), want="blocks")]
    seen.append(teacher.features(normal(mean), want="preactivations"))
    for features in seen:
        assert torch.allclose(features.logits, expected.logits, atol=1e-5)
    halfway = teacher.run(teacher.run(normal(mean), 0, 2), 2, len(teacher.stages) + 1)
    assert torch.allclose(halfway, expected.logits, atol=1e-5)


def test_equal_normalisation_changes_no_bit() -> None:
    network = create("resnet8", 3).eval()
    images = torch.randn(2, 3, 16, 16)
    before = network(images)
    network.set_input_normalization((0.5, 0.4, 0.3), (0.2, 0.2, 0.2), given=((0.5, 0.4, 0.3), (0.2, 0.2, 0.2)))
    assert torch.equal(network(images), before)
    network.set_input_normalization((0.5, 0.4, 0.3), (0.2, 0.2, 0.2), given=((0.0,) * 3, (1.0,) * 3))
    assert not torch.equal(network(images), before)
    assert network.state_dict().keys() == create("resnet8", 3).state_dict().keys()


def test_an_evaluation_converts_too(lab: CliRunner) -> None:
    (run,) = (lab.path / "runs").glob("*pretrain*")
    own = lab.sakd("eval", str(run), "--json", "-q", "--set", "timing_seconds=0").document
    other = lab.sakd(
        "eval", str(run), "--json", "-q", "--set", "data.mean=[0,0,0]", "--set", "timing_seconds=0"
    ).document
    assert own["loss"] == pytest.approx(other["loss"], rel=1e-4)
