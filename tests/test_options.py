"""The table of options: what each row makes, how a value may be written, and what a foreign word is answered with."""

import re
from pathlib import Path
from typing import Any

import pytest
from conftest import CliRunner

from sakd_cli.config.base import description
from sakd_cli.config.effective import effective
from sakd_cli.config.foreign import FOREIGN, ours
from sakd_cli.config.keys import keys_of, places_of
from sakd_cli.config.networks import find_network
from sakd_cli.config.options import OPTIONS as TABLE
from sakd_cli.config.resolve import ConfigSource, environment_sources, option_sources, resolve, set_sources
from sakd_cli.config.training import TASKS
from sakd_cli.errors import UsageError

OPTIONS = {name: row.key for name, row in TABLE.items() if row.key}
PAIR = ConfigSource("pair", {"teacher": "resnet20", "student": "resnet8"})


def test_every_option_has_an_environment_variable_of_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    fields = dict.fromkeys(OPTIONS, "1") | {"teacher": "resnet8", "student": "resnet8", "method": "dfa"}
    fields |= {"router": "never", "dataset": "imagefolder", "pretrain": "yes", "validation": "0.5", "precision": "bf16"}
    fields |= {"log": "tensorboard", "head": "replace", "milestones": "[]"}
    del fields["model"], fields["student_friendly"], fields["eval_batch_size"]  # of other commands
    for name, value in fields.items():
        monkeypatch.setenv(f"SAKD_{name.upper()}", value)
    config, origins = resolve("distill", environment_sources(fields))
    assert set(origins) == {OPTIONS[name] for name in fields}
    assert (config.teacher.source, config.teacher.pretrain, config.student) == ("resnet8", True, "resnet8")
    assert (config.method.name, config.router.name, config.data.name) == ("dfa", "never", "imagefolder")
    assert (config.data.root, config.data.manifest) == (Path("1").absolute(),) * 2
    assert config.runs_dir == Path("1")
    assert config.method.weights == str(Path("1").absolute())
    assert (config.train.epochs, config.seed, config.data.validation) == (1, 1, 0.5)


def test_every_row_sets_a_key_that_there_is_and_says_what_it_is() -> None:
    for row in TABLE.values():
        assert len(row.help) > 10
        assert not row.key or list(places_of(row.key))
        assert row.help[0].isupper()


@pytest.mark.parametrize("text", ["150,180,210", "[150,180,210]", "[150, 180, 210]", "150, 180, 210"])
def test_a_list_may_be_written_with_and_without_brackets(text: str) -> None:
    for sources in (option_sources({"milestones": text}), set_sources([f"train.milestones={text}"])):
        assert resolve("distill", [PAIR, *sources]).config.train.milestones == (150, 180, 210)
    assert resolve("distill", [PAIR, *option_sources({"milestones": "7"})]).config.train.milestones == (7,)


def test_a_name_may_be_written_in_any_case_and_with_hyphens_or_underscores() -> None:
    given = {"method": "FitNet", "router": "Random_Matched", "dataset": "CIFAR-10"}
    config = resolve("distill", [PAIR, *option_sources(given)]).config
    assert (config.method.name, config.router.name, config.data.name) == ("fitnet", "random-matched", "cifar10")
    below = ConfigSource("file", {"method": {"name": "at", "power": 3}})
    assert resolve("distill", [PAIR, below, *set_sources(["method=AT"])]).config.method.power == 3, "the same method"


def test_the_options_that_everybody_looks_for_set_their_keys() -> None:
    given = {"lr": "0.1", "temperature": "2", "loss_weight": "3", "milestones": "5,6"}
    config = resolve("distill", [PAIR, *option_sources(given)]).config
    assert (config.train.lr, config.train.milestones) == (0.1, (5, 6))
    assert (config.method.temperature, config.method.weight) == (2, 3)


def test_a_word_of_another_program_leads_to_a_key_that_there_is() -> None:
    assert all(list(places_of(key)) for keys in FOREIGN.values() for key in keys)


@pytest.mark.parametrize(
    ("assignment", "key"),
    [
        ("alpha=0.9", "method.kl_weight"),
        ("method.beta=50", "method.weight"),
        ("kd_T=4", "method.temperature"),
        ("method.hint_layer=2", "method.stage"),
        ("r=1", "method.ce_weight"),
        ("KD.TEMPERATURE=4", "method.temperature"),
        ("KD.LOSS.KD_WEIGHT=0.9", "method.kl_weight"),
        ("SOLVER.LR=0.05", "train.lr"),
        ("SOLVER.LR_DECAY_STAGES=[150]", "train.milestones"),
        ("train.lr_milestones=[150]", "train.milestones"),
    ],
)
def test_a_key_of_another_program_is_answered_with_ours(assignment: str, key: str) -> None:
    with pytest.raises(UsageError, match=f"here it is '{key}'"):
        resolve("distill", [PAIR, *set_sources([assignment])])


def test_values_are_read_as_a_program_has_them() -> None:
    """Python's None and tuples; and numbers are decimal, which YAML 1.1 reads otherwise: 010 as 8."""
    given = ["data.limit=None", "train.milestones=(5, 6)", "train.epochs=010", "train.clip_norm=none", "seed=1_0"]
    config = resolve("distill", [PAIR, *option_sources({"lr": "none"}), *set_sources(given)]).config
    assert (config.data.limit, config.train.clip_norm, config.train.lr) == (None, None, None)
    assert (config.train.milestones, config.train.epochs, config.seed) == ((5, 6), 10, 10)
    assert find_network("torchvision:resnet50").name == "torchvision/resnet50"
    hub = find_network("hf_hub:timm/resnet50.a1_in1k").name
    assert hub == find_network("hf-hub:timm/resnet50.a1_in1k").name


def test_a_hint_is_right_or_there_is_none() -> None:
    assert (ours("alpha", "dkd"), ours("DKD.ALPHA", "dkd"), ours("hint_layer", "at")) == ("method.target",) * 2 + (
        None,
    )
    with pytest.raises(UsageError) as caught:
        resolve("distill", [PAIR, *set_sources(["method.quux=3"])])
    assert caught.value.message == "unknown key 'method.quux' (from --set method.quux)"


@pytest.mark.parametrize(
    ("fields", "hint"),
    [
        ("distill --alpha 0.9", "--set method.kl_weight=..."),
        ("distill --kd_T 4", "--temperature"),
        ("distill --lr-decay-epochs 150,180", "--milestones"),
        ("distill -r 1", "--set method.ce_weight=..."),
        ("eval --bogus", "sakd eval --help"),
    ],
)
def test_an_option_of_another_program_is_answered_with_ours(cli: CliRunner, fields: str, hint: str) -> None:
    result = cli.sakd(*fields.split())
    assert (result.code, result.out) == (2, "")
    assert result.err.splitlines()[1] == f"hint: {hint}"


def test_no_type_stands_behind_a_flag(cli: CliRunner) -> None:
    assert "<bool>" not in cli.sakd("distill", "--help").out + cli.sakd("--help").out
    assert "Random seed (default 0)" in cli.sakd("distill", "--help", COLUMNS="200").out


def test_the_published_recipe_can_be_verified_before_a_minute_is_trained(cli: CliRunner) -> None:
    effective = cli.sakd("config", "show", "--preset", "cifar100-sakd", "--json").document["effective"]
    assert (effective["train.lr"], effective["train.milestones"], effective["router.lr"]) == (
        0.05,
        [150, 180, 210],
        0.025,
    )
    assert (effective["router.teacher_bias"], effective["router.gamma"], effective["steps_per_epoch"]) == (
        10.0,
        1.0,
        704,
    )
    assert (effective["training_images"], effective["validation_images"]) == (45000, 5000)


@pytest.mark.parametrize(
    ("method", "teacher", "rate"),
    [("ft", "ResNet50", 0.05), ("ft", "vgg13", 0.01), ("ft", "runs/t", None), ("fsp", "runs/t", 0.05)],
)
def test_the_rate_of_a_warm_up_is_shown_where_it_is_known(method: str, teacher: str, rate: float | None) -> None:
    layers = option_sources({"method": method, "teacher": teacher, "student": "vgg8"})
    assert effective(resolve("distill", layers).config)["method.warmup_lr"] == rate


def test_what_is_computed_beforehand_is_what_a_run_has(cli: CliRunner) -> None:
    given = ["--dataset", "shapes", "--set", "data.train=201", "--set", "data.test=20", "--validation", "0.15"]
    pair = ["--teacher", "resnet8", "--student", "MobileNetV2", *given, "--batch-size", "16"]
    before = cli.sakd("config", "show", *pair, "--json").document["effective"]
    assert (before["train.lr"], before["router.teacher_bias"], before["validation_images"]) == (0.01, 0.0, 30)
    plan = cli.sakd("distill", *pair, "--pretrain", "--dry-run", "--json").document
    assert (plan["effective"], plan["steps_per_epoch"]) == (before, before["steps_per_epoch"])


def test_the_published_protocol_sets_what_the_authors_did_and_options_beside_it_win(cli: CliRunner) -> None:
    def settings(*options: str) -> tuple[Any, ...]:
        shown = cli.sakd("config", "show", "--teacher", "wrn40_2", "--student", "wrn16_2", *options, "--json").document
        config, router = shown["config"], shown["config"]["router"]
        return config["seed"], config["data"]["validation"], router.get("recipe"), shown["effective"]["training_images"]

    published = ("--protocol", "published")
    assert settings(*published) == (1029, 0.0, "published", 50_000)
    assert settings(*published, "--seed", "2", "--set", "router.recipe=auto") == (2, 0.0, "auto", 50_000)
    assert settings(*published, "--router", "Always") == (1029, 0.0, None, 50_000)
    assert settings("--protocol", "honest", "--preset", "cifar100-sakd") == settings("--preset", "cifar100-sakd")
    assert settings() == (0, 0.1, "auto", 45_000)
    shown = cli.sakd("config", "show", "--task", "pretrain", "--model", "resnet8", *published, "--json").document
    assert (shown["config"]["seed"], shown["effective"]["validation_images"]) == (1029, 0)
    shown = cli.sakd("config", "show", *published, "--preset", "cifar100-sakd", "--epochs", "12", "--json").document
    assert shown["effective"]["router.teacher_bias"] == 10.0, "in a short run as well"


def test_a_written_config_is_read_without_its_effective_values() -> None:
    config = resolve("distill", [PAIR]).config
    written = ConfigSource("file", config.model_dump(mode="json") | {"effective": {"train.lr": 7}})
    assert resolve("distill", [written]).config == config


@pytest.mark.parametrize("task", TASKS)
def test_every_key_says_in_a_sentence_what_it_is(task: str) -> None:
    for key in keys_of(task):
        for _, kind in places_of(key, task):
            text = description(kind, key.rpartition(".")[2])
            ours = kind.__module__.startswith("sakd_cli")
            assert not ours or (len(text) > 10 and text[-1] in ".)"), f"{kind.__name__}.{key}: {text!r}"


def test_a_key_is_explained(cli: CliRunner) -> None:
    text = cli.sakd("show", "key", "train.lr").out
    assert "Initial learning rate; null: the network's published one" in " ".join(text.split())
    rows = {row["of"]: row for row in cli.sakd("show", "key", "method.weight", "--json").document["rows"]}
    assert (rows["at"]["default"], rows["kd"]["default"]) == ("1000.0", "1.0")
    assert "ICLR 2017" in rows["at"]["source"]
    cli.assert_rejects(["show", "key", "kd_T"], 2, "unknown key 'kd_T'")
    cli.assert_rejects(["show", "key", "train.lrr"], 2, "unknown key 'train.lrr'")
    assert (
        "did you mean 'friendly.tau' or 'router.tau'?"
        in cli.assert_rejects(["show", "key", "tau"], 2, "unknown key 'tau'").err
    )


def test_settings_are_shown_as_a_settings_file_has_them(cli: CliRunner) -> None:
    words = ["config", "show", "--preset", "quickstart", "--set", "data.mean=[0.1,0.2,0.3]"]
    shown = cli.sakd(*words, "--origin", COLUMNS="200").out
    for key, value in {"data.limit": "null", "teacher.pretrain": "true", "data.mean": r"\[0\.1, 0\.2, 0\.3\]"}.items():
        assert re.search(rf"^{key} +{value} ", shown, re.MULTILINE)
    assert "None" not in shown + cli.sakd("show", "key", "data.limit").out.replace("int | None", "")
    (cli.path / "shown.yaml").write_text(cli.sakd(*words).out, encoding="utf-8")
    assert cli.sakd("config", "show", "--config", "shown.yaml").out == cli.sakd(*words).out


def test_a_config_is_shown_with_what_each_key_means(cli: CliRunner) -> None:
    rows = cli.sakd("config", "show", "--preset", "quickstart", "--describe", "--json").document["keys"]
    assert all(len(row["description"]) > 10 for row in rows)


def test_a_variable_that_is_nearly_one_of_ours_is_told(cli: CliRunner) -> None:
    pair = "config", "show", "--teacher", "resnet20", "--student", "resnet8"
    told = cli.sakd(*pair, SAKD_MY_LAB="1"), cli.sakd(*pair, SAKD_EPOCH="3")
    assert [one.code for one in told] == [0, 2], "who has others of that beginning may have them"
    assert told[1].err.splitlines()[0] == "error: SAKD_EPOCH: no variable of sakd; did you mean SAKD_EPOCHS?"


@pytest.mark.parametrize(
    ("name", "instead"),
    [("PRESET", "--preset"), ("SET", "--set"), ("DATA_LIMIT", "--set data.limit=..."), ("TRAIN_LR", "SAKD_LR")],
)
def test_a_variable_that_is_not_read_is_told(cli: CliRunner, name: str, instead: str) -> None:
    told = cli.sakd("config", "show", "--teacher", "resnet20", "--student", "resnet8", **{f"SAKD_{name}": "1"})
    assert told.code == 2
    assert told.err.splitlines()[:2] == [
        f"error: SAKD_{name}: no variable of sakd",
        f"hint: {instead}; unset SAKD_{name}",
    ]
