"""Every registered network against the reference figures, the published table and the model contract."""

import functools
from typing import Any

import pytest
import torch
from oracles import close, fill, image, oracle, samples, stats, tensors_of
from torch import Tensor, nn
from torch.nn import functional as F

from sakd_cli.config.networks import NETWORKS, find_network
from sakd_cli.errors import UsageError
from sakd_cli.models.cost import cost
from sakd_cli.models.spot import aligned, spots_at
from sakd_cli.models.staged import StagedModel, frozen_view
from sakd_cli.models.table import FAMILIES, create

# sakd spec, section 4.2: parameters and MMACs for 100 classes at 32x32, width of the pooled vector, maps as "CxH".
RESNET, X4, WRN1, WRN2 = (
    "16x32 16x32 32x16 64x8",
    "32x32 64x32 128x16 256x8",
    "16x32 16x32 32x16 64x8",
    "16x32 32x32 64x16 128x8",
)
TABLE = {
    "resnet8": (83_892, 12.5, 64, RESNET),
    "resnet14": (181_108, 26.7, 64, RESNET),
    "resnet20": (278_324, 40.8, 64, RESNET),
    "resnet32": (472_756, 69.1, 64, RESNET),
    "resnet44": (667_188, 97.4, 64, RESNET),
    "resnet56": (861_620, 125.8, 64, RESNET),
    "resnet110": (1_736_564, 253.2, 64, RESNET),
    "resnet8x4": (1_233_540, 177.1, 256, X4),
    "resnet32x4": (7_433_860, 1083.0, 256, X4),
    "wrn_16_1": (180_916, 26.7, 64, WRN1),
    "wrn_16_2": (703_284, 101.1, 128, WRN2),
    "wrn_40_1": (569_780, 83.3, 64, WRN1),
    "wrn_40_2": (2_255_156, 327.6, 128, WRN2),
    "wrn_28_10": (36_536_884, 5243.4, 640, "16x32 160x32 320x16 640x8"),
}
CASES = [case for case in oracle("models")[0] if case["arch"] in NETWORKS]
# Networks small enough to be computed in a test; the others are checked on the meta device.
LIGHT = [name for name in NETWORKS if name in TABLE and TABLE[name][1] < 130 and not name.startswith("resnet1")]


def ids(case: dict[str, Any]) -> str:
    return str(case["id"])


@functools.cache
def ghost(name: str) -> StagedModel:
    """The network without its numbers: nothing is initialised and nothing is computed."""
    with torch.device("meta"):
        return create(name, 100)


def filled(case: dict[str, Any], dtype: torch.dtype) -> tuple[StagedModel, Tensor, Tensor]:
    """The case's network, its images and its labels."""
    with torch.device("meta"):
        model = create(case["arch"], case["num_classes"])
    model = fill(model.to_empty(device="cpu").to(dtype), case["salt"])
    x = image((case["batch"], *case["input"][1:]), case["salt"]).to(dtype)
    return model, x, (7 * torch.arange(case["batch"]) + 3) % case["num_classes"]


def figures(model: StagedModel, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Every figure of one case by the oracle's names."""
    found: dict[str, Tensor] = {}
    with torch.no_grad():
        features = model.eval().features(x)
    found |= {"eval_logits": features.logits, "eval_feat_stats": torch.stack([stats(f) for f in features.stages])}
    found |= {f"eval_feat{k}_samples": samples(f) for k, f in enumerate(features.stages)}

    x = x.clone().requires_grad_()
    features = model.train().features(x)
    loss = F.cross_entropy(features.logits, labels)
    loss.backward()
    found |= {"train_logits": features.logits, "train_ce": loss}
    found |= {"train_feat_stats": torch.stack([stats(f) for f in features.stages])}
    found |= {f"train_feat{k}_samples": samples(f) for k, f in enumerate(features.stages)}
    assert x.grad is not None
    gradient = torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.grad is not None])
    found |= {"train_input_grad_stats": stats(x.grad), "train_input_grad_samples": samples(x.grad, 64)}
    found |= {"train_param_grad_l2": gradient.norm(), "train_param_grad_l1": gradient.abs().sum()}

    for which in ("running_mean", "running_var"):
        values = torch.cat([getattr(m, which) for m in model.modules() if isinstance(m, nn.BatchNorm2d)])
        found |= {f"after_{which}_sum": values.sum(), f"after_{which}_sq": values.square().sum()}
    with torch.no_grad():
        found["after_eval_logits"] = model.eval()(x)
    short = {f"{name}_samples": samples(found[name]) for name in found if name.endswith("logits")}
    return found | short


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_figures_in_double_precision(case: dict[str, Any]) -> None:
    found = figures(*filled(case, torch.float64))
    wanted = {n: t for n, t in tensors_of("models", case["id"], "f64").items() if "preact" not in n}
    assert len(wanted) >= 10
    for name, reference in wanted.items():
        close(found[name], reference, 1e-8 if "grad" in name else 1e-9)


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_figures_in_single_precision(case: dict[str, Any]) -> None:
    model, x, labels = filled(case, torch.float32)
    with torch.no_grad():
        found = {"eval_logits": model.eval()(x), "train_logits": model.train()(x)}
        found |= {"train_ce": F.cross_entropy(found["train_logits"], labels), "after_eval_logits": model.eval()(x)}
    found |= {f"{name}_samples": samples(found[name]) for name in found if name.endswith("logits")}
    for name, reference in tensors_of("models", case["id"], "f32").items():
        close(found[name], reference, 1e-5 if name.startswith("eval") else 1e-4)


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_counted_facts(case: dict[str, Any]) -> None:
    with torch.device("meta"):
        model = create(case["arch"], case["num_classes"])
    side = case["input"][-1]
    assert cost(model, side) == (case["parameters"], case["macs_per_image"])
    assert len(list(model.parameters())) == case["parameter_tensors"]
    assert sum(b.numel() for b in model.buffers()) == case["buffer_elements"]
    assert [list(info.shape(side)) for info in model.infos] == [shape[1:] for shape in case["feature_shapes"]]
    for classes, parameters in case["parameters_by_num_classes"].items():
        with torch.device("meta"):
            assert sum(p.numel() for p in create(case["arch"], int(classes)).parameters()) == parameters


def test_all_oracle_networks_are_registered() -> None:
    assert {case["arch"] for case in oracle("models")[0]} <= set(NETWORKS)
    assert len(CASES) == 15


@pytest.mark.parametrize("name", TABLE)
def test_published_table(name: str) -> None:
    parameters, mmacs, pooled, maps = TABLE[name]
    found = cost(ghost(name), 32)
    assert (found.parameters, round(found.macs / 1e6, 1)) == (parameters, mmacs)
    *declared, last = [info.shape(32) for info in ghost(name).infos]
    assert last == (pooled,)
    assert " ".join(f"{c}x{h}" for c, h, _ in declared) == maps


@pytest.mark.parametrize("side", [32, 64])
@pytest.mark.parametrize("name", NETWORKS)
def test_shapes_are_as_declared(name: str, side: int) -> None:
    model = ghost(name).eval()
    with torch.no_grad():
        features = model.features(torch.empty(2, 3, side, side, device="meta"))
    assert [tuple(f.shape[1:]) for f in features.stages] == [info.shape(side) for info in model.infos]
    assert [info.kind for info in model.infos] == ["map"] * (len(model.infos) - 1) + ["embedding"]
    assert features.logits.shape == (2, 100)
    assert features.embedding is features.stages[-1]


@pytest.mark.parametrize("name", NETWORKS)
def test_groups_of_blocks_are_sequences(name: str) -> None:
    model = ghost(name)
    assert model.name == name
    assert model.family in FAMILIES
    assert all(isinstance(model.stages[k], nn.Sequential) for k in model.map_stages)


@pytest.mark.parametrize("name", LIGHT)
def test_every_cut_gives_the_same_numbers(name: str) -> None:
    model = fill(create(name, 7), 3).eval()
    x = image((2, 3, 32, 32), 3).float()
    with torch.no_grad():
        features = model.features(x)
        ends = [x, *features.stages, features.logits]
        for start, begin in enumerate(ends):
            for stop in range(start, len(ends)):
                assert torch.equal(model.run(begin, start, stop), ends[stop]), (start, stop)
        assert torch.equal(model(x), features.logits)


@pytest.mark.parametrize("name", NETWORKS)
def test_every_parameter_gets_a_gradient(name: str) -> None:
    light = name in LIGHT
    model = create(name, 5) if light else ghost(name)
    x = torch.randn(
        2, 3, 32, 32, device="cpu" if light else "meta", generator=torch.Generator().manual_seed(0) if light else None
    )
    gradients = torch.autograd.grad(model.train()(x).square().sum(), list(model.parameters()))
    assert all(g.shape == p.shape for g, p in zip(gradients, model.parameters(), strict=True))
    assert not light or all(g.isfinite().all() for g in gradients)


def test_initial_weights_follow_the_generator() -> None:
    def weights() -> list[Tensor]:
        torch.manual_seed(5)
        return list(create("resnet8", 10).parameters())

    assert all(torch.equal(a, b) for a, b in zip(weights(), weights(), strict=True))


@pytest.mark.parametrize(
    ("spelled", "name"),
    [("wrn40_2", "wrn_40_2"), ("WRN-40-2", "wrn_40_2"), ("ResNet8x4", "resnet8x4"), ("resnet-20", "resnet20")],
)
def test_spellings(spelled: str, name: str) -> None:
    assert find_network(spelled).name == name


def test_any_wide_resnet_can_be_built() -> None:
    assert create("wrn_22_3", 10).infos[-1].channels == 192


@pytest.mark.parametrize("name", ["resnet21", "wrn_17_2", "wrn_16_0", "vgg9", ""])
def test_unknown_names_are_refused(name: str) -> None:
    with pytest.raises(UsageError):
        create(name, 10)


def test_frozen_view_shares_weights_and_sees_changes() -> None:
    model = create("resnet8", 10)
    view = frozen_view(model)
    assert not any(p.requires_grad for p in view.parameters())
    assert all(p.requires_grad for p in model.parameters())
    mine, theirs = view.state_dict(), model.state_dict()
    assert all(mine[key].data_ptr() == theirs[key].data_ptr() for key in theirs)

    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    F.cross_entropy(model.train()(x), torch.arange(4)).backward()
    optimizer.step()
    assert model.training
    assert not view.training
    assert torch.equal(view(x), model.eval()(x))


def test_frozen_view_lets_gradients_reach_its_input() -> None:
    view = frozen_view(create("resnet8", 10))
    x = torch.randn(1, 3, 32, 32, requires_grad=True)
    view(x).sum().backward()
    assert x.grad is not None
    assert all(p.grad is None for p in view.parameters())


@pytest.mark.parametrize("pair", [("resnet20", "resnet56"), ("wrn_16_2", "wrn_40_2"), ("resnet8x4", "resnet32x4")])
def test_equally_many_stages_are_paired_in_order(pair: tuple[str, str]) -> None:
    student, teacher = map(ghost, pair)
    assert aligned(student, teacher) == [(k, k) for k in student.map_stages]


def test_spots_carry_the_shapes_of_one_sample() -> None:
    student, teacher = ghost("resnet8"), ghost("resnet8x4")
    spots = spots_at(student, teacher, [(2, 2), (4, 4)], 32)
    assert [(s.name, s.kind, s.student_shape, s.teacher_shape) for s in spots] == [
        ("stage2", "map", (32, 16, 16), (128, 16, 16)),
        ("pool", "embedding", (64,), (256,)),
        ("logits", "logits", (100,), (100,)),
    ]
    assert (spots[-1].student, spots[-1].teacher) == (5, 5)
