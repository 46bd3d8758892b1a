"""What is said of results: one sentence for one thing, and nothing side by side that is not alike."""

import dataclasses
import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.cells import cell_len
from rich.console import Console
from sample_documents import sample
from test_compare import compared, make, series
from test_inspection import SPOTS, header, measured, survey
from test_report import CONFIG, Tree, epoch, everything, long_run, make_run, spot, text_of
from test_spot_page import document
from test_sweep_table import finished

from sakd_cli.cli.progress import Bars
from sakd_cli.documents.bench import Bench
from sakd_cli.documents.evaluation import EnsembleEvaluation, Evaluation
from sakd_cli.documents.listing import RunEntries
from sakd_cli.documents.spots import Measured, SpotsDocument
from sakd_cli.documents.training import EnsembleTraining, TrainingTeacher
from sakd_cli.report.bench import bench_tables
from sakd_cli.report.evaluation import curve_table, ensemble_summary, ensemble_tables, score_tables
from sakd_cli.report.render import format
from sakd_cli.report.render.sheet import parts
from sakd_cli.report.runs.compare import compare
from sakd_cli.report.runs.compare_tables import comparison_tables
from sakd_cli.report.runs.entries import entry_tables, run_entries
from sakd_cli.report.runs.page import RunPage
from sakd_cli.report.spots.charts import panels_of
from sakd_cli.report.spots.findings import at_the_end, findings
from sakd_cli.report.spots.log import spots_document
from sakd_cli.report.spots.page import PageContext, spot_sections
from sakd_cli.report.spots.survey import measure
from sakd_cli.report.spots.tables import spot_tables, survey_tables
from sakd_cli.report.sweep.results import sweep_document
from sakd_cli.report.sweep.tables import sweep_tables
from sakd_cli.rundir import RunDir

ALWAYS = "of 100 % at every spot in every epoch. It decided nothing and did what router always does, at almost twice"
RECIPE = "--set router.recipe=auto lets it decide"


@pytest.mark.parametrize(
    ("chances", "shares", "router", "said"),
    [
        ((0.996, 1.0), (1.0, 0.999), {"recipe": "published"}, [ALWAYS, f"the cost; {RECIPE}."]),
        ((0.004, 0.0), (0.0, 0.0), {"lr": 0.1}, ["of 0 % at", "router never does", f"{RECIPE} (without router.lr)."]),
        (
            (0.004, 0.996),
            (0.0, 1.0),
            {},
            ["of 0 % or 100 % at", "one fixed weight", "a smaller --set router.lr"],
        ),
        ((0.994, 1.0), (1.0, 1.0), {}, []),
        ((1.0, None), (1.0, 1.0), {}, []),
    ],
)
def test_a_saturated_router_is_one_sentence_with_the_cure(
    tmp_path: Path, chances: Any, shares: Any, router: Tree, said: list[str]
) -> None:
    names = ("stage2", "logits")
    spots = [spot(name, share, [share], p) for name, share, p in zip(names, shares, chances, strict=True)]
    config = CONFIG | {"router": {"name": "adaptive"} | router}
    report = spots_document(make_run(tmp_path / "run", [epoch(n, 10, *spots) for n in (1, 2)], config=config))
    if not said:
        assert (report.saturated, len(spot_tables(report))) == (None, 3)
        return
    assert report.saturated is not None
    assert all(part in report.saturated for part in said)
    [sheet] = spot_tables(report)
    assert (sheet.rows, panels_of(report), "100.0" in text_of([sheet])) == ([], ["epochs"], False)
    [section] = spot_sections(report, PageContext({}))
    assert [block.title for block in section.blocks] == [report.saturated]


def test_a_router_that_treats_all_alike_has_one_table(tmp_path: Path) -> None:
    for share, tables in ((1.0, 1), (0.0, 1), (0.5, 3)):
        spots = [[spot("logits", share, [share, share + change], None)] for change in (0.0, 0.5 * (share == 0.5))]
        run = make_run(tmp_path / str(share), [epoch(n, 10, *one) for n, one in enumerate(spots, 1)], config=CONFIG)
        first, *others = spot_tables(spots_document(run))
        assert (len(others) + 1, "Min" in first.headers) == (tables, tables > 1)


def test_a_difference_is_that_of_the_figures_beside_it_or_has_one_more_digit() -> None:
    assert format.difference(0.5, 70.5, 70.0) == "+0.50"
    assert format.difference(0.012, 70.006, 69.994) == "+0.012", "shown are 70.01 and 69.99"
    assert format.difference(-0.004, None, 1.0) == "0.00"


def test_accuracies_on_two_sets_of_images_say_so() -> None:
    """In the tables by image and of the routed network, and of two evaluations."""
    score = {"top1": 60.0, "loss": 1.0}
    sampled = {"top1": 50.0, "loss": 2.0, "draws": 4, "top1_std": 0.5}
    rows = [{"name": name, "images": 5, "deviation": [0.1, None], "mean": [0.5, None]} for name in "abc"]
    given = {
        "images": 40,
        "split": "train",
        "spots": [{"name": "stage2"}, {"name": "logits"}],
        "classes": {"correlation": [0.5, None], "correlation_p": [0.098, None], "rows": rows},
        "routed": {"images": 100, "student": score, "teacher": score, "sampled": sampled},
    }
    sheets = [sheet for sheets in survey_tables(sample(Measured, given)).values() for sheet in sheets]
    text = " ".join(text_of(sheets, 400).split())
    assert "Top-1: on these 40 training images." in text
    assert "All on 100 test images, not on those of the tables by class and by difficulty." in text
    assert (
        "Sampled gates are below both networks: where a path changes from one network to the other, only the adapter"
        in text
    )
    assert "n = 3 classes: stage2 0.50 (p 0.098), logits –." in text
    two = [sample(Evaluation, {"split": split, "dataset": "shapes", "images": 9}) for split in ("test", "val")]
    assert "Not on the same images: these figures cannot be compared." in text_of(score_tables(two), 120)
    assert "Not on the same images" not in text_of(score_tables(two[:1] * 2), 120)


def fragments(word: str) -> set[str]:
    """All of a word that may stand in a line: it may be broken behind a hyphen, a slash or an underscore."""
    cut = parts(word)
    return {"".join(cut[start:stop]) for start in range(len(cut)) for stop in range(start + 1, len(cut) + 1)}


def a_bench() -> Bench:
    """As long as names and figures become."""
    names = ("adaptive", "published, literally", "balanced", "random-matched")
    figures = dict.fromkeys(("ms", "ms_low", "ms_high", "images_per_second", "gflop", "gflop_per_second"), 12345.678)
    counted = dict.fromkeys(("operations", "synchronisations", "saved_bytes", "peak_bytes"), 1_234_567_890)
    steps = [{"name": name, "about": "a step of both networks and the router"} | figures | counted for name in names]
    where = {"cpu": "AMD EPYC 9R14", "cpu_flags": ["avx2", "avx512"], "threads": 1, "load": 1.5, "device": "cpu"}
    where |= {"mode": "fp32, channels_last", "torch": "2.9.0", "process_peak_bytes": 2**31}
    given: dict[str, Any] = {"environment": where, "steps": steps}
    given["setup"] = {"teacher": "wrn_40_2", "student": "ShuffleNetV2", "batch": 64, "side": 32, "rounds": 7}
    given["phases"] = [{"name": "distillation's backward", "ms": 12345.6, "fraction": 0.5}] * 2
    given["scaling"] = {"axis": "images", "points": [{"value": 50_000, "ms": 1e4, "kd_ms": 1e4, "ratio": 1.5}]}
    changed = [{"name": "published, literally", "base": 1.5, "now": 1.2, "slow": True, "regressed": True}]
    given["comparison"] = {"ratios": changed, "risen": [], "regressed": True}
    return sample(Bench, given)


def residual_tables() -> list[Any]:
    """Of a summary and of an evaluation, with the curve."""
    figures = {"members": ["ShuffleNetV2", "resnet8x4", "resnet8"], "member_macs": [40_800_000, 12_500_000, 12_500_000]}
    figures |= {"thresholds": [0.5, -1.0], "stage_top1": [70.0, 71.0, 71.5], "teacher": {"macs": 324_000_000}}
    energies = {"calibration": [0.5, 0.4, 0.3], "train": [0.5, 0.4, 0.3]}
    metrics = {"top1": 71.5, "exits": [5000, 3000, 2000], "cost": 0.25}
    points = [{"theta": 0.5, "cost": 0.25, "top1": 71.0, "agreement": 90.0, "exits": [1, 2, 3], "pareto": True}] * 3
    figures |= {"energies": energies, "early": metrics, "all": metrics, "curve": points, "stopped": "three at most"}
    found = sample(EnsembleTraining, figures)
    return [ensemble_summary(found), curve_table(found.curve)]


@pytest.mark.parametrize(("budget", "told"), [(0.2, True), (0.4, False)])
def test_a_budget_that_cannot_be_kept_is_told(budget: float, told: bool) -> None:
    figures = {"members": ["resnet8", "resnet8"], "member_macs": [30, 20], "macs": 31, "cost": 0.31, "exits": [9, 1]}
    figures |= {"rule": "budget", "budget": budget, "early_exit": True, "thresholds": [0.9], "teacher": {"macs": 100}}
    text = text_of(ensemble_tables(sample(EnsembleEvaluation, {"images": 10, "ensemble": figures})), 200)
    assert ("Warning: the budget, 20.0 %, is less than the student alone costs." in text) == told


def a_probe() -> SpotsDocument:
    """Of two spots, one of which nothing is known of."""
    known = dict.fromkeys(("helps", "mean", "reliability", "explained", "chosen_loss", "class_share"), 0.512)
    spots = [{"name": "stage3.block2", "kind": "map", "settled": 120} | known, {"name": "logits", "kind": "logits"}]
    spot = {"name": "logits", "kind": "logits"}
    epoch = {key: [0.5] for key in ("fraction", "probability", "gradient_ratio", "empty_selection")}
    probe = {"images": 2000, "held_out": 1000, "held_out_split": "validation", "seed": 0, "spots": spots}
    return sample(SpotsDocument, {"overall": [spot], "by_epoch": [{"epoch": 1} | epoch], "probe": probe})


def test_no_table_breaks_a_word_at_any_width(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    routers = ("adaptive", "random-matched", "never")
    runs = [make(tmp_path / "runs", router, seed, 40.0 + seed) for router in routers for seed in (0, 1)]
    swept = [finished(router, seed, 70.0 + seed) for router in ("always", "random-matched") for seed in (0, 1)]
    sheets: list[Any] = [*everything(spots_document(long_run(tmp_path / "run", 3))), *comparison_tables(compare(runs))]
    sheets += [sheet for found in survey_tables(measured()).values() for sheet in found]
    sheets += sweep_tables(sweep_document("mine", swept, {"fitnet always": "no such stage"}, "cifar100"))
    sheets += entry_tables(RunEntries(rows=run_entries(tmp_path / "runs", {}, None), removed=[]))
    sheets += [*bench_tables(a_bench()), *residual_tables(), *spot_tables(a_probe())]
    for sheet in sheets:
        whole = {piece for word in text_of([sheet], 1000).split() for piece in fragments(word)}
        for width in (60, 72, 80, 96, 100, 118, 132, 160, 200):
            lines = text_of([sheet], width).splitlines()
            assert max(map(cell_len, lines), default=0) <= width
            words = {word for line in lines for word in line.split() if not set(word) <= {"─"}}
            assert not {word for word in words if word not in whole and word.rstrip(":") not in whole}, width


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_progress_is_a_bar_for_the_epoch_one_for_the_run_and_whole_figures(width: int) -> None:
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    bars = Bars(console, steps=120, done=40)
    bars.plan(3, 64)
    for step in range(41, 91):
        bars.advance(step)
    bars.record({"kind": "train", "epoch": 3, "step": 90, "lr": 0.005, "loss": 1.25, "top1": 61.3})
    bars.record({"kind": "eval", "epoch": 2, "split": "validation", "top1": 57.125, "loss": 1.5})
    bars.spots([0.5, 0.875])
    with console.capture() as capture:
        console.print(bars.renderable())
    text = capture.get()
    assert "epoch 3/3" in text.splitlines()[1]
    assert text.startswith("run")
    assert ("90/120" in text, "10/40" in text) == (width >= 80, width >= 80)
    for figure in ("lr 0.005", "loss 1.2500", "training top-1 61.3 %", "validation top-1 57.12 %", "images/s "):
        assert figure in text
    assert "distilled, by spot 50.0 87.5 %" in text
    assert max(map(cell_len, text.splitlines())) <= width


def test_coins_that_repeat_each_seed_another_run_are_one_group(tmp_path: Path) -> None:
    """A run by itself also keeps the SHA-256 of the record whose rates it repeats."""
    runs = series(tmp_path, "adaptive", [41.0, 41.2])
    for seed in (0, 1):
        runs.append(make(tmp_path, "random-matched", seed, 40.0, str(runs[seed].path)))
        config = runs[-1].path / "config.yaml"
        config.write_text(config.read_text().replace("  run: ", f"  run_sha256: '{seed}'\n  run: "))
    document = compared(runs)
    assert [len(group["seeds"]) for group in document["groups"]] == [2, 2]
    assert not [row for row in document["differences"] if row["key"].startswith("router.run")]


def test_the_page_of_a_run_names_every_teacher_and_the_first_of_equal_epochs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RunDir, "environment", {})
    run = make(tmp_path, "always", 0, 40.0)
    more = [sample(TrainingTeacher, network="two", top1=55.55)]
    first = sample(TrainingTeacher, network="one", top1=60.0)
    found = run.summary.model_copy(update={"teacher": first, "more_teachers": more})
    (run.path / "summary.json").write_text(found.text)
    metrics = run.path / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('"top1": 22.0', '"top1": 21.0'))
    RunPage(RunDir(run.path), print).write(tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text().replace("&nbsp;", " ")
    assert "Top-1 40.00 % on the test images after the last epoch; its teachers one 60.00 %, two 55.55 %." in page
    assert "Validation top-1 was highest in epoch 1 of 2, 21.00 %; in the last 21.00 %." in page


def test_images_without_labels_are_named_by_their_index() -> None:
    counts = dataclasses.replace(survey(), source="samples", header=None, rated=True, answers={})
    report = document(measured=measure(counts, SPOTS, sample=False, seed=0, extremes=2))
    assert re.search(r"apart at \w+: image \d+ at [\d.]+ % and image \d+ at", findings(report, [])["Extremes"])
    assert report.measured
    (spots,) = survey_tables(report.measured)["spots"]
    assert list(spots.headers)[:2] == ["Spot", "Mean"], "no columns of dashes for stages that are not known"
    assert {*survey_tables(report.measured)["extremes"][0].headers} == {"Value", "Image"}


def test_what_is_the_same_everywhere_has_no_ends() -> None:
    alike = survey(header=header(classes=["a", "b", "c"]))
    alike = dataclasses.replace(alike, value=np.full_like(alike.value, 0.99999))
    rows = [{"name": name, "fraction": [0.5, 0.2 * k], "deviation": [0.0, k - 0.5]} for k, name in enumerate("abc")]
    report = document(by_class=rows, measured=measure(alike, SPOTS, sample=False, seed=0, extremes=2))
    assert at_the_end(report) == [
        "At the end of training the router's probability at logits is 100.0 % for every class."
    ]
    said = findings(report, [])["The trained router"]
    assert said == "Single images hardly differ at any spot: at stage2 nine in ten are at 100.0 %."
