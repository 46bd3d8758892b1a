"""Spots and the adapters between their two sides: reference figures, geometry, sizes, which stages belong together."""

import functools
from typing import Any

import pytest
import torch
from oracles import close, fill, oracle, samples, tensors_of
from torch import Tensor, nn

from sakd_cli.models.adapters import ConvAdapter, LinearAdapter, adapter, mean_pool
from sakd_cli.models.spot import align_stages, spots_at
from sakd_cli.models.staged import StagedModel
from sakd_cli.models.table import create

CASES = [
    case for case in oracle("adapters")[0] if case["id"].startswith("conv_regressor/") or case["id"] == "embed/linear"
]


@functools.cache
def ghost(name: str) -> StagedModel:
    """The network without its numbers."""
    with torch.device("meta"):
        return create(name, 100)


def built(case: dict[str, Any]) -> nn.Module:
    if case["id"] == "embed/linear":
        return LinearAdapter((20,), (12,))
    return ConvAdapter(tuple(case["source_shape"][1:]), tuple(case["target_shape"][1:]), relu=case["relu"])


def figures(module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Every figure of one case by the oracle's names."""
    with torch.no_grad():
        found = {"eval_out": module.eval()(x)}
    x = x.clone().requires_grad_()
    out = module.train()(x)
    places = torch.arange(out.numel(), dtype=x.dtype).reshape(out.shape)
    (gradient,) = torch.autograd.grad((out * places.cos()).sum(), x)
    found |= {"train_out": out, "train_grad_x": gradient}
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            assert norm.running_mean is not None
            assert norm.running_var is not None
            found |= {"after_running_mean": norm.running_mean, "after_running_var": norm.running_var}
    return found | {f"{name}_samples": samples(tensor) for name, tensor in found.items()}


@pytest.mark.parametrize("part", ["f64", "f32"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case["id"])
def test_figures(case: dict[str, Any], part: str) -> None:
    dtype = torch.float64 if part == "f64" else torch.float32
    x = tensors_of("adapters", case["id"], "in")["x"].to(dtype)
    found = figures(fill(built(case), case["salt"]).to(dtype), x)
    wanted = tensors_of("adapters", case["id"], part)
    assert len(wanted) >= 3
    for name, reference in wanted.items():
        if part == "f64":
            close(found[name], reference, 1e-9, 1e-12)
        else:
            noise = case["f32_rel_err"][name.removesuffix("_samples")]
            close(found[name], reference, max(1e-5, 10 * noise), 1e-9)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["id"])
def test_parameters(case: dict[str, Any]) -> None:
    assert sum(p.numel() for p in built(case).parameters()) == case["parameters"]


@pytest.mark.parametrize(
    ("source", "target", "geometry"),
    [
        ((4, 8, 8), (6, 4, 4), "conv 3x3 /2"),
        ((4, 4, 4), (6, 8, 8), "up-conv 4x4 x2"),
        ((4, 4, 4), (6, 4, 4), "conv 1x1"),
        ((4, 9, 9), (6, 4, 4), "conv 6x6"),
        ((4, 3, 3), (6, 8, 8), "up-conv 4x4 x2"),
        ((4, 2, 2), (6, 8, 8), "up-conv 4x4 x4"),
        ((4, 2, 2), (6, 1, 1), "conv 3x3 /2"),
        ((4, 8, 6), (6, 5, 5), "conv 4x2"),
    ],
)
def test_geometry(source: tuple[int, ...], target: tuple[int, ...], geometry: str) -> None:
    made = adapter(source, target)
    assert made.geometry == geometry
    assert made(torch.randn(3, *source)).shape == (3, *target)


def test_pooled_vectors_get_a_linear_layer() -> None:
    made = adapter((5,), (7,))
    assert isinstance(made, LinearAdapter)
    assert made(torch.randn(3, 5)).shape == (3, 7)


def test_relu_can_be_left_out() -> None:
    x = torch.randn(8, 4, 4, 4)
    assert ConvAdapter((4, 4, 4), (4, 4, 4))(x).min() == 0
    assert ConvAdapter((4, 4, 4), (4, 4, 4), relu=False)(x).min() < 0


@pytest.mark.parametrize("pair", [("resnet20", "resnet56"), ("MobileNetV2", "vgg13"), ("ShuffleNetV1", "wrn_40_2")])
def test_equally_many_stages_are_paired_in_order(pair: tuple[str, str]) -> None:
    student, teacher = map(ghost, pair)
    assert align_stages(student, teacher) == [(k, k) for k in student.map_stages]


def test_spots_carry_the_shapes_of_one_sample() -> None:
    student, teacher = ghost("resnet8"), ghost("resnet8x4")
    spots = spots_at(student, teacher, [(2, 2), (4, 4)], 32)
    assert [(s.name, s.kind, s.student_shape, s.teacher_shape) for s in spots] == [
        ("stage2", "map", (32, 16, 16), (128, 16, 16)),
        ("pool", "embedding", (64,), (256,)),
        ("logits", "logits", (100,), (100,)),
    ]
    assert (spots[-1].student, spots[-1].teacher) == (5, 5)


@pytest.mark.parametrize(
    ("student", "teacher", "pairs"),
    [
        ("vgg8", "resnet32x4", [(1, 1), (2, 2), (4, 3)]),
        ("resnet8x4", "vgg13", [(1, 1), (2, 2), (3, 4)]),
        ("MobileNetV2", "resnet32x4", [(1, 1), (2, 2), (3, 3)]),
        ("ShuffleNetV1", "ResNet50", [(1, 2), (2, 3), (3, 4)]),
    ],
)
def test_different_numbers_of_stages_are_paired_by_stride(
    student: str, teacher: str, pairs: list[tuple[int, int]]
) -> None:
    assert align_stages(ghost(student), ghost(teacher)) == pairs


def test_lifting_from_vgg_to_mobilenet_depends_on_the_side() -> None:
    """At 64x64 the last group of VGG pools, so that all four maps are of one size."""
    student, teacher = ghost("MobileNetV2"), ghost("vgg13")
    for side, last in ((32, "up-conv 4x4 x2"), (64, "conv 1x1")):
        spots = spots_at(student, teacher, align_stages(student, teacher), side)[:-1]
        assert [adapter(s.student_shape, s.teacher_shape).geometry for s in spots] == ["conv 1x1"] * 3 + [last]


@pytest.mark.parametrize(
    ("height", "width", "side"), [(8, 8, 4), (8, 4, 2), (7, 7, 3), (9, 9, 4), (7, 5, 4), (3, 3, 5)]
)
def test_means_over_windows_are_those_of_adaptive_pooling(height: int, width: int, side: int) -> None:
    """A gradient of adaptive pooling has no deterministic form on CUDA; ours must not be one."""
    x = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x.requires_grad_()
    ours, theirs = mean_pool(x, side), nn.functional.adaptive_avg_pool2d(x, side)
    assert "Adaptive" not in str(ours.grad_fn)
    wave = torch.arange(ours.numel()).cos().reshape(ours.shape)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)
    gradients = [torch.autograd.grad((y * wave).sum(), x) for y in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-14)
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 1e-2)):
        given = x.detach().to(dtype)
        expected = nn.functional.adaptive_avg_pool2d(given.double(), side)
        assert mean_pool(given, side).dtype == dtype
        assert (mean_pool(given, side).double() - expected).abs().max() <= tolerance * expected.abs().max()
