"""The published pairs: every method can be built on them, and the router's side has the published sizes."""

from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

from sakd_cli.config.methods import METHODS
from sakd_cli.config.resolve import ConfigSource, nested, resolve
from sakd_cli.config.routers import AdaptiveConfig
from sakd_cli.errors import UsageError
from sakd_cli.models.spot import align_stages, resolve_stage_map
from sakd_cli.models.staged import StagedModel
from sakd_cli.models.table import create
from sakd_cli.routing import table as routers
from sakd_cli.routing.table import Fixed
from sakd_cli.runs.build import assemble
from sakd_cli.tasks.distill import DistillTask

CLASSES, SIDE = 100, 32
# (teacher, student): width of the policy's input, then (lift, drop) parameters of at, fitnet, sp, rkd (spec, 3.2)
SIZES = {
    ("resnet56", "resnet20"): (128, (5712, 5712), (1120, 1120), (4288, 4288), (4160, 4160)),
    ("resnet110", "resnet32"): (128, (5712, 5712), (1120, 1120), (4288, 4288), (4160, 4160)),
    ("resnet32x4", "resnet8x4"): (512, (87360, 87360), (16768, 16768), (66304, 66304), (65792, 65792)),
    ("vgg13", "vgg8"): (1024, (610432, 610432), (66304, 66304), (263680, 263680), (262656, 262656)),
    ("wrn_40_2", "wrn_16_2"): (256, (22176, 22176), (4288, 4288), (16768, 16768), (16512, 16512)),
    ("vgg13", "MobileNetV2"): (1792, (2686080, 1536392), (8960, 8288), (2622976, 1475520), (655872, 656640)),
    ("ResNet50", "MobileNetV2"): (
        3328,
        (12430592, 6987144),
        (263680, 147552),
        (10491904, 5899200),
        (2623488, 2622720),
    ),
    ("ResNet50", "vgg8"): (2560, (12070144, 7245952), (2098688, 1180416), (1054720, 1050112), (1050624, 1049088)),
    ("resnet32x4", "resnet32"): (320, (22848, 21840), (4480, 4192), (17152, 16576), (16640, 16448)),
    ("wrn_40_2", "ShuffleNetV1"): (1088, (2581152, 1456560), (491712, 277920), (1966464, 1108800), (123008, 123840)),
}
SAME_FAMILY = list(SIZES)[:5]
OTHER_DEPTHS = [("resnet32x4", "vgg8"), ("resnet32x4", "MobileNetV2"), ("ResNet50", "resnet20"), ("vgg13", "wrn_16_2")]
PAIRS = [*sorted(set(SIZES) - {("resnet110", "resnet32")}), *OTHER_DEPTHS]  # which is resnet56-resnet20, only longer


@cache
def network(name: str, role: str, device: str) -> StagedModel:
    """Built once, with BatchNorms as they begin; no other number of a network is looked at when a task is built."""
    with torch.device("meta"):
        made = create(name, CLASSES)
    if device != "meta":
        made.to_empty(device=device)
        for module in made.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.reset_parameters()
    return made.requires_grad_(False).eval() if role == "teacher" else made


def task_of(teacher: str, student: str, method: str, **more: Any) -> DistillTask:
    arguments = {"teacher.source": teacher, "student": student, "method.name": method, **more}
    config = resolve("distill", [ConfigSource("test", nested(arguments))]).config
    device = "cpu" if method == "ofd" else "meta"  # ofd reads the teacher's BatchNorms when it is built
    with torch.device(device):
        return assemble(config, network(student, "student", device), network(teacher, "teacher", device), SIDE)


def size(modules: nn.ModuleList) -> int:
    return sum(parameter.numel() for parameter in modules.parameters())


@pytest.mark.parametrize("pair", sorted(SIZES), ids="-".join)
def test_policy_and_adapters_have_the_published_sizes(pair: tuple[str, str]) -> None:
    width, *sizes = SIZES[pair]
    for method, expected in zip(("at", "fitnet", "sp", "rkd"), sizes, strict=True):
        task = task_of(*pair, method)
        assert task.graft is not None
        assert (size(task.graft.to_teacher), size(task.graft.to_student)) == expected
        assert task.router.policy.in_features == width
        assert task.router.policy.out_features == 2 * len(task.spots)


@pytest.mark.parametrize("pair", sorted(SIZES), ids="-".join)
def test_the_prior_is_on_for_the_pairs_it_was_published_for(
    pair: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[routers.Pair] = []
    monkeypatch.setattr(routers, "build", lambda config, pair: seen.append(pair) or Fixed([[1.0] * pair.spots]))
    task_of(*pair, "kd")
    assert seen[0].prior == (10 if pair in SAME_FAMILY else 0)


def test_the_prior_is_what_every_teacher_score_begins_with() -> None:
    for bias in (10.0, 0.0):
        pair = routers.Pair(spots=3, teacher=64, student=64, prior=bias)
        policy = routers.build(AdaptiveConfig(), pair).policy
        assert policy.bias[0::2].mean().item() == pytest.approx(bias, abs=0.2)
        assert policy.bias[1::2].mean().item() == pytest.approx(0.0, abs=0.2)


@pytest.mark.parametrize("pair", sorted(SIZES), ids="-".join)
def test_a_warmup_has_the_published_rate_of_the_pair_or_the_users(pair: tuple[str, str]) -> None:
    published = 0.05 if pair == ("ResNet50", "vgg8") else 0.01
    assert METHODS["ft"]().lr_of_warmup(*pair, 0.1) == published
    assert METHODS["ft"](warmup_lr=0.03).lr_of_warmup(*pair, 0.1) == 0.03
    assert METHODS["ab"]().lr_of_warmup(*pair, 0.1) == 0.1


ONE_WIDTH = SAME_FAMILY  # they have equally many channels at every stage


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"crd"}))
@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_every_method_is_built_on_every_pair_or_says_why_not(pair: tuple[str, str], method: str) -> None:
    why_not = {
        **dict.fromkeys(("ab", "ofd"), "has none" if "MobileNetV2" in pair else None),
        **dict.fromkeys(("fsp", "kdsvd"), None if pair in ONE_WIDTH else "must be equal|equal channels"),
    }.get(method)
    if why_not:
        with pytest.raises(UsageError, match=why_not):
            task_of(*pair, method)
        return
    task = task_of(*pair, method)
    assert task.spots[-1].kind == "logits"
    assert len(task.groups()[1].parameters) > 0


@pytest.mark.parametrize("pair", OTHER_DEPTHS, ids="-".join)
def test_stages_of_networks_of_other_depths_are_paired_by_stride_and_rise(pair: tuple[str, str]) -> None:
    with torch.device("meta"):
        teacher, student = (create(name, CLASSES) for name in pair)
    pairs = align_stages(student, teacher)
    assert len(pairs) == min(len(student.map_stages), len(teacher.map_stages))
    for column in zip(*pairs, strict=True):
        assert list(column) == sorted(set(column))
    assert align_stages(teacher, student) == [(t, s) for s, t in pairs]


def test_a_stage_map_is_the_users_and_is_checked() -> None:
    with torch.device("meta"):
        teacher, student = create("vgg13", CLASSES), create("wrn_16_2", CLASSES)
    assert resolve_stage_map(student, teacher, [(1, 2), (3, 4)]) == [(1, 2), (3, 4)]
    for wrong in ([(1, 2), (3, 2)], [(0, 1)], [(4, 1)], [(1, 5)], []):
        with pytest.raises(UsageError, match="must rise and lie in"):
            resolve_stage_map(student, teacher, wrong)
    task = task_of("vgg13", "wrn_16_2", "at", stage_map=[[1, 2], [3, 4]])
    assert [(spot.student, spot.teacher) for spot in task.spots[:-1]] == [(1, 2), (3, 4)]
