"""A run and its controls: one budget, one teacher, one comparison; what is finished is skipped, the rest is resumed."""

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import PAIR, TINY, CliRunner
from sample_documents import sample

from sakd_cli.config.resolve import flat
from sakd_cli.config.routers import ROUTERS
from sakd_cli.documents.base import Answer
from sakd_cli.documents.table import DOCUMENTS, Comparison, Report
from sakd_cli.report.runs.beside import _in_words, helped
from sakd_cli.rundir import RunDir

WORDS = [*PAIR, *TINY, "--method", "kd", "--quiet"]


def words_of(run: str, cli: CliRunner) -> dict[str, Any]:
    settings = yaml.safe_load((cli.path / run / "config.yaml").read_text())
    return flat({key: value for key, value in settings.items() if key != "effective"})


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return ["--runs-dir", str(tmp_path_factory.mktemp("twins") / "runs")]


@pytest.fixture(scope="module")
def named(trained_cli: CliRunner, teacher: Path) -> list[str]:
    return [WORDS[0], "--teacher", str(teacher), *WORDS[3:]]


@pytest.fixture(scope="module")
def controlled(trained_cli: CliRunner, named: list[str], runs: list[str]) -> dict[str, Any]:
    """What two seeds of a run and its controls print."""
    result = trained_cli.sakd(*named, *runs, "--with-control", "--seeds", "2", "--json")
    assert not [line for line in result.err.splitlines() if "is chance for" not in line]
    return result.document


def test_twins_differ_in_router_and_seed_only(trained_cli: CliRunner, controlled: dict[str, Any]) -> None:
    Comparison.model_validate(controlled)
    rows = [(row["router"], row["seed"]) for row in controlled["runs"]]
    controls = ("adaptive", "random-matched", "always", "always", "never")
    assert rows == [(router, seed) for seed in (0, 1) for router in controls]
    arguments = [words_of(row["run"], trained_cli) for row in controlled["runs"]]
    differing = {key for one in arguments for key in one | arguments[0] if one.get(key) != arguments[0].get(key)}
    assert {key for key in differing if not key.startswith("router.")} == {"seed", "method.balance"}
    assert all(len(group["seeds"]) == 2 for group in controlled["groups"])
    assert [answer["question"] for answer in controlled["answers"]] == ["help", "dose", "where"]


def test_a_twin_is_the_run_that_one_would_start_by_hand(
    trained_cli: CliRunner, named: list[str], controlled: dict[str, Any], tmp_path: Path
) -> None:
    other = next(row for row in controlled["runs"] if (row["router"], row["seed"]) == ("always", 1))
    arguments = [*named, "--router", "always", "--seed", "1", "--run-dir", str(tmp_path / "by hand")]
    assert trained_cli.sakd(*arguments).code == 0
    both = [path / "student" / "model.safetensors" for path in (trained_cli.path / other["run"], tmp_path / "by hand")]
    assert both[0].read_bytes() == both[1].read_bytes()


def test_a_resumed_series_leaves_alone_what_is_finished_and_makes_what_is_missing(
    trained_cli: CliRunner, named: list[str], runs: list[str], controlled: dict[str, Any]
) -> None:
    whole = [row["run"] for row in controlled["runs"]]
    stopped, missing = Path(whole[1]), Path(whole[2])
    weights = (missing / "student" / "model.safetensors").read_bytes()
    summary = json.loads((stopped / "summary.json").read_text())
    (stopped / "summary.json").unlink()
    shutil.rmtree(missing)
    untouched = {
        run: (Path(run) / "summary.json").stat().st_mtime_ns for run in whole if Path(run) not in (stopped, missing)
    }
    arguments = [*named, *runs, "--with-control", "--seeds", "2", "--resume", "auto", "--json"]
    again = trained_cli.sakd(*arguments).document
    assert [row["run"] == old for row, old in zip(again["runs"], whole, strict=True)] == [k != 2 for k in range(10)]
    assert untouched == {run: (Path(run) / "summary.json").stat().st_mtime_ns for run in untouched}
    assert json.loads((stopped / "summary.json").read_text())["last"] == summary["last"]
    assert (Path(again["runs"][2]["run"]) / "student" / "model.safetensors").read_bytes() == weights
    assert again["groups"] == controlled["groups"]


def test_a_series_goes_on_with_the_teacher_it_began_with(
    trained_cli: CliRunner, runs: list[str], controlled: dict[str, Any], teacher: Path
) -> None:
    """And so does a single run: `--resume auto` by the name of an architecture that has a newer run now."""
    folder = Path(runs[1])
    older = folder / "20200101-000000-pretrain-older"
    shutil.copytree(teacher, older)
    arguments = [*PAIR, *TINY, *runs, "--method", "at", "--quiet", "--json"]
    first = trained_cli.sakd(*arguments).document
    assert first["teacher"]["path"].startswith(str(older))
    (Path(first["run"]) / "summary.json").unlink()
    shutil.copytree(teacher, folder / "20300101-000000-pretrain-newer")
    again = trained_cli.sakd(*arguments, "--resume", "auto").document
    assert (again["run"], again["teacher"]["path"]) == (first["run"], first["teacher"]["path"])
    named = [*arguments, "--teacher-weights", str(teacher), "--resume", "auto"]  # by its run, not by the file in it
    assert trained_cli.sakd(*named).document["run"] == trained_cli.sakd(*named).document["run"] != first["run"]


def test_all_routers_are_one_word_and_coins_are_matched_within_a_seed(
    trained_cli: CliRunner, named: list[str], tmp_path: Path
) -> None:
    arguments = [*named, "--runs-dir", str(tmp_path)]
    document = trained_cli.sakd(*arguments, "--routers", "random-matched,adaptive", "--seeds", "2", "--json").document
    rows = document["runs"]
    assert [(row["router"], row["seed"]) for row in rows] == [
        (r, s) for s in (0, 1) for r in ("adaptive", "random-matched")
    ]
    for adaptive, matched in ((rows[0], rows[1]), (rows[2], rows[3])):
        assert words_of(matched["run"], trained_cli)["router.run"] == str(Path(adaptive["run"]).resolve())
    before = trained_cli.tree()
    table = trained_cli.sakd(*arguments, "--routers", "random-matched,adaptive", "--seeds", "2", "--resume", "auto").out
    assert trained_cli.tree() == before
    assert all(text in table for text in ("kd random-matched", "±", "Runs"))
    plan = trained_cli.sakd(*arguments, "--routers", "all", "--dry-run", "--json").document
    assert plan["schema"] == "sakd.plan/2"
    loud = [word for word in arguments if word != "--quiet"]
    tried = trained_cli.sakd(*loud, "--routers", "never,always", "--seeds", "2", "--dry-run", "--json")
    assert tried.document["trainable"]["router"] == 0, "which only a learned router has"
    assert "runs of the series: 4; the first is tried" in tried.err


MISTAKES = {
    "it goes with neither --router nor": ["--routers", "all", "--router", "always"],
    "nor --with-control": ["--routers", "all", "--with-control"],
    "unknown router 'allways'; did you mean 'always'?": ["--routers", "never,allways"],
    "matches the rates of adaptive, or of another that selects": ["--routers", "always,random-matched"],
    "a series makes several": ["--with-control", "--run-dir", "one"],
    "a series needs --resume auto": ["--seeds", "2", "--resume", "RUN"],
    "--parallel runs a series at once": ["--parallel", "--seeds", "1"],
    "--baseline 'kd wsld': no group of this series": ["--with-control", "--baseline", "kd wsld"],
    "--baseline 'balanced': no group of this series": ["--routers", "always,never", "--baseline", "balanced"],
    "--baseline 'kd': is every group of this series": ["--with-control", "--baseline", "kd"],
    "--baseline is for what a series compares": ["--baseline", "always"],
    "teacher: missing": ["--resume", "auto", "--with-control", "ALONE"],
}


@pytest.mark.parametrize("text", MISTAKES)
def test_options_that_do_not_go_together_are_told_before_anything_is_trained(
    trained_cli: CliRunner, named: list[str], distilled: dict[str, Any], text: str
) -> None:
    options = [distilled["run"] if word == "RUN" else word for word in MISTAKES[text]]
    arguments = ["distill"] if "ALONE" in options else ["distill"] if distilled["run"] in options else named
    trained_cli.assert_rejects([*arguments, *(word for word in options if word != "ALONE")], 2, text)


def test_every_router_has_a_place_in_the_series(trained_cli: CliRunner, named: list[str]) -> None:
    from sakd_cli.config.training import DistillConfig
    from sakd_cli.sweep.series import series

    config = DistillConfig(teacher="resnet8", student="resnet8")
    options = {"routers": "all", "router": None, "with_control": False, "seeds": 2, "run_dir": None}
    members = series(config, options | {"overwrite": False, "resume": None, "parallel": False})
    names = [member.router.name for member in members]
    assert (set(names), names[0], names[-1]) == (set(ROUTERS), "adaptive", "random-matched")
    assert [member.seed for member in members] == [0] * len(ROUTERS) + [1] * len(ROUTERS)


def test_the_figures_of_a_run_go_to_tensorboard_too(trained_cli: CliRunner, named: list[str], tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    summary = trained_cli.sakd(*named, "--run-dir", str(tmp_path / "run"), "--log", "tensorboard", "--json").document
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    tags = set(events.Tags()["scalars"])
    assert tags >= {"train/loss", "train/lr", "train/router", "eval/top1", "spots/logits/fraction"}
    [point] = events.Scalars("eval/top1")
    record = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()][-1]
    assert (point.step, point.value) == (summary["epochs"], pytest.approx(record["top1"]))
    trained_cli.assert_rejects([*named, "--log", "wandboard"], 2, "log.0: ")


@pytest.mark.parametrize("name", sorted(DOCUMENTS))
def test_the_schema_of_a_document_is_printed(cli: CliRunner, name: str) -> None:
    schema = cli.sakd("show", "schema", name, "--json").document
    assert schema["additionalProperties"] is False
    assert yaml.safe_load(cli.sakd("show", "schema", name).out) == schema
    cli.assert_rejects(["show", "schema", "evil"], 2, "did you mean 'eval'?")


def test_the_whole_of_a_run_is_one_page_that_needs_nothing_else(
    trained_cli: CliRunner, distilled: dict[str, Any], teacher: Path, tmp_path: Path
) -> None:
    out = tmp_path / "page.html"
    document = trained_cli.sakd("report", distilled["run"], "--out", str(out), "--json").document
    Report.model_validate(document)
    assert document["written"] == [str(tmp_path / name) for name in ("page.html", "page-curves.png", "page-spots.png")]
    page = out.read_text(encoding="utf-8")
    for title in document["sections"]:
        assert f"<h2>{title}</h2>" in page
    assert {"Result", "Curves", "In training", "Environment", "Settings"} <= set(document["sections"])
    assert not re.search(r"(?:src|href)=\"(?!data:|#)", page), "nothing is fetched"
    assert (tmp_path / "page-curves.png").read_bytes().startswith(b"\x89PNG")
    assert "router.teacher_bias" in page
    alone = trained_cli.sakd("report", str(teacher), "--json").document
    assert alone["written"][0] == str(teacher / "report.html")
    assert alone["sections"] == ["Result", "Curves", "Environment", "Settings"]
    for name in alone["written"]:
        Path(name).unlink()


def test_each_verdict_says_how_many_seeds_it_would_need() -> None:
    known = {"seeds": [0, 1, 2], "difference": -0.5, "low": -2.0, "high": 1.0, "p": 0.3, "holm": 0.3, "needed": 904}
    said, advice = _in_words(sample(Answer, known | {"question": "where", "verdict": "not shown", "effect": -0.8}))
    assert said == (
        "Cannot be told from chance: 0.50 points worse than distilling as often, but at random "
        "(95 % interval −2.00 to +1.00; 3 seeds, 904 to see 0.5 points)."
    )
    assert advice == ""


def test_a_page_of_a_run_that_has_only_begun_and_one_without_matplotlib(
    trained_cli: CliRunner, distilled: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.yaml").write_text('task: distill\nstudent: "<b>resnet8"\n')
    sections = trained_cli.sakd("report", str(tmp_path), "--json").document["sections"]
    assert sections == ["Settings"]
    assert "&lt;b&gt;resnet8" in (page := (tmp_path / "report.html").read_text())
    assert "Not known: the run is not finished." in page
    assert f"<code>--resume {tmp_path}</code>" in page
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    out = str(tmp_path / "plain.html")
    result = trained_cli.sakd("report", distilled["run"], "--out", out, "--json")
    assert "matplotlib, which is not installed" in result.err
    assert result.document["written"] == [out]
    trained_cli.assert_rejects(["report", distilled["run"], "--out", "page.pdf"], 2, "ends in .html")
    trained_cli.assert_rejects(["compare", distilled["run"], "--plot", "x.png"], 2, "matplotlib")


def test_a_page_says_what_the_runs_beside_it_found(
    trained_cli: CliRunner, controlled: dict[str, Any], tmp_path: Path
) -> None:
    run = trained_cli.path / controlled["runs"][0]["run"]
    texts = {answer["question"]: answer["text"] for answer in controlled["answers"]}
    verdict, table = helped(RunDir(run))
    assert verdict.startswith("Cannot be told from "), "two seeds at most, of tiny networks"
    assert "distilling as often, but at random" in verdict
    assert "where" in texts
    assert table is not None
    assert [row[0] for row in table.rows][:3] == ["this run, `adaptive`", "teacher", "student alone"]
    own = table.rows[table.own or 0]
    mean = controlled["groups"][controlled["runs"][0]["group"]]["top1"]["mean"]
    assert (own[1].split()[0], own[2]) == (f"{mean:.2f}", "–")
    assert trained_cli.sakd("inspect-spots", str(run), "--html", str(tmp_path / "spots.html"), "-q").code == 0
    first = (tmp_path / "spots.html").read_text().partition("<nav>")[0]
    said = verdict.replace("`--seeds 3`", "<code>--seeds 3</code>")
    assert said in first.replace("&nbsp;", " ")
    assert "--with-control" not in first
    alone = trained_cli.path / controlled["runs"][4]["run"]
    assert helped(RunDir(alone))[0] == "", "nothing was routed there"
    log = alone / "metrics.jsonl"
    whole = log.read_bytes()
    log.write_bytes(whole.partition(b"\n")[2])
    try:
        verdict, table = helped(RunDir(run))
    finally:
        log.write_bytes(whole)
    assert verdict.startswith("Not compared with the runs beside it: "), "and not: it has no controls"
    assert (str(log) in verdict, table) == (True, None)


def test_curves_of_a_comparison_are_drawn(trained_cli: CliRunner, controlled: dict[str, Any], tmp_path: Path) -> None:
    runs = [row["run"] for row in controlled["runs"] if Path(row["run"]).exists()]
    for name in ("curves.png", "curves.svg"):
        assert f"written: {tmp_path / name}\n" in trained_cli.sakd("compare", *runs, "--plot", str(tmp_path / name)).err
        assert (tmp_path / name).stat().st_size > 5000
    trained_cli.assert_rejects(["compare", *runs, "--plot", "curves.gif"], 2, ".png")


def test_controls_that_are_there_are_named_and_taken_for_another_method(
    trained_cli: CliRunner, named: list[str], runs: list[str], controlled: dict[str, Any]
) -> None:
    """`never` for every method, without a word; `always` is another run under another loss."""
    arguments = [word for word in [*named, *runs, "--routers", "always,never", "--json"] if word != "--quiet"]
    arguments[arguments.index("--method") + 1] = "at"
    never = [row["run"] for row in controlled["runs"] if row["router"] == "never"]

    def of(document: dict[str, Any], router: str) -> list[str]:
        return [row["run"] for row in document["runs"] if row["router"] == router]

    first = trained_cli.sakd(*arguments, "--seeds", "2")
    assert of(first.document, "never") == never
    assert [group["label"] for group in first.document["groups"]] == ["at always", "never"]
    [line] = [line for line in first.err.splitlines() if line.startswith("not trained again")]
    assert [f"never, seed {seed} ({Path(run).name})" in line for seed, run in enumerate(never)] == [True, True]
    assert "always" not in line
    counted = [line for line in first.err.splitlines() if line.startswith("run ")]
    assert counted == ["run 3 of 4: always, seed 0", "run 4 of 4: always, seed 1"]
    again = trained_cli.sakd(*arguments, "--seeds", "2")
    assert again.document["runs"] == first.document["runs"], "with another router beside them they are controls"
    itself = [*arguments[: arguments.index("--routers")], "--router", "never", "--seeds", "2", "--json"]
    document = trained_cli.sakd(*itself).document
    assert not {*of(document, "never")} & {*never}, "what is no control is trained as it was asked for"
