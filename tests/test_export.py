"""`sakd export`: files that other programs open with the very lines of their card, and that answer alike."""

import contextlib
import json
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SHAPES, TINY, CliRunner
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from sakd_cli.documents.table import Export
from sakd_cli.errors import UsageError
from sakd_cli.export import export, formats
from sakd_cli.export.formats import FORMS, FromPixels, Writing
from sakd_cli.export.source import executed, source
from sakd_cli.models import artifact
from sakd_cli.models.artifact import NetworkCard
from sakd_cli.models.table import create

FAMILIES = ["resnet8", "wrn_10_1", "vgg8", "MobileNetV2_half", "ShuffleNetV1", "ShuffleNetV2_0_5", "ResNet18"]
QUICK = ["--set", "timing_seconds=0"]
# Runs the lines of each folder in it, without sakd, and keeps what they were given and made of it.
PROGRAM = """
import json, os, pathlib, sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "sakd_cli":
            raise ImportError(name)

sys.meta_path.insert(0, Blocker())
sys.path.insert(0, "")
for folder in sys.argv[1:]:
    os.chdir(folder)
    names = {}
    exec(pathlib.Path("lines.py").read_text(), names)
    kept = {"images": names["images"].tolist(), "logits": names["logits"].tolist()}
    kept["loaded"] = [name for name in ("torch", "sakd_cli") if name in sys.modules]
    pathlib.Path("kept.json").write_text(json.dumps(kept))
"""


def lines_of(folder: Path) -> str:
    (lines,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    return str(lines)


def run_alone(folders: list[Path]) -> list[dict[str, Any]]:
    """What the lines of the cards made of which images, in a process that cannot import sakd."""
    photo = np.random.default_rng(3).integers(0, 256, (45, 71, 3), dtype=np.uint8)
    for folder in folders:
        (folder / "lines.py").write_text(lines_of(folder))
        Image.fromarray(photo).save(folder / "photo.jpg")
    program = [sys.executable, "-c", PROGRAM, *map(str, folders)]
    done = subprocess.run(program, capture_output=True, text=True, env={})
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / "kept.json").read_text()) for folder in folders]


@pytest.mark.parametrize(
    ("kinds", "loaded"),
    [
        ([("safetensors", False), ("pt2", True)], ["torch"]),
        ([("onnx", True), ("onnx", False), ("openvino", True), ("openvino", False)], []),
    ],
)
def test_a_program_without_sakd_opens_it_with_the_cards_lines(
    trained_cli: CliRunner, distilled: dict[str, Any], tmp_path: Path, kinds: list[tuple[str, bool]], loaded: list[str]
) -> None:
    if missing := [name for form, _ in kinds for name in FORMS[form].needs if find_spec(name) is None]:
        pytest.skip(f"not installed: {missing}")
    student = json.loads((trained_cli.path / distilled["run"] / "student" / "config.json").read_text())
    folders = []
    for form, inside in kinds:
        option = [] if inside else ["--without-normalisation"]
        out = ["--out", str(tmp_path / f"a {form} {inside}"), *option, "--json", "--set", "timing_seconds=0.01"]
        done = trained_cli.sakd("export", distilled["run"], "--format", form, *out)
        assert "timing network and file for 0.04 s or more" in done.err
        document = done.document
        Export.model_validate(document)
        check = document["check"]
        assert check["difference"] <= 1e-4
        assert (check["agreement"], check["images"], check["real"]) == (100, SHAPES["test"], True)
        assert document["latency"]["file"]["median"] > 0
        folders.append(folder := Path(document["folder"]))
        assert document["bytes"] == sum((folder / name).stat().st_size for name in FORMS[form].files)
        told = json.loads((folder / "config.json").read_text())
        assert (told["classes"], told["top1"]) == (student["classes"], student["top1"])
        assert told["teacher"]["sha256"] == distilled["teacher"]["sha256"]
        assert told["teacher"]["sha256"] in (folder / "README.md").read_text()
    network = student_of(trained_cli, distilled)
    for (_, inside), kept in zip(kinds, run_alone(folders), strict=True):
        assert kept["loaded"] == loaded
        expected = FromPixels(network, student["mean"], student["std"]).eval() if inside else network
        with torch.inference_mode():
            found = expected(torch.tensor(kept["images"]))
            torch.testing.assert_close(found, torch.tensor(kept["logits"]), rtol=0, atol=1e-4)


def student_of(cli: CliRunner, distilled: dict[str, Any]) -> nn.Module:
    return artifact.load(cli.path / distilled["run"] / "student").model.eval()


@pytest.mark.parametrize("side", [32, 64])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_written_as_plain_source(name: str, side: int) -> None:
    network = create(name, 5).eval()
    images = torch.rand(3, 3, side, side, generator=torch.Generator().manual_seed(1))
    again = executed(source(network, images[:2], name))()
    again.load_state_dict(network.state_dict())
    with torch.inference_mode():
        assert torch.equal(again.eval()(images), network(images))


def test_layers_of_ones_own_are_not_written_as_source() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.scale

    with pytest.raises(UsageError, match="layers of its own"):
        source(Own(), torch.zeros(1), "")


@torch.no_grad()
def outer_product(tensor: Tensor, *_: Any, **__: Any) -> Tensor:
    """Fill it with some numbers at once."""
    rows, columns = torch.rand(len(tensor), *[1] * (tensor.dim() - 1)), torch.rand(tensor.shape[-1])
    return tensor.copy_((rows - 0.5) * (columns - 0.5) / 10)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("torchvision/resnet18", "torchvision.models.get_model('resnet18', weights=None, num_classes=3)"),
        (
            "torchvision/vit_b_16",
            "torchvision.models.get_model('vit_b_16', weights=None, num_classes=3, image_size=32)",
        ),
        (
            "timm/vit_tiny_patch16_224",
            "timm.create_model('vit_tiny_patch16_224', pretrained=False, num_classes=3, img_size=32)",
        ),
    ],
)
def test_the_architecture_of_a_library_needs_no_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, call: str
) -> None:
    pytest.importorskip(name.partition("/")[0])
    for start in ("trunc_normal_", "normal_", "xavier_uniform_", "kaiming_uniform_"):  # slow for 86 M numbers
        monkeypatch.setattr(nn.init, start, outer_product)
    card = NetworkCard(name, "shapes", ("a", "b", "c"), (0.5,) * 3, (0.25,) * 3, 32)
    network = create(name, 3, 32).eval()
    images = torch.rand(2, 3, 32, 32)
    Image.new("RGB", (50, 40), (10, 200, 30)).save(tmp_path / "photo.jpg")
    FORMS["safetensors"].write(network, images, card, tmp_path, Writing())
    assert {path.name for path in tmp_path.iterdir()} == {"model.safetensors", "photo.jpg"}
    lines = FORMS["safetensors"].lines(card, False)
    assert call in lines
    names: dict[str, Any] = {}
    with contextlib.chdir(tmp_path):
        exec(lines, names)
    with torch.inference_mode():
        torch.testing.assert_close(network(names["images"]), names["logits"])
        assert torch.equal(FORMS["safetensors"].opened(card, tmp_path)(images), network(images))


def test_an_interrupted_run_gives_its_last_checkpoint(
    trained_cli: CliRunner, distilled: dict[str, Any], tmp_path: Path
) -> None:
    run = Path(shutil.copytree(trained_cli.path / distilled["run"], tmp_path / "run"))
    (run / "summary.json").unlink()
    shutil.rmtree(run / "student")
    result = trained_cli.sakd("export", str(run), *QUICK, "--json")
    assert "is not finished; taking its last checkpoint (epoch 1, " in result.err
    folder = run / "export-safetensors"
    assert "not finished" in (folder / "README.md").read_text()
    with torch.inference_mode():
        images = torch.rand(2, 3, 32, 32)
        opened = FORMS["safetensors"].opened(
            artifact.load(trained_cli.path / distilled["run"] / "student").card, folder
        )
        assert torch.equal(opened(images), student_of(trained_cli, distilled)(images))


def test_nothing_is_replaced_unasked_and_nothing_is_left_half(
    trained_cli: CliRunner, distilled: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["export", distilled["run"], "-q", *QUICK, "--out", str(tmp_path / "out")]
    (tmp_path / "out").mkdir()
    trained_cli.assert_rejects(options, 2, "is no export; it is not replaced")
    (tmp_path / "out").rmdir()
    assert trained_cli.sakd(*options).code == 0
    trained_cli.assert_rejects(options, 2, "exists already")
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    monkeypatch.setattr(export, "TOLERANCE", -1.0)
    trained_cli.assert_rejects([*options, "--overwrite"], 2, "the file's outputs differ by")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    monkeypatch.undo()
    assert trained_cli.sakd(*options, "--overwrite").code == 0
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    (tmp_path / "out" / ".git").mkdir()
    trained_cli.assert_rejects([*options, "--overwrite"], 2, "is not replaced, .git in it is no part of an export")


def test_a_missing_extra_is_one_line(
    trained_cli: CliRunner, distilled: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formats.importlib.util, "find_spec", lambda name: None)
    result = trained_cli.assert_rejects(
        ["export", distilled["run"], "--format", "onnx"], 2, "needs onnx, onnxscript, onnxruntime"
    )
    assert "pip install 'sakd[onnx]'" in result.err


def test_without_the_data_set_noise_does(tmp_path: Path, cli: CliRunner) -> None:
    card = NetworkCard("resnet8", "cifar10", tuple("abcdefghij"), (0.5,) * 3, (0.25,) * 3, 32)
    artifact.save_weights(tmp_path / "net.safetensors", create("resnet8", 10), card)
    options = ["export", str(tmp_path / "net.safetensors"), "--format", "pt2", "--data-root", str(tmp_path), *QUICK]
    document = cli.sakd(*options, "--json").document
    assert (document["check"]["real"], document["folder"]) == (False, str(tmp_path / "export-pt2"))
    assert "64 images of noise" in (tmp_path / "export-pt2" / "README.md").read_text()


def test_an_ensemble_is_exported_as_its_sum(tmp_path: Path, cli: CliRunner, trained_cli: CliRunner) -> None:
    options = ["distill", "--teacher", "resnet8", "--student", "resnet8", "--method", "kd", *TINY]
    options += [
        "--residual-students",
        "1",
        "--set",
        "residual.architectures=[resnet8]",
        "--set",
        "residual.max_cost=9",
    ]
    run = cli.sakd(*options, "--set", "residual.min_gain=-9e9", "--json").document["run"]
    document = cli.sakd("export", run, *QUICK, "--json").document
    assert document["network"] == "resnet8+resnet8"
    members = [artifact.load(cli.path / run / "ensemble" / f"member-{n}.safetensors").model.eval() for n in (0, 1)]
    opened = FORMS["safetensors"].opened(artifact.load(cli.path / run / "student").card, cli.path / document["folder"])
    images = torch.rand(2, 3, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(opened(images), members[0](images) + members[1](images), rtol=0, atol=1e-4)


def test_a_damaged_file_is_one_line(tmp_path: Path, cli: CliRunner) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "net.safetensors")
    cli.assert_rejects(["export", str(tmp_path / "net.safetensors")], 2, "not a network saved by sakd")
    cli.assert_rejects(["export", str(tmp_path / "nowhere")], 2, "no such file")
