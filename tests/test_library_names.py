"""Networks by the names that their libraries give them, with the libraries' weights; nothing is fetched here."""

import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CliRunner
from PIL import Image
from torch import nn

from sakd_cli.config.code import functions
from sakd_cli.config.networks import brought, find_network
from sakd_cli.models import artifact

CLASSES = ("cat", "dog", "owl")
LABELS = ["owl", "cat", "dog"]  # the order of the weights on the hub
HUB = "hf-hub:somebody/resnet10t_pets"
CONFIG = {
    "mean": [0.4, 0.5, 0.6],
    "std": [0.2, 0.3, 0.4],
    "input_size": [3, 40, 40],
    "interpolation": "bicubic",
    "crop_pct": 0.8,
    "num_classes": 3,
    "label_names": LABELS,
}


@pytest.fixture(scope="module")
def pets(cli: CliRunner) -> Iterator[nn.Module]:
    """The hub, which gives a network of timm's for three classes; a folder of pictures; a cache of our own."""
    timm = pytest.importorskip("timm")
    draw = np.random.default_rng(0)
    for name in CLASSES:
        (cli.path / "pets" / name).mkdir(parents=True)
        for number in range(8):
            file = cli.path / "pets" / name / f"{number}.png"
            Image.fromarray(draw.integers(0, 256, (48, 56, 3), dtype=np.uint8)).save(file)
    torch.manual_seed(3)
    network = timm.create_model("resnet10t", num_classes=3).eval()

    def config(name: str, *_: Any, **__: Any) -> tuple[dict[str, Any], str, dict[str, Any]]:
        assert name == HUB.removeprefix("hf-hub:")
        return dict(CONFIG) | {"hf_hub_id": name, "source": "hf-hub"}, "resnet10t", {}

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(cli.path / "cache"))
        for module in ("timm.models", "timm.models._factory"):
            patch.setattr(f"{module}.load_model_config_from_hf", config)
        weights = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        patch.setattr("timm.models._builder.load_state_dict_from_hf", lambda *_, **__: dict(weights))
        yield network


DATA = ["--dataset", "imagefolder", "--data-root", "pets"]


def test_a_name_on_the_hub_is_a_network_of_timms_and_no_code() -> None:
    assert find_network(HUB).name == find_network(f"timm/{HUB}").name == f"timm/{HUB}"
    assert (find_network(HUB).family, find_network(HUB).kin) == ("timm", "timm/resnet")
    assert functions(f"timm/{HUB}") == []
    assert functions("simkd2-resnet8-hub:build") == ["hub:build"], "a module of that name is code"
    assert brought("hf-hub:nobody") is None


def test_a_network_of_the_hub_is_scored_predicts_and_teaches(cli: CliRunner, pets: nn.Module) -> None:
    scored = cli.sakd("eval", HUB, *DATA, "--set", "timing_seconds=0", "--json", "-q").document
    assert (scored["network"], scored["split"]) == (f"timm/{HUB}", "all")
    answers = cli.sakd("predict", HUB, "pets", "--json", "-q").document["predictions"]
    top1 = 100 * np.mean([Path(one["file"]).parent.name == one["classes"][0]["class"] for one in answers])
    assert scored["top1"] == pytest.approx(top1)
    (folder, *_) = (cli.path / "cache" / "sakd" / "networks").iterdir()
    tokens = ["distill", "--teacher", HUB, "--teacher-weights", "library", "--student", "resnet8", "--method", "kd"]
    run = cli.sakd(*tokens, *DATA, "--epochs", "1", "--set", "data.size=32", "--json", "-q").document
    assert run["teacher"]["network"] == f"timm/{HUB}"
    path = Path(run["teacher"]["path"])
    assert path.parent == folder.parent
    head = artifact.load(path).model.head.weight
    rows = [LABELS.index(name) for name in CLASSES]
    assert torch.equal(head, pets.get_submodule("fc").weight[rows]), "in the order of the folders"
    about = json.loads((path / "config.json").read_text())
    assert (about["preprocessing"]["size"], about["preprocessing"]["resize"]) == (40, 50)
    assert about["mean"] == CONFIG["mean"]
    both = cli.sakd(*tokens, f"--teacher=timm/{HUB}", *DATA, "--epochs", "1", "--set", "data.size=32", "--json")
    assert [one["path"] for one in both.document["more_teachers"]] == [str(path)], "its library's as well"
    again = cli.sakd(*tokens, *DATA, "--dry-run", "--json", "-q")
    assert again.code == 0, again.err


def test_what_a_library_cannot_give_is_one_line(cli: CliRunner, pets: nn.Module) -> None:
    base = ["distill", "--student", "resnet8", "--epochs", "1", "--teacher-weights", "library", "-q"]
    shapes = ["--dataset", "shapes", "--set", "data.train=40", "--set", "data.test=20"]
    text = f"timm/{HUB}: its library's weights are for 3 classes, not for the 20 of shapes"
    result = cli.assert_rejects([*base, "--teacher", HUB, *shapes], 2, text)
    assert "--set init_from=library --head replace" in result.err
    cli.assert_rejects([*base, "--teacher", "resnet20", *shapes], 2, "resnet20 is no network of a library")


def test_a_network_of_torchvisions_answers_as_torchvision_does(
    cli: CliRunner, pets: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(5)
    network = models.get_model("resnet18", weights=None)
    state = network.eval().state_dict()
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *_, **__: state)
    file = cli.path / "pets" / "cat" / "0.png"
    (found,) = cli.sakd("predict", "torchvision/resnet18", str(file), "--json", "-q").document["predictions"]
    weights = models.ResNet18_Weights.DEFAULT
    with torch.inference_mode():
        best = network(weights.transforms()(Image.open(file).convert("RGB"))[None]).softmax(1)[0].topk(5)
    assert [one["class"] for one in found["classes"]] == [weights.meta["categories"][k] for k in best.indices]
    assert [one["probability"] for one in found["classes"]] == pytest.approx(best.values.tolist(), rel=1e-3)


class NotFound(OSError):
    """As the hub's own errors: no number, and what it is about behind an empty line."""


REFUSALS = {
    2: (NotFound("404 Client Error.\n\nRepository Not Found for url: there"), "Repository Not Found for url: there"),
    5: (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "its cache: No space left on device"),
}


@pytest.mark.parametrize("code", REFUSALS)
@pytest.mark.parametrize("what", ["config", "weights"])
def test_what_the_hub_does_not_give_is_said_in_its_words(
    cli: CliRunner, pets: nn.Module, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, what: str, code: int
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    error, text = REFUSALS[code]

    def refuse(*_: Any, **__: Any) -> Any:
        raise error

    places = {"config": ["timm.models", "timm.models._factory"], "weights": ["timm.models._builder"]}
    names = {"config": "load_model_config_from_hf", "weights": "load_state_dict_from_hf"}
    for module in places[what]:
        monkeypatch.setattr(f"{module}.{names[what]}", refuse)
    picture = str(next((cli.path / "pets").rglob("*.png")))
    for words in (
        ["predict", HUB, picture],
        ["pretrain-teacher", HUB, "--set", "init_from=library", "--epochs", "1", *DATA, "-q"],
    ):
        result = cli.assert_rejects(words, code, text)
        assert "for these images" not in result.err
