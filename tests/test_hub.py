"""Folders for the Hugging Face hub: the block of a card as the hub reads it, a config.json that timm builds from."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CliRunner
from safetensors.torch import load_file

from sakd_cli.config.preprocessing import Preprocessing
from sakd_cli.models import artifact
from sakd_cli.models.artifact import NetworkCard
from sakd_cli.models.table import create

CLASSES = ("cat", "dog", "owl")
SEEN = Preprocessing(size=48, resize=60, interpolation="bicubic")
QUICK = ["-q", "--set", "timing_seconds=0", "--data-root", "."]  # without pictures: noise


def saved(cli: CliRunner, name: str) -> torch.nn.Module:
    """A folder of a network, named like the network, as a run leaves it."""
    torch.manual_seed(2)
    network = create(name, 3, 48).eval()
    card = NetworkCard(name, "imagefolder", CLASSES, (0.4, 0.5, 0.6), (0.2, 0.3, 0.4), 48, SEEN)
    artifact.save_folder(cli.path / name.replace("/", "."), network, card, {"top1": 71.234, "images": 500})
    return network


def exported(cli: CliRunner, name: str, *more: str) -> Path:
    folder = saved(cli, name) and name.replace("/", ".")
    return Path(cli.sakd("export", folder, "--overwrite", "--json", *more, *QUICK).document["folder"])


@pytest.mark.parametrize("name", ["timm/resnet10t", "timm/vit_tiny_patch16_224"])
def test_timm_builds_a_network_of_its_own_from_the_folder(cli: CliRunner, name: str) -> None:
    timm = pytest.importorskip("timm")
    network = saved(cli, name)
    folder = cli.path / exported(cli, name)
    found = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    images = torch.randn(2, 3, 48, 48)
    with torch.inference_mode():
        torch.testing.assert_close(found(images), network(images))
    shown: dict[str, Any] = timm.data.resolve_model_data_config(found)
    assert (tuple(shown["input_size"]), shown["interpolation"], shown["crop_pct"]) == ((3, 48, 48), "bicubic", 0.8)
    assert (tuple(shown["mean"]), tuple(shown["std"])) == ((0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
    assert tuple(found.pretrained_cfg["label_names"]) == CLASSES
    assert json.loads((folder / "config.json").read_text())["network"] == name


def test_a_network_of_torchvisions_has_torchvisions_names(cli: CliRunner) -> None:
    models = pytest.importorskip("torchvision.models")
    folder = cli.path / exported(cli, "torchvision/mobilenet_v3_small")
    theirs = models.get_model("mobilenet_v3_small", weights=None, num_classes=3)
    theirs.load_state_dict(load_file(folder / "model.safetensors"))
    with torch.inference_mode():
        images = torch.randn(2, 3, 48, 48)
        network = artifact.load(cli.path / "torchvision.mobilenet_v3_small").model.eval()
        torch.testing.assert_close(theirs.eval()(images), network(images))


@pytest.mark.parametrize(("name", "library"), [("timm/resnet10t", "timm"), ("resnet8", "pytorch")])
def test_the_hub_reads_the_block_of_a_card(cli: CliRunner, name: str, library: str) -> None:
    pytest.importorskip(name.partition("/")[0] if "/" in name else "torch")
    hub = pytest.importorskip("huggingface_hub")
    folder = exported(cli, name)
    for file, program in (
        (cli.path / folder / "README.md", library),
        (cli.path / folder.parent / "README.md", "pytorch"),
    ):
        text = file.read_text(encoding="utf-8")
        data = hub.ModelCard(text, ignore_metadata_errors=False).data
        assert (data.library_name, data.pipeline_tag) == (program, "image-classification")
        assert {"image-classification", "sakd"} <= set(data.tags)
        (result,) = data.eval_results
        assert (result.metric_type, result.metric_value, result.dataset_name) == ("accuracy", 71.23, "imagefolder")
        assert text.partition("---\n\n")[2].startswith(f"# {name} on imagefolder")
