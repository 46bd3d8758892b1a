"""A teacher's card: what it says, who says it, and that a distillation holds it against what it measures itself."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY, CliRunner

from sakd_cli.errors import UsageError
from sakd_cli.files import sha256
from sakd_cli.runs.teachers import Claim, compare_with_card, read_claim

PAIR = ["distill", "--student", "resnet8", "--method", "kd", *TINY]


def card(folder: Path) -> dict[str, Any]:
    fields: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return fields


@pytest.fixture
def copied(cli: CliRunner, teacher: Path, tmp_path: Path) -> Path:
    """The teacher's folder, to be spoilt."""
    return Path(shutil.copytree(teacher / "teacher", tmp_path / "teacher"))


def claims(folder: Path, **fields: Any) -> None:
    (folder / "config.json").write_text(json.dumps(card(folder) | fields), encoding="utf-8")


def test_a_teacher_carries_its_accuracy_and_the_hash_of_its_weights(teacher: Path) -> None:
    fields, last = card(teacher / "teacher"), json.loads((teacher / "summary.json").read_text())["last"]
    assert fields["sha256"] == sha256(teacher / "teacher" / "model.safetensors")
    assert (fields["dataset"], fields["split"], fields["images"], fields["epoch"]) == ("shapes", "test", 20, 1)
    assert fields["top1"] == last["top1"]
    told = (teacher / "teacher" / "README.md").read_text(encoding="utf-8")
    assert fields["sha256"] in told
    assert f"Top-1 on 20 test images after the last epoch: {fields['top1']:.2f} %" in told


def test_the_students_card_names_its_teacher(trained_cli: CliRunner, teacher: Path, distilled: dict[str, Any]) -> None:
    folder, theirs = trained_cli.path / distilled["run"] / "student", card(teacher / "teacher")
    taught_by = card(folder)["teacher"]
    assert (taught_by["sha256"], taught_by["top1"]) == (theirs["sha256"], pytest.approx(theirs["top1"]))
    assert f"top-1 {theirs['top1']:.2f} %, SHA-256 `{theirs['sha256']}`" in (folder / "README.md").read_text()


def test_a_gap_is_refused_unless_it_is_allowed(cli: CliRunner, copied: Path) -> None:
    measured = card(copied)["top1"]
    claims(copied, top1=measured + 7)
    fields = [*PAIR, "--teacher", str(copied)]
    result = cli.assert_rejects(
        [*fields, "-q"], 2, f"top-1 {measured:.2f} % on 20 test images, its card says {measured + 7:.2f} %"
    )
    assert "--allow-teacher-mismatch" in result.err
    runs_dir = ["--runs-dir", str(copied / "runs")]
    result = cli.sakd(*fields, *runs_dir, "--allow-teacher-mismatch", "--json")
    assert result.document["teacher"]["top1"] == measured
    assert result.err.count("taken as it is") == 1
    run = result.document["run"]
    assert cli.sakd("distill", "--resume", run).code == 0


def test_a_card_of_other_weights_is_refused_before_anything_is_tried(cli: CliRunner, copied: Path) -> None:
    claims(copied, sha256="0" * 64)
    cli.assert_rejects([*PAIR, "--teacher", str(copied), "--dry-run"], 2, "is the card of other weights")
    cli.assert_rejects([*PAIR, "--teacher", str(copied), "--allow-teacher-mismatch"], 2, "is the card of other weights")


def test_what_cannot_be_compared_is_said_once(cli: CliRunner, copied: Path) -> None:
    elsewhere = ["--runs-dir", str(copied / "runs")]
    result = cli.sakd(*PAIR, "--teacher", str(copied), *elsewhere, "--set", "data.test=40")
    assert result.err.count("which is of 20 test images of shapes; here are 40 test images of shapes") == 1, result.err
    (copied / "config.json").unlink()
    result = cli.sakd(*PAIR, "--teacher", str(copied / "model.safetensors"), *elsewhere)
    assert (result.code, result.err.count("no card beside")) == (0, 1), result.err


def test_two_tenths_of_a_point_or_one_image() -> None:
    here = Path("teacher")
    claim = Claim("cifar100", 10000, 75.0)
    for top1, images, fits in ((75.2, 10000, True), (75.21, 10000, False), (74.8, 10000, True), (74.79, 10000, False)):
        measured = Claim("cifar100", images, top1)
        if fits:
            assert compare_with_card(here, claim, measured, allowed=False) is None
        else:
            with pytest.raises(UsageError, match="its card says 75"):
                compare_with_card(here, claim, measured, allowed=False)
    few = Claim("shapes", 100, 50.0)
    assert compare_with_card(here, few, Claim("shapes", 100, 51.0), allowed=False) is None
    with pytest.raises(UsageError):
        compare_with_card(here, few, Claim("shapes", 100, 52.0), allowed=False)
    assert "names no accuracy" in str(compare_with_card(here, few._replace(top1=None), few, allowed=False))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"sha256": "x", "top1": "much"}', "{" * 1000])
def test_a_damaged_card_is_one_line(copied: Path, text: str) -> None:
    (copied / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(UsageError, match="card is damaged"):
        read_claim(copied, "x")
