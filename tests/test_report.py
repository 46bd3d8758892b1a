"""The report floor: arithmetic on hand-made records, damaged and hostile input, and tables at every width."""

import io
import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.cells import cell_len
from rich.console import Console, RenderableType
from sample_documents import sample

from sakd_cli.documents.evaluation import Evaluation
from sakd_cli.documents.spots import SpotsDocument
from sakd_cli.documents.training import Plan, Summary
from sakd_cli.errors import UsageError
from sakd_cli.report.evaluation import evaluation_tables
from sakd_cli.report.render import format
from sakd_cli.report.render.sheet import Sheet, listing_table
from sakd_cli.report.runs.page import plan_table, summary_table
from sakd_cli.report.spots.log import history, spots_document
from sakd_cli.report.spots.tables import spot_tables
from sakd_cli.rundir import RunDir

Tree = dict[str, Any]
CONFIG = {"task": "distill", "student": "resnet8", "teacher": {"source": "resnet20"}, "method": {"name": "fitnet"}}
CONFIG |= {"router": {"name": "adaptive"}, "data": {"name": "cifar100"}}
STEPS = ("router_loss_scaled_up", "router_loss_scaled_down", "count_penalty_active")


def spot(name: str, fraction: float | None, by_class: list[float | None], probability: float | None = 0.5) -> Tree:
    kind = "logits" if name == "logits" else "map"
    return {"name": name, "kind": kind, "fraction": fraction, "probability": probability, "by_class": by_class}


def epoch(number: int, samples: int, *spots: Tree, routed: bool = True) -> Tree:
    steps: Tree = dict.fromkeys(STEPS, 0.25 if routed else None) | dict.fromkeys(("routed_ce", "student_ce"))
    return {"epoch": number, "samples": samples, "spots": list(spots), **steps, "empty_selection": [0.125] * len(spots)}


TWO_EPOCHS = [
    epoch(1, 100, spot("stage2", 0.8, [1.0, 0.6, None, None]), spot("logits", 0.5, [0.5, 0.5, None, None])),
    epoch(2, 300, spot("stage2", 0.4, [0.6, None, 0.1, None], 0.3), spot("logits", 0.5, [0.5, None, 0.6, None])),
]


def make_run(folder: Path, records: list[Any], *, config: Tree = CONFIG, classes: list[str] | None = None) -> RunDir:
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    if records:
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (folder / "spots.jsonl").write_text(lines, encoding="utf-8")
    if classes is not None:
        (folder / "student").mkdir()
        (folder / "student" / "config.json").write_text(json.dumps({"classes": classes}), encoding="utf-8")
    return RunDir(folder)


def text_of(renderables: list[RenderableType], width: int = 80, encoding: str = "utf-8", colour: bool = False) -> str:
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding, newline="\n")
    console = Console(file=file, width=width, force_terminal=colour, color_system="standard" if colour else None)
    for renderable in renderables:
        console.print(renderable)
    file.flush()
    return raw.getvalue().decode(encoding)


def test_report_names_the_run(tmp_path: Path) -> None:
    report = spots_document(make_run(tmp_path / "run", TWO_EPOCHS))
    assert report.schema_ == "sakd.spots/2"
    assert report.run == str(tmp_path / "run")
    names = [report.method, report.router, report.teacher, report.student, report.dataset]
    assert names == ["fitnet", "adaptive", "resnet20", "resnet8", "cifar100"]
    assert (report.finished, report.epochs, report.samples) == (False, 2, 400)
    assert SpotsDocument.model_validate_json(report.text) == report


def test_overall_fraction_is_weighted_by_samples_and_epochs_are_kept(tmp_path: Path) -> None:
    report = spots_document(make_run(tmp_path / "run", TWO_EPOCHS))
    stage, logits = report.overall
    assert stage.fraction == pytest.approx((0.8 * 100 + 0.4 * 300) / 400)
    of_epochs = {"first": 0.8, "last": 0.4, "min": 0.4, "max": 0.8, "probability": 0.3, "gradient_ratio": None}
    assert stage.plain() == {"name": "stage2", "kind": "map", "fraction": stage.fraction, **of_epochs}
    assert (logits.name, logits.kind, logits.fraction) == ("logits", "logits", 0.5)
    steps = dict.fromkeys(STEPS, 0.25) | {"routed_ce": None, "student_ce": None, "empty_selection": [0.125, 0.125]}
    known = {"epoch": 2, "samples": 300, "fraction": [0.4, 0.5], "probability": [0.3, 0.5]}
    known |= {"gradient_ratio": [None, None]}
    assert report.by_epoch[1].plain() == known | steps


def test_by_class_is_the_mean_of_the_epochs_that_have_the_class(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", TWO_EPOCHS, classes=["apple", "bear", "cat", "dog"])
    rows = spots_document(run).by_class
    # Overall 0.5 and 0.5: cat deviates by -0.4, apple by +0.3, bear by +0.1; no sample of a dog was seen.
    assert [row.name for row in rows] == ["cat", "apple", "bear", "dog"]
    fractions = [row.fraction for row in rows]
    assert fractions[:3] == [pytest.approx([0.1, 0.6]), pytest.approx([0.8, 0.5]), pytest.approx([0.6, 0.5])]
    assert rows[-1].plain() == {"name": "dog", "fraction": [None, None], "deviation": [None, None]}
    assert rows[0].deviation == pytest.approx([-0.4, 0.1])


def test_classes_without_names_are_numbered(tmp_path: Path) -> None:
    unnamed = spots_document(make_run(tmp_path / "a", TWO_EPOCHS)).by_class
    assert {row.name for row in unnamed} == {"class 0", "class 1", "class 2", "class 3"}
    short = spots_document(make_run(tmp_path / "b", TWO_EPOCHS, classes=["apple", "\x1b[1m"])).by_class
    assert {row.name for row in short} == {"apple", "class 1", "class 2", "class 3"}


def test_no_classes_on_record(tmp_path: Path) -> None:
    record = epoch(1, 10, spot("logits", 0.5, []))
    report = spots_document(make_run(tmp_path / "run", [record]))
    assert report.by_class == []
    assert len(spot_tables(report)) == 2


def test_router_without_policy_and_epoch_without_samples(tmp_path: Path) -> None:
    record = epoch(1, 0, spot("logits", None, [None], None), routed=False)
    report = spots_document(make_run(tmp_path / "run", [record]))
    row = report.overall[0]
    assert [row.fraction, row.first, row.last, row.min, row.max, row.probability] == [None] * 6
    text = text_of(spot_tables(report))
    assert [part in text for part in ("γ", "Count", "ount penalty", format.DASH)] == [False, False, False, True]


def test_resumed_run_counts_an_epoch_once(tmp_path: Path) -> None:
    again = [epoch(n, 100, spot("logits", rate, [rate])) for n, rate in ((1, 0.2), (3, 0.1), (2, 0.9), (3, 0.4))]
    report = spots_document(make_run(tmp_path / "run", again))
    assert [row.epoch for row in report.by_epoch] == [1, 2, 3]
    assert [row.fraction for row in report.by_epoch] == [[0.2], [0.9], [0.4]]
    assert report.overall[0].last == 0.4


def test_running_and_finished_run(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", TWO_EPOCHS)
    with (run.path / "spots.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"epoch": 3, "sam')
    assert "2 epochs so far" in text_of(spot_tables(spots_document(run)), 200)
    (run.path / "summary.json").write_text("{}", encoding="utf-8")
    assert "so far" not in text_of(spot_tables(spots_document(run)), 200)


def refusal(run: RunDir, code: int = 2) -> str:
    with pytest.raises(UsageError) as caught:
        spots_document(run)
    assert caught.value.exit_code == code
    assert caught.value.message.isprintable()
    return caught.value.message


def test_pretrain_run_is_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", TWO_EPOCHS, config={"task": "pretrain"})
    assert refusal(run) == f"{tmp_path / 'run'}: has no record of spots: it is a 'pretrain' run"


def test_run_without_an_epoch_is_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", [])
    assert "has no record of spots yet" in refusal(run)
    with pytest.raises(UsageError, match="has no record of spots yet"):  # others removed it since it was begun to read
        history(run, None)
    assert "not a run directory" in refusal(RunDir(tmp_path))


@pytest.mark.parametrize(
    "record",
    [[], 3, {"epoch": 1}]
    + [TWO_EPOCHS[0] | {"spots": spots} for spots in ([], [1], [{"name": "logits"}])]
    + [{key: value for key, value in TWO_EPOCHS[0].items() if key != "routed_ce"}, TWO_EPOCHS[0] | {"share": 0.5}]
    + [TWO_EPOCHS[0] | {"empty_selection": [0.0]}, TWO_EPOCHS[0] | {"samples": -1}, TWO_EPOCHS[0] | {"routed_ce": "1"}]
    + [TWO_EPOCHS[0] | {"epoch": wrong} for wrong in (float("inf"), None, 1.5)],
)
def test_damaged_record_is_named(tmp_path: Path, record: Any) -> None:
    assert refusal(make_run(tmp_path / "run", [TWO_EPOCHS[1], record]), 4).endswith("line 2 is no record of an epoch")


def test_damaged_file_is_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", [TWO_EPOCHS[0], epoch(2, 10, spot("logits", 0.5, []))])
    assert refusal(run, 4).endswith("epoch 2 has other spots than epoch 1")
    (run.path / "spots.jsonl").write_bytes(b"\xff\xfe\x00")
    assert "no epoch is finished" in refusal(run)


HOSTILE = "\x1b[31mre\x07d\x1b]0;title\x07 \u202e[bold]x[/bold]\r\n[/] :smile:\x9b2J\ud800"
HARMLESS = "red [bold]x[/bold]  [/] :smile:"


def test_plain() -> None:
    assert format.plain(HOSTILE) == HARMLESS
    assert format.plain("naïve 猫") == "naïve 猫"
    assert format.plain("\x1bc\x1b(B\x1b") == ""
    assert format.named("\x1b[0m") == format.named(None) == format.DASH


def test_names_from_files_are_shown_as_plain_text(tmp_path: Path) -> None:
    name = HOSTILE.replace("\ud800", "")  # no JSON file holds half a character
    record = epoch(1, 10, {**spot("x", 0.5, [0.75]), "name": name, "kind": name})
    config = CONFIG | {"teacher": {"source": name}}
    report = spots_document(make_run(tmp_path / "run", [record], config=config, classes=[HOSTILE]))
    assert report.overall[0].name == report.overall[0].kind == report.teacher == HARMLESS
    assert report.by_class[0].name == HARMLESS
    evaluation = sample(Evaluation, network=name, classes=[{"name": name, "images": 1, "top1": 5.0}])
    plan = sample(Plan, spots=[{"name": name, "student_to_teacher": name}], trainable={name: 3})
    summary = sample(Summary, network=name, protocol=name, device=name, dataset=name, seconds=1.0)
    tables = [*spot_tables(report), *evaluation_tables(evaluation), summary_table(summary), plan_table(plan)]
    text = text_of([*tables, listing_table(HOSTILE, [{HOSTILE: HOSTILE}])], width=300)
    assert text.count(HARMLESS) >= 12
    assert all(char.isprintable() or char == "\n" for char in text)


def long_run(folder: Path, features: int, epochs: int = 240, classes: int = 100) -> RunDir:
    names = [*(f"stage{number}" for number in range(1, features + 1)), "logits"]
    records = []
    for number in range(1, epochs + 1):
        spots = []
        for index, name in enumerate(names):
            fraction = 0.9 - 0.1 * index - 0.4 * number / epochs
            by_class: list[float | None] = [fraction + 0.00101 * (label - 49.5) for label in range(classes)]
            spots.append(spot(name, fraction, by_class, fraction))
        records.append(epoch(number, 50_000, *spots))
    return make_run(folder, records, classes=[f"name_{label:02d}" for label in range(classes)])


# fmt: off
EVALUATION = sample(Evaluation, {
    "network": "resnet8", "dataset": "cifar100", "split": "test", "images": 10_000, "top1": 41.2345, "top5": 70.1,
    "loss": 2.2034, "parameters": 83_892, "macs": 12_507_392,
    "classes": [{"name": f"name_{label:02d}", "images": 100, "top1": float(label)} for label in range(100)],
})
SUMMARY = sample(Summary, {
    "task": "distill", "network": "resnet8", "dataset": "cifar100", "epochs": 3,
    "last": {"epoch": 3, "split": "test", "top1": 41.2, "top5": 70.1, "loss": 2.2},
    "best": {"epoch": 2, "selected_on": "validation", "top1": 40.9, "top5": 70.4, "loss": 2.19},
    "protocol": "the reported result is the last epoch; best epoch chosen on 10 % of the training images held out",
    "parameters": 83_892, "macs": 12_507_392, "seconds": 83.1, "phases": {"train": 0.93, "evaluate": 0.07},
    "teacher": {"network": "resnet20", "top1": 45.1, "parameters": 278_324, "macs": 40_800_000, "sha256": "ab" * 32},
})
PLAN = sample(Plan, {
    "spots": [
        {"name": "stage2", "kind": "map", "student_stage": 1, "teacher_stage": 1,
         "student_shape": [32, 16, 16], "teacher_shape": [128, 16, 16],
         "student_to_teacher": "conv 1x1", "teacher_to_student": "conv 1x1"},
        {"name": "logits", "kind": "logits", "student_shape": [100], "teacher_shape": [100]},
    ],
    "networks": [{"role": "teacher", "name": "resnet20", "parameters": 278_324, "macs": 40_800_000}],
    "trainable": {"router": 772, "adapters": 8448, "distiller": 0},
})
# fmt: on
ABOUT = "three groups of one block each, and more that does not fit on one line"
LISTING = [{"name": "resnet8", "parameters": 83_892, "macs": 12_507_392, "about": ABOUT}]


def everything(report: SpotsDocument) -> list[RenderableType]:
    tables = [*spot_tables(report), *evaluation_tables(EVALUATION), summary_table(SUMMARY), plan_table(PLAN)]
    return [*tables, listing_table("Networks", LISTING)]


@pytest.mark.parametrize("features", [1, 3])
@pytest.mark.parametrize("width", [1, 8, 20, 40, 80, 200])
def test_no_line_is_wider_than_the_terminal(tmp_path: Path, features: int, width: int) -> None:
    text = text_of(everything(spots_document(long_run(tmp_path / "run", features))), width)
    assert max(cell_len(line) for line in text.splitlines()) <= width


def test_figures_are_whole_on_a_narrow_terminal(tmp_path: Path) -> None:
    report = spots_document(long_run(tmp_path / "run", 3))
    lines = [line.strip() for line in text_of(everything(report), 20).splitlines()]
    assert "Fraction: 69.9" in lines or "Fraction: 69.8" in lines
    assert {"Epoch 240", "# 100", "Top-1 %: 41.23", "Parameters: 0.28 M", "Top-1", "Student shape:"} <= set(lines)


def test_tables_fit_80_columns_as_tables(tmp_path: Path) -> None:
    text = text_of(everything(spots_document(long_run(tmp_path / "run", 3))), 80)
    assert text.count("───\n") == 9  # a rule below every header: none of the nine fell apart into a list
    assert "\x1b" not in text


def test_colour_changes_no_character(tmp_path: Path) -> None:
    tables = everything(spots_document(long_run(tmp_path / "run", 1)))
    coloured = text_of(tables, 80, colour=True)
    assert "\x1b[" in coloured
    strip = "\n".join(line.rstrip() for line in format._ESCAPES.sub("", coloured).splitlines())
    assert strip == "\n".join(line.rstrip() for line in text_of(tables, 80).splitlines())


def test_terminal_without_unicode(tmp_path: Path) -> None:
    report = spots_document(make_run(tmp_path / "run", TWO_EPOCHS, classes=["naïve", "b", "c", "d"]))
    text = text_of([*spot_tables(report), summary_table(SUMMARY)], encoding="ascii")
    for part in ("na?ve", "resnet20 -> resnet8", "#####", "-40.0"):
        assert part in text


def test_long_runs_are_thinned_evenly(tmp_path: Path) -> None:
    text = text_of([spot_tables(spots_document(long_run(tmp_path / "run", 1)))[1]])
    shown = [int(line.split()[0]) for line in text.splitlines() if line.strip() and line.split()[0].isdigit()][:20]
    assert (len(shown), shown[0], shown[-1]) == (20, 1, 240)
    assert {after - before for before, after in pairwise(shown)} == {12, 13}
    assert "20 of 240 epochs are shown; all of them: --json" in text


def test_short_runs_are_shown_whole(tmp_path: Path) -> None:
    assert "--json" not in text_of(spot_tables(spots_document(long_run(tmp_path / "run", 1, epochs=20, classes=20))))


def test_by_class_shows_both_ends(tmp_path: Path) -> None:
    report = spots_document(long_run(tmp_path / "run", 1))
    text = text_of([spot_tables(report, top=2)[2]])
    names = [line.split()[0] for line in text.splitlines() if "name_" in line]
    assert names == ["name_99", "name_98", "name_01", "name_00"]
    for part in ("⋮", "4 of 100 classes are shown; all of them: --json", "+5.0", "−5.0"):
        assert part in text
    assert len(spot_tables(report, top=0)) == 2


def test_classes_never_seen_are_not_ranked(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", TWO_EPOCHS, classes=["apple", "bear", "cat", "dog"])
    rows = text_of([spot_tables(spots_document(run))[2]]).splitlines()[3:6]
    assert [row.split()[0] for row in rows] == ["apple", "bear", "cat"]


def test_evaluation_shows_best_and_worst() -> None:
    text = text_of(evaluation_tables(EVALUATION))
    for figure in ("10 000", "41.23", "70.10", "2.203", "0.084 M", "12.5 M"):
        assert figure in text
    names = [line.split()[1] for line in text.splitlines() if "name_" in line]
    assert names == [f"name_{label:02d}" for label in (*range(99, 89, -1), *range(9, -1, -1))]


def test_evaluation_of_few_classes_shows_all() -> None:
    rows = [{"name": f"name_{label:02d}", "images": 4, "top1": 4.0 * label} for label in range(25)]
    rows[3] |= {"images": 0, "top1": None}
    text = text_of(evaluation_tables(sample(Evaluation, classes=rows)))
    assert text.count("name_") == 24
    assert ("1 of 25 classes have no image here" in text, "--json" in text) == (True, False)
    assert len(evaluation_tables(sample(Evaluation))) == 1


def test_summary_with_and_without_teacher() -> None:
    both = text_of([summary_table(SUMMARY)], 200)
    assert both.startswith("resnet20 → resnet8 on cifar100 (test)\n")
    row = next(line for line in both.splitlines() if line.startswith("Top-1"))
    assert row.split() == ["Top-1", "41.20", "%", "40.90", "%", "45.10", "%"]
    against = "−3.90 points top-1, 30 % of the parameters, 31 % of the MACs."
    for part in (against, "Protocol: the reported result is the last epoch;", "1 min 23 s for 3 epochs: train 93 %"):
        assert part in both
    large = SUMMARY.teacher.model_copy(update={"parameters": 300 * SUMMARY.parameters}) if SUMMARY.teacher else None
    assert ", 0.3 % of the parameters" in text_of([summary_table(SUMMARY.model_copy(update={"teacher": large}))], 200)
    alone = text_of([summary_table(SUMMARY.model_copy(update={"teacher": None}))], 200)
    assert not any(part in alone for part in ("Teacher", "against"))


def test_missing_figures_are_dashes() -> None:
    text = text_of([summary_table(sample(Summary)), plan_table(sample(Plan)), listing_table("Empty", [])])
    assert [part in text for part in (format.DASH, "none", "None")] == [True, True, False]


def test_plan_lists_what_is_trained() -> None:
    text = text_of([plan_table(PLAN)])
    assert "Trained parameters: router 772, adapters 8.45 k.\n" in text
    assert "128×16×16" in text


def test_listing_follows_the_kind_of_value() -> None:
    first = {"name": "a", "macs": 1_250_000_000, "learned": True}
    text = text_of([listing_table("Things [red]", [first, {"name": None, "rate": 5e-4, "of": ["x", "y"]}])])
    title, header, _, *rows, _ = text.splitlines()
    assert (title, header.split()) == ("Things [red]", ["Name", "MACs", "Learned", "Rate", "Of"])
    assert [" ".join(row.split()) for row in rows] == ["a 1.25 G yes – –", "– – – 0.0005 x, y"]


def test_wide_characters_and_long_names_wrap() -> None:
    sheet = Sheet("", ["Name", "Figure"], [["猫" * 40, "1.0"], ["n" * 90, "2.0"]])
    for width in (1, 2, 30, 80):
        text = text_of([sheet], width)
        assert max(cell_len(line) for line in text.splitlines()) <= max(width, 2)
    assert text_of([sheet], 80).count("n") == 90


def test_importing_the_floor_imports_no_torch() -> None:
    modules = "sakd_cli.report.spots.log, sakd_cli.report.runs.page"
    code = f"import sys, {modules}; print({{'torch', 'numpy'}} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_the_table_names_each_of_several_teachers() -> None:
    accuracies = {"one": 50.0, "two": 40.0}
    first, other = ({"network": name, "top1": top1, "sha256": name * 8} for name, top1 in accuracies.items())
    last = {"epoch": 2, "top1": 45.0}
    text = text_of([summary_table(sample(Summary, last=last, teacher=first, more_teachers=[other]))])
    assert "Student against one: −5.00 points" in text
    assert "Student against two: +5.00 points" in text
    assert "sha256 oneoneoneoneoneo, twotwotwotwotwot" in " ".join(text.split())
