"""The table of a sweep from figures that are known, the published figures beside it, and the grids that are shipped"""

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from sample_documents import sample

from sakd_cli.config.grid import Grid, grid
from sakd_cli.config.options import options_of
from sakd_cli.config.sweep import SweepConfig
from sakd_cli.config.training import DistillConfig, PretrainConfig
from sakd_cli.documents.sweep import PublishedPair, SweepRun
from sakd_cli.errors import UsageError
from sakd_cli.report.sweep.results import published_cell, sweep_document
from sakd_cli.report.sweep.tables import sweep_markdown
from sakd_cli.sweep.carry_out import read_sweep
from sakd_cli.sweep.halving import dropped_by_halving

NONE = dict.fromkeys(row for row in options_of("sweep"))


def grid_of(file: str, **options: Any) -> Grid:
    return read_sweep(file, NONE | options)[2]


def finished(router: str | None, seed: int, top1: float, **fields: Any) -> SweepRun:
    about = {"role": "student", "teacher": "resnet56", "student": "resnet20", "method": "fitnet", "epochs": 24}
    about |= {"key": f"{router} {seed}", "router": router, "seed": seed, "state": "done"}
    return sample(SweepRun, about | {"top1": top1, "best_top1": top1 + 0.1, "teacher_top1": 72.5} | fields)


@pytest.fixture
def runs() -> list[SweepRun]:
    always, adaptive = (70.0, 70.2, 70.4, 70.1), (70.5, 70.6, 71.0)  # the last seed is not there yet
    made = [finished("always", seed, top1) for seed, top1 in enumerate(always)]
    made += [finished("adaptive", seed, top1) for seed, top1 in enumerate(adaptive)]
    return [*made, finished(None, 0, 68.0, role="baseline", teacher=None, method=None)]


def test_gains_are_paired_by_seed_and_stand_beside_the_published_ones(runs: list[SweepRun]) -> None:
    document = sweep_document("mine", runs, {}, "cifar100")
    [gain] = document.gains
    assert (gain.seeds, gain.published, gain.verdict) == ([0, 1, 2], 0.29, "better")
    assert gain.difference == pytest.approx((0.5 + 0.4 + 0.6) / 3)
    # t = 0.5 / (0.1 / sqrt 3) with two degrees of freedom
    assert gain.p == pytest.approx(0.01307, abs=1e-4)
    always = next(cell for cell in document.cells if cell.router == "always")
    assert always.top1 is not None
    assert (always.top1.mean, always.published) == (pytest.approx(70.175), 71.05)
    [pair] = document.pairs
    assert pair.published == PublishedPair(teacher=72.34, baseline=69.06)
    assert pair.baseline is not None
    assert (pair.teacher_top1, pair.baseline.mean) == (72.5, 68.0)
    text = sweep_markdown(document)
    for line in (
        "| fitnet | always | 70.17 ± 0.17 (69.90 to 70.45; 4) |",
        "|  | adaptive − always | +0.50 (+0.25 to +0.75), p 0.013, better |",
    ):
        assert line in text
    assert all(part in text for part in ("Ours trained 24 epochs: not comparable", "corrected for being 1 test (Holm)"))


def test_a_part_of_the_data_has_no_published_figures() -> None:
    document = sweep_document("mine", [finished("always", 0, 50.0)], {}, None)
    assert (document.published, document.cells[0].published) == (None, None)


@pytest.mark.parametrize(("name", "runs"), [("table-same-family", 115), ("table-cross-family", 113)])
def test_the_published_tables_are_shipped_with_their_figures(name: str, runs: int) -> None:
    grid = grid_of(name)
    assert (len(grid.members), grid.skipped) == (runs, {})
    students = [member for member in grid.members if member.pair]
    assert {member.config.train.epochs for member in students} == {240}
    missing = {m.key for m in students if published_cell("cifar100", ":".join(m.pair or ()), *named(m.config)) is None}
    # Without a figure: NST for this pair, which was not reported.
    expected = {f"nst {router} ResNet50:vgg8 seed 0" for router in ("always", "adaptive")}
    assert missing == (expected if "cross" in name else set())
    halved = {member.key for member in students if member.config.train.batch_size == 32}
    assert len(halved) == (4 if "cross" in name else 0)
    assert grid_of(f"presets/{name}.yaml").members == grid.members


def named(config: Any) -> tuple[str, str]:
    return config.method.name, config.router.name


def test_the_small_sweep_says_what_was_said_by_hand() -> None:
    grid = grid_of("sweep-small")
    assert len(grid.members) == 1 + 3 * 4 * 3
    teacher, first = grid.members[0].config, grid.members[1].config
    assert isinstance(teacher, PretrainConfig)
    assert isinstance(first, DistillConfig)
    assert (teacher.data.limit, teacher.train.epochs, teacher.train.milestones) == (None, 16, (10, 14))
    assert (first.data.limit, first.train.epochs, first.train.milestones) == (4000, 12, (7, 10))
    assert (first.router.model_dump()["lr"], first.router.model_dump()["teacher_bias"]) == (2e-4, 0)
    assert [member.config.seed for member in grid.members[1::12]] == [0, 1, 2]


def test_teachers_that_are_there_are_not_trained_and_two_rules_beat_one(tmp_path: Path) -> None:
    overrides = {"at": {"method": {"weight": 5}}, "at ./there:resnet8": {"method": {"weight": 7}}}
    overrides |= {"resnet20:resnet8": {"teacher": {"weights": "some.safetensors"}}}
    record = {"task": "sweep", "pairs": ["./there:resnet8", "resnet20:resnet8", "torchvision/resnet18:resnet8"]}
    (tmp_path / "mine.yaml").write_text(
        json.dumps(record | {"methods": ["at"], "routers": ["always"], "overrides": overrides})
    )
    members = grid_of(str(tmp_path / "mine.yaml")).members
    assert [member.key for member in members if not member.pair] == ["teacher torchvision/resnet18"]
    assert [member.teacher for member in members if member.pair] == [None, None, "teacher torchvision/resnet18"]
    weights = [m.config.method.weight for m in members if isinstance(m.config, DistillConfig)]
    assert weights == [7, 5, 5]


@pytest.mark.parametrize(
    ("text", "pair"),
    [
        ("resnet8:my.py:small", ("resnet8", "my.py:small")),
        ("my.py:big:resnet8", ("my.py:big", "resnet8")),
        ("my.py:big:my.py:small", ("my.py:big", "my.py:small")),
    ],
)
def test_networks_of_a_file_in_a_pair(text: str, pair: tuple[str, str]) -> None:
    settings = SweepConfig(pairs=[text], methods=["kd"], overrides={text: {"train": {"epochs": 3}}})
    assert (settings.pairs, [*settings.overrides]) == ((pair,), [text])


def test_a_network_of_a_file_is_no_pair() -> None:
    with pytest.raises(ValueError, match="TEACHER:STUDENT"):
        SweepConfig(pairs=["my.py:small"], methods=["kd"])


def test_a_part_of_a_grid_under_a_budget() -> None:
    part = {"methods": "ft", "pairs": "vgg13:vgg8", "some_routers": "always", "seed_count": 2}
    grid = grid_of("table-same-family", **part, budget="10%", set_=["train.lr=0.1"])
    assert [member.key for member in grid.members] == [
        "teacher vgg13",
        "baseline vgg8 seed 0",
        "kd always vgg13:vgg8 seed 0",
        "ft always vgg13:vgg8 seed 0",
        "baseline vgg8 seed 1",
        "kd always vgg13:vgg8 seed 1",
        "ft always vgg13:vgg8 seed 1",
    ]
    assert {(member.config.train.epochs, member.config.train.lr) for member in grid.members} == {(24, 0.1)}
    assert grid.members[3].config.model_dump()["method"]["warmup_epochs"] == 3
    same = grid_of("table-same-family", **part, budget="24", set_=["train.lr=0.1"])
    assert same.members == grid.members
    small = grid_of("sweep-small", budget="0.5").members
    assert [small[k].config.train.milestones for k in (0, 1)] == [(5, 7), (4, 5)]


def test_doses_are_multiples_of_each_methods_weight_and_the_balanced_one() -> None:
    settings = SweepConfig(
        pairs=["resnet20:resnet8"], methods=["at"], routers=["always", "never"], doses=[0.1, 1, "auto"], seeds=1
    )
    made = {member.key: member for member in grid(settings).members if member.method}
    assert list(made) == [
        "at x0.1 always resnet20:resnet8 seed 0",
        "at always resnet20:resnet8 seed 0",
        "at never resnet20:resnet8 seed 0",
        "at auto always resnet20:resnet8 seed 0",
    ]
    weights = [(one.config.method.weight, one.config.method.balance) for one in made.values()]
    assert weights == [(100.0, 0.0), (1000.0, 0.0), (1000.0, 0.0), (1000.0, 1.0)]
    with pytest.raises(ValidationError, match="'much' is neither a multiple of the method's weight nor auto"):
        SweepConfig(pairs=["resnet20:resnet8"], methods=["at"], doses=["much"])


def test_a_sweep_answers_the_three_questions_for_each_pair_and_method() -> None:
    runs = []
    for seed in range(3):
        for method, router, top1, valid in (
            ("at", "always", 40.0, 45.0),
            ("at auto", "always", 44.0, 46.0),
            ("at auto", "adaptive", 42.0, 40.0),
            ("at auto", "random-matched", 42.5, 40.0),
            ("at", "never", 30.0, 30.0),
        ):
            matched = f"at auto adaptive {seed}" if router == "random-matched" else None
            own = {"key": f"{method} {router} {seed}", "method": method, "matched": matched, "validation_top1": valid}
            runs.append(finished(router, seed, top1 + 0.1 * (seed * len(router) % 3), teacher="t", student="s", **own))
    texts = [answer.text for answer in sweep_document("x", runs, {}, None).answers]
    assert [text.split("?")[0] for text in texts] == [
        "Does distilling help",
        "Does the router give more than the dose",
        "Does where it distils add to how much",
    ]
    assert "Yes: method at auto, router always (t:s), over method at, router never (t:s): +" in texts[0]
    assert "method at auto, router adaptive (t:s), over method at auto, router always (t:s)" in texts[1]
    document = sweep_document("x", runs, {}, None)
    assert ("at auto", "adaptive", "random-matched") in {
        (one.method, one.router, one.against) for one in document.gains
    }
    assert all(gain.router != "never" for gain in document.gains)
    tested = [test for test in [*document.gains, *document.answers] if test.p is not None]
    assert document.tests == len({(test.difference, test.p) for test in tested}), "an answer that is a gain counts once"
    assert "method at auto, router adaptive (t:s), over method at auto, router random-matched (t:s)" in texts[2]


def test_a_grid_tries_values_of_any_key_where_a_cell_has_it() -> None:
    tried = {"lr": [0.05, 0.1], "router.tau": [1, 5], "method.power": [2]}
    routers = ["adaptive", "random-matched", "never"]
    settings = SweepConfig(pairs=["resnet20:resnet8"], methods=["at", "kd"], routers=routers, grid=tried)
    made = {member.key: member for member in grid(settings).members if member.method}
    varied = [f"train.lr={lr} router.tau={tau}" for lr in (0.05, 0.1) for tau in (1, 5)]
    at = [f"at {one} method.power=2 {router}" for router in ("adaptive", "random-matched") for one in varied]
    assert {key.partition(" resnet20")[0] for key in made if key.startswith("at") and "never" not in key} == set(at)
    assert [key.partition(" resnet20")[0] for key in made if key.startswith("kd") and "never" in key] == [
        "kd train.lr=0.05 never",
        "kd train.lr=0.1 never",
    ]
    coins = made["kd train.lr=0.1 router.tau=5 random-matched resnet20:resnet8 seed 0"]
    assert coins.matched == "kd train.lr=0.1 router.tau=5 adaptive resnet20:resnet8 seed 0"
    router = made[coins.matched].config.model_dump()["router"]
    assert (coins.config.train.lr, router["tau"]) == (0.1, 5)
    assert made["kd train.lr=0.05 never resnet20:resnet8 seed 0"].config.train.lr == 0.05
    refused: dict[str, dict[str, list[Any]]] = {
        "seed has a field of its own: seeds": {"seed": [1, 2]},
        r"train\.lr needs values, each once, got \[\]": {"lr": []},
        r"train\.lr needs values, each once, got \[0\.1, 0\.1\]": {"lr": [0.1, "1e-1"]},
        r"train\.lr is there twice": {"lr": [0.1], "train.lr": [0.2]},
    }
    for said, wrong in refused.items():
        with pytest.raises(ValidationError, match=said):
            SweepConfig(pairs=["resnet20:resnet8"], methods=["at"], grid=wrong)
    once = {"task": "sweep", "pairs": ["resnet20:resnet8"], "methods": ["at"]}
    for fields, told in (
        ({"methods": ["at", "AT"]}, "methods: at is there twice"),
        ({"seeds": [1, 0, 1]}, "seeds: 1 is there twice"),
        ({"grid": {"lr": 1}}, "grid.lr: must"),
    ):
        with pytest.raises(UsageError, match=told):
            read_sweep(once | fields, NONE)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"unknown key 'router\.taau'"):
        grid(SweepConfig(pairs=["resnet20:resnet8"], methods=["at"], grid={"router.taau": [1]}))
    others = grid(SweepConfig(pairs=["resnet20:resnet8"], methods=["at"], routers=["always"], grid={"router.tau": [1]}))
    assert others.skipped == {"grid router.tau": "no method or router here has it"}
    with pytest.raises(UsageError, match=r"at train\.lrr=1 adaptive resnet20:resnet8: .*train\.lrr"):
        grid(SweepConfig(pairs=["resnet20:resnet8"], methods=["at"], grid={"train.lrr": [1]}))


def test_successive_halving_trains_few_settings_to_the_end() -> None:
    pytest.importorskip("optuna")
    rates = [0.05, 0.03, 0.06, 0.02, 0.07, 0.01]
    routers = ["adaptive", "random-matched"]
    settings = SweepConfig(pairs=["resnet20:resnet8"], methods=["at"], routers=routers, grid={"lr": rates}, seeds=2)
    stages = [grid(settings, part=1 / 3 ** (2 - stage)).members for stage in range(2)]
    assert [stage[-1].config.train.epochs for stage in stages] == [27, 80]
    trained: list[tuple[int, float | None]] = []

    def train(members: Any) -> dict[str, float]:
        assert all(member.teacher in {one.key for one in members} for member in members if member.pair)
        own = [member for member in members if member.pair]
        trained.append((own[0].config.train.epochs, own[0].config.train.lr))
        return {member.key: 100 * (member.config.train.lr or 0.0) for member in own}

    out = dropped_by_halving(stages, 3, train)
    assert [lr for epochs, lr in trained if epochs == 27] == rates
    assert [lr for epochs, lr in trained if epochs == 80] == [0.05, 0.06, 0.07], "each was the best so far"
    assert {cell for cell in out if "adaptive" in cell} == {
        f"at train.lr={lr} adaptive resnet20:resnet8" for lr in (0.03, 0.02, 0.01)
    }
    assert out["at train.lr=0.02 adaptive resnet20:resnet8"] == "halving: top-1 2.00 % on validation after 27 epochs"
    assert "at train.lr=0.02 random-matched resnet20:resnet8" in out


def test_coins_are_of_the_router_that_selects_whichever_it_is() -> None:
    routers = ["random-matched", "always", "wsld"]
    settings = SweepConfig(pairs=["resnet20:resnet8"], methods=["kd"], routers=routers, doses=["auto"])
    found = {member.router: member.matched for member in grid(settings).members if member.method}
    assert found == {"always": None, "wsld": None, "random-matched": "kd auto wsld resnet20:resnet8 seed 0"}


def test_any_baseline_is_what_all_cells_of_a_sweep_are_compared_with(runs: list[SweepRun]) -> None:
    seeds = range(3)
    runs += [finished("always", seed, 69.5 + 0.1 * seed, method="at", key=f"at always {seed}") for seed in seeds]
    runs += [
        finished(None, seed, 68.0 - 0.3 * seed, role="baseline", teacher=None, method=None, key=f"b {seed}")
        for seed in seeds
    ]

    def compared(words: str) -> dict[tuple[str, str], tuple[str, float]]:
        document = sweep_document("mine", runs, {}, "cifar100", words)
        assert document.tests == len(document.gains)
        assert document.baseline == words
        return {(gain.method, gain.router): (gain.against, round(gain.difference or 0.0, 2)) for gain in document.gains}

    expected = {("fitnet", "adaptive"): ("always", 0.5), ("at", "always"): ("fitnet always", -0.6)}
    assert compared("fitnet always") == expected | {("baseline", ""): ("fitnet always", -2.5)}
    assert compared("always")[("fitnet", "adaptive")] == ("always", 0.5), "of the same method where there is one"
    from_scratch = compared("baseline")
    assert from_scratch[("at", "always")] == ("baseline", 1.9)
    text = sweep_markdown(sweep_document("mine", runs, {}, "cifar100", "baseline"))
    assert "|  | always − baseline | +1.90" in text
    assert "baseline over fitnet always: above 0 in 0 of 1" in sweep_markdown(
        sweep_document("mine", runs, {}, "cifar100", "fitnet always")
    )
    assert grid_of("table-same-family", baseline="baseline").members, "also where it is the run that distils nowhere"
    with pytest.raises(UsageError, match="--baseline 'at wsld': no such cell of this sweep"):
        grid_of("table-same-family", baseline="at wsld")


def test_a_sweep_under_the_published_protocol_is_as_published(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(
        "{task: sweep, pairs: ['wrn40_2:wrn16_2'], methods: [fitnet], routers: [adaptive, always], baseline: true,"
        " seeds: 2, common: {seed: 4, data: {validation: 0.2}, train: {epochs: 12}}}"
    )
    file = str(tmp_path / "s.yaml")
    for protocol, validation, seeds, recipe in (
        ("published", 0.0, {1029, 1030}, "published"),
        ("honest", 0.1, {4, 5}, "auto"),
        (None, 0.2, {4, 5}, "auto"),
    ):
        members = grid_of(file, protocol=protocol).members
        assert {member.config.data.validation for member in members} == {validation}, "teacher and baseline as well"
        assert {member.config.seed for member in members if member.role != "teacher"} == seeds
        routers = [member.config.router for member in members if isinstance(member.config, DistillConfig)]
        assert {one.recipe for one in routers if one.name == "adaptive"} == {recipe}
    over = grid_of(file, protocol="published", set_=["data.validation=0.3"]).members
    assert {member.config.data.validation for member in over} == {0.3}, "an option wins"
