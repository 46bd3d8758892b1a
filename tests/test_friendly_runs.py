"""A student-friendly teacher from the command line: what is said, what is written, who can use it, what is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SHAPES, TINY, CliRunner

from sakd_cli.config.resolve import ConfigSource, option_sources, resolve, set_sources
from sakd_cli.errors import UsageError
from sakd_cli.models import artifact
from sakd_cli.models.branches import load_branches
from sakd_cli.models.cost import cost
from sakd_cli.models.table import create
from sakd_cli.runs import build
from sakd_cli.runs.locate import locate_inputs


@pytest.fixture(scope="module")
def friendly(cli: CliRunner) -> dict[str, Any]:
    """The summary of such a teacher."""
    fields = ["--student-friendly", "resnet8", "--student-friendly", "wrn16_1", "--set", "friendly.share_branches=true"]
    return cli.sakd("pretrain-teacher", "resnet8", *fields, *TINY, "--json").document


def test_the_summary_the_card_and_the_table_say_for_whom_it_is(cli: CliRunner, friendly: dict[str, Any]) -> None:
    rows = friendly["friendly"]["branches"]
    places = [("resnet8", "stage1"), ("resnet8", "stage2"), ("wrn_16_1", "stage1"), ("wrn_16_1", "stage2")]
    assert [(row["student"], row["behind"]) for row in rows] == places
    assert friendly["friendly"]["students"] == ["resnet8", "wrn_16_1"]
    assert friendly["friendly"]["training_macs"] == sum(row["macs"] for row in rows) > 0
    assert friendly["macs"] == cost(create("resnet8", 20), SHAPES["size"]).macs, "its own use costs what it did"
    assert friendly["run"].endswith("resnet8-shapes-friendly-resnet8-wrn_16_1")
    folder = cli.path / friendly["run"] / "teacher"
    card = json.loads((folder / "config.json").read_text())
    assert (card["architecture"], card["friendly"]["students"]) == ("resnet8", ["resnet8", "wrn_16_1"])
    assert "branches of resnet8, wrn_16_1" in (folder / "README.md").read_text()


def test_eval_scores_the_branches_too_as_the_summary_does(cli: CliRunner, friendly: dict[str, Any]) -> None:
    result = cli.sakd("eval", friendly["run"], "--json", "--quiet").document
    for ours, theirs in zip(result["branches"], friendly["friendly"]["branches"], strict=True):
        assert ours == theirs
    assert all(0 <= row["top1"] <= row["top5"] <= 100 for row in result["branches"])
    table = cli.sakd("eval", friendly["run"]).out
    assert all(word in table for word in ("Student branches", "wrn_16_1", "stage2", "conv 1x1"))


def test_other_weights_have_no_branches(cli: CliRunner, friendly: dict[str, Any], tmp_path: Path) -> None:
    shutil.copytree(cli.path / friendly["run"], tmp_path / "run")
    teacher = artifact.load(tmp_path / "run" / "teacher")
    assert load_branches(tmp_path / "run" / "branches" / "model.safetensors", teacher) is not None
    artifact.save_weights(tmp_path / "run" / "teacher" / "model.safetensors", create("resnet8", 20), teacher.card)
    cli.assert_rejects(["eval", str(tmp_path / "run")], 4, "/teacher/model.safetensors: damaged or changed")
    other = artifact.load(tmp_path / "run" / "teacher")
    assert load_branches(tmp_path / "run" / "branches" / "model.safetensors", other) is None


STUDENT = ["--student", "resnet8", *TINY, "--set", "init_from_branches=true"]


def test_a_student_can_start_with_the_longest_tail(cli: CliRunner, friendly: dict[str, Any]) -> None:
    fields = {"teacher": str(cli.path / friendly["run"]), "student": "resnet8", "data": {"name": "shapes"}}
    fields["data"] |= SHAPES
    students = []
    for start in (True, False):
        config = resolve("distill", [ConfigSource("test", fields | {"init_from_branches": start})]).config
        students.append(build.distillation(locate_inputs(config)).network.state_dict())
    teacher = artifact.load(cli.path / friendly["run"] / "teacher")
    branches = load_branches(cli.path / friendly["run"] / "branches" / "model.safetensors", teacher)
    tail = branches.tails[0].state_dict()
    copied = {name.replace(f"stages.{k}.", f"stages.{k + 2}.") for k in range(2) for name in tail if f"s.{k}." in name}
    copied |= {"head.weight", "head.bias"}
    assert {name for name in students[0] if not torch.equal(students[0][name], students[1][name])} <= copied
    assert torch.equal(students[0]["head.weight"], tail["head.weight"])
    assert all(torch.equal(students[0][f"stages.{k + 2}.{rest}"], tensor) for k, rest, tensor in tail_parts(tail))
    summary = cli.sakd("distill", "--teacher", friendly["run"], *STUDENT, "--method", "kd", "--json").document
    assert summary["teacher"]["network"] == "resnet8"


def tail_parts(tail: dict[str, torch.Tensor]) -> list[tuple[int, str, torch.Tensor]]:
    names = [name.split(".", 2) for name in tail if name.startswith("stages.")]
    return [(int(k), rest, tail[f"{stages}.{k}.{rest}"]) for stages, k, rest in names]


def test_who_has_no_branches_says_so(cli: CliRunner, teacher: Path, friendly: dict[str, Any]) -> None:
    result = cli.assert_rejects(
        ["distill", "--teacher", str(teacher), *STUDENT], 2, "has no student branches beside it"
    )
    assert "--student-friendly resnet8" in result.err
    fields = ["distill", "--teacher", "resnet20", "--pretrain", *STUDENT]
    cli.assert_rejects(fields, 2, "a teacher that is yet to be trained has no student branches")
    other = ["resnet14" if word == "resnet8" else word for word in STUDENT]
    cli.assert_rejects(
        ["distill", "--teacher", friendly["run"], *other], 2, "are of resnet8, wrn_16_1, not of resnet14"
    )
    cli.assert_rejects(
        ["pretrain-teacher", "resnet14", *TINY, "--set", f"init_from={teacher}"], 2, "is a resnet8, not a"
    )
    cli.assert_rejects(
        ["pretrain-teacher", "resnet8", *TINY, "--set", "init_from=none"], 2, "init_from: none: no such file"
    )


@pytest.mark.parametrize("place", [0.0, 0.5, 0.999])
def test_a_flipped_bit_in_the_branches_is_found(
    cli: CliRunner, friendly: dict[str, Any], tmp_path: Path, place: float
) -> None:
    shutil.copytree(cli.path / friendly["run"], tmp_path / "run")
    file = tmp_path / "run" / "branches" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[int(place * len(content))] ^= 4
    file.write_bytes(content)
    cli.assert_rejects(["eval", str(tmp_path / "run"), "--quiet"], 4, "/branches/model")
    result = cli.sakd("distill", "--teacher", str(tmp_path / "run"), *STUDENT[:-2], "--dry-run", "--json")
    assert result.code == 0, "a distillation that does not ask for branches does not look at them"


def test_a_dry_run_shows_the_branches_and_writes_nothing(cli: CliRunner) -> None:
    before = cli.tree()
    fields = ["pretrain-teacher", "vgg8", "--student-friendly", "resnet8", *TINY, "--dry-run"]
    plan = cli.sakd(*fields, "--json").document
    assert [row["role"] for row in plan["networks"]] == ["network", "branch at stage1", "branch at stage2"]
    assert set(plan["batch"]) == {"ce", "branch_kl", "branch_ce", "loss"}
    assert set(plan["trainable"]) == {"network", "branches"}
    assert "branch at stage2" in cli.sakd(*fields).out
    assert cli.tree() == before


def test_the_students_are_words_like_all_others() -> None:
    def students(*layers: ConfigSource) -> tuple[str, ...]:
        return resolve("pretrain", [ConfigSource("model", {"model": "resnet20"}), *layers]).config.friendly.students

    assert students(*option_sources({"student_friendly": ["wrn40_2", "resnet8"]})) == ("wrn_40_2", "resnet8")
    assert students(ConfigSource("environment", {"friendly": {"students": "resnet8,vgg8"}})) == ("resnet8", "vgg8")
    assert students(ConfigSource("file", {"friendly": "WRN-16-2"}), *set_sources(["friendly.tau=2"])) == ("wrn_16_2",)


@pytest.mark.parametrize(
    ("assignments", "message"),
    [
        (["friendly.tau=2"], "friendly.students: missing"),
        (["friendly=resnt8"], "unknown model 'resnt8'; did you mean 'resnet8'?"),
        (["friendly=[resnet8]"], "friendly: "),
        (["friendly.students=[]"], "at least 1 item"),
        (["friendly.students=[resnet8, ResNet-8]"], "named twice"),
        (["friendly=resnet8", "friendly.tua=2"], "unknown key 'friendly.tua'; did you mean 'friendly.tau'?"),
        (["friendly=resnet8", "friendly.kl=sideways"], "friendly.kl: "),
        (["friendly=resnet8", "friendly.lambda_kl=-1"], "friendly.lambda_kl: "),
    ],
)
def test_a_wrong_word_is_told_with_its_key(assignments: list[str], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        resolve("pretrain", [ConfigSource("model", {"model": "resnet20"}), *set_sources(assignments)])
    assert message in caught.value.message
    assert "\n" not in caught.value.message
