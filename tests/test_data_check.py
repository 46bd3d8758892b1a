"""`sakd data check`, and runs on own images from the command line: trained, resumed, evaluated, normalised apart."""

import json
import shlex
from pathlib import Path

import pytest
import torch
from conftest import CliRunner
from safetensors.torch import load_file
from test_imagefolder import cut_short, folder, picture

from sakd_cli.config.training import DistillConfig
from sakd_cli.data.decode import Reading, find_unreadable
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


def test_many_files_are_read_by_several_processes(tmp_path: Path) -> None:
    picture(tmp_path / "good.png", (8, 8), 0)
    (tmp_path / "bad.png").write_bytes(b"")
    good, bad = (str(tmp_path / name) for name in ("good.png", "bad.png"))
    faults = list(find_unreadable([good] * 250 + [bad] + [good] * 50, Reading(), processes=2))
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
    assert "1 files could not be read" in left.err


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
