"""Residual students: their losses, the offset under any method, when the chain stops, and the ensemble as a folder."""

import copy
import json
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from conftest import PAIR, SHAPES, TINY, CliRunner
from safetensors.torch import load_file
from test_step import batches, fit, make
from torch import Tensor
from torch.nn import functional as F

from sakd_cli.config.networks import NETWORKS
from sakd_cli.config.resolve import ConfigSource, resolve
from sakd_cli.config.training import ResidualConfig
from sakd_cli.documents.evaluation import Evaluations
from sakd_cli.engine.runtime import compile_task
from sakd_cli.engine.task import Task
from sakd_cli.errors import UsageError
from sakd_cli.models import ensemble as ensembles
from sakd_cli.models.artifact import NetworkCard
from sakd_cli.models.cost import Cost, cost
from sakd_cli.models.ensemble import Ensemble, Exits, Offset
from sakd_cli.models.staged import StagedModel
from sakd_cli.models.table import create
from sakd_cli.runs.residual_chain import lighter, planned, verdict
from sakd_cli.tasks.residual import ResidualTask, Sides, centred, kl, mse, relative_energy

MORE = ["--residual-students", "1", "--set", "residual.max_cost=2", "--set", "residual.min_gain=-9"]
MORE += ["--set", "residual.architectures=resnet8", "--method", "kd", "--json", "-q"]


IMAGES = SHAPES["test"]
FACTS = {"stopped": "why", "rule": {}, "teacher": {"architecture": "resnet20", "macs": 77}}


def sides(seed: int = 0) -> Sides:
    torch.manual_seed(seed)
    teacher, base, own = 3 * torch.randn(3, 12, 7, dtype=torch.float64)
    return Sides(teacher, base, own.requires_grad_(True), partial(F.cross_entropy, target=torch.randint(7, (12,))))


def test_the_gradient_of_kl_is_the_softened_residual() -> None:
    given, tau = sides(), 4.0
    (gradient,) = torch.autograd.grad(kl(given, ResidualConfig(alpha=1.0, temperature=tau)), given.own)
    summed = given.base + given.own.detach()
    expected = tau * ((summed / tau).softmax(1) - (given.teacher / tau).softmax(1)) / 12
    assert torch.allclose(gradient, expected, atol=1e-12)


def test_the_gradient_of_mse_is_the_residual() -> None:
    given = sides()
    (gradient,) = torch.autograd.grad(mse(given, ResidualConfig()), given.own)
    missing = centred(given.teacher) - centred(given.base) - centred(given.own.detach())
    assert torch.allclose(gradient, -2 * missing / (12 * 7), atol=1e-12)


@pytest.mark.parametrize("loss", [kl, mse])
def test_a_constant_per_sample_changes_neither_loss_nor_energy(loss: Any) -> None:
    given = sides()
    moved = given._replace(teacher=given.teacher + torch.randn(12, 1), base=given.base + torch.randn(12, 1))
    values = [loss(one, ResidualConfig()).detach() for one in (given, moved)]
    assert torch.allclose(*values, rtol=1e-12)
    assert relative_energy(moved.teacher, moved.base) == pytest.approx(relative_energy(given.teacher, given.base))


def test_energy_falls_where_it_must() -> None:
    torch.manual_seed(1)
    teacher, features = torch.randn(80, 6).double(), torch.randn(80, 20).double()
    student, energies = torch.zeros(80, 6).double(), []
    for width in (2, 5, 10, 20):
        missing = centred(teacher) - centred(student)
        student = student + features[:, :width] @ torch.linalg.lstsq(features[:, :width], missing).solution
        energies.append(relative_energy(teacher, student))
    assert energies == sorted(energies, reverse=True)
    perfect = student + (centred(teacher) - centred(student))
    assert relative_energy(teacher, perfect) == pytest.approx(0, abs=1e-20)
    assert torch.equal(perfect.argmax(1), teacher.argmax(1))


def test_the_chain_stops_where_the_energy_says_so() -> None:
    fields = ResidualConfig(students=5, min_gain=0.02, energy=0.1)
    assert verdict([0.70], fields) == (False, None)
    assert verdict([0.70, 0.60], fields) == (False, None)
    drop, stopped = verdict([0.70, 0.60, 0.599], fields)
    assert drop
    assert stopped == "residual student 2 lowered the energy by 0.2 % only"
    assert verdict([0.5, 0.6], ResidualConfig()) == (True, "residual student 1 raised the energy by 20.0 %")
    assert verdict([0.70, 0.05], fields) == (False, "the energy fell below 0.1")
    assert verdict([0.70, 0.75], fields)[0]


def test_the_chain_stops_at_its_number_and_its_cost() -> None:
    teacher = Cost(0, 100_000_000)
    free = {"max_cost": 9.0}
    chain = ["resnet14", "resnet8", "resnet8"]  # ResKD spec, 2.3
    for students in (1, 2, 3):
        fields = ResidualConfig(students=students, **free)
        assert planned("resnet20", teacher, fields, 100, 32) == (chain[:students], f"{students} were asked for")
    names, why = planned("resnet20", teacher, ResidualConfig(students=3, max_cost=0.7), 100, 32)
    assert names == chain[:1]
    assert why.startswith("resnet20 + resnet14 + resnet8 would cost 80.0 % of the teacher")
    named = ResidualConfig(students=2, architectures="resnet8,vgg8", **free)
    assert planned("resnet20", teacher, named, 100, 32)[0] == ["resnet8", "vgg8"]
    alike = ResidualConfig(students=2, architectures="resnet8", **free)
    assert planned("resnet20", teacher, alike, 100, 32)[0] == ["resnet8"] * 2, "one name for all"
    with pytest.raises(ValueError, match="2 architectures are named for 1"):
        ResidualConfig(students=1, architectures=("resnet8", "resnet8"))


def test_a_lighter_network_is_of_the_family_as_long_as_that_has_one() -> None:
    assert lighter("resnet20", "resnet20", 0.7, 100, 32) == "resnet14"
    assert lighter("resnet20", "resnet20", 0.5, 100, 32) == "resnet8"
    few = {name: NETWORKS[name] for name in ("resnet8", "resnet14", "MobileNetV2_half", "vgg8")}
    with mock.patch.dict(NETWORKS, few, clear=True):
        assert lighter("resnet8", "resnet8", 0.7, 100, 32) == "MobileNetV2_half"
        assert lighter("resnet14", "resnet8", 0.7, 100, 32) == "resnet8"


def test_macs_are_counted_as_by_hand() -> None:
    assert cost(torch.nn.Conv2d(3, 8, 3, padding=1, bias=False), 10).macs == 3 * 8 * 9 * 100
    assert cost(torch.nn.Conv2d(3, 6, 3, padding=1, groups=3), 10).macs == 6 * 9 * 100
    assert cost(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(300, 7)), 10).macs == 2100
    assert round(cost(create("resnet20", 100), 32).macs / 1e6, 1) == 40.8


def double(name: str, seed: int) -> StagedModel:
    torch.manual_seed(seed)
    model = create(name, 10).double()
    with torch.no_grad():
        model.train()(torch.randn(8, 3, 32, 32, dtype=torch.float64))
    return model.requires_grad_(False).eval()


def test_a_residual_student_trained_by_kd_is_one_trained_by_kl(float64: None) -> None:
    inner = make("kd", "always", **{"method.kl_weight": 9.0})
    base = Ensemble([double("resnet8", 1)]).eval()
    inner.offset = base.forward
    fields = ResidualConfig(loss="kl", alpha=0.9)
    plain = ResidualTask(
        copy.deepcopy(inner.network),
        lambda x: inner.teacher_features.network(x),
        base.forward,
        fields,
        lr=0,
        weight_decay=0,
    )
    (batch,) = batches(inner, 1)
    one, two = inner.train()(batch), plain.train()(batch)
    assert torch.allclose(one.loss, 10 * two.loss, rtol=1e-12)
    assert torch.equal(one.logits, two.logits)
    assert torch.equal(one.logits, Offset(inner.network, base.forward)(batch.images))
    assert list(inner.network.state_dict()) == list(create("resnet8", 10).state_dict())
    for task in (inner, plain):
        assert not [name for name in task.state_dict() if not name.startswith(("network.", "router.", "distillers."))]


@pytest.mark.parametrize("method", ["kd", "fitnet"])
def test_the_offset_is_added_where_the_routed_pass_ends_in_the_students_head(method: str, float64: None) -> None:
    task, base = make(method, "adaptive").train(), Ensemble([double("resnet14", 2)]).eval()
    (batch,) = batches(task, 1)
    seen: list[Tensor] = []
    task.offset = base.forward
    teacher = task.teacher_features(batch)
    gate = torch.zeros(6, len(task.spots))
    gate[:3, -1] = 1
    heard = mock.patch("sakd_cli.tasks.distill.router_loss", side_effect=lambda routed, *_, **__: seen.append(routed))
    with heard:
        task.route(batch, teacher, torch.zeros(()), gate, base(batch.images))
    without = task.graft(batch.images, teacher, gate)
    assert torch.equal(seen[0][:3], without[:3])
    assert torch.allclose(seen[0][3:], without[3:] + base(batch.images)[3:])


def test_training_a_stage_changes_no_earlier_member_and_not_the_teacher(float64: None) -> None:
    task = make("fitnet", "adaptive")
    first, teacher = double("resnet8", 1), task.teacher_features.network
    task.offset = Ensemble([first]).eval().forward
    before = copy.deepcopy((first.state_dict(), teacher.state_dict()))
    fit(task, batches(task, 2))
    for state, network in zip(before, (first, teacher), strict=True):
        assert all(torch.equal(state[name], tensor) for name, tensor in network.state_dict().items())
        assert all(parameter.grad is None for parameter in network.parameters())


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch asks, and hides it
def test_a_step_with_an_offset_is_one_graph(float64: None) -> None:
    torch._dynamo.reset()
    task: Task = make("kd", "adaptive").train()
    task.offset = Ensemble([double("resnet8", 1)]).eval().forward
    (batch,) = batches(task, 1)
    before = copy.deepcopy(task.state_dict())
    called = task(batch).loss.detach()
    task.load_state_dict(before)
    compile_task(task, pytest.fail, backend="eager")
    assert torch.allclose(task(batch).loss, called, rtol=1e-12)


def test_an_ensemble_comes_back_from_its_folder_and_damage_is_told(tmp_path: Path) -> None:
    card = NetworkCard("resnet8", "shapes", tuple("abcdefghij"), (0.5,) * 3, (0.3,) * 3, 32)
    made = Ensemble([double(name, 3).float() for name in ("resnet14", "resnet8")]).eval()
    folder = tmp_path / "ensemble"
    ensembles.save(folder, made, card, Exits("margin", (0.0, 1.0), (0.1 + 0.2,)), FACTS)
    back = ensembles.load(folder)
    images = torch.randn(5, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(made.stages(images), back.ensemble.stages(images))
    assert (back.exits, back.about["stopped"]) == (Exits("margin", (0.0, 1.0), (0.1 + 0.2,)), "why")
    sound = (folder / "ensemble.json").read_text()
    for old, new, told in (
        ("sakd.ensemble/1", "sakd.ensemble/9", "not an ensemble of this sakd"),
        ("margin", "magrin", "damaged or not an ensemble"),
        ("0.30000000000000004", "0.3, 0.4", "2 members and 2 thresholds"),
        ("{", "", "damaged or not an ensemble"),
        ('"macs": 77', '"macs": "many"', "damaged or not an ensemble"),
        ('"rule": {}', '"rule": 3', "damaged or not an ensemble"),
    ):
        (folder / "ensemble.json").write_text(sound.replace(old, new, 1))
        with pytest.raises(UsageError, match=told):
            ensembles.load(folder)
    (folder / "ensemble.json").write_text(sound)
    shutil.copy(folder / "member-0.safetensors", folder / "member-1.safetensors")
    with pytest.raises(UsageError, match="is not the member that"):
        ensembles.load(folder)


@pytest.fixture(scope="module")
def chained(trained_cli: CliRunner) -> dict[str, Any]:
    """The summary of a distillation with one residual student, which starts by changing nothing."""
    return trained_cli.sakd(*PAIR, *TINY, *MORE, "--set", "residual.init=zero").document


def test_a_run_leaves_an_ensemble_beside_its_student(trained_cli: CliRunner, chained: dict[str, Any]) -> None:
    run, told = trained_cli.path / chained["run"], chained["ensemble"]
    index = json.loads((run / "ensemble" / "ensemble.json").read_text())
    assert [member["architecture"] for member in index["members"]] == told["members"] == ["resnet8", "resnet8"]
    student = (run / "student" / "model.safetensors").read_bytes()
    assert (run / "ensemble" / "member-0.safetensors").read_bytes() == student, "frozen since its own phase"
    assert (run / "checkpoints" / "residual-1" / "last" / "model.safetensors").is_file()
    assert told["stage_top1"][0] == chained["last"]["top1"]
    assert told["all"]["top1"] == pytest.approx(told["stage_top1"][1])
    assert told["member_macs"][0] <= told["early"]["macs"] <= told["all"]["macs"] == sum(told["member_macs"])
    assert all(len(values) == 2 for values in told["energies"].values())
    assert chained["images"] + told["calibration_images"] == 90, "kept away from every student"
    kinds = {line["kind"] for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())}
    assert kinds == {"train", "residual-1", "eval"}


def test_zero_init_starts_by_changing_nothing() -> None:
    fields = {"teacher": "resnet8", "student": "resnet8", "data": {"name": "shapes", "train": 60, "test": 20}}
    from sakd_cli.runs import build

    for init in ("zero", "default"):
        more = fields | {"residual": {"students": 1, "init": init, "max_cost": 3}}
        config = resolve("distill", [ConfigSource("test", more)]).config
        job = build.untrained(config)[1]
        images = torch.randn(4, 3, 32, 32)
        base = job.network.eval().forward
        stage = build.residual_stage(job, "resnet8", 1, base)
        with torch.no_grad():
            same = torch.equal(Offset(stage.network.eval(), base)(images), base(images))
        assert same == (init == "zero")


def test_eval_scores_the_ensemble_early_or_whole_and_sweeps(trained_cli: CliRunner, chained: dict[str, Any]) -> None:
    run, told = chained["run"], chained["ensemble"]
    early = trained_cli.sakd("eval", run, "--json").document
    assert early == trained_cli.sakd("eval", run, "--early-exit", "--json").document
    assert (early["top1"], early["ensemble"]["cost"]) == (told["early"]["top1"], told["early"]["cost"])
    whole = trained_cli.sakd("eval", run, "--always-on", "--curve", "--json").document
    assert (whole["top1"], whole["ensemble"]["exits"]) == (pytest.approx(told["all"]["top1"]), [0, IMAGES])
    assert whole["ensemble"]["curve"][0]["top1"] == pytest.approx(whole["top1"])
    shutil.copytree(trained_cli.path / run / "ensemble", trained_cli.path / "exported")
    assert trained_cli.sakd("eval", "exported", "--dataset", "shapes", "--json").document["ensemble"]["exits"]
    Evaluations.model_validate(
        both := trained_cli.sakd("eval", run, f"{run}/student", "--json", "--set", "timing_seconds=0").document
    )
    assert [one["schema"] for one in both["evaluations"]] == ["sakd.ensemble/2", "sakd.eval/3"]
    alone = trained_cli.sakd("eval", f"{run}/student", "--early-exit", "--json").document
    assert (alone["top1"], alone["ensemble"]["exits"]) == (chained["last"]["top1"], [IMAGES])
    assert alone["ensemble"]["cost"] == 1.0, "as large as its teacher"
    plain = both["evaluations"][1]
    assert (alone["brier"], alone["ece"]) == (pytest.approx(plain["brier"]), pytest.approx(plain["ece"], abs=1e-6))
    assert (alone["averages"], alone["confusions"]) == (plain["averages"], plain["confusions"])
    assert [(one["precision"], one["f1"]) for one in alone["classes"]] == [
        (one["precision"], one["f1"]) for one in plain["classes"]
    ]
    right = trained_cli.sakd("eval", run, "--confusion", "matrix.csv", "--json").document
    diagonal = sum(row[k] for k, row in enumerate(right["confusion_matrix"]))
    assert (100 * diagonal / IMAGES, right["averages"]) == (pytest.approx(early["top1"]), early["averages"])
    assert (trained_cli.path / "matrix.csv").read_text().startswith("class,predicted ")
    tables = trained_cli.sakd("eval", run, "--curve").out
    assert all(word in tables for word in ("Balanced accuracy", "ROC-AUC", "F1 %, macro | weighted"))
    assert "Times:" not in tables, "none are shown"
    assert all(word in tables for word in ("Student and residual students", "Agree %", "Pareto", "rule agreement"))


def test_thresholds_are_fitted_anew_for_other_words(trained_cli: CliRunner, chained: dict[str, Any]) -> None:
    given = ["--set", "residual.delta=1", "--json"]
    loose = trained_cli.sakd("eval", chained["run"], *given).document
    told = loose["ensemble"]
    assert (told["delta"], loose["top1"]) == (1, pytest.approx(told["exits"][0] and loose["top1"]))
    assert told["exits"][0] > 0.8 * IMAGES
    fixed = trained_cli.sakd(
        "eval", chained["run"], "--set", "residual.rule=fixed", "--set", "residual.theta=1", "--json"
    )
    assert fixed.document["top1"] == chained["last"]["top1"]
    assert fixed.document["ensemble"]["exits"] == [IMAGES, 0]


def test_mistakes_cost_one_line_and_nothing_is_written(trained_cli: CliRunner, chained: dict[str, Any]) -> None:
    run = chained["run"]
    fields = [*PAIR, *TINY, "--residual-students", "1"]
    trained_cli.assert_rejects([*fields], 2, "resnet8 + ")
    trained_cli.assert_rejects([*fields, "--set", "residual.rule=agreemnt"], 2, "residual.rule")
    trained_cli.assert_rejects([*fields, "--set", "residual.student=2"], 2, "did you mean 'residual.students'?")
    trained_cli.assert_rejects([*fields, "--set", "residual.architectures=resnt8"], 2, "did you mean 'resnet8'?")
    big = [
        "--set",
        "residual.max_cost=9",
        "--set",
        "residual.loss=inner",
        "--set",
        "residual.architectures=MobileNetV2",
    ]
    trained_cli.assert_rejects(
        [*fields, *big, "--set", "stage_map=[[1,1],[2,2],[3,3]]", "--method", "ofd"], 2, "MobileNetV2"
    )
    trained_cli.assert_rejects(["eval", run, "--early-exit", "--always-on"], 2, "exclude each other")
    trained_cli.assert_rejects(["eval", run, run, "--plot", "curve.png"], 2, "of one network")
    trained_cli.assert_rejects(["eval", run, "--teacher", "resnet8"], 2, "beside the teacher that it was trained with")
    trained_cli.assert_rejects(["eval", run, "--plot", "curve.txt"], 2, "--plot curve.txt")
    trained_cli.assert_rejects(["eval", run, "--plot", "nowhere/curve.png"], 2, "no such folder")
    with mock.patch.dict(sys.modules, {"matplotlib.figure": None}):
        trained_cli.assert_rejects(["eval", run, "--plot", "curve.png"], 2, "plots need matplotlib")


def test_the_curve_is_drawn(trained_cli: CliRunner, chained: dict[str, Any]) -> None:
    pytest.importorskip("matplotlib")
    result = trained_cli.sakd("eval", chained["run"], "--plot", "curve.png", "--json")
    assert result.document["ensemble"]["curve"]
    assert (trained_cli.path / "curve.png").read_bytes().startswith(b"\x89PNG")
    page = trained_cli.sakd("report", chained["run"], "--json").document
    assert "Residual students" in page["sections"]
    assert f"{chained['run']}/report-exits.png" in page["written"]


def test_a_dry_run_shows_the_residual_students(trained_cli: CliRunner) -> None:
    plan = trained_cli.sakd(*PAIR, *TINY, *MORE, "--dry-run").document
    assert [entry["role"] for entry in plan["networks"]] == ["teacher", "student", "residual student"]


def test_members_are_as_they_were_saved(trained_cli: CliRunner, chained: dict[str, Any]) -> None:
    run = trained_cli.path / chained["run"]
    trained = load_file(run / "checkpoints" / "residual-1" / "last" / "model.safetensors")
    saved = load_file(run / "ensemble" / "member-1.safetensors")
    assert all(torch.equal(trained[name], tensor) for name, tensor in saved.items())
    assert saved["head.weight"].abs().sum() > 0, "it did learn"
