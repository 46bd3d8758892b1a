"""Exports in fewer bits and older operators: what they cost is measured, told, and refused where it is too much."""

import importlib
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import CliRunner
from fork_server import ROOT
from PIL import Image
from torch import nn

from sakd_cli.documents.table import Export
from sakd_cli.errors import UsageError
from sakd_cli.export import export, formats
from sakd_cli.export.formats import FORMS, FromPixels, Writing
from sakd_cli.models import artifact
from sakd_cli.models.artifact import NetworkCard
from sakd_cli.models.table import create

CLASSES = ("cat", "dog", "owl")
CARD = NetworkCard("resnet8", "imagefolder", CLASSES, (0.5,) * 3, (0.25,) * 3, 32)
QUICK = ["-q", "--set", "timing_seconds=0"]


@pytest.fixture(scope="module")
def photos(cli: CliRunner) -> Path:
    """A network, 8 pictures of each of its classes, and a flat folder of pictures of no class."""
    draw = np.random.default_rng(0)
    for name in (*CLASSES, "flat"):
        folder = cli.path / ("flat" if name == "flat" else f"photos/{name}")
        folder.mkdir(parents=True)
        for number in range(8):
            Image.fromarray(draw.integers(0, 256, (40, 44, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    torch.manual_seed(1)
    network = create("resnet8", 3)
    with torch.no_grad():
        network.head.weight *= 20  # answers that differ from picture to picture
    artifact.save_weights(cli.path / "net.safetensors", network, CARD)
    return cli.path / "photos"


@pytest.mark.parametrize(
    ("form", "precision", "ratio"),
    [
        ("onnx", "fp16", 0.8),
        ("onnx", "int8", 0.7),
        ("pt2", "fp16", 1.1),
        ("safetensors", "fp16", 0.6),
        ("openvino", "fp32", 1.3),
        ("openvino", "int8", 0.9),
    ],
)
def test_fewer_bits_are_smaller_and_told(
    cli: CliRunner, photos: Path, tmp_path: Path, form: str, precision: str, ratio: float
) -> None:
    for name in FORMS[form].needs:
        pytest.importorskip(name)
    more = [] if precision == "fp32" else [f"--{precision}"]
    options = ["--data-root", "photos", "--out", str(tmp_path / "out"), "--max-drop", "100", "--json", *QUICK[1:]]
    result = cli.sakd("export", "net.safetensors", "--format", form, *more, *options)
    document = result.document
    told = "warning: int8 is calibrated on pictures that it is scored on" in result.err
    assert told == (precision == "int8"), "one folder for both"
    Export.model_validate(document)
    assert document["check"]["real"], "it is checked on the photos"
    assert (document["precision"], document["accuracy"]["images"]) == (precision, 24)
    assert document["bytes"] < ratio * document["network_bytes"]
    assert document["bytes"] == sum((tmp_path / "out" / name).stat().st_size for name in FORMS[form].files)
    assert document["calibration"] == (18 if precision == "int8" else 0), "the part that trains"
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"top-1 on 24 images: {document['accuracy']['after']:.2f} %" in card
    opened = FORMS[form].opened(CARD, tmp_path / "out")
    images = torch.rand(3, 3, 32, 32)
    network: nn.Module = artifact.load(cli.path / "net.safetensors").model.eval()
    network = FromPixels(network, CARD.mean, CARD.std).eval() if FORMS[form].inside else network
    with torch.inference_mode():
        difference = float((opened(images) - network(images)).abs().max())
    assert 0 < difference < {"fp32": 1e-3, "fp16": 0.2, "int8": 10}[precision]


def test_a_calibration_on_what_is_scored_is_told(cli: CliRunner, photos: Path, tmp_path: Path) -> None:
    """Pictures of no class; of classes: above."""
    pytest.importorskip("onnxruntime.quantization")
    options = ["--out", str(tmp_path / "out"), "--max-drop", "100", "--json", "--set", "timing_seconds=0"]
    result = cli.sakd("export", "net.safetensors", "--format", "onnx", "--int8", "--data-root", "flat", *options)
    assert "warning: int8 is calibrated on pictures that it is scored on" in result.err
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"calibrated on {result.document['calibration']} images" in card
    assert result.document["calibration"] == result.document["check"]["images"]


def test_the_metadata_names_classes_and_preprocessing(cli: CliRunner, photos: Path, tmp_path: Path) -> None:
    onnx, openvino = pytest.importorskip("onnx"), pytest.importorskip("openvino")
    network = FromPixels(artifact.load(cli.path / "net.safetensors").model.eval(), CARD.mean, CARD.std).eval()
    images = torch.rand(2, 3, 32, 32)
    FORMS["onnx"].write(network, images, CARD, tmp_path, Writing(13, "int8", [images]))
    FORMS["openvino"].write(network, images, CARD, tmp_path, Writing(17))
    model = onnx.load(tmp_path / "model.onnx")
    assert [opset.version for opset in model.opset_import if not opset.domain] == [13]
    found = {entry.key: json.loads(entry.value) for entry in model.metadata_props if entry.value[:1] in '[{"'}
    assert tuple(found["classes"]) == CLASSES
    assert found["preprocessing"]["size"] == 32
    read = openvino.Core().read_model(tmp_path / "model.xml")
    assert json.loads(read.get_rt_info(["model_info", "classes"]).astype(str)) == list(CLASSES)


def test_an_operator_that_an_old_opset_lacks_is_one_line(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")

    class Attention(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            parts = images.flatten(2)
            return nn.functional.scaled_dot_product_attention(parts, parts, parts).mean(2)

    with pytest.raises(formats.UsageError, match="cannot be written as ONNX") as caught:
        FORMS["onnx"].write(Attention().eval(), torch.rand(2, 3, 8, 8), CARD, tmp_path, Writing(13))
    assert caught.value.hint == "--opset 18 or later"
    assert capfd.readouterr() == ("", "")


def test_an_opset_that_the_exporter_cannot_write_logs_nothing(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    newest = pytest.importorskip("onnx").defs.onnx_opset_version()
    with suppress(UsageError):
        FORMS["onnx"].write(nn.Flatten().eval(), torch.rand(2, 3, 8, 8), CARD, tmp_path, Writing(newest))
    assert [one.message for one in caplog.records if one.levelno >= logging.WARNING] == []


def test_an_onnxscript_that_is_older_than_torch_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    missing = mock.Mock(side_effect=ModuleNotFoundError("No module named 'onnxscript._framework_apis.torch_2_11'"))
    monkeypatch.setattr(torch.onnx, "export", missing)
    with pytest.raises(UsageError, match=r"onnxscript and torch .* do not go together \(No module named") as told:
        FORMS["onnx"].write(nn.Flatten().eval(), torch.rand(2, 3, 8, 8), CARD, tmp_path, Writing(None))
    assert told.value.hint == "pip install --upgrade onnxscript"


def test_a_fall_beyond_the_stated_points_is_refused(
    cli: CliRunner, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxruntime.quantization")
    opened = FORMS["onnx"].opened

    def worse(card: NetworkCard, folder: Path) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda images: opened(card, folder)(images).roll(1, 1)

    monkeypatch.setitem(export.FORMS, "onnx", FORMS["onnx"]._replace(opened=worse))
    tokens = ["export", "net.safetensors", "--data-root", "photos", *QUICK]
    assert "by more than nan points" in cli.sakd(*tokens, "--fp16", "--max-drop", "nan").err
    tokens += ["--format", "onnx", "--int8"]
    result = cli.sakd(*tokens, "--max-drop", "-100")
    assert (result.code, result.out) == (2, "")
    assert "int8: top-1 falls from" in result.err.splitlines()[-2]
    assert "--max-drop POINTS allows it" in result.err
    assert not (cli.path / "export-onnx-int8").exists()


def test_any_folder_of_pictures_is_checked_on(cli: CliRunner, photos: Path) -> None:
    """Pictures of no class: the same answers; of a network of drawn images, too."""
    card = CARD._replace(dataset="shapes")
    artifact.save_weights(cli.path / "drawn.safetensors", create("resnet8", 3), card)
    for target, folder, labelled in (
        ("net.safetensors", "flat", None),
        ("drawn.safetensors", "photos", 24),
        ("drawn.safetensors", "flat", None),
    ):
        options = ["--data-root", folder, "--out", "checked", "--overwrite", "--json", *QUICK]
        document = cli.sakd("export", target, *options).document
        images: Any = document["accuracy"] and document["accuracy"]["images"]
        assert (document["check"]["real"], document["check"]["agreement"], images) == (True, 100, labelled)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--int8"], "--int8: safetensors has no 8-bit form"),
        (["--int8", "--fp16"], "exclude each other"),
        (["--format", "onnx", "--opset", "12"], "Invalid value for '--opset'"),
        (["--format", "onnx", "--int8", "--data-root", "empty"], "no training images at hand to calibrate on"),
        (["--data-root", "nowhere"], "nowhere: no such folder"),
        (["--data-root", "cifar.safetensors"], "cifar.safetensors: not a folder"),
        (["--opset", "17"], "--opset: safetensors is not written as ONNX"),
        (["--format", "pt2", "--opset", "17"], "--opset: pt2 is not written as ONNX"),
    ],
)
def test_mistakes(cli: CliRunner, photos: Path, options: list[str], text: str) -> None:
    (cli.path / "empty").mkdir(exist_ok=True)
    artifact.save_weights(
        cli.path / "cifar.safetensors",
        create("resnet8", 10),
        CARD._replace(dataset="cifar10", classes=tuple("abcdefghij")),
    )
    cli.assert_rejects(["export", "cifar.safetensors", *options, *QUICK], 2, text)


def test_a_network_with_attention_keeps_its_sums_in_floats(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime.quantization")
    onnx = importlib.import_module("onnx")

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.linear = nn.LayerNorm(12), nn.Linear(12, 12)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            x = images.flatten(1)
            return x + self.linear(self.norm(x))

    images = torch.rand(4, 3, 2, 2)
    FORMS["onnx"].write(Block().eval(), images, CARD._replace(side=2), tmp_path, Writing(17, "int8", [images]))
    nodes = onnx.load(tmp_path / "model.onnx").graph.node
    made = {output: node.op_type for node in nodes for output in node.output}
    kinds = {node.op_type: {made.get(name) for name in node.input} for node in nodes}
    assert "DequantizeLinear" in kinds.get("Gemm", kinds.get("MatMul", set()))
    assert "DequantizeLinear" not in kinds["LayerNormalization"]
    assert formats.PRODUCTS == ["Conv", "Gemm", "MatMul"]


def test_what_predicts_and_exports_loads_no_plots_and_onnxruntime_leaves_nothing_in_the_home(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    code = "import sys, sakd_cli.runs.predict, sakd_cli.export.export; "
    code += "print({'scipy', 'matplotlib'} & set(sys.modules)); import sakd_cli.export.formats, onnxruntime"
    alone = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    there = alone | {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=there, capture_output=True, check=True)
    assert done.stdout == b"set()\n"
    assert not [path for path in tmp_path.rglob("*") if "onnxruntime" in path.name]
