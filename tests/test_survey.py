"""`sakd inspect-spots` from end to end: what a run keeps of its images, what is measured anew, every form of output."""

import csv
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import PAIR, SHAPES, TINY, CliRunner, Result
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_tensors

from sakd_cli.documents.spots import SpotsDocument
from sakd_cli.models import artifact
from sakd_cli.report.spots.log import CSV_HEADER
from sakd_cli.runs.images import load_images

SETTINGS = ["--set", "router.teacher_bias=0", "--set", "router.lr=0.002"]


@pytest.fixture(scope="module")
def routed(cli: CliRunner, pretrained: Result) -> Path:
    """A run with four spots under a router that has not settled."""
    result = cli.sakd(*PAIR, "--method", "at", *TINY, *SETTINGS, "--set", "router.gamma=2", "-q", "--json")
    return Path(result.document["run"])


def inspected(cli: CliRunner, *arguments: Any) -> Any:
    """The document, after it was held against its schema."""
    document = cli.sakd("inspect-spots", *map(str, arguments), "--json", "-q").document
    SpotsDocument.model_validate(document)
    return document


def columns(run: Path, cli: CliRunner) -> Any:
    return load_file(cli.path / run / "survey.safetensors")


def test_a_run_keeps_what_its_router_makes_of_every_training_image(cli: CliRunner, routed: Path) -> None:
    kept = columns(routed, cli)
    summary = json.loads((cli.path / routed / "summary.json").read_text())
    assert summary["survey_seconds"] > 0
    assert kept["probability"].shape == (summary["images"], 4)
    assert np.array_equal(kept["index"], load_file(cli.path / routed / "samples.safetensors")["index"])
    measured = inspected(cli, routed)["measured"]
    assert (measured["source"], measured["value"], measured["split"]) == ("survey", "probability", "train")
    assert [spot["mean"] for spot in measured["spots"]] == pytest.approx(kept["probability"].mean(axis=0))
    assert measured["spots"][1] | {"mean": 0} == measured["spots"][1] | {
        "mean": 0, "name": "stage2", "student_stage": "stage2", "student_shape": [32, 8, 8],
        "student_to_teacher": "conv 1x1",
    }  # fmt: skip


def test_the_probabilities_are_those_of_the_policy_on_features_in_evaluation_mode(cli: CliRunner, routed: Path) -> None:
    kept, arguments = columns(routed, cli), json.loads((cli.path / routed / "student" / "config.json").read_text())
    from sakd_cli.config.resolve import ConfigSource, resolve
    from sakd_cli.rundir import RunDir

    run = RunDir(cli.path / routed)
    config = resolve("distill", [ConfigSource("run", run.config)]).config
    split = load_images(config.data).train
    mean, std = (torch.tensor(arguments[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    images = (split.images[:50].float() / 255 - mean) / std
    networks = [artifact.load(path).model.eval() for path in (config.teacher.weights, run.path / "student")]
    state = load_tensors(run.path / "checkpoints" / "last" / "training.safetensors")
    with torch.no_grad():
        teacher, student = (network.features(images) for network in networks)
        pooled = torch.cat([teacher.embedding, student.embedding], dim=1)
        scores = pooled @ state["task/router.policy.weight"].T + state["task/router.policy.bias"]
    chance = torch.sigmoid(scores[:, 0::2] - scores[:, 1::2])
    torch.testing.assert_close(torch.tensor(kept["probability"][:50]), chance, rtol=1e-4, atol=1e-5)
    loss = torch.nn.functional.cross_entropy(student.logits, split.labels[:50], reduction="none")
    torch.testing.assert_close(torch.tensor(kept["student_loss"][:50]), loss, rtol=1e-4, atol=1e-5)
    assert np.array_equal(kept["teacher_prediction"][:50], teacher.logits.argmax(dim=1).numpy())
    assert np.array_equal(kept["images"], split.images[torch.tensor(kept["extreme"])].numpy())


def test_the_fixed_paths_are_the_networks_alone_and_their_figures_those_of_the_summary(
    cli: CliRunner, routed: Path
) -> None:
    figures = inspected(cli, routed)["measured"]["routed"]
    summary = json.loads((cli.path / routed / "summary.json").read_text())
    for network, path, known in (("student", "all_student", "last"), ("teacher", "all_teacher", "teacher")):
        assert figures[path] == pytest.approx(figures[network], rel=1e-6)
        assert figures[network]["top1"] == pytest.approx(summary[known]["top1"])
    assert (figures["images"], figures["sampled"]["draws"]) == (SHAPES["test"], 3)


def test_the_reliability_bins_hold_every_test_image_and_the_tracked_ones_every_epoch(
    cli: CliRunner, routed: Path
) -> None:
    figures = inspected(cli, routed)["measured"]["routed"]
    for who in ("student", "teacher"):
        bins = [one for one in figures[f"{who}_reliability"] if one["images"]]
        assert sum(one["images"] for one in bins) == SHAPES["test"]
        right = sum(one["images"] * one["correct"] for one in bins) / SHAPES["test"]
        assert 100 * right == pytest.approx(figures[who]["top1"])
    lines = [json.loads(line) for line in (cli.path / routed / "spots.jsonl").read_text().splitlines()]
    kept, tracked = columns(routed, cli), lines[-1]["tracked"]
    assert [image["visits"] for image in tracked] == [len(lines)] * 8
    assert {image["index"] for image in tracked} <= set(kept["index"][kept["extreme"]].tolist())


def test_live_on_the_same_images_says_the_same(cli: CliRunner, routed: Path) -> None:
    kept, live = (inspected(cli, routed, *arguments)["measured"] for arguments in ([], ["--live"]))
    assert (live.pop("source"), kept.pop("source")) == ("live", "survey")
    assert live == kept


@pytest.mark.parametrize(
    ("arguments", "split", "images"),
    [
        (["--split", "test"], "test", SHAPES["test"]),
        (["--split", "validation"], "validation", 10),
        (["--set", "data.seed=5", "--set", "data.test=30", "--split", "test"], "test", 30),
        (["--device", "cpu"], "train", 90),
    ],
)
def test_other_images_are_measured_by_the_networks(
    cli: CliRunner, routed: Path, arguments: list[str], split: str, images: int
) -> None:
    measured = inspected(cli, routed, *arguments)["measured"]
    assert (measured["source"], measured["split"], measured["images"]) == ("live", split, images)
    assert sum(path["fraction"] for path in measured["paths"]) == pytest.approx(1)
    assert sum(row["images"] for row in measured["difficulty"]["by_student_loss"]) == images


def test_a_draw_depends_on_its_seed_alone(cli: CliRunner, routed: Path) -> None:
    one, again, other = (inspected(cli, routed, "--sample", "--seed", seed)["measured"] for seed in (1, 1, 2))
    assert one == again
    assert one["value"] == "draw"
    assert [spot["mean"] for spot in one["spots"]] == [spot["sampled"] for spot in one["spots"]]
    assert one["spots"] != other["spots"]
    assert one["extremes"] == other["extremes"], "always by probability"


@pytest.mark.parametrize(("router", "rate"), [("always", 1.0), ("never", 0.0), ("random", 0.5)])
def test_without_a_policy_the_rates_of_the_training_stand_in(
    cli: CliRunner, run_of: Any, router: str, rate: float
) -> None:
    run = run_of(router)
    assert not (cli.path / run / "survey.safetensors").exists()
    measured = inspected(cli, run)["measured"]
    assert (measured["source"], measured["value"], measured["classes"]) == ("samples", "rate", None)
    assert measured["spots"][0]["mean"] == pytest.approx(rate, abs=0.15)
    assert "rate at which each image was distilled" in cli.sakd("inspect-spots", run).out.replace("\n", " ")
    live = inspected(cli, run, "--live")["measured"]
    assert (live["source"], live["value"], live["paths"]) == ("live", "rate", None)
    assert live["spots"][0]["mean"] == measured["spots"][0]["mean"]
    assert live["routed"]["sampled"] is None
    test = inspected(cli, run, "--split", "test")["measured"]
    assert (test["value"], test["spots"], test["classes"]) == (None, [], None)
    assert "no value is known" in cli.sakd("inspect-spots", run, "--split", "test", "-q").out


def test_anti_says_that_it_distilled_the_others(cli: CliRunner, run_of: Any) -> None:
    measured = inspected(cli, run_of("anti"))["measured"]
    assert (measured["complement"], measured["value"]) == (True, "probability")
    assert any("distilled the other images" in note for note in measured["notes"])


@pytest.fixture(scope="module")
def run_of(cli: CliRunner, pretrained: Result) -> Any:
    """The run of a router."""

    def run(router: str) -> str:
        arguments = ["--set", "router.teacher_bias=0"] if router == "anti" else []
        result = cli.sakd(*PAIR, "--method", "kd", *TINY, "--router", router, *arguments, "-q", "--json")
        return str(result.document["run"])

    return run


def test_csv_holds_every_figure_of_the_document(cli: CliRunner, routed: Path) -> None:
    document = inspected(cli, routed)
    result = cli.sakd("inspect-spots", str(routed), "--csv", "-q")
    header, *rows = csv.reader(io.StringIO(result.out))
    assert (tuple(header), result.err) == (CSV_HEADER, "")
    known = {tuple(row[:4]): row[4] for row in rows}
    assert len(known) == len(rows), "no figure stands twice"
    measured = document["measured"]
    assert float(known["spot", "", "stage2", "p95"]) == measured["spots"][1]["p95"]
    assert float(known["epoch", "1", "", "routed_ce"]) == document["by_epoch"][0]["routed_ce"]
    assert (
        float(known["student_loss", "10", "logits", "mean"])
        == (measured["difficulty"]["by_student_loss"][9]["mean"][3])
    )
    assert float(known["path", "TTTT", "", "fraction"]) > 0
    assert float(known["routed", "sampled", "", "top1_std"]) == measured["routed"]["sampled"]["top1_std"]
    tables = {
        "overall",
        "epoch",
        "class_distilled",
        "spot",
        "class",
        "student_loss",
        "teacher_confidence",
        "correctness",
        "agreement",
    }
    assert {row[0] for row in rows} == tables | {"path", "highest", "lowest", "routed"}


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_one_record_per_image_on_request(cli: CliRunner, routed: Path, tmp_path: Path, kind: str) -> None:
    file = tmp_path / f"records.{kind}"
    assert cli.sakd("inspect-spots", str(routed), "--samples", str(file), "-q").out == ""
    text = file.read_text()
    records = (
        [json.loads(line) for line in text.splitlines()] if kind == "jsonl" else list(csv.DictReader(io.StringIO(text)))
    )
    kept = columns(routed, cli)
    assert len(records) == len(kept["index"])
    assert float(records[7]["p_logits"]) == pytest.approx(float(kept["probability"][7, 3]))
    assert int(records[7]["index"]) == kept["index"][7]


def test_a_damaged_survey_is_told_and_never_shown(cli: CliRunner, routed: Path) -> None:
    run = cli.path / "hurt"
    shutil.copytree(cli.path / routed, run)
    sound = (run / "survey.safetensors").read_bytes()
    for damage in (b"", b"{}", sound[:-9], sound[:-9] + bytes([sound[-9] ^ 1]) + sound[-8:]):
        (run / "survey.safetensors").write_bytes(damage)
        cli.assert_rejects(["inspect-spots", str(run)], 4, "damaged")
    assert inspected(cli, run, "--live")["measured"]["source"] == "live"
    (run / "survey.safetensors").unlink()
    assert inspected(cli, run)["measured"]["source"] == "samples"
    (run / "samples.safetensors").write_bytes(b"no tensors")
    cli.assert_rejects(["inspect-spots", str(run)], 4, "samples.safetensors: damaged")
    (run / "samples.safetensors").unlink()
    assert inspected(cli, run)["measured"] is None
    shutil.rmtree(run / "checkpoints")
    cli.assert_rejects(["inspect-spots", str(run), "--live", "-q"], 4, "manifest is missing")


WRONG = """
--json --csv | both write to stdout
--panel paths | --panel needs --plot
--plot a.jpg | ends in .png or .svg
--samples a.txt | ends in .jsonl or .csv
--split all | Invalid value for '--split'
--set train.epochs=3 | unknown key 'train
--set data.tset=3 | unknown key 'data.tset'
"""


@pytest.mark.parametrize("case", WRONG.strip().splitlines())
def test_a_mistake_costs_one_line(cli: CliRunner, routed: Path, case: str) -> None:
    arguments, text = (part.strip() for part in case.split("|"))
    cli.assert_rejects(["inspect-spots", str(routed), *arguments.split()], 2, text)


def test_the_images_of_other_classes_are_refused(cli: CliRunner, routed: Path) -> None:
    arguments = ["--dataset", "cifar10", "--set", "data.download=false", "--data-root", "nowhere", "-q"]
    cli.assert_rejects(["inspect-spots", str(routed), *arguments], 3, "cifar10: files not found")
