"""`sakd compare`: groups, figures over seeds, verdicts and settings, from made-up run directories, without torch."""

import csv
import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import CliRunner
from rich.console import Console
from sample_documents import sample
from scipy import stats

from sakd_cli.config.identity import identity
from sakd_cli.documents.base import PairedTest
from sakd_cli.documents.table import Comparison
from sakd_cli.documents.training import Summary
from sakd_cli.errors import UsageError
from sakd_cli.report.runs.compare import compare
from sakd_cli.report.runs.compare_tables import comparison_csv, comparison_tables
from sakd_cli.report.runs.statistics import corrected, holm, in_words, paired_test, seed_statistics, seeds_needed
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


def paired(differences: list[float]) -> PairedTest:
    return paired_test(dict(enumerate(differences)), dict.fromkeys(range(20), 0.0))


def test_a_thousand_simulated_cases_are_as_scipy_has_them_and_intervals_cover_the_truth() -> None:
    """Half of them without an effect, 2 to 12 seeds, what both runs of a seed share being larger than the rest."""
    draw, covered, found = np.random.default_rng(1029), 0, 0
    for case in range(1000):
        seeds, truth = 2 + case % 11, 0.0 if case % 2 else 0.4
        shared = draw.normal(70.0, 2.0, seeds)
        ours, theirs = shared + truth + draw.normal(0, 0.3, seeds), shared + draw.normal(0, 0.3, seeds)
        test = paired_test(dict(enumerate(ours.tolist())), dict(enumerate(theirs.tolist())))
        expected = stats.ttest_rel(ours, theirs)
        bounds = expected.confidence_interval(0.95)
        assert (test.p, test.low, test.high) == pytest.approx((expected.pvalue, bounds.low, bounds.high), rel=1e-6)
        assert test.effect == pytest.approx(np.mean(ours - theirs) / np.std(ours - theirs, ddof=1), rel=1e-6)
        assert test.low is not None
        assert test.high is not None
        assert test.verdict == ("better" if test.low > 0 else "worse" if test.high < 0 else "not shown"), test
        covered, found = (
            covered + (test.low <= truth <= test.high),
            found + (truth == 0 and test.verdict != "not shown"),
        )
    assert abs(covered / 1000 - 0.95) <= 0.015
    assert 0.02 <= found / 500 <= 0.08, "of 500 cases without an effect"


def test_the_seeds_that_are_needed_are_those_of_the_noncentral_t_distribution() -> None:
    assert seeds_needed(1.0) == 34, "d = 0.5: the textbook's number of pairs"
    for std in (0.01, 0.1, 0.3, 2.0, 7.0):
        seeds = seeds_needed(std)
        assert seeds is not None
        powers = []
        for n in (seeds - 1, seeds):
            shift, limit = 0.5 * n**0.5 / std, stats.t.ppf(0.975, max(n - 1, 1))
            nct = stats.nct(max(n - 1, 1), shift)
            powers.append(np.nan_to_num(nct.sf(limit), nan=1.0) + np.nan_to_num(nct.cdf(-limit)))
        assert powers[0] < 0.8 <= powers[1] or (seeds == 2 and powers[1] >= 0.8)
    assert seeds_needed(30.0) is None, "more than 10 000"


def test_a_deviation_of_rounding_is_none_and_many_tests_claim_less() -> None:
    same = paired_test({0: 71.1, 1: 70.2, 2: 60.3}, {0: 70.1, 1: 69.2, 2: 59.3})
    assert (same.verdict, same.p, same.difference) == ("not shown", None, 1.0)
    assert "+1.00 points top-1 in each of 3 seeds: without a deviation nothing can be tested" in in_words(same)
    # Of 60 images, as summaries write it, with nine figures: both differences are two images.
    written = paired_test({0: 23.3333333, 1: 31.6666666}, {0: 20.0, 1: 28.3333333})
    assert (written.p, written.effect, written.verdict) == (None, None, "not shown")
    tests = [paired([1.0, 1.2, 1.4]), paired([0.1, 0.5, 0.9]), paired([5.0])]
    assert [test.verdict for test in tests] == ["better", "not shown", "one seed"]
    many = corrected([tests[0]] * 10)
    assert {test.verdict for test in many} == {"not shown"}
    assert many[0].holm == pytest.approx(10 * (tests[0].p or 0.0))
    said = (
        "inconclusive after the correction: an effect between +0.70 and +1.70 points is compatible; p 0.009, Holm 0.091"
    )
    assert said in in_words(many[0])


def test_statistics_and_paired_test_of_three_seeds() -> None:
    found = seed_statistics([1.0, 2.0, 4.0])
    assert found is not None
    assert found.mean == pytest.approx(7 / 3)
    assert found.std == pytest.approx((7 / 3) ** 0.5)
    assert found.high is not None
    assert found.high - found.mean == pytest.approx(4.30265273 * (7 / 9) ** 0.5)
    # t = 2.6458 with two degrees of freedom, in closed form p = 1 - t / sqrt(t^2 + 2).
    assert paired([1.0, 2.0, 4.0]).p == pytest.approx(1 - (7 / 9) ** 0.5, rel=1e-6)
    assert [paired(few).p for few in ([], [1.0], [1.0, 1.0, 1.0])] == [None] * 3
    two = paired([1.0, 2.0])
    assert (two.p, two.verdict) == (pytest.approx(0.2048, abs=1e-4), "not shown")
    assert (two.low, two.high) == (
        pytest.approx(1.5 - 12.7062 / 2, abs=1e-4),
        pytest.approx(1.5 + 12.7062 / 2, abs=1e-4),
    )
    assert seed_statistics([]) is None
    one = seed_statistics([2.0])
    assert one is not None
    assert one.plain() == {"mean": 2.0, "std": None, "low": None, "high": None}


def test_a_loss_is_said_plainly(tmp_path: Path) -> None:
    runs = series(tmp_path, "adaptive", [40.0, 41.0, 42.0]) + series(tmp_path, "never", [43.0, 44.1, 44.9])
    document = compared(runs)
    assert [group["seeds"] for group in document["groups"]] == [[0, 1, 2], [0, 1, 2]]
    assert [group["distilled"] for group in document["groups"]] == [True, False]
    [versus] = document["comparisons"]
    assert (versus["verdict"], versus["difference"], versus["unequal"]) == ("worse", pytest.approx(-3.0), [])
    assert versus["text"].startswith(
        "at adaptive against at never: distillation hurt, −3.00 points top-1 (95 % interval"
    )
    row = next(line for line in text_of(document).splitlines() if line.startswith("at adaptive  at never"))
    assert re.fullmatch(r"at adaptive +at never +−3.00 +−3.25 to −2.75 +< 0.001 +−30.00 +3 +3 +worse *", row)
    assert "corrected for being 1 test (Holm)" in text_of(document)


def test_what_is_not_shown_is_inconclusive_and_one_seed_decides_nothing(tmp_path: Path) -> None:
    runs = series(tmp_path, "adaptive", [40.0, 44.0, 42.0]) + series(tmp_path, "always", [41.0, 42.0, 41.0])
    document = compared(runs)
    [open_] = document["comparisons"]
    said = (
        "not shown, +0.67 points top-1 (inconclusive: an effect between −3.13 and +4.46 points is compatible; p 0.529"
    )
    assert (open_["verdict"], said in open_["text"]) == ("not shown", True)
    assert "3 seeds; to see 0.5 points at 80 % power: 76 seeds)" in open_["text"]
    assert not re.search("noise|no effect", text_of(document) + document["answers"][0]["text"])
    runs = series(tmp_path, "anti", [40.0]) + series(tmp_path, "never", [41.0])
    [few] = compared(runs)["comparisons"]
    assert (few["verdict"], few["p"]) == ("one seed", None)
    assert few["text"].endswith("−1.00 points top-1, 1 seed: one seed cannot tell a difference from chance.")


def test_a_control_is_one_group_for_all_methods_and_what_has_no_effect_makes_none(tmp_path: Path) -> None:
    at, sp, ab = ({"name": name, "ce_weight": 1.0} for name in ("at", "sp", "ab"))
    runs = [make(tmp_path, router, 0, 40.0, method=method) for method in (at, sp) for router in ("adaptive", "never")]
    runs.append(make(tmp_path, "never", 1, 40.0, method=sp | {"gamma": 3.0}, teacher={"sha256": "cd"}))
    document = compared(runs)
    assert [group["label"] for group in document["groups"]] == ["at adaptive", "never", "sp adaptive"]
    assert document["groups"][1]["seeds"] == [0, 1]
    pairs = [(one["group"], one["against"]) for one in document["comparisons"]]
    assert pairs == [(0, 1), (2, 1), (2, 0)]
    kept = [
        make(tmp_path, "never", 0, 40.0, method=ab),
        make(tmp_path, "never", 0, 40.0, method=at | {"ce_weight": 0.5}),
    ]
    kept.append(make(tmp_path, "never", 0, 40.0, method=at, residual={"students": 1}))
    assert len(compared([*runs, *kept])["groups"]) == 6, "a warm-up of the student, another loss, more students"
    always = {"router.name": "always", "router.dose": "published", "method.name": "at", "method.gamma": 1.0}
    same = always | {"router.dose": "selected-mean", "method.gamma": 2.0}
    assert identity(always, without=()) == identity(same, without=())
    routed = [settings | {"router.name": "adaptive"} for settings in (always, same)]
    assert identity(routed[0], without=()) != identity(routed[1], without=())


def test_methods_meet_under_one_router_and_all_meet_a_baseline(tmp_path: Path) -> None:
    runs = [
        make(tmp_path, router, 0, 40.0, method={"name": name}) for name in ("at", "sp") for router in ("always", "anti")
    ]
    document = compared(runs)
    labels = [group["label"] for group in document["groups"]]

    def pairs(document: Tree) -> set[tuple[str, str]]:
        return {(labels[one["group"]], labels[one["against"]]) for one in document["comparisons"]}

    classical = {("at anti", "at always"), ("sp anti", "sp always")}
    assert pairs(document) == classical | {("sp always", "at always"), ("sp anti", "at anti")}
    assert pairs(json.loads(compare(runs, "always").text)) == classical
    everything = {("at always", "sp anti"), ("sp always", "sp anti"), ("at anti", "sp anti")}
    for baseline in ("anti sp", str(runs[3].path)):
        assert pairs(json.loads(compare(runs, baseline).text)) == everything
    with pytest.raises(UsageError, match="--baseline 'at': is every group"):
        compare(runs[:2], "at")
    with pytest.raises(UsageError, match="--baseline 'kd': no such group") as error:
        compare(runs, "kd")
    assert "sp anti" in str(error.value.hint)


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
    assert not compared([*runs, make(tmp_path, "always", 0, 30.0, data={"name": "cifar100", "limit": 9})])["answers"]
    runs = [make(tmp_path, router, 0, 40.0, train={"epochs": 2, "patience": 1}) for router in ("anti", "never")]
    assert compared(runs)["comparisons"][0]["unequal"] == []
    metrics = runs[1].path / "metrics.jsonl"
    metrics.write_text("".join(f"{line}\n" for line in metrics.read_text().splitlines() if '"epoch": 2' not in line))
    assert compared(runs)["comparisons"][0]["unequal"] == ["epochs until train.patience ended a run"]
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
sys.exit(f"{code} {heavy}" if (heavy := {"torch", "scipy.stats", "matplotlib"} & set(sys.modules)) or code else 0)
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
    assert texts[0].startswith(
        "Does distilling help? Yes: method at, router always, balanced, over method at, router never: +14"
    )
    assert texts[1].startswith(
        "Does the router give more than the dose? No, it takes away: method at, router adaptive, over method at"
    )
    assert texts[2].startswith(
        "Does where it distils add to how much? Not shown: method at, router adaptive, over method at, router random"
    )
    assert all(re.search(r"95 % interval .* to .*; p .*, Holm .*, 4 seeds; ", text) for text in texts[:2])
    assert re.search(r"inconclusive: an effect between −\d.\d\d and \+\d.\d\d points is compatible; p", texts[2])
    tests = document["comparisons"]
    assert [test["holm"] for test in tests] == pytest.approx(holm([test["p"] for test in tests]))
    known = {(test["difference"], test["p"], test["holm"]) for test in tests}
    assert known >= {(answer["difference"], answer["p"], answer["holm"]) for answer in document["answers"]}
    counted = sum(test["p"] is not None for test in tests)
    assert f"corrected for being {counted} tests (Holm)" in " ".join(text_of(document).split())
    assert "Does distilling help? Yes" in " ".join(text_of(document).split())


def test_few_seeds_answer_nothing(tmp_path: Path) -> None:
    runs = [make(tmp_path, router, 0, top1) for router, top1 in (("always", 45.0), (None, 30.0), ("adaptive", 50.0))]
    texts = [answer["text"] for answer in compared(runs)["answers"]]
    assert [text.split("? ")[1].split(":")[0] for text in texts] == ["Not known"] * 2
    assert texts[0].endswith("+15.00 points top-1, 1 seed: one seed cannot tell a difference from chance.")
