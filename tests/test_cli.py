"""The command line from end to end, on a tiny set of drawn shapes: what is said, what is written, what is refused."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import typer
import yaml
from conftest import PAIR, TINY, CliRunner, Result

from sakd_cli import __version__
from sakd_cli.cli import app, console, show
from sakd_cli.config import datasets, methods, networks, routers
from sakd_cli.config.resolve import presets
from sakd_cli.engine import runtime
from sakd_cli.models.staged import StagedModel

ROOT = Path(__file__).parents[1]
CIFAR = ROOT.parent / "shared" / "data"
CLASSES = 20


def test_talk_goes_to_stderr_line_by_line_without_control_characters(pretrained: Result) -> None:
    assert [line.split()[0] for line in pretrained.err.splitlines()] == [
        "resnet8",
        "protocol:",
        "train:",
        "step",
        "epoch",
    ]
    assert not {"\r", "\x1b"} & set(pretrained.err + pretrained.out)


def test_without_a_held_out_part_the_summary_says_so(cli: CliRunner, tmp_path: Path) -> None:
    tokens = ["pretrain-teacher", "resnet8", *TINY, "--set", "data.validation=0", "--runs-dir", str(tmp_path)]
    summary = cli.sakd(*tokens, "--json").document
    assert (summary["images"], summary["best"]["selected_on"]) == (100, "test")
    assert "test set" in summary["protocol"].partition(";")[2]


@pytest.mark.parametrize(("router", "method"), [("always", "at"), ("never", "sp"), ("anti", "kd"), ("random", "sp")])
def test_every_router_leaves_the_record_it_promises(trained_cli: CliRunner, router: str, method: str) -> None:
    tokens = [*PAIR, *TINY, "--method", method, "--router", router, "--quiet", "--json"]
    set_too = {"random": ["--set", "router.rate=0.25"], "anti": ["--set", "router.recipe=published"]}
    tokens += set_too.get(router, [])
    summary = trained_cli.sakd(*tokens).document
    report = trained_cli.sakd("inspect-spots", summary["run"], "--json").document
    shares = [spot["fraction"] for spot in report["overall"]]
    expected = {"always": (1, 1), "never": (0, 0), "anti": (0, 0.1), "random": (0.1, 0.4)}[router]
    assert all(expected[0] <= share <= expected[1] for share in shares)
    assert (report["router"], report["method"], report["finished"]) == (router, method, True)
    assert (report["overall"][0]["probability"] is None) == (router != "anti")
    assert len(report["by_class"]) == CLASSES


def test_coins_are_matched_to_the_newest_adaptive_run(trained_cli: CliRunner, distilled: dict[str, Any]) -> None:
    tokens = [*PAIR, *TINY, "--router", "random-matched", "--quiet", "--json"]
    with_default = trained_cli.sakd(*tokens).document
    named = trained_cli.sakd(*tokens, "--set", f"router.run={distilled['run']}").document
    for summary in (with_default, named):
        report = trained_cli.sakd("inspect-spots", summary["run"], "--json").document
        source = trained_cli.sakd("inspect-spots", distilled["run"], "--json").document
        for ours, theirs in zip(report["overall"], source["overall"], strict=True):
            assert ours["fraction"] == pytest.approx(theirs["fraction"], abs=0.1)


@pytest.mark.parametrize(
    "record", ["", "3\n", '{"epoch": 1, "spots": 3}\n', '{"epoch": 1, "spots": [{"fraction": null}]}\n']
)
def test_coins_cannot_be_matched_to_a_damaged_record(trained_cli: CliRunner, tmp_path: Path, record: str) -> None:
    (tmp_path / "config.yaml").write_text("task: distill\n")
    (tmp_path / "spots.jsonl").write_text(record)
    tokens = ["--router", "random-matched", "--set", f"router.run={tmp_path}", "--method", "kd"]
    trained_cli.assert_rejects([*PAIR, *TINY, *tokens], 2, "random-matched")


def test_a_network_is_scored_as_its_summary_says(trained_cli: CliRunner, teacher: Path) -> None:
    result = trained_cli.sakd("eval", str(teacher), "--json", "--quiet")
    assert result.err == ""
    scores, summary = result.document, json.loads((teacher / "summary.json").read_text())
    assert {key: scores[key] for key in ("top1", "top5", "loss")} == {
        key: summary["last"][key] for key in ("top1", "top5", "loss")
    }
    assert (scores["parameters"], scores["macs"]) == (summary["parameters"], summary["macs"])
    assert sum(row["images"] for row in scores["classes"]) == scores["images"] == 20
    assert sum(row["images"] * row["top1"] for row in scores["classes"]) == pytest.approx(20 * scores["top1"])
    table = trained_cli.sakd("eval", str(teacher)).out
    assert all(word in table for word in ("Top-1", "Top-5", "Loss", "Parameters", "MACs", "By class"))


def test_the_newest_run_is_scored_and_inspected_unless_one_is_named(trained_cli: CliRunner) -> None:
    newest = trained_cli.sakd(*PAIR, *TINY, "--method", "at", "--quiet", "--json").document["run"]
    assert trained_cli.sakd("eval", "--json").document["weights"].startswith(newest)
    assert trained_cli.sakd("inspect-spots", "--json").document["run"] == newest
    weights = f"{newest}/student/model.safetensors"
    assert trained_cli.sakd("eval", weights, "--json").document["images"] == 20, "its run's data, found beside it"


def test_the_spot_tables_show_every_spot_overall_by_epoch_and_by_class(
    trained_cli: CliRunner, distilled: dict[str, Any]
) -> None:
    result = trained_cli.sakd("inspect-spots", distilled["run"])
    assert (result.code, result.err) == (0, "")
    assert all(word in result.out for word in ("stage2", "logits", "By epoch", "By class", "fitnet", "adaptive"))
    report = trained_cli.sakd("inspect-spots", distilled["run"], "--json").document
    assert [spot["name"] for spot in report["overall"]] == ["stage2", "logits"]
    assert (report["epochs"], report["samples"], len(report["by_class"])) == (1, 90, CLASSES)


@pytest.mark.parametrize("damage", ["config.yaml", "{}"])
def test_a_damaged_run_hides_no_other(trained_cli: CliRunner, tmp_path: Path, damage: str) -> None:
    for run_directory in (trained_cli.path / "runs").iterdir():
        (tmp_path / run_directory.name).symlink_to(run_directory)
    broken = tmp_path / "broken"
    (broken / "student").mkdir(parents=True)
    (broken / "config.yaml").write_text("a: [" if damage == "config.yaml" else damage)
    result = trained_cli.sakd("inspect-spots", "--runs-dir", str(tmp_path), "--json")
    assert (result.document["schema"], result.err) == ("sakd.spots/2", "")


KINDS = {"models": networks.NETWORKS, "methods": methods.METHODS, "datasets": datasets.DATASETS}
KINDS |= {"routers": routers.ROUTERS, "presets": presets()}


@pytest.mark.parametrize("kind", KINDS)
def test_everything_that_is_registered_is_listed(cli: CliRunner, kind: str) -> None:
    assert {row["name"] for row in cli.sakd("list", kind, "--json").document["rows"]} == set(KINDS[kind])
    table = cli.sakd("list", kind)
    assert (table.code, table.err) == (0, "")
    assert all(name in table.out for name in KINDS[kind])


def test_the_origin_of_every_setting_is_shown(cli: CliRunner) -> None:
    (cli.path / "mine.yaml").write_text("train: {batch_size: 32}\nseed: 1\n")
    arguments = shlex.split("config show --preset quickstart --config mine.yaml --epochs 2 --set method.weight=1e-4")
    rows = cli.sakd(*arguments, "--origin", "--json", SAKD_SEED="3", SAKD_EPOCHS="9").document["keys"]
    found = {row["key"]: (row["value"], row["origin"]) for row in rows}
    assert found["student"] == ("resnet8", "preset quickstart")
    assert found["train.batch_size"] == (32, "file mine.yaml")
    assert found["seed"] == (3, "SAKD_SEED")
    assert found["train.epochs"] == (2, "--epochs")
    assert found["method.weight"] == (1e-4, "--set method.weight")
    assert found["device"] == ("auto", "default")
    table = cli.sakd(*arguments, "--origin", SAKD_SEED="3").out
    assert all(origin in table for _, origin in found.values())
    plain = cli.sakd(*arguments)
    document = cli.sakd(*arguments, "--json").document
    assert yaml.safe_load(plain.out) == document["config"] | {"effective": document["effective"]}


@pytest.mark.parametrize(
    "tokens",
    [
        ("pretrain-teacher", "resnet14", *TINY),
        (*PAIR, *TINY, "--method", "at"),
        ("distill", "--teacher", "resnet14", "--student", "resnet8", *TINY, "--pretrain"),
    ],
    ids=["pretrain", "distill", "with a teacher to come"],
)
def test_a_dry_run_tries_a_batch_and_writes_nothing(trained_cli: CliRunner, tokens: tuple[str, ...]) -> None:
    before = trained_cli.tree()
    plan = trained_cli.sakd(*tokens, "--dry-run", "--json").document
    assert "nothing written" in trained_cli.sakd(*tokens, "--dry-run").out
    assert trained_cli.tree() == before
    assert (plan["images"], plan["steps_per_epoch"]) == (90, 2)
    assert all(network["parameters"] > 0 < network["macs"] for network in plan["networks"])
    assert plan["batch"]["loss"] > 0
    spots = [(spot["student_shape"], spot["teacher_shape"]) for spot in plan["spots"]]
    assert spots[-1:] == ([] if tokens[0] == "pretrain-teacher" else [([CLASSES], [CLASSES])])


def test_a_teacher_is_found_by_name_run_folder_or_file(trained_cli: CliRunner, teacher: Path) -> None:
    sources = ["ResNet-8", "resnet_8", teacher, teacher / "teacher", teacher / "teacher" / "model.safetensors"]
    words = ["--student", "resnet14", *TINY, "--dry-run", "--json"]
    for source in sources:
        found = trained_cli.sakd("distill", "--teacher", str(source), *words).document["networks"][0]
        assert found["name"] == "resnet8"
        assert Path(found["path"]).is_relative_to((teacher / "teacher").resolve())


def test_a_missing_teacher_is_told_with_the_command_that_trains_it(trained_cli: CliRunner, tmp_path: Path) -> None:
    runs = ["--runs-dir", str(tmp_path / "other runs")]
    tokens = ["distill", "--teacher", "resnet-8", "--student", "resnet8", *TINY, *runs]
    result = trained_cli.assert_rejects(tokens, 2, "no finished resnet8 on shapes")
    command = result.err.splitlines()[1].removeprefix("hint: ").partition(" (or add --pretrain)")[0]
    assert shlex.split(command)[1:] == ["pretrain-teacher", "resnet8", *TINY[:2], "--set", "data.size=16", *runs]
    assert trained_cli.sakd(*shlex.split(command)[1:], *TINY[2:], "--quiet").code == 0
    assert trained_cli.sakd(*tokens, "--dry-run").code == 0


def test_a_preset_trains_its_teacher_first_and_only_once(trained_cli: CliRunner, tmp_path: Path) -> None:
    tokens = ["distill", "--preset", "quickstart", *TINY, "--runs-dir", str(tmp_path), "--quiet"]
    first = trained_cli.sakd(*tokens)
    assert (first.code, first.err) == (0, "")
    assert all(word in first.out for word in ("Teacher", "Student", "Top-1", "stage2"))
    assert trained_cli.sakd(*tokens).code == 0
    assert sorted(path.name.split("-")[2] for path in tmp_path.iterdir()) == ["distill", "distill", "pretrain"]


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt(), 130), (RuntimeError("oh [b]no[/b]"), 1)])
def test_an_interrupt_and_a_bug_have_exit_codes_of_their_own(
    cli: CliRunner, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int
) -> None:
    monkeypatch.setattr(show, "_rows", mock.Mock(side_effect=error))
    result = cli.sakd("list", "methods")
    assert (result.code, result.out) == (code, "")
    assert ("Traceback" in result.err) == (code == 1)
    assert "error: " + ("interrupted" if code == 130 else "internal error: RuntimeError: oh [b]no[/b]") in result.err


def test_without_a_command_the_help_is_shown_and_nothing_is_called_an_error(cli: CliRunner) -> None:
    for arguments in ([], ["config"]):
        result = cli.sakd(*arguments)
        assert "Usage: sakd" in result.out
        assert result.err == ""


@pytest.mark.parametrize(
    "command", ["pretrain-teacher", "distill", "sweep", "eval", "inspect-spots", "list", "config show", "show method"]
)
def test_every_help_has_two_examples(cli: CliRunner, command: str) -> None:
    result = cli.sakd(*command.split(), "--help", COLUMNS="120")
    assert (result.code, result.err) == (0, "")
    assert result.out.partition("Examples:")[2].count(f"sakd {command}") == 2


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("FitNet", "sakd show method FitNet"),
        ("adaptive", "sakd show router adaptive"),
        ("train.lr", "sakd show key train.lr"),
        ("eval", "sakd show schema eval"),
        ("my.py:Hard", "sakd show method|router my.py:Hard"),
        ("nothing-of-the-kind", "sakd show --help"),
    ],
)
def test_what_is_shown_without_its_kind_is_told(capsys: pytest.CaptureFixture[str], name: str, hint: str) -> None:
    assert app.run(["show", name]) == 2
    assert capsys.readouterr().err == f"error: No such command '{name}'.\nhint: {hint}\n"


def test_a_long_message_loses_whole_words_of_its_middle() -> None:
    words = [f"word{k}" for k in range(60)]
    shown = console.clean(" ".join(words))
    assert len(shown) <= console.LONGEST
    assert {*shown.split()} <= {*words, "..."}
    assert shown.startswith("word0 word1 ")
    assert shown.endswith(" word59")
    assert len(console.clean("x" * 500)) == console.LONGEST, "one word is cut"


@pytest.mark.parametrize("width", ["60", "80", "120"])
def test_no_help_is_cut(width: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", width)
    group: Any = typer.main.get_command(app.app)
    groups = {name: {*found.commands} for name, found in group.commands.items() if hasattr(found, "commands")}
    commands = [[], *([name] for name in group.commands), *([name, one] for name in groups for one in groups[name])]
    assert len(commands) > 20
    for command in commands:
        assert app.run([*command, "--help"]) == 0
        shown = capsys.readouterr().out
        assert "Usage: sakd" in shown
        assert "…" not in shown, command
        assert max(map(len, shown.splitlines())) <= int(width)


def test_colour_is_used_where_it_is_forced_and_not_where_it_is_unwanted(cli: CliRunner) -> None:
    assert "\x1b[" in cli.sakd("distill", "--epochs", "ten", FORCE_COLOR="1").err
    assert "\x1b[" not in cli.sakd("list", "methods", NO_COLOR="1").out


LIGHT = """
import json, sys
from sakd_cli.cli.app import run
for tokens in json.loads(sys.argv[1]):
    code = run(tokens)
    allowed = {"safetensors", "numpy"} if tokens[:1] == ["inspect-spots"] else set()
    heavy = {"torch", "torchvision", "safetensors", "numpy"} & set(sys.modules) - allowed
    if code or heavy:
        sys.exit(f"{tokens}: exit code {code}, loads {sorted(heavy)}")
"""


def process(cli: CliRunner, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("SAKD_")}
    clean |= {"PYTHONPATH": str(ROOT)} | environment
    return subprocess.run([sys.executable, *arguments], cwd=cli.path, env=clean, capture_output=True, text=True)


def test_help_lists_and_reports_do_without_torch(trained_cli: CliRunner, distilled: dict[str, Any]) -> None:
    lines = ["--help", "--version", "distill --help", "list models", "list presets"]
    lines += ["config show --preset quickstart --origin", f"inspect-spots {distilled['run']}", "inspect-spots --json"]
    lines += [f"inspect-spots {distilled['run']} --plot all.svg --html page.html --samples all.csv -q"]
    done = process(trained_cli, "-c", LIGHT, json.dumps([line.split() for line in lines]))
    assert (done.returncode, done.stderr) == (0, "")


def test_completion_knows_the_names_and_does_without_torch(cli: CliRunner) -> None:
    program = LIGHT.replace("    if code or heavy", "    if heavy")
    tokens = {"COMP_WORDS": "sakd distill --method fi", "COMP_CWORD": "3", "_SAKD_COMPLETE": "complete_bash"}
    done = process(cli, "-c", program, "[[]]", **tokens)
    assert (done.stdout.split(), done.stderr) == (["fitnet"], "")


SHORT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA"),
    RuntimeError("can't allocate memory: you tried"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
]


@pytest.mark.parametrize("refusal", SHORT_OF_MEMORY, ids=str)
def test_too_little_memory_names_a_batch_size_that_fits(trained_cli: CliRunner, refusal: Exception) -> None:
    with mock.patch("sakd_cli.tasks.distill.DistillTask.forward", side_effect=refusal):
        result = trained_cli.sakd(*PAIR, *TINY, "--batch-size", "96", "-q")
    assert (result.code, result.out) == (6, "")
    error, hint = result.err.splitlines()
    assert error == "error: out of memory with batches of 96 images"
    assert hint.startswith("hint: --batch-size 48 should fit")


@pytest.mark.parametrize("refusal", SHORT_OF_MEMORY, ids=str)
def test_too_little_memory_in_an_evaluation_is_told(trained_cli: CliRunner, refusal: Exception) -> None:
    forward = StagedModel.forward

    def short(network: StagedModel, images: torch.Tensor) -> torch.Tensor:
        if torch.is_inference_mode_enabled():
            raise refusal
        return forward(network, images)

    with mock.patch.object(StagedModel, "forward", short):
        result = trained_cli.sakd(*PAIR, *TINY, "-q")
    assert (result.code, result.out) == (6, "")
    error, hint = result.err.splitlines()
    assert re.fullmatch(r"error: out of memory with batches of \d+ images", error)
    assert re.fullmatch(r"hint: sakd eval --batch-size \d+ should fit; .*", hint)


NOT_DETERMINISTIC = {
    "adaptive_avg_pool2d_backward_cuda does not have a deterministic implementation, but": "adaptive_avg_pool2d_back",
    "Deterministic behavior was enabled ... you must set an environment variable: CUBLAS_WORKSPACE_CONFIG": "CUBLAS_W",
}


@pytest.mark.parametrize("said", NOT_DETERMINISTIC)
def test_what_cannot_be_deterministic_costs_one_line(trained_cli: CliRunner, said: str) -> None:
    """CUDA's words; torch looks at the variable once in a process, so it is set before anything is computed."""
    with mock.patch("sakd_cli.tasks.distill.DistillTask.forward", side_effect=RuntimeError(said)):
        result = trained_cli.sakd(*PAIR, *TINY, "-q")
    assert result.code == 2
    assert result.err.startswith(f"error: --deterministic: {NOT_DETERMINISTIC[said]}")
    assert len(result.err.splitlines()) == 2
    assert runtime  # when it is imported
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


def test_a_missing_compiler_costs_one_line(trained_cli: CliRunner) -> None:
    with mock.patch.dict(os.environ, {"CXX": "/nowhere/g++"}):
        trained_cli.assert_rejects(
            [*PAIR, *TINY, "--compile", "-q"], 2, "--compile: no C++ compiler '/nowhere/g++' here"
        )


def test_the_module_is_the_command_and_leaves_with_its_exit_code(cli: CliRunner) -> None:
    done = process(cli, "-m", "sakd_cli", "--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"sakd {__version__}\n", "")
    failed = process(
        cli, "-m", "sakd_cli", "distill", "--method", "atx", "--teacher", "resnet8", "--student", "resnet8"
    )
    assert (failed.returncode, failed.stdout) == (2, "")
    assert failed.stderr.startswith("error: method: unknown method 'atx'")


@pytest.mark.skipif(
    not (CIFAR / "cifar-100-python" / "train").is_file(), reason="no CIFAR-100 files beside the checkout"
)
def test_photographs_take_the_same_way(tmp_path: Path) -> None:
    cli = CliRunner(tmp_path)
    tokens = ["distill", "--teacher", "resnet8", "--student", "resnet8", "--pretrain", "--dry-run", "--json"]
    settings = ["--data-root", str(CIFAR), "--set", "data.limit=300", "--set", "data.download=false"]
    plan = cli.sakd(*tokens, *settings).document
    assert (plan["images"], plan["spots"][-1]["student_shape"]) == (270, [100])
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_drawn_images_do_not_read_is_told(trained_cli: CliRunner) -> None:
    """Photos were meant, and `--dataset imagefolder` was forgotten."""
    result = trained_cli.sakd(*PAIR, *TINY, "--data-root", "photos", "--dry-run")
    assert result.code == 0
    assert "data.root: shapes is drawn and reads no folder (--dataset imagefolder does)" in result.out
    assert "shapes is drawn" not in trained_cli.sakd(*PAIR, *TINY, "--dry-run").out
