"""`sakd import-weights` beside the file itself: class order, published teachers, chance, differing classes."""

import json

import pytest
import torch
from conftest import CliRunner
from oracles import fill
from PIL import Image
from test_import import foreign
from torch import Tensor

from sakd_cli.data.torchvision_sets import CIFAR100
from sakd_cli.models import artifact
from sakd_cli.models.dialects import DIALECTS, translate_name
from sakd_cli.models.table import create
from sakd_cli.runs.initial_weights import differing_classes
from sakd_cli.runs.teachers import read_claim, warn_of_chance


def published(name: str, seed: int) -> dict[str, Tensor]:
    """Weights under the names that RepDistiller gives them."""
    rules = DIALECTS["resnet"][0]
    return {translate_name(key, rules): value for key, value in fill(create(name, 100), seed).state_dict().items()}


def test_the_command_takes_key_and_class_order_and_knows_published_teachers(cli: CliRunner) -> None:
    """A file of classes in another order gives the rows of the head that the data set has; a release has its figure."""
    order = [*CIFAR100.classes[50:], *CIFAR100.classes[:50]]
    (cli.path / "order.txt").write_text("\n".join(order))
    (cli.path / "order.json").write_text(json.dumps({name: place for place, name in enumerate(order)}))
    folder = cli.path / "resnet56_vanilla"
    folder.mkdir()
    torch.save({"model": published("resnet56", 3), "state_dict_ema": published("resnet56", 4)}, folder / "ckpt.pth")
    nowhere = ["--data-root", "nowhere", "--json"]
    base = ["import-weights", "resnet56_vanilla/ckpt.pth", *nowhere]
    plain = cli.sakd(*base, "--out", "plain")
    assert plain.document["imported"]["published_top1"] == 72.34
    assert "averaged ones (EMA) are there too: --key state_dict_ema" in plain.err
    heads = {
        name: artifact.load(cli.path / name).model.head.weight
        for name, more in {
            "text": ["--classes", "order.txt"],
            "json": ["--classes", "order.json"],
            "ema": ["--key", "state_dict_ema"],
        }.items()
        if cli.sakd(*base, "--out", name, *more).document
    }
    own = artifact.load(cli.path / "plain").model.head.weight
    assert torch.equal(heads["text"], torch.cat([own[50:], own[:50]]))
    assert torch.equal(heads["json"], heads["text"])
    assert torch.equal(heads["ema"], published("resnet56", 4)["fc.weight"])
    claim = read_claim(cli.path / "plain", json.loads((cli.path / "plain" / "config.json").read_text())["sha256"])
    assert claim == ("cifar100", 10_000, 72.34), "a teacher that was not scored is held against the published figure"
    (cli.path / "few.txt").write_text("\n".join([*order[:-1], "unicorn"]))
    text = "is not the 100 classes of cifar100: only there: 'unicorn'; only here: 'mountain'"
    cli.assert_rejects([*base[:2], "--classes", "few.txt", *nowhere[:2]], 2, text)
    for places in (dict.fromkeys(order, 0), {name: 2 * place for place, name in enumerate(order)}):
        (cli.path / "few.json").write_text(json.dumps(places))
        cli.assert_rejects([*base[:2], "--classes", "few.json", *nowhere[:2]], 2, "holds no order of classes")
    (cli.path / "ckpt.pth").write_bytes(b"")
    cli.assert_rejects(["import-weights", "ckpt.pth"], 2, "Missing option '--model'")


def test_a_teacher_at_chance_is_told_at_import_and_before_a_distillation(cli: CliRunner) -> None:
    tensors, _ = foreign("resnet20", 20)
    torch.save(tensors, cli.path / "chance.pth")
    small = ["--dataset", "shapes", "--set", "data.train=60", "--set", "data.test=40"]
    imported = cli.sakd("import-weights", "chance.pth", "--model", "resnet20", "--out", "chance", *small, "-q")
    assert "on 40 test images is chance for 20 classes: another order of classes" in imported.err
    distilled = cli.sakd("distill", "--teacher", "chance", "--student", "resnet8", *small, "--epochs", "1")
    assert distilled.code == 0, distilled.err
    before, _, _ = distilled.err.partition("distilling")
    assert "teacher: top-1 " in distilled.err
    assert "is chance for 20 classes" in before
    told: list[str] = []
    for top1 in (1.4, 1.1):
        warn_of_chance(top1, 10_000, 100, told.append, "teacher: ")
    assert [text[:22] for text in told] == ["teacher: top-1 1.10 % "]
    assert len(told[0]) <= 192, "a message is cut there"


def test_finite_weights_whose_outputs_are_not_cost_one_line_in_every_command(cli: CliRunner) -> None:
    """A variance below zero: at import, in an evaluation, for a picture, as a teacher."""
    tensors, _ = foreign("resnet20", 20)
    torch.save(tensors | {"bn1.running_var": torch.full((16,), -1.0)}, cli.path / "odd.pth")
    small = ["--dataset", "shapes", "--set", "data.train=60", "--set", "data.test=40"]
    text = "resnet20: the loss on 40 evaluated images is nan"
    cli.assert_rejects(["import-weights", "odd.pth", "--model", "resnet20", "--out", "odd", *small, "-q"], 7, text)
    torch.save(tensors, cli.path / "even.pth")
    assert cli.sakd("import-weights", "even.pth", "--model", "resnet20", "--out", "odd", *small, "-q").code == 0
    network = artifact.load(cli.path / "odd")
    with torch.no_grad():
        network.model.head.weight.fill_(3e38)
    artifact.save_folder(cli.path / "odd", network.model, network.card, {})
    Image.new("RGB", (32, 32)).save(cli.path / "a.png")
    text = "resnet20: the loss on 40 evaluated images is "
    cli.assert_rejects(["eval", "odd", *small, "-q"], 7, text)
    cli.assert_rejects(["predict", "odd", "a.png", "-q"], 7, "odd: the network's outputs are not finite")
    taught = cli.sakd("distill", "--teacher", "./odd", "--student", "resnet8", *small, "--epochs", "1", "-q")
    assert (taught.code, len(taught.err.splitlines())) == (7, 1), taught.err
    assert text in taught.err


@pytest.mark.parametrize(
    ("theirs", "text"),
    [
        ("bac", "another order, class 0 is 'b' there and 'a' here"),
        ("abd", "only there: 'd'; only here: 'c'"),
        ("ab", "only here: 'c'"),
        ("abcxyz", "only there: 'x', 'y', ..."),
    ],
)
def test_the_first_differing_classes_are_named(theirs: str, text: str) -> None:
    assert differing_classes(theirs, "abc") == text
