"""`sakd bench`: what it writes, what it refuses, and when it calls something slower. No time is judged here."""

import copy
import io
import json
import shlex
import threading
from pathlib import Path
from typing import Any

import pytest
from conftest import CliRunner
from rich.console import Console

from sakd_cli.bench import scaling
from sakd_cli.bench.measure import Times, comparison, reported
from sakd_cli.bench.steps import Setup, Step
from sakd_cli.config.resolve import ConfigSource, resolve
from sakd_cli.documents.bench import Bench, ReportedRatio, TimedRatio
from sakd_cli.engine import graphs
from sakd_cli.report.bench import bench_tables

SMALL = shlex.split(
    "bench --teacher resnet8 --student resnet8 --batch-size 4 --rounds 1 --quiet --set runtime.look_ahead=2"
)
PEER = """
def step(fields):
    print("something that must not reach stdout")
    assert (fields["teacher"], fields["batch"], fields["device"]) == ("resnet8", 4, "cpu")
    return lambda: sum(range(1000))
"""
NAMES = ["plain", "kd", "always", "balanced", "adaptive", "literal", "peer"]
STEP = {"name", "about", "ms", "ms_low", "ms_high", "images_per_second", "gflop", "gflop_per_second", "operations"}
STEP |= {"synchronisations", "saved_bytes", "peak_bytes"}


@pytest.fixture(scope="module")
def found(cli: CliRunner) -> dict[str, Any]:
    (cli.path / "theirs").mkdir()
    (cli.path / "theirs" / "sakd_peer.py").write_text(PEER)
    more = ["--peer", "theirs", "--scaling", "runs", "--method", "at", "--device", "cpu", "--json"]
    return cli.sakd(*SMALL, *more).document


def test_a_teacher_that_is_a_run_is_refused_since_weights_do_not_matter(cli: CliRunner) -> None:
    cli.assert_rejects(["bench", "--teacher", "runs/A", "-q"], 2, "bench: runs/A: an architecture is timed")


def test_the_document_has_its_schema(found: dict[str, Any]) -> None:
    keys = {"schema", "environment", "setup", "steps", "ratios", "reported", "phases", "seconds_to_first_step"}
    assert set(found) == keys | {"scaling", "comparison"}
    assert found["schema"] == "sakd.bench/2"
    assert {"cpu", "cpu_flags", "cores", "threads", "load", "torch", "mode", "device"} <= set(found["environment"])
    assert found["environment"]["threads"] == 1
    assert (found["setup"]["method"], found["setup"]["batch"], found["setup"]["rounds"]) == ("at", 4, 1)
    assert [line["name"] for line in found["steps"]] == NAMES
    assert all(set(line) == STEP for line in found["steps"])
    cost = {line["name"]: line for line in found["steps"]}
    assert cost["plain"]["gflop"] < cost["kd"]["gflop"] < cost["adaptive"]["gflop"] < cost["literal"]["gflop"]
    assert (cost["always"]["synchronisations"], cost["peer"]["gflop"]) == (0, None)
    assert cost["adaptive"]["saved_bytes"] < cost["literal"]["saved_bytes"]
    assert [line["above"] for line in found["ratios"]] == [name for name in NAMES if name != "adaptive"]
    assert all(line["rounds"] == 1 for line in found["ratios"])
    phases = ["teacher pass", "student forward", "routed pass", "losses", "backward", "update", "data"]
    assert [line["name"] for line in found["phases"]] == phases
    assert sum(line["fraction"] for line in found["phases"]) == pytest.approx(1)
    assert all(line["fraction"] > 0 for line in found["phases"])
    assert [line["value"] for line in found["scaling"]["points"]] == [1, 2, 4]


def test_steps_that_run_beside_each_other_are_captured_one_after_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU: who captures a step waits for the whole device, and none may while another captures."""
    called = list[threading.Thread]()
    monkeypatch.setattr(
        scaling, "adaptive", lambda setup: Step("", "", lambda: called.append(threading.current_thread()))
    )
    setup = Setup(resolve("distill", [ConfigSource("test", {"teacher": "resnet8", "student": "resnet8"})]).config)
    scaling._at_once(setup, 2, 3)
    alone = 2 * (graphs.WARMUP + 1)
    assert set(called[:alone]) == {threading.main_thread()}
    assert len(called[alone:]) == 2 * 3


def test_the_tables_have_a_line_for_everything(found: dict[str, Any]) -> None:
    console = Console(width=120, record=True, file=io.StringIO())
    result = Bench.model_validate(found)
    for table in bench_tables(result.model_copy(update={"comparison": comparison(result, result)})):
        console.print(table)
    text = console.export_text()
    assert all(name in text for name in [*NAMES, "routed pass", "Scaling", "No regression."])


def test_a_reported_ratio_needs_quiet_rounds_on_a_quiet_machine() -> None:

    def ratio(above: str, highest: float = 2.1, busy: float = 1.1) -> TimedRatio:
        cpu = {above: [1.9, 2.0, highest], "adaptive": [1.0, 1.0, 1.0]}
        return Times(cpu, {name: [busy * one for one in of] for name, of in cpu.items()}).ratio(above, "adaptive")

    plain = [ratio("plain"), ratio("kd")]
    result = [reported([*plain, ratio("literal", highest)]) for highest in (2.1, 2.5)]
    result.append(reported([ratio("plain"), ratio("kd", busy=3.0)]))
    assert result[0] == ReportedRatio(above="literal", median=2.0, reason=None)
    assert result[1].reason == "the rounds scatter by 30 %, above 25 %"
    assert (result[2].above, result[2].median) == ("kd", None)
    assert "busy" in str(result[2].reason)


def test_slower_twice_in_a_row_is_a_regression(found: dict[str, Any]) -> None:
    first = Bench.model_validate(found)

    def times(factor: float) -> Bench:
        ratios = [ratio.model_copy(update={"median": factor * ratio.median}) for ratio in first.ratios]
        return first.model_copy(update={"ratios": ratios})

    slower = times(0.8)
    change = comparison(first, slower)
    assert all(ratio.slow for ratio in change.ratios)
    assert not change.regressed
    slower = slower.model_copy(update={"comparison": change})
    assert comparison(slower, slower).regressed, "compared with what was recorded first, not with the slow one"
    assert not comparison(slower, first).regressed
    assert not any(ratio.slow for ratio in comparison(first, times(0.9)).ratios)
    dearer = copy.deepcopy(found)
    dearer["steps"][3]["synchronisations"] += 1
    change = comparison(first, Bench.model_validate(dearer))
    assert change.regressed, "counters are exact"
    assert [one.counter for one in change.risen] == ["synchronisations"]


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ("--scaling bacth", "unknown axis 'bacth'"),
        ("--scaling bank", "method fitnet keeps no bank"),
        ("--scaling spots", "method fitnet has spots of a fixed number"),
        ("--teacher resnet9", "resnet9"),
        ("--peer nowhere", "--peer nowhere: no such folder"),
        ("--peer . --peer-entry step", "must be module:function"),
        ("--peer . --peer-entry no_such_module_of_ours:step", "does not load (ModuleNotFoundError"),
        ("--compare nothing.json", "nothing.json: missing or damaged"),
        ("--compare text.json", "text.json: missing or damaged"),
        ("--compare other.json", "other.json: missing or damaged"),
        ("--compare strange.json", "strange.json: missing or damaged"),
        ("--compare elsewhere.json", "another machine or mode (differs in cpu)"),
        ("--compare known.json --method sp", "another setup (differs in method)"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(
    cli: CliRunner, found: dict[str, Any], fields: str, text: str
) -> None:
    elsewhere = found["environment"] | {"cpu": "another"}
    known = found | {"environment": found["environment"], "setup": found["setup"] | {"method": "fitnet"}}
    documents = {"other": [], "strange": {"schema": "sakd.bench/2"}, "elsewhere": found | {"environment": elsewhere}}
    for name, document in (documents | {"known": known}).items():
        (cli.path / f"{name}.json").write_text(json.dumps(document))
    (cli.path / "text.json").write_text("text")
    cli.assert_rejects([*SMALL, "--device", "cpu", *fields.split()], 2, text)


def test_a_peer_that_breaks_is_told(cli: CliRunner, tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("def step(fields):\n    raise KeyError('model')\n")
    fields = [*SMALL, "--peer", str(tmp_path), "--peer-entry", "broken:step"]
    result = cli.assert_rejects(fields, 2, "broken:step does not load (KeyError: 'model')")
    assert "gives a callable" in result.err
