"""The teacher bank: every view is the loader's, answers are the teacher's to 16 bits, damage is seen."""

import json
import shlex
import threading
from pathlib import Path

import pytest
import torch
from conftest import DRAWN, CliRunner
from filelock import FileLock
from safetensors.torch import load_file

from sakd_cli.data.dataset import Dataset, Split
from sakd_cli.data.loader import TrainLoader
from sakd_cli.data.sources import Views
from sakd_cli.runs import teacher_outputs

CPU = torch.device("cpu")
FEW = shlex.split(f"{DRAWN} --set data.train=20 --batch-size 6 --validation 0 -q")


@pytest.mark.parametrize(("padding", "flip", "count"), [(4, True, 162), (1, False, 9), (0, True, 2)])
def test_a_views_number_says_how_the_loader_showed_the_image(padding: int, flip: bool, count: int) -> None:
    images = torch.randint(256, (10, 3, 8, 8), dtype=torch.uint8)
    split = Split(images, torch.arange(10) % 2)
    dataset = Dataset("noise", ("a", "b"), (0.5,) * 3, (0.3,) * 3, padding=padding, flip=flip, train=split, test=split)
    loader = TrainLoader(split, dataset, batch_size=4, seed=1, noise_width=0, device=CPU)
    assert loader.views.count == count
    every = torch.stack([loader.views.images(torch.arange(10), torch.full((10,), view)) for view in range(count)])
    assert len(every.flatten(2).transpose(0, 1)[0].unique(dim=0)) == count, "no view twice"
    for batch in loader.epoch(1):
        assert batch.view is not None
        assert torch.equal(batch.images, every[batch.view, batch.index])
    other = Views(Split(images ^ 1, split.labels), dataset, CPU)
    assert other.digest() != loader.views.digest() == Views(split, dataset, CPU).digest()


def losses(cli: CliRunner, run: str) -> list[float]:
    lines = (cli.path / run / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


@pytest.fixture(scope="module")
def banked(tmp_path_factory: pytest.TempPathFactory) -> CliRunner:
    """A folder with a teacher and a run of kd that made its bank."""
    cli = CliRunner(tmp_path_factory.mktemp("bank"))
    assert cli.sakd("pretrain-teacher", "resnet8", *FEW, "--epochs", "1", "--run-dir", "teacher").code == 0
    assert cli.sakd(*distil("kd"), "--run-dir", "with").code == 0
    return cli


def distil(method: str) -> list[str]:
    arguments = ["distill", "--teacher", "teacher", "--student", "resnet8", "--method", method, "--epochs", "1"]
    return [*arguments, *FEW, "--set", "log_every=1", "--cache-teacher"]


def test_the_curve_is_that_of_the_teacher_itself_to_its_precision(banked: CliRunner) -> None:
    arguments = [word for word in distil("kd") if word != "--cache-teacher"]
    assert banked.sakd(*arguments, "--run-dir", "without").code == 0
    assert losses(banked, "with") == pytest.approx(losses(banked, "without"), rel=2e-3)
    assert losses(banked, "with") != losses(banked, "without")
    (bank,) = (banked.path / "runs" / "teacher-cache").glob("*.safetensors")
    kept = load_file(bank)
    rows = 20 * 50
    assert {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in kept.items()} == {
        "pooled": ((rows, 64), torch.float16),
        "logits": ((rows, 20), torch.float16),
    }


@pytest.mark.parametrize("method", ["crd", "rkd", "dkd"])
def test_another_method_finds_the_bank_and_a_damaged_one_is_made_anew(banked: CliRunner, method: str) -> None:
    (bank,) = (banked.path / "runs" / "teacher-cache").glob("*.safetensors")
    before, content = bank.stat().st_mtime_ns, bank.read_bytes()
    assert banked.sakd(*distil(method), "--set", "router.lr=0.01").code == 0
    assert bank.stat().st_mtime_ns == before
    if method == "crd":
        bank.write_bytes(content[:-9] + b"x" + content[-8:])
        assert banked.sakd(*distil(method), "--router", "always").code == 0
        assert bank.read_bytes() == content


def test_who_waits_for_another_process_that_computes_it_is_told(
    banked: CliRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    (bank,) = (banked.path / "runs" / "teacher-cache").glob("*.safetensors")
    held, told, wait = threading.Event(), threading.Event(), teacher_outputs.wait_for_lock
    heard = lambda path, tell, hint: wait(path, lambda: (tell(), told.set()), hint)  # noqa: E731
    monkeypatch.setattr(teacher_outputs, "wait_for_lock", heard)

    def hold() -> None:
        with FileLock(bank.with_suffix(".lock")):
            held.set()
            told.wait(60)

    other = threading.Thread(target=hold)
    other.start()
    held.wait()
    result = banked.sakd(*(word for word in distil("kd") if word != "-q"), "--set", "router.lr=0.02")
    other.join()
    assert (result.code, result.err.count(f"computes {bank.relative_to(banked.path)}: waiting for it")) == (0, 1)


@pytest.mark.parametrize("method", ["fitnet", "reviewkd", "ab"])
def test_a_method_that_needs_maps_is_refused(banked: CliRunner, method: str) -> None:
    banked.assert_rejects(distil(method), 2, f"teacher.cache: method {method} uses maps")


def test_a_bank_that_does_not_fit_is_refused_before_it_is_begun(
    banked: CliRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(banked.path / "elsewhere")
    free = lambda path: type("usage", (), {"free": 1000 if "teacher-cache" in str(path) else 10**9})  # noqa: E731
    monkeypatch.setattr("shutil.disk_usage", free)
    result = banked.sakd(*distil("kd"), "--runs-dir", str(folder))
    assert (result.code, "needs 0.00017 GB, 1e-06 GB are free" in result.err) == (5, True), result.err
    assert not list(folder.rglob("*.safetensors"))


def test_a_cache_has_its_room_before_it_is_written(tmp_path: Path) -> None:
    """A hole that is written to through memory where a quota has no room left would end the process (SIGBUS)."""
    layout = teacher_outputs.Layout(100, 162, 64, 20)
    arrays = teacher_outputs._empty_file(tmp_path / "cache", layout)
    about = (tmp_path / "cache").stat()
    assert layout.bytes < about.st_size <= 512 * about.st_blocks
    assert not arrays["logits"].any()
    assert load_file(tmp_path / "cache")["pooled"].shape == (layout.rows, layout.width)
