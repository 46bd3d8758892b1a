"""How pictures are shown is part of the network: on its card, in its exports, in every command, equal to plain code."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CliRunner
from PIL import Image, ImageOps
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode, v2

from sakd_cli.config.datasets import ImageFolderConfig
from sakd_cli.config.preprocessing import Preprocessing, library_preprocessing
from sakd_cli.config.resolve import ConfigSource, resolve, set_sources
from sakd_cli.data.decode import Reading
from sakd_cli.data.files import ImageSpec, load_eval_image
from sakd_cli.errors import UsageError
from sakd_cli.export.source import opening_imports, opening_lines
from sakd_cli.models import artifact
from sakd_cli.models.artifact import NetworkCard
from sakd_cli.models.table import create

CLASSES = ("ant", "bee", "cat")
SIZES = [(40, 30), (33, 64), (24, 24), (90, 20), (31, 57), (81, 80), (19, 77)]  # width, height
RNG = np.random.default_rng(0)


def photo(path: Path, number: int) -> None:
    """Odd in size; some stored turned, some transparent, some grey."""
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = Image.fromarray(RNG.integers(0, 256, (7, 6, 3), dtype=np.uint8))
    picture = coarse.resize(SIZES[number % len(SIZES)], Image.Resampling.BICUBIC)
    exif = Image.Exif()
    if number % 4 == 1:
        exif[274] = 3 + number % 6  # orientation
    elif number % 4 == 2:
        picture.putalpha(Image.fromarray(RNG.integers(0, 256, picture.size[::-1], dtype=np.uint8)))
    elif number % 4 == 3:
        picture = picture.convert("L")
    picture.save(path, exif=exif)


@pytest.fixture(scope="module")
def photos(cli: CliRunner) -> Path:
    root = cli.path / "photos"
    for number in range(21):
        photo(root / CLASSES[number % 3] / f"{number}.png", number)
    return root


def all_files(photos: Path) -> list[Path]:
    return [path for name in CLASSES for path in sorted((photos / name).iterdir())]


def opened(path: Path) -> Image.Image:
    """As plain code opens it."""
    picture = ImageOps.exif_transpose(Image.open(path)).convert("RGBA")
    rgb = Image.new("RGB", picture.size, "white")
    rgb.paste(picture, mask=picture.getchannel("A"))
    return rgb


CASES: dict[str, tuple[Preprocessing, list[Any]]] = {
    "bilinear": (Preprocessing(size=64, resize=73), [v2.Resize(73), v2.CenterCrop(64)]),
    "bicubic": (
        Preprocessing(size=64, resize=73, interpolation="bicubic"),
        [v2.Resize(73, InterpolationMode.BICUBIC), v2.CenterCrop(64)],
    ),
    "squash": (
        Preprocessing(size=64, resize=73, resize_mode="squash"),
        [v2.Resize((73, 73)), v2.CenterCrop(64)],
    ),
    "nearest": (
        Preprocessing(size=32, resize=32, interpolation="nearest"),
        [v2.Resize(32, InterpolationMode.NEAREST), v2.CenterCrop(32)],
    ),
    "lanczos": (
        Preprocessing(size=32, resize=40, interpolation="lanczos"),
        [v2.Resize(40, InterpolationMode.LANCZOS), v2.CenterCrop(32)],
    ),
    "no antialias": (
        Preprocessing(size=16, resize=18, antialias=False),
        [v2.PILToTensor(), v2.Resize(18, antialias=False), v2.CenterCrop(16)],
    ),
    "none": (Preprocessing(size=(33, 40), resize=33, resize_mode="none"), [v2.CenterCrop((33, 40))]),
    "none, no antialias": (
        Preprocessing(size=25, resize=25, resize_mode="none", antialias=False),
        [v2.PILToTensor(), v2.CenterCrop(25)],
    ),
    "squash to a rectangle": (
        Preprocessing(size=(24, 48), resize=24, resize_mode="squash"),
        [v2.Resize((24, 48)), v2.CenterCrop((24, 48))],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_picture_is_shown_as_plain_code_shows_it(name: str, photos: Path) -> None:
    seen, steps = CASES[name]
    plain = v2.Compose([*steps, v2.ToImage()])
    for path in all_files(photos):
        ours = load_eval_image(str(path), ImageSpec(seen, 0, Reading()))
        assert isinstance(ours, Tensor)
        assert torch.equal(ours, torch.as_tensor(plain(opened(path)))), path
        names: dict[str, Any] = {}
        exec(f"{opening_imports(seen)}\n{opening_lines(seen, str(path))}", names)
        assert np.array_equal(names["pixels"], ours[None].numpy().astype(np.float32) / 255), path
    assert len(opening_lines(seen).splitlines()) <= 8


@pytest.mark.parametrize("size", [(40, 64), (64, 40)])
def test_a_rectangle_is_covered_in_the_pictures_own_proportions(size: tuple[int, int]) -> None:
    seen = Preprocessing(size=size, resize=44)
    box = {(40, 64): (44, 70), (64, 40): (70, 44)}[size]
    for width, height in SIZES:
        high, wide = seen.scaled(height, width)
        assert high == box[0] or wide == box[1]
        assert high >= box[0]
        assert wide >= box[1]
        assert abs(high / wide - height / width) < 0.05 * height / width
        picture = Image.new("RGB", (width, height))
        names: dict[str, Any] = {}
        lines = opening_lines(seen).replace('ImageOps.exif_transpose(Image.open("photo.jpg"))', "picture")
        exec(f"{opening_imports(seen)}\n", names)
        exec(lines.partition("rgb = rgb.crop")[0], names | (kept := {"picture": picture}), kept)
        assert kept["rgb"].size == (wide, high)


# --- the same loss as plain code


def own_package(num_classes: int) -> nn.Module:
    """Normalises by mean = std = 0.5, as its settings say."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, num_classes),
    )


SQUASH = Preprocessing(size=32, resize=36, resize_mode="squash")
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
NETWORKS: dict[str, tuple[str, Preprocessing, Any]] = {
    "resnet18 bilinear": ("torchvision/resnet18", CASES["bilinear"][0], IMAGENET),
    "timm bicubic": ("timm/test_resnet", Preprocessing(size=64, resize=67, interpolation="bicubic"), IMAGENET),
    "own package squash": ("test_preprocessing:own_package", SQUASH, ((0.5,) * 3, (0.5,) * 3)),
}
STEPS = {
    "resnet18 bilinear": CASES["bilinear"][1],
    "timm bicubic": [v2.Resize(67, InterpolationMode.BICUBIC), v2.CenterCrop(64)],
    "own package squash": [v2.Resize((36, 36)), v2.CenterCrop(32)],
}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_loss_of_a_copied_network_is_that_of_plain_code(
    name: str, cli: CliRunner, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    architecture, seen, (mean, std) = NETWORKS[name]
    torch.manual_seed(0)
    network = create(architecture, 3, int(str(seen.size))).eval()
    folder = cli.path / name.replace(" ", "-")
    card = NetworkCard(architecture, "imagefolder", CLASSES, mean, std, int(str(seen.size)), seen)
    artifact.save_folder(folder, network, card, {})
    trusted = {"SAKD_FACTORIES": architecture}
    result = cli.sakd("eval", str(folder), "--data-root", str(photos), "--json", "--set", "timing_seconds=0", **trusted)
    document = result.document
    steps = v2.Compose([*STEPS[name], v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)])
    with torch.inference_mode():
        logits = network(torch.stack([steps(opened(path)) for path in all_files(photos)]))
    labels = torch.tensor([CLASSES.index(path.parent.name) for path in all_files(photos)])
    assert document["images"] == 21
    assert abs(document["loss"] - float(nn.functional.cross_entropy(logits, labels))) < 1e-6


# --- it travels with the network

SEEN = Preprocessing(size=24, resize=27, interpolation="bicubic", background=(9, 99, 199))
# Runs the lines of each folder's README on each photo, without sakd.
PROGRAM = """
import json, os, pathlib, re, sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "sakd_cli":
            raise ImportError(name)

sys.meta_path.insert(0, Blocker())
photos, *folders = sys.argv[1:]
for folder in folders:
    os.chdir(folder)
    sys.path.insert(0, folder)
    (lines,) = re.findall(r"```python\\n(.*?)```", pathlib.Path("README.md").read_text(), re.DOTALL)
    found = []
    for photo in json.loads(photos):
        exec(lines.replace("photo.jpg", photo), names := {})
        found.append(names["logits"].tolist()[0])
    print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def trained(cli: CliRunner, photos: Path) -> Path:
    """A network that saw its pictures so."""
    torch.manual_seed(1)
    card = NetworkCard("resnet8", "imagefolder", CLASSES, (0.4, 0.5, 0.6), (0.2, 0.3, 0.25), 24, SEEN)
    artifact.save_folder(cli.path / "net", create("resnet8", 3, 24), card, {})
    return cli.path / "net"


def test_the_lines_of_an_export_open_any_photo_as_it_was_trained(cli: CliRunner, trained: Path, photos: Path) -> None:
    files, folders = all_files(photos), []
    for form in ("safetensors", "onnx"):
        out = ["--out", str(cli.path / form), "--json", "--data-root", str(photos), "--set", "timing_seconds=0"]
        document = cli.sakd("export", str(trained), "--format", form, *out).document
        assert document["check"]["real"]
        folders.append(document["folder"])
        about = json.loads((Path(folders[-1]) / "config.json").read_text())
        assert about["preprocessing"] == SEEN.model_dump(mode="json")
    program = [sys.executable, "-c", PROGRAM, json.dumps([*map(str, files)]), *folders]
    done = subprocess.run(program, capture_output=True, text=True, env={"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    network = artifact.load(trained).model.eval()
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in ((0.4, 0.5, 0.6), (0.2, 0.3, 0.25)))
    reading = Reading(background=SEEN.background)
    shown_ = [load_eval_image(str(path), ImageSpec(SEEN, 0, reading)) for path in files]
    pixels = torch.stack([image for image in shown_ if isinstance(image, Tensor)])
    with torch.inference_mode():
        expected = network((pixels / 255 - mean) / std)
    for line in done.stdout.splitlines():
        torch.testing.assert_close(torch.tensor(json.loads(line)), expected, rtol=0, atol=1e-4)
    assert len(done.stdout.splitlines()) == 2
    import onnx

    model = onnx.load(Path(folders[1]) / "model.onnx")
    told = {entry.key: json.loads(entry.value) for entry in model.metadata_props}
    assert (told["classes"], told["preprocessing"]) == (list(CLASSES), SEEN.model_dump(mode="json"))


def test_a_program_file_carries_its_preprocessing(cli: CliRunner, trained: Path, photos: Path) -> None:
    out = ["--out", str(cli.path / "pt2"), "--json", "--data-root", str(photos), "--set", "timing_seconds=0"]
    document = cli.sakd("export", str(trained), "--format", "pt2", *out).document
    told = {"preprocessing.json": "", "classes.json": ""}
    torch.export.load(Path(document["folder"]) / "model.pt2", extra_files=told)
    assert json.loads(told["preprocessing.json"]) == SEEN.model_dump(mode="json")
    assert json.loads(told["classes.json"]) == list(CLASSES)


def test_a_difference_from_the_card_is_named(cli: CliRunner, trained: Path, photos: Path) -> None:
    same = ["eval", str(trained), "--data-root", str(photos), "--set", "timing_seconds=0"]
    assert "card says" not in cli.sakd(*same).err
    other = cli.sakd(*same, "--set", "data.resize=24", "--set", "data.interpolation=bilinear")
    assert "resize 24; its card says 27" in other.err
    assert "interpolation bilinear; its card says bicubic" in other.err


def test_a_run_writes_down_how_its_pictures_were_shown(cli: CliRunner, photos: Path) -> None:
    settings = "size=16 resize=20 resize_mode=squash interpolation=lanczos cache=false workers=0 background=0,0,0"
    options = [part for setting in settings.split() for part in ("--set", f"data.{setting}")]
    where = ["--dataset", "imagefolder", "--data-root", str(photos), "--epochs", "1", "--run-dir", "run", "-q"]
    assert cli.sakd("pretrain-teacher", "resnet8", *where, *options).code == 0
    card = artifact.load(cli.path / "run/teacher").card
    assert card.preprocessing == Preprocessing(
        size=16, resize=20, resize_mode="squash", interpolation="lanczos", background=(0, 0, 0)
    )
    result = cli.sakd("eval", "run/teacher", "--data-root", str(photos), "--json", "--set", "timing_seconds=0")
    about = json.loads((cli.path / "run/teacher/config.json").read_text())
    assert result.document["top1"] == about["top1"]


# --- from a library


def test_it_is_taken_from_a_librarys_network_as_far_as_nothing_else_is_said() -> None:
    assert library_preprocessing("timm/vit_tiny_patch16_224") == {
        "size": 224,
        "resize": 248,
        "resize_mode": "shorter",
        "interpolation": "bicubic",
        "antialias": True,
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
    }
    assert library_preprocessing("torchvision/ResNet50_Weights.IMAGENET1K_V2")["resize"] == 232
    assert library_preprocessing("torchvision/resnet18")["resize"] == 256
    for name in ("resnet18", "timm/nosuch", "torchvision/nosuch", "torchvision/ResNet50_Weights.NONE"):
        with pytest.raises(UsageError, match=re.escape(name)):
            library_preprocessing(name)
    base = ConfigSource("a file", {"model": "resnet8", "data": {"name": "imagefolder", "size": 32, "resize": 40}})
    said = set_sources(["data.size=96", "data.preprocessing=timm/vit_tiny_patch16_224"])
    data: ImageFolderConfig = resolve("pretrain", [base, *said]).config.data
    assert (data.size, data.resize, data.interpolation, data.mean) == (96, 248, "bicubic", (0.5, 0.5, 0.5))
    again = resolve("pretrain", [ConfigSource("a run", {"model": "resnet8", "data": data.model_dump()})]).config
    assert again.data == data


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"size": 64, "resize": 63}, "resize 63 is smaller than the 64x64 pixels"),
        ({"size": (64, 96), "resize": 63}, "resize 63 is smaller than the 64x96 pixels"),
        ({"resize": 256, "resize_mode": "none"}, "resize_mode none leaves pictures as large as they are"),
        ({"interpolation": "lanczos", "antialias": False}, "lanczos is only there with antialias"),
        ({"size": 4}, "size"),
    ],
)
def test_what_does_not_fit_is_refused(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(UsageError, match=re.escape(text)):
        resolve("pretrain", [ConfigSource("-", {"model": "resnet8", "data": {"name": "imagefolder"} | settings})])
