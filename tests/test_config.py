"""Config: which layer wins, who is named as the origin, what a name may look like, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from sakd_cli.config import resolve as resolving
from sakd_cli.config.base import summary
from sakd_cli.config.datasets import DATASETS
from sakd_cli.config.effective import router_gamma
from sakd_cli.config.methods import METHODS, FitNetConfig
from sakd_cli.config.networks import NETWORKS, find_network
from sakd_cli.config.options import OPTIONS as TABLE
from sakd_cli.config.resolve import (
    ConfigSource,
    Resolved,
    environment_sources,
    file_source,
    flat,
    nested,
    option_sources,
    preset_source,
    resolve,
    set_sources,
)
from sakd_cli.config.routers import ROUTERS
from sakd_cli.config.train import Train
from sakd_cli.config.training import DistillConfig, PretrainConfig
from sakd_cli.errors import UsageError, unknown

OPTIONS = {name: row.key for name, row in TABLE.items() if row.key}
PAIR = ConfigSource("pair", {"teacher": "resnet20", "student": "resnet8"})


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in OPTIONS:
        monkeypatch.delenv(f"SAKD_{name.upper()}", raising=False)


def distillation(*layers: ConfigSource) -> Resolved:
    return resolve("distill", [PAIR, *layers])


def refusal(*layers: ConfigSource, task: str = "distill") -> UsageError:
    with pytest.raises(UsageError) as caught:
        resolve(task, [PAIR, *layers] if task == "distill" else layers)
    assert "\n" not in caught.value.message
    assert caught.value.exit_code == 2
    return caught.value


def assigned(*assignments: str) -> str:
    return refusal(*set_sources(assignments)).message


def test_a_stronger_layer_wins_and_every_key_knows_its_origin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolving, "preset_folder", lambda: tmp_path)
    below = (
        "# A preset\ntask: distill\ntrain: {epochs: 1, batch_size: 1, lr: 0.1, momentum: 0.1}\nseed: 1\nlog_every: 1\n"
    )
    (tmp_path / "mine.yaml").write_text(below, encoding="utf-8")
    (tmp_path / "file.yaml").write_text("train: {batch_size: 2, lr: 0.2, momentum: 0.2}\nseed: 2\n", encoding="utf-8")
    for name, value in {"BATCH_SIZE": "3", "EPOCHS": "3", "SEED": "3", "DEVICE": ""}.items():
        monkeypatch.setenv(f"SAKD_{name}", value)
    config, origins = distillation(
        preset_source("mine"),
        file_source(tmp_path / "file.yaml", "file file.yaml"),
        *environment_sources(OPTIONS),
        *option_sources({"epochs": "4", "seed": "4", "device": None}),
        *set_sources(["seed=5"]),
    )
    found = {key: (value, origins.get(key)) for key, value in flat(config.model_dump()).items()}
    assert found["log_every"] == (1, "preset mine")
    assert found["train.momentum"] == (0.2, "file file.yaml")
    assert found["train.batch_size"] == (3, "SAKD_BATCH_SIZE")
    assert found["train.epochs"] == (4, "--epochs")
    assert found["seed"] == (5, "--set seed")
    assert found["device"] == ("auto", None), "an empty variable and an option not given say nothing"


def test_one_word_stands_for_a_section() -> None:
    short = {"method": "at", "router": "never", "data": "shapes", "teacher": "wrn40_2"}
    long = {"method": {"name": "at"}, "router": {"name": "never"}, "data": {"name": "shapes"}}
    long["teacher"] = {"source": "wrn40_2"}
    assert distillation(ConfigSource("a", short)) == distillation(ConfigSource("a", long))
    assert distillation(ConfigSource("a", short)).origins["method.name"] == "a"


def test_a_word_chooses_the_class_and_with_it_the_published_defaults() -> None:
    for name, kind in METHODS.items():
        assert distillation(ConfigSource("a", {"method": name})).config.method == kind()
    for name, kind in ROUTERS.items():
        assert distillation(ConfigSource("a", {"router": name})).config.router == kind()
    for name, kind in DATASETS.items():
        assert distillation(ConfigSource("a", {"data": name})).config.data == kind()
    assert all(len(summary(kind)) > 10 for kind in [*METHODS.values(), *ROUTERS.values(), *DATASETS.values()])


def test_the_defaults_are_those_of_the_issue() -> None:
    config = distillation().config
    assert (config.data.name, config.router.name, config.method) == ("cifar100", "adaptive", FitNetConfig())
    assert (config.data.validation, config.train.epochs, config.train.batch_size) == (0.1, 240, 64)


def test_another_name_drops_the_old_names_keys() -> None:
    below = ConfigSource("below", {"method": {"name": "fitnet", "weight": 7.0, "stage": 3}, "router": {"tau": 2.0}})
    assert distillation(below, *set_sources(["method=at"])).config.method == METHODS["at"]()
    assert distillation(below, *set_sources(["method=fitnet"])).config.method.weight == 7.0
    assert distillation(below, *set_sources(["method=at", "method.weight=3"])).config.method.weight == 3.0


def test_what_all_data_sets_share_outlives_a_change_of_the_data_set() -> None:
    below = ConfigSource(
        "below", {"data": {"name": "shapes", "train": 5, "limit": 9, "root": "here", "validation": 0.2}}
    )
    data = distillation(below, *option_sources({"dataset": "cifar10"})).config.data
    assert (data.name, data.limit, data.root, data.validation) == ("cifar10", 9, Path("here").absolute(), 0.2)


def test_pretraining_outlives_a_change_of_the_teacher() -> None:
    below = ConfigSource("below", {"teacher": {"source": "resnet20", "pretrain": True, "epochs": 3}})
    teacher = distillation(below, *option_sources({"teacher": "resnet32"})).config.teacher
    assert (teacher.source, teacher.pretrain, teacher.epochs) == ("resnet32", True, 3)


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("wrn40_2", "wrn_40_2"),
        ("wrn_40_2", "wrn_40_2"),
        ("WRN-40-2", "wrn_40_2"),
        ("wrn-16_1", "wrn_16_1"),
        ("wrn_22_3", "wrn_22_3"),
        ("resnet8", "resnet8"),
        ("ResNet_8", "resnet8"),
        ("RESNET32X4", "resnet32x4"),
        ("resnet50", "ResNet50"),
        ("VGG-13", "vgg13"),
        ("mobilenet_v2", "MobileNetV2"),
        ("ShuffleV1", "ShuffleNetV1"),
    ],
)
def test_a_network_is_found_however_its_name_is_spelled(spelling: str, name: str) -> None:
    assert find_network(spelling).name == name
    assert resolve("pretrain", [ConfigSource("a", {"model": spelling})]).config.model == name


def test_every_network_is_found_by_its_own_name() -> None:
    assert {name: find_network(name).name for name in NETWORKS} == {name: name for name in NETWORKS}


@pytest.mark.parametrize("spelling", ["wrn_41_2", "wrn_4_2", "wrn_40_0"])
def test_a_wide_resnet_of_no_possible_depth_is_refused(spelling: str) -> None:
    with pytest.raises(UsageError, match="6n\\+4"):
        find_network(spelling)


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "1.0e-4", ".0001", "0.0001", "+1e-4"])
def test_a_number_may_be_written_in_any_of_the_usual_ways(text: str) -> None:
    assert distillation(*set_sources([f"train.weight_decay={text}"])).config.train.weight_decay == 1e-4


def test_values_of_set_are_yaml() -> None:
    layers = set_sources(["data.limit=null", "train.milestones=[1, 2]", "runs_dir=a=b", "teacher.pretrain=yes"])
    config = distillation(ConfigSource("below", {"data": {"limit": 4}}), *layers).config
    assert (config.data.limit, config.train.milestones, config.runs_dir) == (None, (1, 2), Path("a=b"))
    assert config.teacher.pretrain is True


@pytest.mark.parametrize("text", ["nonsense", "=3", "a..b=3", ".a=3", "a.=3"])
def test_an_assignment_without_a_key_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="key=value") as caught:
        set_sources([text])
    assert text in caught.value.message


def test_a_value_that_is_no_yaml_is_refused() -> None:
    with pytest.raises(UsageError, match="--set seed"):
        set_sources(["seed={"])


def test_dotted_and_nested_say_the_same() -> None:
    dotted = {"a.b.c": 1, "a.d": [2], "e": {}}
    assert flat(nested(dotted)) == dotted


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("train.epoch=3", "unknown key 'train.epoch'; did you mean 'train.epochs'? (from --set train.epoch)"),
        ("sed=3", "unknown key 'sed'; did you mean 'seed'? (from --set sed)"),
        ("trian.epochs=3", "unknown key 'trian'; did you mean 'train'? (from --set trian.epochs)"),
        ("data.trian=3", "unknown key 'data.trian'; did you mean 'data.train'? (from --set data.trian)"),
        ("method.weigt=3", "unknown key 'method.weigt'; did you mean 'method.weight'? (from --set method.weigt)"),
        ("router.tua=3", "unknown key 'router.tua'; did you mean 'router.tau'? (from --set router.tua)"),
        ("teacher.pretrian=1", "did you mean 'teacher.pretrain'? (from --set teacher.pretrian)"),
        ("method=atx", "unknown method 'atx'; did you mean 'at'? (from --set method)"),
        ("router.name=adaptve", "unknown router 'adaptve'; did you mean 'adaptive'? (from --set router.name)"),
        ("data=shaps", "unknown data set 'shaps'; did you mean 'shapes'? (from --set data)"),
        ("student=resnt8", "student: unknown model 'resnt8'; did you mean 'resnet8'? (from --set student)"),
        ("train={freeze.epochs: 2}", "unknown key 'train.freeze.epochs'; keys are nested here: freeze: {epochs: ...}"),
        ("student=wrn_41_2", "(from --set student)"),
    ],
)
def test_an_unknown_word_is_told_with_the_nearest_one_and_its_origin(assignment: str, message: str) -> None:
    assert message in assigned(assignment)


def test_a_name_that_is_near_to_nothing_is_told_with_all_names() -> None:
    message = assigned("method=zzzzzz")
    assert all(name in message for name in METHODS)
    assert unknown("colour", "mauve", ["red", "blue"]) == "unknown colour 'mauve'; known: blue, red"


@pytest.mark.parametrize(
    ("assignment", "key"),
    [
        ("train.epochs=ten", "train.epochs"),
        ("train.epochs=1.5", "train.epochs"),
        ("train.epochs=0", "train.epochs"),
        ("train.epochs=true", "train.epochs"),
        ("train.epochs=[1]", "train.epochs"),
        ("train.epochs=null", "train.epochs"),
        ("train.lr=.nan", "train.lr"),
        ("train.lr=nan", "train.lr"),
        ("train.lr=.inf", "train.lr"),
        ("train.lr=-0.1", "train.lr"),
        ("train.lr=true", "train.lr"),
        ("train.momentum=1", "train.momentum"),
        ("train.weight_decay=-1", "train.weight_decay"),
        ("train.milestones=3", "train.milestones"),
        ("train.milestones=[5, 3]", "train"),
        ("train.milestones=[3, 3]", "train"),
        ("train.milestones=[0]", "train.milestones.0"),
        ("train.milestones=[240]", "train"),
        ("train=3", "train"),
        ("data.validation=1", "data.validation"),
        ("data.validation=-0.1", "data.validation"),
        ("data.limit=0", "data.limit"),
        ("data=3", "data"),
        ("data.name=[shapes]", "data"),
        ("seed=-1", "seed"),
        ("method=[fitnet]", "method"),
        ("method.stage=0", "method.stage"),
        ("method.temperature=0", "method.temperature"),
        ("method.weight.x=3", "method.weight"),
        ("router.tau=0", "router.tau"),
        ("router.min_teacher_fraction=1.5", "router.min_teacher_fraction"),
        ("teacher=[resnet8]", "teacher"),
        ("teacher.pretrain=maybe", "teacher.pretrain"),
    ],
)
def test_a_value_that_cannot_be_is_told_with_its_key_and_origin(assignment: str, key: str) -> None:
    message = assigned(assignment)
    assert message.startswith(f"{key}: ")
    assert message.endswith(f"(from --set {assignment.partition('=')[0]})")


def test_the_value_that_was_refused_is_shown() -> None:
    assert "got -0.1" in assigned("train.lr=-0.1")
    assert "got 'ten'" in assigned("train.epochs=ten")
    assert "(and 1 more)" in assigned("train.epochs=ten", "train.lr=-1")


@pytest.mark.parametrize(
    ("task", "arguments", "message", "hint"),
    [
        ("pretrain", {}, "model: missing", "the name of a network"),
        ("distill", {"student": "resnet8"}, "teacher: missing", "--teacher"),
        ("distill", {"teacher": "resnet8"}, "student: missing", "--student"),
    ],
)
def test_a_missing_word_is_told_with_its_option(task: str, arguments: dict[str, Any], message: str, hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        resolve(task, [ConfigSource("a", arguments)])
    assert caught.value.message == message
    assert hint in (caught.value.hint or "")


def test_an_unknown_preset_is_told_with_the_nearest() -> None:
    with pytest.raises(UsageError, match="unknown preset 'quikstart'; did you mean 'quickstart'"):
        preset_source("quikstart")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: [", "line 2: not valid YAML"),
        (b"train: {lr: 0.1}\ntrain: {epochs: 3}\n", "line 2: not valid YAML: 'train' stands twice"),
        (b"- 1\n- 2\n", "a mapping of keys"),
        (b"", "a mapping of keys"),
        (b"1: 2\n", "a mapping of keys"),
        (b"a: \xff\xfe\x00", "not a text file"),
        (b"seed: !!python/object:os.system x\n", "not valid YAML"),
    ],
)
def test_a_config_file_that_is_none_is_refused_with_its_name(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(b"\n" * content.startswith(b"a: [") + content)
    with pytest.raises(UsageError, match=message) as caught:
        file_source(path, "file")
    assert str(path) in caught.value.message


@pytest.mark.parametrize("name", ["missing.yaml", "."])
def test_a_config_file_that_is_not_there_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match=r"no such file|is a directory"):
        file_source(tmp_path / name, "file")


@pytest.mark.parametrize(
    ("epochs", "falls"), [(240, (150, 180, 210)), (8, (5, 6, 7)), (4, (2, 3)), (2, (1,)), (1, ()), (60, (37, 45, 52))]
)
def test_the_learning_rate_falls_after_five_six_and_seven_eighths(epochs: int, falls: tuple[int, ...]) -> None:
    assert Train(epochs=epochs).decay_epochs() == falls


def test_milestones_of_ones_own_are_taken_as_they_are() -> None:
    assert Train(epochs=9, milestones=(2, 4)).decay_epochs() == (2, 4)
    assert Train(epochs=9, milestones=()).decay_epochs() == ()


def test_the_published_recipe_can_be_shortened_and_keeps_its_proportions() -> None:
    recipe = resolve("distill", [preset_source("cifar100-sakd")]).config
    assert (recipe.train.epochs, recipe.train.decay_epochs()) == (240, (150, 180, 210))
    short = resolve("distill", [preset_source("cifar100-sakd"), *option_sources({"epochs": "80"})]).config
    assert short.train.decay_epochs() == (50, 60, 70)


@pytest.mark.parametrize("method", ["fitnet", "at", "crd"])
def test_the_published_recipe_on_tiny_imagenet(method: str) -> None:
    tiny = resolve("distill", [preset_source("tiny-imagenet-sakd"), *option_sources({"method": method})]).config
    assert (tiny.data.border, tiny.data.flip, tiny.data.seen.resize) == (0, True, 64)
    assert (tiny.data.mean, tiny.data.std) == ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
    assert router_gamma(tiny) == 2


def test_a_milestone_that_never_comes_is_refused_with_the_reason() -> None:
    message = refusal(*set_sources(["train.milestones=[210]"]), *option_sources({"epochs": "100"})).message
    assert "milestone 210 must come before the last epoch (100)" in message


def test_what_learned_routers_share_outlives_a_change_between_them_only() -> None:
    below = preset_source("quickstart")
    anti = resolve("distill", [below, *option_sources({"router": "anti"})])
    assert (anti.config.router.name, anti.config.router.lr, anti.config.router.teacher_bias) == ("anti", 2e-4, 0)
    always = resolve("distill", [below, *option_sources({"router": "always"})])
    assert [key for key in always.origins if key.startswith("router.")] == ["router.name"]


def test_a_config_of_a_distillation_trains_its_teacher() -> None:
    arguments = resolve("distill", [preset_source("quickstart")]).config.model_dump(mode="json")
    config = resolve("pretrain", [ConfigSource("file", arguments)]).config
    assert (config.model, config.train.epochs) == ("resnet20", 5)


@pytest.mark.parametrize(("method", "router"), [*((m, "adaptive") for m in METHODS), *(("fitnet", r) for r in ROUTERS)])
def test_a_written_config_reads_back_equal(tmp_path: Path, method: str, router: str) -> None:
    settings = ["data.root=/some/where", "train.milestones=[1, 2]", "train.lr=1e-4", "teacher.epochs=3"]
    settings.append("method.ce_weight=1")  # without it `never` is refused where there is none
    config = distillation(ConfigSource("a", {"method": method, "router": router}), *set_sources(settings)).config
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False), encoding="utf-8")
    assert resolve("distill", [file_source(path, "file")]).config == config


def test_a_distillation_says_how_to_pretrain_its_teacher() -> None:
    config, origins = resolve("pretrain", [preset_source("quickstart"), *option_sources({"seed": "4"})])
    assert isinstance(config, PretrainConfig)
    preset = resolve("distill", [preset_source("quickstart")]).config
    assert isinstance(preset, DistillConfig)
    assert (config.model, config.data, config.train) == (preset.teacher.source, preset.data, preset.train)
    assert (config.seed, origins["model"]) == (4, "preset quickstart")


def test_the_teachers_epochs_are_its_own_where_the_distillation_says_so() -> None:
    written = ConfigSource("file", {"task": "distill", "teacher": {"source": "wrn40_2", "epochs": 3}, "method": "kd"})
    config = resolve("pretrain", [written]).config
    assert (config.model, config.train.epochs) == ("wrn_40_2", 3)
    teachers = distillation(ConfigSource("y", {"train": {"epochs": 7}})).config.pretraining()
    again = resolve("pretrain", [ConfigSource("x", teachers)])
    assert (again.config.model, again.config.train.epochs) == ("resnet20", 7)


def test_a_pretraining_is_no_distillation() -> None:
    message = refusal(ConfigSource("file mine.yaml", {"task": "pretrain", "model": "resnet8"})).message
    assert message == "file mine.yaml is written for 'pretrain', not for 'distill'"


def test_a_config_cannot_be_changed_after_it_was_read() -> None:
    config = distillation().config
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 3
    with pytest.raises(ValueError, match="frozen"):
        config.method.weight = 3.0
