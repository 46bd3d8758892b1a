"""`sakd watch`: a run that goes on, one that is finished, one that was stopped, and what is no run."""

import io
import json
import threading
from pathlib import Path
from typing import Any

import pytest
from conftest import CliRunner
from rich.console import Console
from test_compare import make
from test_report import epoch, spot

from sakd_cli.cli import watch

RECORDS = [epoch(n, 90, spot("stage2", 0.25 * n, [0.5]), spot("logits", 0.5, [0.5])) for n in (1, 2, 3)]


@pytest.fixture
def going(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A run that a thread works on: it has two epochs, then comes to a third one, and leaves."""
    monkeypatch.setattr(watch, "INTERVAL", 0.01)
    (tmp_path / "runs").mkdir()
    run = make(tmp_path / "runs", "adaptive", 0, None)
    (run.path / "spots.jsonl").write_text("".join(json.dumps(one) + "\n" for one in RECORDS[:2]))
    begun, seen, over = threading.Event(), threading.Event(), threading.Event()

    def work() -> None:
        with run.locked():
            begun.set()
            seen.wait(20)
            for name, line in (("spots.jsonl", RECORDS[2]), ("metrics.jsonl", THIRD)):
                with (run.path / name).open("a") as file:
                    file.write(json.dumps(line) + "\n")
            over.wait(20)

    thread = threading.Thread(target=work)
    thread.start()
    begun.wait(20)
    yield run, seen, over
    seen.set()
    over.set()
    thread.join()


THIRD = {"kind": "eval", "epoch": 3, "split": "validation", "top1": 33.25, "top5": 50.0, "loss": 3.0}


class Heard(io.StringIO):
    """Sets `event` when `text` has been written."""

    def __init__(self, waits: list[tuple[str, threading.Event]]) -> None:
        super().__init__()
        self.waits = waits

    def write(self, text: str) -> int:
        length = super().write(text)
        while self.waits and self.waits[0][0] in self.getvalue():
            self.waits.pop(0)[1].set()
        return length


@pytest.mark.parametrize("terminal", [True, False])
def test_a_run_is_followed_to_its_end(going: Any, monkeypatch: pytest.MonkeyPatch, terminal: bool) -> None:
    run, seen, over = going
    file = Heard([("22.00", seen), ("33.25", over)])
    console = Console(file=file, width=100, force_terminal=terminal, color_system=None)
    monkeypatch.setattr(watch, "out", lambda: console)
    monkeypatch.setattr(watch, "show", lambda *shown: [console.print(one) for one in shown])
    watch.watch(run=run.path, runs_dir=None)
    text = file.getvalue()
    assert over.is_set(), "what came while it watched was shown"
    assert ("2 of 2 epochs, running" in text) == terminal
    assert ("epoch 3 training loss – validation top-1 33.25 %" in " ".join(text.split())) == (not terminal)
    assert "3 of 2 epochs, stopped; --resume RUN resumes it" in text
    assert "75.0" in text.rpartition("Samples distilled")[2], "the spots of the third epoch"


def test_a_finished_run_and_what_is_none(cli: CliRunner, tmp_path: Path) -> None:
    finished, begun = make(tmp_path, "always", 0, 40.0), make(tmp_path, "never", 0, None)
    result = cli.sakd("watch", str(finished.path))
    assert (result.code, result.err) == (0, "")
    assert "finished" in result.out
    assert "40.00 %" in result.out
    (begun.path / "metrics.jsonl").unlink()
    assert "Nothing is logged yet." in cli.sakd("watch", str(begun.path)).out
    assert "Nothing is logged yet." in cli.sakd("watch", "--runs-dir", str(tmp_path)).out, "the newest"
    cli.assert_rejects(["watch", "--runs-dir", str(tmp_path / "none")], 2, "no run in")
    before = cli.tree()
    assert "sakd runs lists" in cli.assert_rejects(["watch", str(tmp_path)], 2, "not a run directory").err
    cli.assert_rejects(["watch", str(tmp_path / "nowhere")], 2, "nowhere")
    (begun.path / "config.yaml").write_text("task: 3")
    assert cli.sakd("watch", str(begun.path)).code in (0, 2, 4)
    assert cli.tree() == before


def test_a_run_that_was_changed_is_not_shown_with_less(cli: CliRunner, tmp_path: Path) -> None:
    """Spots that cannot be read are no spots that are not there."""
    stopped = make(tmp_path, "adaptive", 0, None)
    (stopped.path / "spots.jsonl").write_text("".join(json.dumps(one) + "\n" for one in RECORDS))
    words = ["watch", str(stopped.path)]
    assert "Samples distilled" in cli.sakd(*words).out
    (stopped.path / "student").mkdir()
    (stopped.path / "student" / "model.safetensors").write_bytes(b"as where it is killed before the card is written")
    assert "Samples distilled" in cli.sakd(*words).out
    (stopped.path / "student" / "config.json").write_text("{}")
    cli.assert_rejects(words, 4, "names no classes")
