"""`sakd eval`: each figure against one computed by hand or another way, the teacher, several networks side by side."""

import re
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CliRunner
from sample_documents import sample
from test_report import text_of
from torch import nn

from sakd_cli.documents.evaluation import Evaluation, Evaluations, Speed
from sakd_cli.evaluation.quality import Answers, agreement, averages, calibration, confusions
from sakd_cli.evaluation.speed import LEAST, _others, speed
from sakd_cli.models.cost import peak_memory
from sakd_cli.report.evaluation import DISTURBED, score_tables

FAST = ("--quiet", "--set", "timing_seconds=0")


def logits_of(chances: list[list[float]]) -> torch.Tensor:
    return torch.tensor(chances).log()


def test_calibration_of_four_images_by_hand() -> None:
    logits = logits_of([[0.9, 0.1], [0.9, 0.1], [0.8, 0.2], [0.35, 0.65]])
    brier, ece = calibration(logits, torch.tensor([0, 1, 0, 1]))
    assert brier == pytest.approx(2 * (0.1**2 + 0.9**2 + 0.2**2 + 0.35**2) / 4)
    # Three bins are in use: [12/15, 13/15) holds 0.8, [13/15, 14/15) holds 0.9 twice, [9/15, 10/15) holds 0.65.
    assert ece == pytest.approx(0.25 * 0.2 + 0.5 * abs(0.5 - 0.9) + 0.25 * 0.35, abs=1e-6)


def test_confusions_are_ranked_and_each_class_has_its_own() -> None:
    result, truth = [1, 1, 0, 2, 2, 0, 2], [0, 0, 0, 1, 1, 1, 2]
    logits = torch.eye(3)[result]
    pairs, mistaken = confusions(logits, torch.tensor(truth), ["cat", "dog", "owl"])
    assert [pair.plain() for pair in pairs] == [
        {"class": "cat", "predicted_as": "dog", "images": 2, "fraction": pytest.approx(2 / 3)},
        {"class": "dog", "predicted_as": "owl", "images": 2, "fraction": pytest.approx(2 / 3)},
        {"class": "dog", "predicted_as": "cat", "images": 1, "fraction": pytest.approx(1 / 3)},
    ]
    assert mistaken == [pairs[0], pairs[1], None]


def test_agreement_counts_whose_errors_they_are() -> None:
    truth = torch.tensor([0, 0, 0, 0, 0, 0])
    teacher, student = torch.tensor([0, 0, 1, 1, 1, 2]), torch.tensor([0, 1, 1, 2, 0, 0])
    features = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    heard = [Answers(torch.eye(3)[result] * 3, features) for result in (student, teacher)]
    found = agreement(*heard, truth).plain()
    assert {
        key: found[key] for key in ("both_wrong", "same_wrong_answer", "teacher_only_wrong", "student_only_wrong")
    } == {
        "both_wrong": 2,
        "same_wrong_answer": 1,
        "teacher_only_wrong": 2,
        "student_only_wrong": 1,
    }
    assert found["top1"] == pytest.approx(100 * 2 / 6)
    p, q = (result.logits.softmax(dim=1) for result in (heard[1], heard[0]))
    assert found["kl"] == pytest.approx(float((p * (p / q).log()).sum(dim=1).mean()), rel=1e-5)
    assert found["cka"] == pytest.approx(1.0)


def test_cka_ignores_rotation_scale_and_offset_and_tells_strangers_apart() -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(200, 6, generator=draw)
    turned = 3 * x @ torch.linalg.qr(torch.randn(6, 6, generator=draw)).Q + 5
    logits, truth = torch.zeros(200, 2), torch.zeros(200, dtype=torch.int64)

    def cka(y: torch.Tensor) -> Any:
        return agreement(Answers(logits, x), Answers(logits, y), truth).cka

    assert cka(turned) == pytest.approx(1.0, abs=1e-6)
    assert cka(torch.randn(200, 9, generator=draw)) < 0.2
    assert cka(torch.ones(200, 3)) is None
    # Definition by Gram matrices: HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)).
    y = torch.randn(200, 9, generator=draw).double()
    centre = torch.eye(200, dtype=torch.float64) - 1 / 200
    k, gram = (centre @ (z.double() @ z.double().T) @ centre for z in (x, y))
    expected = (k * gram).sum() / (k.norm() * gram.norm())
    assert cka(y.float()) == pytest.approx(float(expected), abs=1e-5)


def test_memory_is_weights_input_and_what_lives_at_once() -> None:
    wide = nn.Sequential(nn.Flatten(), nn.Linear(12, 50, bias=False), nn.ReLU(), nn.Linear(50, 2, bias=False))
    weights = 4 * (12 * 50 + 50 * 2)
    # Images, and the hidden layer before and after its ReLU; nothing else is larger.
    assert peak_memory(wide, side=2, batch=10) == weights + 4 * 10 * (12 + 50 + 50)


def test_speed_gives_median_and_quartiles() -> None:
    seen: list[int] = []
    found = speed(lambda x: seen.append(len(x)) or x, 8, torch.device("cpu"), batch=4, seconds=0.01).plain()
    turns = sum(before != after for before, after in pairwise(seen))
    assert turns >= 2 * LEAST - 1, "in turns, so that a disturbance is in the quartiles of both"
    for key, batch in (("latency", 1), ("throughput", 4)):
        assert found[key]["low"] <= found[key]["median"] <= found[key]["high"]
        assert (found[key]["batch"], found[key]["runs"] >= 3) == (batch, True)
    assert found["memory"] is None


def test_a_student_is_judged_beside_the_teacher_of_its_run(trained_cli: CliRunner, distilled: dict[str, Any]) -> None:
    said = trained_cli.sakd("eval", distilled["run"], "--set", "timing_seconds=0.01").err
    assert "timing it for 0.02 s or more" in said, "by default it takes seconds"
    result = trained_cli.sakd("eval", distilled["run"], "--json", "--quiet", "--set", "timing_seconds=0.01")
    assert result.err == ""
    document = result.document
    Evaluation.model_validate(document)
    assert {key: document["teacher"][key] for key in ("sha256", "top1", "top5", "loss", "parameters", "macs")} == {
        key: distilled["teacher"][key] for key in ("sha256", "top1", "top5", "loss", "parameters", "macs")
    }
    share = document["teacher"]["agreement"]
    wrong = document["images"] * (1 - document["top1"] / 100)
    assert share["both_wrong"] + share["student_only_wrong"] == pytest.approx(wrong)
    taught_wrong = document["images"] * (1 - document["teacher"]["top1"] / 100)
    assert share["both_wrong"] + share["teacher_only_wrong"] == pytest.approx(taught_wrong)
    assert all(row["teacher_top1"] is not None for row in document["classes"])
    table = trained_cli.sakd("eval", distilled["run"], *FAST).out
    assert all(text in table for text in ("Same answer as teacher", "Linear CKA", "Both wrong", "confusions"))


def test_several_networks_stand_in_one_table(trained_cli: CliRunner, distilled: dict[str, Any], teacher: Path) -> None:
    document = trained_cli.sakd("eval", distilled["run"], str(teacher), *FAST, "--batch-size", "30", "--json").document
    Evaluations.model_validate(document)
    student, alone = document["evaluations"]
    assert (alone["teacher"], alone["speed"], alone["memory"]["batch"]) == (None, None, 30)
    assert student["teacher"]["top1"] == alone["top1"], "the student's teacher is this very network"
    table = trained_cli.sakd("eval", distilled["run"], str(teacher), *FAST).out
    assert table.count("Evaluation") == 1
    assert "By class" not in table
    assert f"B: {teacher}" in table.replace("\n", "")


def test_a_network_agrees_with_itself(trained_cli: CliRunner, teacher: Path) -> None:
    document = trained_cli.sakd("eval", str(teacher), "--teacher", str(teacher), *FAST, "--json").document
    found = document["teacher"]["agreement"]
    assert (found["top1"], found["teacher_only_wrong"], found["student_only_wrong"]) == (100.0, 0, 0)
    assert found["kl"] == pytest.approx(0, abs=1e-6)
    assert found["both_wrong"] == found["same_wrong_answer"] == round(document["images"] * (1 - document["top1"] / 100))


def test_a_teacher_that_is_gone_costs_the_comparison_only(
    trained_cli: CliRunner, distilled: dict[str, Any], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained_cli.path / distilled["run"], run)
    arguments = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(arguments.replace(distilled["teacher"]["sha256"], "f" * 64))
    result = trained_cli.sakd("eval", str(run), *FAST, "--json")
    assert result.document["teacher"] is None
    assert "not compared with its teacher" in result.err
    assert "its SHA-256 differs" in result.err
    trained_cli.assert_rejects(["eval", str(run), "--teacher", str(tmp_path / "nowhere"), *FAST], 2, "no such file")


def test_averages_are_as_defined() -> None:
    labels = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2])
    answers = torch.tensor([0, 0, 1, 1, 3, 2, 2, 0, 2])  # of class 3 there is none, class 4 is nowhere
    draw = torch.rand(9, 5, generator=torch.Generator().manual_seed(0))
    logits = 4 * torch.nn.functional.one_hot(answers, 5).float() + draw
    chances = logits.softmax(dim=1)
    found, of_class = averages(logits, labels)
    recalls, precisions = [2 / 3, 1 / 2, 3 / 4, 0.0], [2 / 3, 1 / 2, 1.0, 0.0]
    f1 = [2 * p * r / (p + r) if p + r else 0.0 for p, r in zip(precisions, recalls, strict=True)]
    weights = [3, 2, 4, 0]
    for name, values in (("recall", recalls), ("precision", precisions), ("f1", f1)):
        assert getattr(found, f"{name}_macro") == pytest.approx(100 * sum(values) / 4)
        weighted = sum(w * v for w, v in zip(weights, values, strict=True)) / 9
        assert getattr(found, f"{name}_weighted") == pytest.approx(100 * weighted)
    assert found.balanced_accuracy == pytest.approx(100 * sum(recalls[:3]) / 3)
    areas = []
    for c in (0, 1, 2):  # of every pair of an image of the class and another one: how often the first is ahead
        mine, others = chances[labels == c, c], chances[labels != c, c]
        ahead = (mine[:, None] > others).double() + 0.5 * (mine[:, None] == others)
        areas.append(float(ahead.mean()))
    assert found.auroc == pytest.approx(100 * sum(areas) / 3)
    assert [pair == (None, None) for pair in of_class] == [False, False, False, False, True]
    assert of_class[3] == (0.0, 0.0)


def test_the_matrix_is_written_as_csv_and_as_a_picture(trained_cli: CliRunner, distilled: dict[str, Any]) -> None:
    words = ["eval", distilled["run"], "--json", "-q", "--set", "timing_seconds=0", "--confusion"]
    document = trained_cli.sakd(*words, "matrix.csv").document
    matrix = document["confusion_matrix"]
    assert [sum(row) for row in matrix] == [one["images"] for one in document["classes"]]
    rows = [line.split(",") for line in (trained_cli.path / "matrix.csv").read_text().splitlines()]
    assert rows[0] == ["class", *(f"predicted {one['name']}" for one in document["classes"])]
    assert [list(map(int, row[1:])) for row in rows[1:]] == matrix
    words.remove("-q")
    assert "written: matrix.png" in trained_cli.sakd(*words, "matrix.png").err.splitlines()
    assert (trained_cli.path / "matrix.png").read_bytes().startswith(b"\x89PNG")
    trained_cli.assert_rejects([*words, "matrix.pdf"], 2, "--confusion matrix.pdf: the name ends in .csv, .png or .svg")
    assert trained_cli.sakd(*words[:-1]).document["confusion_matrix"] is None


def test_a_busy_machine_is_told() -> None:
    part = {"batch": 1, "runs": 5, "median": 1.0, "low": 1.0, "high": 1.0}
    common: dict[str, Any] = {"device": "cpu", "latency": part, "throughput": part, "memory": None}
    assert not Speed(**common, threads=1, busy=1.0, cores=2).disturbed
    assert Speed(**common, threads=2, busy=1.0, cores=2).disturbed
    assert not Speed(**common, threads=2, busy=None, cores=2).disturbed
    of = [Speed(**common, threads=2, busy=busy, cores=2).model_dump() for busy in (1.0, None)]
    told, calm = (text_of(score_tables([sample(Evaluation, {"speed": speed})])) for speed in of)
    assert re.search(r"disturbed: cores that others used +1\.0 of 2\n", told)
    assert DISTURBED in " ".join(told.split())
    assert "isturbed" not in calm
    assert _others((0.0, 10.0, 1.0), (2.0, 15.0, 3.0)) == pytest.approx(1.5)
