"""One's own router, loss, network and data set in a file that is named, and by entry points: used as ours are."""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from conftest import SHAPES, TINY, CliRunner
from test_plugin import packages  # noqa: F401
from wrong_files import ROUTER, WARNED, WRONG

from sakd_cli import api
from sakd_cli.cli.console import ConsoleReporter
from sakd_cli.errors import SakdError

MINE = '''
"""All four kinds."""

import torch
from torch import nn
from torch.nn import functional as F

from sakd_cli.api import Dataset, Decision, Distiller, LearnedConfig, Router, Seen
from helper import WIDTH


class Hard(Router):
    """The samples that the student finds harder than most"""

    noise_width = 1

    def __init__(self, spots: int, *, share: float = 1.0) -> None:
        super().__init__()
        self.share = share
        self.seen = nn.Buffer(torch.zeros(()))

    def decide(self, seen: Seen):
        self.seen.add_(1)
        kept = seen.noise[:, 0] < 0.9 / seen.epoch
        return kept & (seen.student_loss > self.share * seen.student_loss.mean())


class LearnedSettings(LearnedConfig):
    """Learned, from both networks' logits"""


class Learned(Router):
    settings = LearnedSettings

    def __init__(self, spots: int, classes: int, config: LearnedSettings) -> None:
        super().__init__(spots)
        self.policy = nn.Linear(2 * classes, spots)

    def decide(self, seen: Seen) -> Decision:
        gate = self.policy(torch.cat([seen.teacher_logits, seen.student_logits], dim=1)).sigmoid()
        return Decision(gate.T, gate, gate.detach().T)


class Cosine(Distiller):
    """One minus the cosine of the pooled vectors"""

    places = "pooled"

    def __init__(self, spots, *, weight: float = 2.0, power: int = 1) -> None:
        super().__init__(spots)
        self.power = power
        self.maps = nn.ModuleList([nn.Linear(s.student_shape[0], s.teacher_shape[0]) for s in spots])

    def forward(self, student, teacher, weight, batch):
        pairs = zip(self.maps, self.pairs(student, teacher), weight)
        return torch.stack([(w * (1 - F.cosine_similarity(m(s), t)) ** self.power).mean() for m, (s, t), w in pairs])


def small(num_classes):
    body = [nn.Conv2d(3, WIDTH, 3, 2, 1), nn.BatchNorm2d(WIDTH), nn.ReLU(), nn.Conv2d(WIDTH, 16, 3, 2, 1), nn.ReLU()]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, num_classes))


def stripes(train: int = 60, test: int = 40, gray: list[int] = [0, 200]):
    def draw(count):
        labels = torch.arange(count) % 2
        images = torch.tensor(gray)[torch.arange(16) % 2][None, None, None].expand(count, 3, 16, 16).clone()
        images[labels == 1] = images[labels == 1].transpose(2, 3)
        return images.to(torch.uint8), labels
    return Dataset.of(draw(train), draw(test), ["level", "upright"])
'''
PAIR = ["distill", "--teacher", "resnet8", "--student", "resnet8"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> CliRunner:
    """A folder with the file, one that it imports, and a teacher."""
    runner = CliRunner(tmp_path_factory.mktemp("own"))
    (runner.path / "my.py").write_text(MINE)
    (runner.path / "helper.py").write_text("WIDTH = 8\n")
    assert runner.sakd("pretrain-teacher", "resnet8", *TINY, "-q").code == 0
    return runner


@pytest.fixture(scope="module")
def hard(place: CliRunner) -> dict[str, Any]:
    """A run with the router of one's own."""
    settings = ["--router", "my.py:Hard", "--set", "router.share=0.9"]
    return place.sakd(*PAIR, *TINY, "--epochs", "2", *settings, "--run-dir", "hard", "--json").document  # type: ignore[no-any-return]


def test_a_router_of_a_file_is_trained_shown_and_compared(place: CliRunner, hard: dict[str, Any]) -> None:
    listed = place.sakd("list", "routers", "my.py", "--json").document["rows"]
    assert [row["name"] for row in listed if row["package"] == "my.py"] == ["my.py:Hard", "my.py:Learned"]
    assert listed[-2]["about"] == "The samples that the student finds harder than most"
    shown = place.sakd("show", "router", "my.py:Hard", "--json").document
    assert shown["defaults"] == {"dose": "published", "share": 1.0}
    assert place.sakd("show", "router", "random", "--json").document["defaults"]["rate"] == 0.5
    assert 0 < hard["spots"][0]["fraction"] < 100 if "spots" in hard else True
    spots = place.sakd("inspect-spots", "hard", "--json").document
    assert [0 < spot["fraction"] < 1 for spot in spots["overall"]] == [True, True]
    assert place.sakd("runs", "--where", "router.name=my.py:Hard", "--runs-dir", ".", "--json").document["rows"]
    assert "my.py:Hard" in place.sakd("compare", "hard").out
    card = json.loads((place.path / "hard" / "student" / "config.json").read_text())
    assert card["code"] == [f"{hashlib.sha256(MINE.encode()).hexdigest()}  my.py"]
    assert place.sakd("eval", "hard", "--json", "--set", "timing_seconds=0").document["top1"] == hard["last"]["top1"]


def test_it_resumes_bit_for_bit_inside_an_epoch(place: CliRunner, hard: dict[str, Any]) -> None:
    arguments = [*PAIR, *TINY, "--epochs", "2", "--router", "my.py:Hard", "--set", "router.share=0.9"]
    calls = [0, 0, 0, *[15] * 9]
    with mock.patch.object(ConsoleReporter, "stop", side_effect=calls):
        assert place.sakd(*arguments, "--run-dir", "stopped", "-q").code == 143
    assert place.sakd("distill", "--resume", "stopped", "-q").code == 0
    for file in ("student/model.safetensors", "checkpoints/last/training.safetensors"):
        assert (place.path / "stopped" / file).read_bytes() == (place.path / "hard" / file).read_bytes()


def test_a_changed_file_is_told_and_a_new_run_is_another(place: CliRunner, tmp_path: Path) -> None:
    shutil.copytree(place.path, tmp_path / "copy")
    here = CliRunner(tmp_path / "copy")
    arguments = [*PAIR, *TINY, "--router", "my.py:Hard", "-q", "--json"]
    first = here.sakd(*arguments).document["run"]
    (code,) = here.sakd("runs", "show", first, "--json").document["rows"][0]["settings"]["code"]
    (here.path / "my.py").write_text(MINE + "\n# changed\n")
    (here.path / first / "summary.json").unlink()
    resumed = here.sakd("distill", "--resume", first, "-q")
    assert resumed.code == 0
    assert f"warning: my.py: has changed since this run began (SHA-256 {code[:12]}" in resumed.err
    assert here.sakd(*arguments, "--resume", "auto").document["run"] != first
    (here.path / "my.py").unlink()
    assert "my.py: no such file" in here.sakd(*arguments).err


def test_a_run_of_another_asks_before_its_code_runs(place: CliRunner, hard: dict[str, Any]) -> None:
    elsewhere = {"XDG_STATE_HOME": str(place.path / "nobody")}
    for words in (["distill", "--resume", "hard"], ["eval", "hard", "--dataset", "shapes"]):
        refused = place.sakd(*words, "-q", **elsewhere)
        if words[0] == "distill":
            assert (refused.code, refused.err.count("\n")) == (2, 2), refused.err
            assert "my.py:Hard would run code that you have not named" in refused.err
            assert place.sakd(*words, "-q", **elsewhere, SAKD_FACTORIES="my.py:Hard").code == 0
        else:
            assert refused.code == 0, "the student is ours, and needs none of it"


def test_loss_network_and_data_of_a_file(place: CliRunner) -> None:
    words = ["--dataset", "my.py:stripes", "--set", "data.train=50", "--epochs", "1", "-q", "--json"]
    teacher = place.sakd("pretrain-teacher", "my.py:small", *words).document
    assert (teacher["network"], teacher["images"]) == ("my.py:small", 45)
    words += ["--method", "my.py:Cosine", "--set", "method.power=2", "--router", "my.py:Learned"]
    run = place.sakd("distill", "--teacher", teacher["run"], "--student", "my.py:small", *words).document["run"]
    scored = place.sakd("eval", run, "--json", "--set", "timing_seconds=0").document
    assert (scored["dataset"], scored["images"]) == ("my.py:stripes", 40)
    settings = place.sakd("runs", "show", run, "--json").document["rows"][0]["settings"]
    assert (settings["method"]["weight"], settings["method"]["power"], settings["data"]["train"]) == (2.0, 2, 50)
    assert "router" in json.loads((place.path / run / "metrics.jsonl").read_text().splitlines()[0])
    assert place.sakd("show", "method", "my.py:Cosine", "--json").document["spots"] == "pooled, logits"
    routed = place.sakd("inspect-spots", run, "--json").document
    assert all(spot["probability"] is not None for spot in routed["overall"])
    assert place.sakd("inspect-spots", run, "--live", "--json").code == 0


def test_data_of_a_file_is_checked_and_swept_where_it_is_named(place: CliRunner) -> None:
    assert place.sakd("data", "check", "my.py:stripes", "--json").document["parts"][0]["images"] == 60
    grid = "task: sweep\npairs: [[resnet8, resnet8]]\nmethods: [kd]\nrouters: ['my.py:Hard']\n"
    grid += "common: {data: {name: 'my.py:stripes'}}\noverrides: {'my.py:Hard': {router: {share: 0.9}}}\n"
    (place.path / "own.yaml").write_text(grid)
    assert place.sakd("sweep", "own.yaml", "--dry-run", "--measure", "0", "--json", "-q").document["runs"] > 1


def test_a_data_set_that_is_called_like_one_of_ours_may_be_pictures(place: CliRunner) -> None:
    (place.path / "cifar_mine.py").write_text(MINE)
    (place.path / "pictures/cat").mkdir(parents=True)
    (place.path / "pictures/cat/1.png").touch()
    words = ["--dataset", "cifar_mine.py:stripes", "--data-root", "pictures", "--dry-run", "-q"]
    assert place.sakd("pretrain-teacher", "resnet8", *words).code == 0


@pytest.mark.parametrize(("kind", "content", "code", "told"), WRONG, ids=[f"{w[0]}-{k}" for k, w in enumerate(WRONG)])
def test_what_is_wrong_with_a_file_is_one_line_with_its_place(
    place: CliRunner, kind: str, content: str, code: int, told: str
) -> None:
    (place.path / "bad.py").write_text(content)
    words = [*PAIR, *TINY] if kind != "dataset" else ["pretrain-teacher", "resnet8"]
    result = place.sakd(*words, f"--{kind}", "bad.py:R", "-q")
    assert (result.code, result.out) == (code, ""), result.err
    assert re.search(told, result.err), result.err
    assert [line.partition(":")[0] for line in result.err.splitlines()] in (["error"], ["error", "hint"], WARNED), (
        result
    )
    shutil.rmtree(place.path / "__pycache__", ignore_errors=True)


def test_what_own_code_prints_is_no_data(place: CliRunner) -> None:
    (place.path / "loud.py").write_text(ROUTER.format("print('noise') or seen.student_loss > 0"))
    plan = place.sakd(*PAIR, *TINY, "--router", "loud.py:R", "--dry-run", "--json", "-q")
    assert plan.document["schema"] == "sakd.plan/2"
    assert "noise" in plan.err


def test_a_file_without_a_name_and_a_key_of_a_file_say_how(place: CliRunner) -> None:
    for option, name in (("router", "Hard"), ("method", "Cosine"), ("student", "small"), ("dataset", "small")):
        told = place.sakd(*PAIR, *TINY, f"--{option}", "my.py").err
        assert f"my.py: name a {'class' if name[0].isupper() else 'function'} in it: my.py:{name}" in told
    assert "sakd show router FILE.py:CLASS" in place.sakd("show", "key", "router.quantile").err


def test_a_file_is_one_file_however_it_is_spelled(place: CliRunner, hard: dict[str, Any], tmp_path: Path) -> None:
    words = [*PAIR, *TINY, "--epochs", "2", "--set", "router.share=0.9", "--run-dir", "hard", "--resume", "auto"]
    for name in ("./my.py:Hard", f"{place.path}/my.py:Hard", f"../{place.path.name}/my.py:Hard"):
        result = place.sakd(*words, "--router", name, "-q", "--json")
        assert result.code == 0, result.err
    elsewhere = CliRunner(tmp_path)
    lost = elsewhere.sakd("distill", "--resume", str(place.path / "hard"), "-q")
    assert f"run it from {place.path}" in lost.err, lost.err


def test_comparing_own_code_does_not_call_it_a_budget(place: CliRunner, hard: dict[str, Any]) -> None:
    words = [*PAIR, *TINY, "--epochs", "2", "--router", "always", "--run-dir", "plain", "-q"]
    assert place.sakd(*words).code == 0
    document = place.sakd("compare", "hard", "plain", "--json").document
    assert [one["unequal"] for one in document["comparisons"]] == [[]]
    out = place.sakd("compare", "hard", "plain").out
    digest = hashlib.sha256(MINE.encode()).hexdigest()
    assert f"my.py ({digest[:12]})" in out
    assert digest[:20] not in out


def test_a_dry_run_tries_the_last_batch_of_an_epoch(place: CliRunner) -> None:
    (place.path / "bad.py").write_text(ROUTER.format("seen.student_loss * torch.ones(32) > 0"))
    words = [*PAIR, *TINY, "--router", "bad.py:R", "--batch-size", "32", "--dry-run"]
    result = place.sakd(*words)
    assert result.code == 2
    assert "bad.py, line 6: RuntimeError" in result.err


def test_a_router_may_write_into_what_it_is_shown(place: CliRunner) -> None:
    (place.path / "pure.py").write_text(ROUTER.format("seen.student_loss > 0"))
    spoilt = "(seen.student_loss > 0, [one.zero_() for one in seen])[0]"
    (place.path / "spoils.py").write_text(ROUTER.format(spoilt))
    words = [*PAIR, *TINY, "--json", "-q", "--seed", "3", "--router"]
    pure, spoils = (place.sakd(*words, f"{name}.py:R").document for name in ("pure", "spoils"))
    assert pure["last"] == spoils["last"]


class Failing(api.Router):
    """An object of a program"""

    def decide(self, seen: api.Seen) -> Any:
        return seen.nothing  # type: ignore[attr-defined]


def test_own_code_of_a_program_raises_our_error(place: CliRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place.path)
    words = {"teacher": "resnet8", "student": "resnet8", "method": "kd", "dataset": "shapes", "epochs": 1}
    words |= {"settings": {f"data.{key}": value for key, value in SHAPES.items()}}
    with pytest.raises(SakdError, match=r"test_own\.py, line \d+: AttributeError"):
        api.distill(router=Failing, **words)
    with pytest.raises(SakdError, match="router: give the class Failing, not an object of it"):
        api.distill(router=Failing(2), **words)


def test_settings_of_a_file_are_checked_as_ours(place: CliRunner) -> None:
    words = [*PAIR, *TINY, "--router", "my.py:Hard", "--set"]
    assert "router.share: must be a number, got 'much'" in place.sakd(*words, "router.share=much").err
    assert "unknown key 'router.shear'; did you mean 'router.share'?" in place.sakd(*words, "router.shear=1").err


def test_a_setting_of_the_same_name_is_another_ones(place: CliRunner) -> None:
    """A series changes from the file's router to ours and back; `momentum` is another setting there."""
    (place.path / "same.py").write_text(MINE.replace("share", "momentum"))
    words = ["--routers", "same.py:Hard,random-matched,adaptive", "--set", "method.weight=1", "-q", "--json"]
    rows = place.sakd(*PAIR, *TINY, *words).document["runs"]
    assert [row["router"] for row in rows] == ["adaptive", "same.py:Hard", "random-matched"]


def test_entry_points_of_all_kinds(cli: CliRunner, packages: Any, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    points = "[sakd.routers]\nhard_ones = own_four:Hard\n[sakd.datasets]\nbars = own_four:stripes\n"
    points += "[sakd.methods]\ncosine_of = own_four:Cosine\n[sakd.networks]\ntiny_one = own_four:build\n"
    packages("own_four", points, MINE.replace("from helper import WIDTH", "WIDTH = 8"))
    for kind, name in (("routers", "hard_ones"), ("datasets", "bars"), ("methods", "cosine_of")):
        row = next(row for row in cli.sakd("list", kind, "--json").document["rows"] if row["name"] == name)
        assert row["package"] == "own_four"
    words = ["--dataset", "bars", "--epochs", "1", "-q", "--json"]
    assert cli.sakd("pretrain-teacher", "resnet8", *words).code == 0
    chosen = ["--router", "hard_ones", "--method", "cosine_of", "--set", "router.share=0.9"]
    assert cli.sakd(*PAIR, *words, *chosen).document["images"] == 54
    help_of_all = cli.sakd("distill", "--help")
    assert help_of_all.code == 0
    assert os.environ is not None
