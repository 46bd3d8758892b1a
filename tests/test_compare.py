"""`sakd compare`: groups, figures over seeds, verdicts and settings, from made-up run directories, without torch."""

import csv
import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import CliRunner
from rich.console import Console
from sample_documents import sample

from sakd_cli.documents.base import PairedTest
from sakd_cli.documents.table import Comparison
from sakd_cli.documents.training import Summary
from sakd_cli.errors import UsageError
from sakd_cli.report.runs.compare import compare
from sakd_cli.report.runs.compare_tables import comparison_csv, comparison_tables
from sakd_cli.report.runs.questions import holm
from sakd_cli.report.runs.statistics import critical, paired_test, seed_statistics, two_sided
from sakd_cli.rundir import RunDir

Tree = dict[str, Any]


def make(
    folder: Path, router: str | None, seed: int, top1: float | None, coins_of: str = "", **settings: Any
) -> RunDir:
    """A run; without `router` the network alone, without `top1` not finished; `coins_of`: whose rates it has."""
    config: Tree = {"task": "distill", "student": "resnet8", "seed": seed, "device": "cpu", "train": {"epochs": 2}}
    config |= {
        "data": {"name": "cifar100"},
        "method": {"name": "at"},
        "router": {"name": router} | ({"run": coins_of} if coins_of else {}),
    }
    config["teacher"] = {"source": f"somewhere{seed}", "sha256": "ab", "weights": f"/somewhere{seed}"}
    if router is None:
        config = {key: config[key] for key in ("seed", "device", "train", "data")}
        config |= {"task": "pretrain", "model": "resnet8"}
    path = folder / f"{router}-{seed}-{len(list(folder.iterdir()))}"
    path.mkdir()
    (path / "config.yaml").write_text(yaml.safe_dump(config | settings))
    lines: list[Any] = []
    for epoch in (1, 2):
        for step, loss in ((10, 4.0), (15, 1.0)):
            lines.append(
                {
                    "kind": "train",
                    "epoch": epoch,
                    "step": 15 * (epoch - 1) + step,
                    "loss": 9.0,
                    "ce": loss,
                    "top1": 10.0,
                }
            )
        lines.append(
            {"kind": "eval", "epoch": epoch, "split": "validation", "top1": 20.0 + epoch, "top5": 50.0, "loss": 3.0}
        )
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*lines, 3, {"kind": "train"}]))
    if top1 is not None:
        last = {"epoch": 2, "top1": top1, "top5": 70.0, "loss": 2.0}
        summary = sample(Summary, last=last, best=last | {"epoch": 1}, seconds=5.0, teacher={"top1": 60.0})
        (path / "summary.json").write_text(summary.text)
    return RunDir(path)


def series(folder: Path, router: str | None, figures: list[float], **settings: Any) -> list[RunDir]:
    return [make(folder, router, seed, top1, **settings) for seed, top1 in enumerate(figures)]


def compared(runs: list[RunDir]) -> Tree:
    document = compare(runs)
    found: Tree = json.loads(document.text)
    assert Comparison.model_validate(found) == document
    return found


def text_of(document: Tree, width: int = 150) -> str:
    console = Console(file=io.StringIO(), width=width)
    for table in comparison_tables(Comparison.model_validate(document)):
        console.print(table)
    return console.file.getvalue()  # type: ignore[attr-defined]


# scipy 1.17: stats.t.ppf(0.975, n), 2 * stats.t.sf(t, n), stats.ttest_rel
@pytest.mark.parametrize(("freedom", "t"), [(1, 12.706204736), (2, 4.30265273), (4, 2.776445105), (30, 2.042272456)])
def test_the_t_distribution_is_that_of_the_tables(freedom: int, t: float) -> None:
    assert critical(freedom) == pytest.approx(t, rel=1e-8)
    assert two_sided(t, freedom) == pytest.approx(0.05, rel=1e-8)
    assert two_sided(-t, freedom) == two_sided(t, freedom)
    assert (two_sided(0.0, freedom), two_sided(1e6, freedom) < 1e-5) == (1.0, True)


def paired(differences: list[float]) -> PairedTest:
    return paired_test(dict(enumerate(differences)), dict.fromkeys(range(3), 0.0))


def test_statistics_and_paired_test_of_three_seeds() -> None:
    found = seed_statistics([1.0, 2.0, 4.0])
    assert found is not None
    assert found.mean == pytest.approx(7 / 3)
    assert found.std == pytest.approx((7 / 3) ** 0.5)
    assert found.high is not None
    assert found.high - found.mean == pytest.approx(4.30265273 * (7 / 9) ** 0.5)
    # t = 2.6458 with two degrees of freedom, in closed form p = 1 - t / sqrt(t^2 + 2).
    assert paired([1.0, 2.0, 4.0]).p == pytest.approx(1 - (7 / 9) ** 0.5, rel=1e-6)
    assert [paired(few).p for few in ([], [1.0], [1.0, 2.0], [1.0, 1.0, 1.0])] == [None] * 4
    assert seed_statistics([]) is None
    one = seed_statistics([2.0])
    assert one is not None
    assert one.plain() == {"mean": 2.0, "std": None, "low": None, "high": None}


def test_a_loss_that_is_more_than_noise_is_said_plainly(tmp_path: Path) -> None:
    runs = series(tmp_path, "adaptive", [40.0, 41.0, 42.0]) + series(tmp_path, "never", [43.0, 44.1, 44.9])
    document = compared(runs)
    assert [group["seeds"] for group in document["groups"]] == [[0, 1, 2], [0, 1, 2]]
    assert [group["distilled"] for group in document["groups"]] == [True, False]
    [versus] = document["comparisons"]
    assert (versus["verdict"], versus["difference"], versus["unequal"]) == ("worse", pytest.approx(-3.0), [])
    assert versus["text"].startswith(
        "at adaptive against at never: distillation hurt, −3.00 points top-1 (95 % interval"
    )
    assert "distillation hurt" in text_of(document)


def test_noise_is_called_noise_and_few_seeds_decide_nothing(tmp_path: Path) -> None:
    runs = series(tmp_path, "adaptive", [40.0, 44.0, 42.0]) + series(tmp_path, "always", [41.0, 42.0, 41.0])
    [noise] = compared(runs)["comparisons"]
    assert (noise["verdict"], "the difference is noise" in noise["text"]) == ("noise", True)
    runs = series(tmp_path, "anti", [40.0]) + series(tmp_path, "never", [41.0])
    [few] = compared(runs)["comparisons"]
    assert (few["verdict"], few["p"]) == ("few seeds", None)
    assert few["text"].endswith("with 1 seed, too few to tell it from noise.")


def test_each_router_meets_plain_training_and_its_classical_twin(tmp_path: Path) -> None:
    routers = ["adaptive", "always", "never", "random-matched"]
    runs = [make(tmp_path, router, 0, 40.0) for router in routers]
    runs.append(make(tmp_path, None, 0, 39.0))
    document = compared(runs)
    labels = [group["label"] for group in document["groups"]]
    assert labels == ["at adaptive", "at always", "at never", "at random-matched", "from scratch"]
    pairs = {(labels[row["group"]], labels[row["against"]]) for row in document["comparisons"]}
    distilled = ["at adaptive", "at always", "at random-matched"]
    expected = {(one, other) for one in distilled for other in ("at never", "from scratch")}
    assert pairs == expected | {("at adaptive", "at always"), ("at random-matched", "at always")}
    assert all(not row["unequal"] for row in document["comparisons"])


def test_what_does_not_change_the_result_makes_no_group_and_a_seed_counts_once(tmp_path: Path) -> None:
    runs = series(tmp_path, "always", [40.0, 42.0])
    runs.append(make(tmp_path, "always", 1, 42.0, device="cuda", log_every=7))
    document = compared(runs)
    [group] = document["groups"]
    assert (group["seeds"], group["top1"]["mean"]) == ([0, 1], 41.0)
    assert [row["key"] for row in document["differences"]] == ["seed"]
    assert document["comparisons"] == []


def test_another_budget_is_named(tmp_path: Path) -> None:
    runs = [make(tmp_path, "adaptive", 0, 40.0), make(tmp_path, "never", 0, 41.0, train={"epochs": 9})]
    [versus] = compared(runs)["comparisons"]
    assert versus["unequal"] == ["train.epochs"]
    assert versus["text"].endswith("Not under one budget: train.epochs.")
    runs = [make(tmp_path, "always", 0, 40.0), make(tmp_path, "always", 0, 41.0, train={"epochs": 9})]
    assert [group["label"] for group in compared(runs)["groups"]] == [
        "at always train.epochs=2",
        "at always train.epochs=9",
    ]


def test_curves_are_means_over_the_steps_of_an_epoch(tmp_path: Path) -> None:
    [row] = compared([make(tmp_path, "always", 0, None)])["runs"]
    assert (row["finished"], row["top1"]) == (False, None)
    assert row["curve"][1] == {
        "epoch": 2,
        "train_loss": pytest.approx((10 * 4.0 + 5 * 1.0) / 15),
        "train_top1": 10.0,
        "selected_on": "validation",
        "top1": 22.0,
        "loss": 3.0,
    }


def test_the_table_for_programs_has_every_epoch_and_the_results(tmp_path: Path) -> None:
    rows = list(csv.DictReader(io.StringIO(comparison_csv(compare(series(tmp_path, "always", [40.0, 41.0]))))))
    assert [row["split"] for row in rows] == ["train", "validation", "train", "validation", "test"] * 2
    assert [row["top1"] for row in rows if row["split"] == "test"] == ["40.0", "41.0"]
    assert {row["group"] for row in rows} == {"at always"}


@pytest.mark.parametrize("width", [20, 80, 200])
def test_tables_hold_runs_of_every_kind(tmp_path: Path, width: int) -> None:
    runs = [*series(tmp_path, "always", [40.0, 41.0]), make(tmp_path, "never", 0, None), make(tmp_path, None, 0, 30.0)]
    runs.append(make(tmp_path, "adaptive", 0, 3.0, student="\x1b[31mred"))
    text = text_of(compared(runs), width)
    assert "\x1b" not in text
    assert max(len(line) for line in text.splitlines()) <= width


def test_what_is_no_run_is_refused(cli: CliRunner, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nothing to compare"):
        compare([])
    cli.assert_rejects(["compare", str(tmp_path)], 2, "not a run directory")
    run = make(tmp_path, "always", 0, 40.0)
    cli.assert_rejects(["compare", str(run.path), "--csv", "--json"], 2, "choose one")
    assert cli.sakd("compare", str(run.path), "--csv").out.startswith("run,group,")
    Comparison.model_validate(cli.sakd("compare", str(run.path), "--json").document)


@pytest.mark.parametrize("command", ["compare", "report", "show schema"])
def test_every_help_has_two_examples(cli: CliRunner, command: str) -> None:
    result = cli.sakd(*command.split(), "--help", COLUMNS="120")
    assert (result.code, result.err) == (0, "")
    assert result.out.partition("Examples:")[2].count(f"sakd {command}") == 2


def test_runs_are_compared_without_torch(tmp_path: Path) -> None:
    runs = series(tmp_path, "adaptive", [40.0, 41.0, 42.0]) + series(tmp_path, "never", [43.0, 44.1, 44.9])
    program = """
import sys
from sakd_cli.cli.app import run
code = run(["compare", *sys.argv[1:], "--csv"]) or run(["compare", *sys.argv[1:]])
sys.exit(f"{code} {heavy}" if (heavy := {"torch", "numpy", "matplotlib"} & set(sys.modules)) or code else 0)
"""
    arguments = [sys.executable, "-c", program, *(str(run.path) for run in runs)]
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert (done.returncode, done.stderr) == (0, "")


def test_p_values_are_corrected_step_down() -> None:
    assert holm([0.01, None, 0.04, 0.03, 0.9]) == pytest.approx([0.04, None, 0.09, 0.09, 0.9])
    assert holm([0.6, 0.7]) == [1.0, 1.0]


def test_the_three_questions_are_answered_in_words(tmp_path: Path) -> None:
    """At the dose that the validation images prefer; coins are those of the router that they repeat."""
    adaptive = series(tmp_path, "adaptive", [41.0, 41.2, 41.1, 40.9])
    runs = [*adaptive, *series(tmp_path, "never", [30.0, 30.3, 30.1, 30.2])]
    runs += series(tmp_path, "always", [45.0, 45.1, 45.3, 45.2])
    better = series(tmp_path, "always", [44.0, 44.2, 44.1, 44.3], method={"name": "at", "balance": 1.0})
    for run in better:
        metrics = run.path / "metrics.jsonl"
        metrics.write_text(metrics.read_text().replace("22.0", "29.0"))
    runs += better
    for seed, top1 in enumerate([41.2, 41.0, 41.2, 41.1]):
        runs.append(make(tmp_path, "random-matched", seed, top1, str(adaptive[seed].path)))
    runs.append(make(tmp_path, "random", 0, 10.0))
    document = compared(runs)
    texts = [answer["text"] for answer in document["answers"]]
    assert [answer["question"] for answer in document["answers"]] == ["help", "dose", "where"]
    assert texts[0].startswith("Does distilling help? Yes: at always method.balance=1.0 over at never +14.00 points")
    assert texts[1].startswith("Does the router give more than the dose? No, it takes away: at adaptive over at always")
    assert texts[2].startswith("Does where it distils add to how much? Not shown: at adaptive over at random-matched")
    assert all(re.search(r"95 % interval .* to .*, p .* \(Holm\), 4 seeds\.$", text) for text in texts)
    raw, corrected = ([answer[key] for answer in document["answers"]] for key in ("p", "holm"))
    assert corrected == pytest.approx(holm(raw))
    assert "Does distilling help? Yes" in " ".join(text_of(document).split())


def test_few_seeds_answer_nothing(tmp_path: Path) -> None:
    runs = [make(tmp_path, router, 0, top1) for router, top1 in (("always", 45.0), (None, 30.0), ("adaptive", 50.0))]
    texts = [answer["text"] for answer in compared(runs)["answers"]]
    assert [text.split("? ")[1].split(":")[0] for text in texts] == ["Not known (too few seeds)"] * 2
    assert texts[0].endswith("+15.00 points, 1 seed.")
