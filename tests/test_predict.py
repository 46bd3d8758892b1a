"""`sakd predict`: the answers of `sakd eval` for any pictures; what cannot be read costs one line."""

import csv
import io
import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CliRunner
from PIL import Image

from sakd_cli.config.preprocessing import Preprocessing
from sakd_cli.data.decode import Reading
from sakd_cli.data.files import ImageSpec, load_eval_image
from sakd_cli.models import artifact, ensemble
from sakd_cli.models.artifact import NetworkCard
from sakd_cli.models.ensemble import Ensemble, Exits
from sakd_cli.models.table import create
from sakd_cli.runs.predict import find_pictures

CLASSES = ("cat", "dog", "owl")
SEEN = Preprocessing(size=32, resize=40, interpolation="bicubic", resize_mode="shorter")
CARD = NetworkCard("resnet8", "imagefolder", CLASSES, (0.4, 0.5, 0.6), (0.2, 0.25, 0.3), 32, SEEN)


@pytest.fixture(scope="module")
def photos(cli: CliRunner) -> Path:
    """A folder of a network and of three classes of pictures, one of them damaged."""
    draw = np.random.default_rng(0)
    for name in CLASSES:
        (cli.path / "photos" / name).mkdir(parents=True)
        for number in range(5):
            size = (40 + number, 60 - number, 3)
            file = cli.path / "photos" / name / f"{number}.png"
            Image.fromarray(draw.integers(0, 256, size, dtype=np.uint8)).save(file)
    torch.manual_seed(1)
    artifact.save_weights(cli.path / "net.safetensors", create("resnet8", 3), CARD)
    return cli.path / "photos"


def test_it_answers_as_eval_does(cli: CliRunner, photos: Path) -> None:
    shown = ["--dataset", "imagefolder", "--data-root", "photos", "--set", "timing_seconds=0"]
    normal = ["--set", "data.mean=0.4,0.5,0.6", "--set", "data.std=0.2,0.25,0.3"]
    scored = cli.sakd("eval", "net.safetensors", *shown, *normal, "--json", "-q").document
    found = cli.sakd("predict", "net.safetensors", "photos", "--json", "--top", "2").document
    answers = {one["file"]: one["classes"][0]["class"] for one in found["predictions"]}
    assert len(answers) == scored["images"] == 15
    assert 100 * np.mean([Path(file).parent.name == name for file, name in answers.items()]) == pytest.approx(
        scored["top1"]
    )
    wrong = Counter((Path(file).parent.name, name) for file, name in answers.items())
    for pair in scored["confusions"]:
        assert wrong[pair["class"], pair["predicted_as"]] == pair["images"]
    model = artifact.load(cli.path / "net.safetensors").model.eval()
    for one in found["predictions"]:
        pixels = load_eval_image(str(cli.path / one["file"]), ImageSpec(SEEN, 0, Reading()))
        assert isinstance(pixels, torch.Tensor)
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (CARD.mean, CARD.std))
        with torch.inference_mode():
            best = model((pixels / 255 - mean)[None] / std).softmax(1)[0].topk(2)
        assert [answer["class"] for answer in one["classes"]] == [CLASSES[k] for k in best.indices]
        expected = best.values.tolist()
        assert [answer["probability"] for answer in one["classes"]] == pytest.approx(expected, abs=1e-6)


def test_files_folders_patterns_and_a_list_give_the_same(
    cli: CliRunner, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [f"photos/{name}/{number}.png" for name in CLASSES for number in range(5)]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines) + "\n\n"))
    monkeypatch.setattr("sys.stdin", io.StringIO("\ufeff" + "\r\n".join(lines)))
    assert [one.path for one in find_pictures(["-"])] == lines, "as Windows writes lists"
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines) + "\n\n"))
    ways = (["photos"], lines, ["photos/*/*.png"], ["photos/**/*.png"], ["photos/*"], ["-"])
    found = [cli.sakd("predict", "net.safetensors", *way, "--csv", "-q").out for way in ways]
    assert len(set(found)) == 1
    rows = list(csv.DictReader(io.StringIO(found[0])))
    assert [row["file"] for row in rows] == lines
    assert rows[0].keys() == {"file", "error", "exit"} | {
        f"{n}_{k}" for n in ("class", "probability") for k in (1, 2, 3)
    }
    smaller = cli.sakd("predict", "net.safetensors", "photos", "--csv", "--batch-size", "2", "-q").out
    assert [row["class_1"] for row in csv.DictReader(io.StringIO(smaller))] == [row["class_1"] for row in rows]


def test_a_picture_has_one_line_whatever_it_or_a_class_is_called(cli: CliRunner, photos: Path, tmp_path: Path) -> None:
    shutil.copy(photos / "cat" / "0.png", tmp_path / "a\nb.png")
    card = CARD._replace(classes=("new\nline", "dog", "owl"))
    artifact.save_weights(tmp_path / "odd.safetensors", create("resnet8", 3), card)
    out = cli.sakd("predict", str(tmp_path / "odd.safetensors"), str(tmp_path / "a\nb.png"), "-q").out
    assert r"a\nb.png: " in out
    assert "new line" in out
    assert len(out.splitlines()) == 1


def test_a_picture_that_cannot_be_read_costs_one_line(cli: CliRunner, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes((photos / "cat" / "0.png").read_bytes()[:200])
    (tmp_path / "empty.png").touch()
    named = [str(tmp_path), "photos/cat/1.png", "photos/none.png", "photos/*.gif"]
    found = cli.sakd("predict", "net.safetensors", *named, "--json", "-q")
    document = json.loads(found.out)
    assert (found.code, document["images"], document["failed"]) == (3, 5, 4)
    reasons = [one["error"] for one in document["predictions"]]
    assert [bool(reason) for reason in reasons] == [True, True, False, True, True]
    assert reasons[1:] == ["is empty", None, "no such file or directory", "no file fits this pattern"]
    kinds = [line.partition(":")[0] for line in found.err.splitlines()]
    assert kinds == ["warning"] * 4 + ["error"]
    assert "4 of 5 pictures could not be read; the others are answered" in found.err
    found = cli.sakd("predict", "net.safetensors", str(tmp_path / "empty.png"))
    assert found.err.splitlines()[-1] == "error: 1 of 1 picture could not be read"
    text = cli.sakd("predict", "net.safetensors", *named, "-q").out.splitlines()
    assert text[1] == f"{tmp_path}/empty.png: not read (is empty)"
    assert text[2].startswith("photos/cat/1.png: ")
    gone = cli.sakd("predict", "net.safetensors", *(f"gone/{n}.png" for n in range(30))).err.splitlines()
    assert [line for line in gone if line.startswith("warning")][20:] == [
        "warning: and 10 more that could not be read; --json names them all"
    ]
    (tmp_path / "nothing").mkdir()
    cli.assert_rejects(["predict", "net.safetensors", str(tmp_path / "nothing")], 3, "no pictures there")
    cli.assert_rejects(["predict", "nowhere", "photos"], 2, "nowhere: no such file")


def test_pictures_leave_an_ensemble_where_they_may(cli: CliRunner, photos: Path) -> None:
    torch.manual_seed(2)
    members = Ensemble([create("resnet8", 3).eval(), create("resnet8", 3).eval()])
    facts = {"rule": {}, "teacher": {"macs": 1}}
    for name, limit in (("early", 1.0), ("late", -1.0)):
        ensemble.save(cli.path / name, members, CARD, Exits("entropy", (0.0, 1.0), (limit,)), facts)
    exits, answers = {}, {}
    for way in (["early"], ["late"], ["early", "--always-on"]):
        found = cli.sakd("predict", *way, "photos", "--json", "-q").document
        exits[" ".join(way)] = {one["exit"] for one in found["predictions"]}
        answers[" ".join(way)] = [one["classes"] for one in found["predictions"]]
        assert found["network"] == "resnet8 + resnet8"
    assert exits == {"early": {0}, "late": {1}, "early --always-on": {1}}
    assert answers["late"] == answers["early --always-on"] != answers["early"]
