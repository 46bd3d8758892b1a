"""`sakd import-weights`: other programs' names, bit for bit into our networks, and every misfit told in one line."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fork_server import ForkServer
from oracles import fill
from safetensors.torch import save_file
from torch import Tensor

from sakd_cli.config.networks import NETWORKS
from sakd_cli.data.torchvision_sets import CIFAR100
from sakd_cli.documents.table import Imported
from sakd_cli.errors import UsageError
from sakd_cli.models import artifact
from sakd_cli.models.dialects import DIALECTS, translate_name
from sakd_cli.models.foreign import load_foreign, read_foreign
from sakd_cli.models.table import create


def norm(name: str) -> list[str]:
    return [f"{name}.{part}" for part in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")]


def pair(number: int | str, before: str = "") -> list[str]:
    return [f"{before}conv{number}.weight", *norm(f"{before}bn{number}")]


def residual(blocks: list[int], convs: int, shortcut: str, head: str, wide: bool) -> list[str]:
    names = pair(1)
    for group, count in enumerate(blocks, start=1):
        for block in range(count):
            start = f"layer{group}.{block}."
            names += [name for n in range(1, convs + 1) for name in pair(n, start)]
            if block == 0 and (group > 1 or wide):
                names += [f"{start}{shortcut}.0.weight", *norm(f"{start}{shortcut}.1")]
    return [*names, f"{head}.weight", f"{head}.bias"]


def wrn(blocks: int) -> list[str]:
    names = ["conv1.weight"]
    for group in (1, 2, 3):
        for block in range(blocks):
            start = f"block{group}.layer.{block}."
            names += [*norm(f"{start}bn1"), f"{start}conv1.weight", *norm(f"{start}bn2"), f"{start}conv2.weight"]
            names += [f"{start}convShortcut.weight"] if block == 0 else []
    return [*names, *norm("bn1"), "fc.weight", "fc.bias"]


def vgg(convolutions: list[int]) -> list[str]:
    names: list[str] = []
    for group, count in enumerate(convolutions):
        for place in range(0, 3 * count, 3):
            start = f"block{group}."
            names += [f"{start}{place}.weight", f"{start}{place}.bias", *norm(f"{start}{place + 1}")]
    return [*names, "classifier.weight", "classifier.bias"]


def mobile() -> list[str]:
    names = ["conv1.0.weight", *norm("conv1.1")]
    for group, count in enumerate([1, 2, 3, 4, 3, 3, 1]):
        for block in range(count):
            for place in (0, 3, 6):
                start = f"blocks.{group}.{block}.conv."
                names += [f"{start}{place}.weight", *norm(f"{start}{place + 1}")]
    return [*names, "conv2.0.weight", *norm("conv2.1"), "classifier.0.weight", "classifier.0.bias"]


def shuffle(units: list[int], first: int, tail: list[str]) -> list[str]:
    names = pair(1)
    for group, count in enumerate(units, start=1):
        for unit in range(count):
            names += [name for n in range(1, (3 if unit else first) + 1) for name in pair(n, f"layer{group}.{unit}.")]
    return [*names, *tail, "linear.weight", "linear.bias"]


# The names in the order in which these programs define them, which is ours too.
FOREIGN: dict[str, Callable[[], list[str]]] = {
    "resnet20": lambda: residual([3, 3, 3], 2, "downsample", "fc", wide=False),
    "resnet8x4": lambda: residual([1, 1, 1], 2, "downsample", "fc", wide=True),
    "wrn_16_2": lambda: wrn(2),
    "vgg8": lambda: vgg([1, 1, 1, 1, 1]),
    "vgg13": lambda: vgg([2, 2, 2, 2, 2]),
    "ResNet18": lambda: residual([2, 2, 2, 2], 2, "shortcut", "linear", wide=False),
    "ResNet50": lambda: residual([3, 4, 6, 3], 3, "shortcut", "linear", wide=True),
    "MobileNetV2_half": mobile,
    "ShuffleNetV1": lambda: shuffle([4, 8, 4], 3, []),
    "ShuffleNetV2": lambda: shuffle([4, 8, 4], 5, pair(2)),
}


def foreign(name: str, classes: int = 100) -> tuple[dict[str, Tensor], Any]:
    """The tensors of a network that the formula fills, under their names; and the network."""
    network = fill(create(name, classes), 3).eval()
    return dict(zip(FOREIGN[name](), network.state_dict().values(), strict=True)), network


@pytest.mark.parametrize("name", FOREIGN)
def test_every_family_comes_in_bit_for_bit(tmp_path: Path, name: str) -> None:
    tensors, network = foreign(name)
    torch.save(
        {"epoch": 240, "model": {f"module.{key}": tensor for key, tensor in tensors.items()}}, tmp_path / "a.pth"
    )
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(load_foreign(tmp_path / "a.pth", name, 100).eval()(images), network(images))


@pytest.mark.parametrize("name", NETWORKS)
def test_no_two_tensors_have_one_foreign_name(name: str) -> None:
    ours = artifact.shapes_of(artifact.meta_network(name, 7, 32))
    for rules in DIALECTS[NETWORKS[name].family]:
        assert len({translate_name(tensor, rules) for tensor in ours}) == len(ours)


def test_where_the_weights_may_stand_in_a_file(tmp_path: Path) -> None:
    tensors, network = foreign("resnet20", 10)
    few = {key: tensor.double() for key, tensor in tensors.items() if not key.endswith("num_batches_tracked")}
    contents: list[Any] = [
        tensors,
        few,
        *(
            {"epoch": 3, key: tensors}
            for key in ("model", "state_dict", "net", "student", "model_state_dict", "weights")
        ),
    ]
    for number, content in enumerate(contents):
        torch.save(content, tmp_path / f"{number}.pth", _use_new_zipfile_serialization=number != 1)
        loaded = load_foreign(tmp_path / f"{number}.pth", "resnet20", 10).state_dict()
        assert all(torch.equal(loaded[key], tensor) for key, tensor in network.state_dict().items())
    save_file(tensors, tmp_path / "a.safetensors")
    assert read_foreign(tmp_path / "a.safetensors", 10**9).keys() == tensors.keys()


def changed(tensors: dict[str, Tensor], key: str, value: Any) -> dict[str, Any]:
    return tensors | {key: value}


def without(tensors: dict[str, Tensor], key: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name != key}


LATE = "layer2.0.conv1.weight"
MISFITS: dict[str, tuple[int, str, Callable[[dict[str, Tensor]], Any]]] = {
    "a missing tensor": (2, f"1 tensors missing: {LATE}", lambda t: without(t, LATE)),
    "one too many": (2, "1 tensors left over: layer9.weight", lambda t: changed(t, "layer9.weight", torch.zeros(1))),
    "a wrong shape": (
        2,
        f"{LATE} has shape 3x3, resnet20 needs 32x16x3x3",
        lambda t: changed(t, LATE, torch.ones(3, 3)),
    ),
    "a view of a million million": (2, "needs 32x16", lambda t: changed(t, LATE, torch.zeros(1).expand(10**6, 10**6))),
    "whole numbers": (2, "no plain tensor", lambda t: changed(t, LATE, torch.ones(32, 16, 3, 3, dtype=torch.int64))),
    "sparse": (2, "no plain tensor", lambda t: changed(t, LATE, torch.ones(32, 16, 3, 3).to_sparse())),
    "without numbers": (2, "no plain tensor", lambda t: changed(t, LATE, torch.ones(32, 16, 3, 3, device="meta"))),
    "a word": (2, "is no tensor", lambda t: changed(t, LATE, "conv")),
    "NaN": (7, f"tensor '{LATE}' holds", lambda t: changed(t, LATE, torch.full((32, 16, 3, 3), float("nan")))),
    "infinite as float": (
        7,
        f"'{LATE}'",
        lambda t: changed(t, LATE, torch.full((32, 16, 3, 3), 1e300, dtype=torch.float64)),
    ),
    "other classes": (2, "is for 10 classes, not for 100", lambda t: foreign("resnet20", 10)[0]),
    "another network": (2, "is no resnet20; ", lambda t: foreign("resnet8x4")[0]),
    "no state dict": (2, "holds no state dict", lambda t: [1, 2]),
    "keys of numbers": (2, "holds no state dict", lambda t: dict(enumerate(t.values()))),
    "nothing": (2, "holds no state dict", lambda t: {}),
}


@pytest.fixture(scope="module")
def bench(fork_server: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> ForkServer:
    """A folder with a file of every misfit."""
    fork_server = fork_server.at(tmp_path_factory.mktemp("import"))
    sound, _ = foreign("resnet20")
    torch.save(sound, fork_server.cwd / "sound.pth")
    for name, (_, _, change) in MISFITS.items():
        torch.save(change(sound), fork_server.cwd / f"{name.replace(' ', '-')}.pth")
    return fork_server


@pytest.mark.parametrize("name", MISFITS)
def test_a_misfit_is_told_in_one_line(bench: ForkServer, name: str) -> None:
    code, text, _ = MISFITS[name]
    result = bench.assert_rejects(
        ["import-weights", f"{name.replace(' ', '-')}.pth", "--model", "resnet20"], code, text
    )
    if name in ("another network", "other classes"):
        assert "these are the weights of a resnet" in result.err.splitlines()[1]


@pytest.mark.parametrize(
    ("code", "text", "options"),
    [
        (2, "unknown model 'resnt'", "sound.pth --model resnt"),
        (2, "Missing option", "sound.pth"),
        (2, "nowhere.pth: no such file", "nowhere.pth --model resnet20"),
        (2, "sound.pth: exists already", "sound.pth --model resnet20 --out sound.pth"),
        (2, "is no resnet32; ", "sound.pth --model resnet32"),
        (5, "cannot be made", "sound.pth --model resnet20 --out sound.pth/a --set data.root=."),
    ],
)
def test_mistakes_of_the_command(bench: ForkServer, code: int, text: str, options: str) -> None:
    result = bench.sakd("import-weights", *options.split(), "-q", "--set", "data.root=nowhere")
    assert (result.code, result.out) == (code, ""), result.err
    assert text in result.err
    assert "Traceback" not in result.err


def test_without_the_images_the_network_comes_in_unscored(bench: ForkServer) -> None:
    result = bench.sakd("import-weights", "sound.pth", "--model", "resnet20", "--data-root", "nowhere", "--json")
    assert result.code == 0, result.err
    assert result.err.startswith("warning: not scored: cifar100: files not found")
    result = json.loads(result.out)
    Imported.model_validate(result)
    assert (result["top1"], result["folder"], result["classes"]) == (None, "resnet20-cifar100", 100)
    found = artifact.load(bench.cwd / "resnet20-cifar100")
    assert found.card.classes == CIFAR100.classes
    assert not list(bench.cwd.glob(".*"))


def test_an_imported_network_is_scored_and_teaches(fork_server: ForkServer, tmp_path: Path) -> None:
    tensors, _ = foreign("resnet20", 20)
    torch.save({"net": tensors}, tmp_path / "a.pth")
    here = fork_server.at(tmp_path)
    options = ["--dataset", "shapes", "--set", "data.train=60", "--set", "data.test=40"]
    result = here.sakd("import-weights", "a.pth", "--model", "resnet20", "--out", "deep/er", *options)
    assert result.code == 0, result.err
    about = json.loads((tmp_path / "deep" / "er" / "config.json").read_text())
    assert f"top-1 {about['top1']:.2f} % on 40 test images" in result.out
    assert about["imported"]["file"] == "a.pth"
    assert "imported by sakd" in (tmp_path / "deep" / "er" / "README.md").read_text()
    again = here.sakd("eval", "deep/er", *options, "--json", "-q")
    assert json.loads(again.out)["top1"] == about["top1"]
    pretrained = here.sakd(
        "distill", "--teacher", "deep/er", "--student", "resnet8", *options, "--epochs", "1", "--json"
    )
    assert pretrained.code == 0, pretrained.err
    assert json.loads(pretrained.out)["teacher"]["top1"] == about["top1"]


def test_weights_of_our_own_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    network = create("resnet8", 10)
    with torch.no_grad():
        network.head.bias[3] = float("inf")
    card = artifact.NetworkCard("resnet8", "cifar10", tuple("abcdefghij"), (0.5,) * 3, (0.3,) * 3, 32)
    artifact.save_weights(tmp_path / "a.safetensors", network, card)
    with pytest.raises(artifact.NonFiniteError, match=r"a\.safetensors: tensor 'head\.bias'"):
        artifact.load(tmp_path / "a.safetensors")
    with pytest.raises(UsageError, match="too many for this network"):
        read_foreign(tmp_path / "a.safetensors", 100)


def test_a_head_from_elsewhere_and_half_numbers_are_told(tmp_path: Path) -> None:
    halves = {n: t.bfloat16() if t.is_floating_point() else t for n, t in foreign("resnet20")[0].items()}
    torch.save({f"probe{n[2:]}" if n[:3] == "fc." else f"body.{n}": t for n, t in halves.items()}, tmp_path / "a.pth")
    told: list[str] = []
    load_foreign(tmp_path / "a.pth", "resnet20", 100, tell=told.append)
    assert told == ["weights of type bfloat16, from here on float32", "the last layer taken from probe"]


@pytest.mark.parametrize("name", ["resnet20", "vgg8", "MobileNetV2"])
def test_our_own_names_come_in_too_and_averaged_weights_are_told(tmp_path: Path, name: str) -> None:
    network = create(name, 10)
    torch.save(torch.optim.swa_utils.AveragedModel(network).state_dict(), tmp_path / "a.pth")
    told: list[str] = []
    found = load_foreign(tmp_path / "a.pth", name, 10, tell=told.append).state_dict()
    assert all(torch.equal(found[key], tensor) for key, tensor in network.state_dict().items())
    left = "left in the file, beside the weights: n_averaged"
    assert told == ["averaged weights (EMA) taken (what has no prefix)", left]
    if name == "vgg8":  # all networks are looked at
        with pytest.raises(UsageError) as caught:
            load_foreign(tmp_path / "a.pth", "resnet56", 10)
        assert caught.value.hint == f"these are the weights of a {name} with 10 classes"


def test_a_file_is_what_its_content_says(tmp_path: Path) -> None:
    tensors, file = foreign("resnet20")[0], tmp_path / "a.pth"
    save_file({name: t.double() if t.is_floating_point() else t for name, t in tensors.items()}, file)
    torch.save(tensors, tmp_path / "a.safetensors")
    told: list[str] = []
    for name in ("a.pth", "a.safetensors"):
        network = load_foreign(tmp_path / name, "resnet20", 100, tell=told.append)
        assert torch.equal(network.head.bias, tensors["fc.bias"])
    assert told == ["weights of type float64, from here on float32"]
    with pytest.raises(UsageError, match="has no weights under 'ema'") as caught:
        load_foreign(file, "resnet20", 100, key="ema")
    assert caught.value.hint == "its weights stand under no key: leave --key out"
    for content, text, hint in (
        (b"", "a.pth: empty", None),
        (
            b"version https://git-lfs.github.com/spec/v1\n",
            "begins with 'version h'",
            "a pointer of Git LFS: git lfs pull",
        ),
        (b"<!DOCTYPE html>", "begins with '<!DOCTYPE'", None),
        (b"\xff\0\0\0\0\0\0\0{}", "damaged or not a safetensors file", None),
    ):
        file.write_bytes(content)
        with pytest.raises(UsageError, match=text) as caught:
            read_foreign(file, 10**9)
        assert caught.value.hint == hint
    torch.export.save(torch.export.export(torch.nn.Linear(2, 2), (torch.ones(1, 2),)), tmp_path / "a.pt2")
    with pytest.raises(UsageError, match=r"a\.pt2: is a program"):
        read_foreign(tmp_path / "a.pt2", 10**9)


def test_a_file_in_parts_is_read_by_its_index(tmp_path: Path) -> None:
    tensors, index = foreign("resnet20")[0], tmp_path / "model.safetensors.index.json"
    files = {name: f"model-0000{1 + (k > 9)}-of-00002.safetensors" for k, name in enumerate(tensors)}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in tensors if files[name] == file}, tmp_path / file)
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": files}))
    assert torch.equal(load_foreign(index, "resnet20", 100).head.bias, tensors["fc.bias"])
    for wrong, text in (
        ({name: file for name, file in files.items() if "fc" not in name}, "its parts have not the"),
        (files | {"fc.bias": "../a.safetensors"}, "is no index of a file in parts"),
        (files | {"fc.bias": "gone.safetensors"}, "no such file"),
    ):
        index.write_text(json.dumps({"weight_map": wrong}))
        with pytest.raises(UsageError, match=text):
            load_foreign(index, "resnet20", 100)
