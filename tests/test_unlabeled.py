"""Images without labels: a plain script, fixed shapes, records of the others alone; what is refused."""

import copy
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import test_replay as replay
import torch
from conftest import PAIR, TINY, CliRunner
from emulator import Emulator
from PIL import Image
from test_ahead import Halt
from test_imagefolder import folder as pictures
from test_step import batches, fit, make
from torch.nn import functional as F

from sakd_cli.config.datasets import ImageFolderConfig, ShapesConfig
from sakd_cli.engine import checkpoint
from sakd_cli.engine.recorder import Rows, SpotRecorder, top1
from sakd_cli.engine.task import SpotUse
from sakd_cli.errors import DataError, Stopped
from sakd_cli.runs.images import load_images, with_unlabeled


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("router", ["always", "never"])
def test_twenty_steps_are_those_of_a_plain_script(router: str) -> None:
    task = make("kd", router)
    student, teacher = copy.deepcopy(task.network), task.teacher_features.network
    known = [torch.tensor([1.0, 0, 1, 1, 0, 1]), torch.zeros(6), torch.ones(6)]
    made = [replace(batch, ratio=known[k % 3]) for k, batch in enumerate(batches(task, 20))]
    sgd = torch.optim.SGD(student.train().parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    for batch in made:
        logits, labelled = student(batch.images), batch.ratio > 0
        loss = F.cross_entropy(logits[labelled], batch.labels[labelled]) if labelled.any() else logits.sum() * 0
        if router == "always":
            p, q = (teacher(batch.images) / 4).softmax(1), (logits / 4).log_softmax(1)
            loss = loss + 16 * (p * (p.log() - q)).sum(1).mean()
        sgd.zero_grad()
        loss.backward()
        sgd.step()
    fit(task, made)
    for a, b in zip(task.network.state_dict().values(), student.state_dict().values(), strict=True):
        assert torch.allclose(a.double(), b.double(), rtol=1e-10, atol=1e-11)


def test_records_and_accuracy_are_of_the_labelled_ones() -> None:
    recorder = SpotRecorder([("logits", "logits")], 2, 4, torch.device("cpu"))
    weight, chance = torch.tensor([[1.0, 0, 1, 1]]), torch.full((1, 4), 0.5)
    rows = Rows(torch.tensor([0, 1, 0, 0]), torch.tensor([0, 1, 2, 9]), torch.tensor([1.0, 1, 1, 0]))
    recorder.add(SpotUse(weight, chance, {}), rows)
    assert recorder.by_sample()["visits"].tolist() == [1, 1, 1, 0]
    (spot,) = recorder.close_epoch(1).spots
    assert (spot.fraction, spot.probability, spot.by_class) == (pytest.approx(2 / 3), 0.5, [1.0, 0.0])
    assert float(top1(torch.eye(2)[[0, 0, 0, 1]], rows)) == pytest.approx(200 / 3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("unlabelled")
    (path / "deep").mkdir()
    for k in range(30):
        Image.new("RGB", (40, 36), (8 * k, 90, 200)).save(path / ("deep" if k % 2 else ".") / f"{k}.png")
    return path


def test_a_run_mixes_them_in_and_goes_on(trained_cli: CliRunner, folder: Path) -> None:
    words = [*PAIR, "--method", "fitnet", *TINY, "--set", f"data.unlabeled={folder}"]
    found = trained_cli.sakd(*words, "--json", "--set", "data.balance=balanced")
    run = found.document["run"]
    assert "and 30 images without labels, for which the teacher alone counts" in found.err
    assert (found.document["images"], sum(one["images"] for one in found.document["classes"])) == (90, 90)
    assert len(trained_cli.path.joinpath(run, "images.json").read_text().split("unlabeled")) == 2
    assert trained_cli.sakd("distill", "--resume", run, "--epochs", "2", "-q").code == 0
    assert trained_cli.sakd("eval", run, "-q").code == 0
    assert trained_cli.sakd("inspect-spots", run, "--json").code == 0
    (folder / "0.png").unlink()
    again = trained_cli.sakd("distill", "--resume", run, "--epochs", "3")
    assert "not the images that the run began with" in again.err
    Image.new("RGB", (40, 36), (0, 90, 200)).save(folder / "0.png")


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--method", "dkd"], "data.unlabeled: method dkd needs labelled images alone"),
        (["--method", "fitnet+crd"], "data.unlabeled: method crd needs labelled images alone"),
        (["--router", "wsld"], "data.unlabeled: router wsld needs labelled images alone"),
        (["--set", "data.mixup=0.2"], "data.unlabeled: data.mixup needs labelled images alone"),
        (["--set", "data.unlabeled=nowhere"], "nowhere: no such file or directory"),
    ],
)
def test_what_needs_labels_costs_a_line(trained_cli: CliRunner, folder: Path, words: list[str], text: str) -> None:
    result = trained_cli.sakd(*PAIR, *TINY, "--set", f"data.unlabeled={folder}", *words)
    assert text in result.err.splitlines()[0]
    assert result.code in (2, 3)


@pytest.mark.parametrize("labelled", [True, False])
def test_a_picture_that_cannot_be_read_is_named_or_left_out(tmp_path: Path, labelled: bool) -> None:
    """Left out with `on_bad_image: skip`, which data sets in memory do not have."""
    pictures(tmp_path / "own", {"": 4})
    pictures(tmp_path / "more", {"": 4})
    (tmp_path / "more" / "ant" / "0.png").write_bytes(b"no picture")
    own = ImageFolderConfig(root=tmp_path / "own", size=32, on_bad_image="skip") if labelled else ShapesConfig(train=60)
    config = own.model_copy(update={"unlabeled": tmp_path / "more"})
    images = load_images(config)
    if not labelled:
        with pytest.raises(DataError, match=r"data.unlabeled: .*0.png") as told:
            with_unlabeled(images, config)
        assert "on_bad_image" not in str(told.value.hint)
        return
    images = with_unlabeled(images, config)
    assert images.unlabeled is not None
    assert (len(images.unlabeled), images.dataset.skipped) == (11, 1)


def test_alone_there_is_nothing_to_learn_from_them(trained_cli: CliRunner, folder: Path) -> None:
    words = ["pretrain-teacher", "resnet8", *TINY, "--set", f"data.unlabeled={folder}"]
    trained_cli.assert_rejects(words, 2, "data.unlabeled: without a teacher there is nothing to learn")


@pytest.mark.parametrize("router", ["adaptive", "random"])
def test_its_steps_are_one_graph_and_a_stopped_run_goes_on(
    router: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seven of twenty images are without a label."""
    monkeypatch.setattr("sakd_cli.engine.optim.updates_on_device", lambda parameter: True)
    monkeypatch.setattr("sakd_cli.engine.graphs.WARMUP", 1)
    labels = replay.DATASET.train.labels.clone()
    labels[::3] = -1
    some = replace(replay.DATASET, train=replace(replay.DATASET.train, labels=labels))
    make = partial(replay.task_of, "fitnet", router)
    monkeypatch.setattr(replay, "DATASET", some)
    device, _ = replay.assert_equal_when_replayed(make, tmp_path)
    assert device.replays
    whole, halted = (replay.trainer_of(make(), tmp_path / name, Emulator()) for name in ("whole", "halted"))
    whole.fit()
    halted.reporter = Halt(5)
    with pytest.raises(Stopped):
        halted.fit()
    again = replay.trainer_of(make(), tmp_path / "halted", Emulator())
    again.resume(checkpoint.read(tmp_path / "halted" / "checkpoints" / "last"))
    again.fit()
    assert not replay.differing(replay.memory(again), replay.memory(whole))
