"""Commands with networks of other libraries and of one's own code: train, go on, score, look, start from weights."""

from pathlib import Path

import pytest
import torch
import torchvision
from conftest import TINY, CliRunner

from sakd_cli.api import evaluate
from sakd_cli.config.code import trust_no_more
from sakd_cli.errors import UsageError
from sakd_cli.models.artifact import load

SMALL = """
from torch import nn

def small(num_classes):
    body = [nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU()]
    body += [nn.Conv2d(16, 16, 3, 2, 1), nn.ReLU()]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, num_classes))
"""
TEACHER = ["--teacher", "torchvision/shufflenet_v2_x0_5", "--teacher-weights", "library.pth"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> CliRunner:
    """A folder with a module of networks, and weights as torchvision saves them: for 20 classes and for 7."""
    path = tmp_path_factory.mktemp("external")
    (path / "sakd_test_nets.py").write_text(SMALL, encoding="utf-8")
    for name, classes in (("library.pth", 20), ("seven.pth", 7)):
        network = torchvision.models.shufflenet_v2_x0_5(num_classes=classes)
        torch.save(network.state_dict(), path / name)
    return CliRunner(path)


@pytest.fixture(scope="module")
def run(place: CliRunner) -> Path:
    """A distillation from torchvision's file to a network of one's own."""
    arguments = ["distill", *TEACHER, "--student", "sakd_test_nets:small", *TINY, "--json"]
    return place.path / place.sakd(*arguments).document["run"]


def test_a_run_is_saved_and_scored_where_its_code_is_trusted(place: CliRunner, run: Path) -> None:
    assert "torchvision.shufflenet_v2_x0_5-sakd_test_nets.small" in run.name
    with pytest.raises(UsageError, match="would run code that you have not named"):
        load(run / "student")
    refused = place.sakd("eval", str(run), XDG_STATE_HOME=str(place.path / "another user"))
    assert (refused.code, refused.err.count("\n")) == (2, 2)
    scored = place.sakd("eval", str(run), "--json", SAKD_FACTORIES="sakd_test_nets:small").document
    assert 0 <= scored["top1"] <= 100
    assert place.sakd("eval", str(run), "--json").document["top1"] == scored["top1"], "a run that was made here"
    settings = {"timing_seconds": 0}
    assert evaluate(run / "student", trust=["sakd_test_nets:small"], settings=settings).top1 == scored["top1"]
    trust_no_more()


def test_it_goes_on_and_can_be_looked_at(place: CliRunner, run: Path) -> None:
    assert place.sakd("distill", "--resume", str(run), "--json").document["run"]
    assert len(place.sakd("inspect-spots", str(run), "--json").document["overall"]) == 2


def test_a_dry_run_shows_the_spots_of_a_library(place: CliRunner) -> None:
    arguments = ["distill", *TEACHER, "--student", "torchvision/mobilenet_v3_small", *TINY, "--dry-run", "--json"]
    arguments += ["--set", "data.size=32"]
    plan = place.sakd(*arguments, "--set", "stage_map=[[2,1],[4,3]]", "--set", "method.stage=2").document
    assert [(spot["student_stage"], spot["teacher_stage"]) for spot in plan["spots"]] == [(4, 3), (6, 5)]


def test_a_head_is_replaced_only_where_that_is_asked_for(place: CliRunner) -> None:
    arguments = ["pretrain-teacher", "torchvision/shufflenet_v2_x0_5", "--set", "init_from=seven.pth", *TINY]
    place.assert_rejects(arguments, 2, "init_from: seven.pth is for 7 classes, not for the 20 of shapes")
    made = place.sakd(*arguments, "--head", "replace", "--json").document
    folder = place.path / made["run"]
    again = ["distill", "--teacher", str(folder), "--student", "resnet8", *TINY, "--dry-run", "--json"]
    assert place.sakd(*again).document["networks"][0]["name"] == "torchvision/shufflenet_v2_x0_5"


@pytest.mark.parametrize(
    ("word", "told"),
    [
        (
            "student_weights=seven.pth",
            "student_weights: seven.pth is not a file of sakd, and resnet8 is no network of a",
        ),
        ("student_weights=library", "student_weights: library is not a file of sakd"),
        ("student_weights=nowhere.pth", "student_weights: nowhere.pth: no such file or directory"),
    ],
)
def test_weights_of_another_network_are_refused(place: CliRunner, word: str, told: str) -> None:
    arguments = ["distill", *TEACHER, "--student", "resnet8", *TINY, "--set", word]
    assert told in place.sakd(*arguments).err
