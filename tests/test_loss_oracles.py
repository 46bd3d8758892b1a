"""Every distiller's value and gradients against the reference figures of the groups `losses` and `masked`.

float32 is compared with the float64 figures too, within what the reference itself loses in float32. `python
tests/test_loss_oracles.py` writes the small copies anew that stand in where the full vectors are not there.
"""

import json
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import pytest
import torch
from oracles import SMALL, Case, close, fill, oracle, samples, tensors_of
from torch import Tensor, nn

from sakd_cli.batch import Batch
from sakd_cli.config.methods import (
    ABConfig,
    ATConfig,
    CCConfig,
    CRDConfig,
    DKDConfig,
    FitNetConfig,
    FSPConfig,
    FTConfig,
    KDConfig,
    KDSVDConfig,
    NSTConfig,
    OFDConfig,
    PKTConfig,
    ReviewKDConfig,
    RKDConfig,
    SPConfig,
    VIDConfig,
)
from sakd_cli.distillers.distiller import Distiller, Warmup
from sakd_cli.distillers.kdsvd import KDSVD
from sakd_cli.distillers.logits import DKD, KD
from sakd_cli.distillers.maps import AT, NST, OFD, VID, FitNet, ReviewKD
from sakd_cli.distillers.relations import CC, CRD, PKT, RKD, SP
from sakd_cli.distillers.warmups import AB, FSP, FT, Paraphraser, translator
from sakd_cli.models.spot import Spot
from sakd_cli.models.staged import Features

Spots = tuple[Spot, ...]
Given = dict[str, Tensor]
EMPTY = torch.empty(0)


def fitnet(spots: Spots, case: Case, given: Given) -> Distiller:
    """The vectors' student maps have passed the regressor already."""
    distiller = FitNet((), FitNetConfig())
    distiller.spots, distiller.regressors = spots, nn.ModuleList([nn.Identity() for _ in spots])
    distiller.active = (True,) * len(spots)
    return distiller


def rkd(spots: Spots, case: Case, given: Given) -> Distiller:
    return RKD(spots, RKDConfig(distance=case["constants"]["w_d"], angle=case["constants"]["w_a"]))


def dkd(spots: Spots, case: Case, given: Given) -> Distiller:
    constants = case["constants"]
    fields = {"target": constants["alpha"], "others": constants["beta"], "temperature": constants["T"]}
    return DKD(spots, DKDConfig(**fields))


def cc(spots: Spots, case: Case, given: Given) -> Distiller:
    """The vectors are embedded already."""
    distiller = CC(spots, CCConfig())
    distiller.students = distiller.teachers = nn.ModuleList([nn.Identity() for _ in spots])
    return distiller


def vid(spots: Spots, case: Case, given: Given) -> Distiller:
    distiller = VID(spots, VIDConfig())
    for k, gaussian in enumerate(distiller.gaussians):
        end = str(k) if "w00" in given else ""
        for layer, name in ((0, "w0"), (2, "w1"), (4, "w2")):
            gaussian.mean[layer].weight = given[name + end] = nn.Parameter(given[name + end])
        if case.get("log_scale") == "at its initial value":
            assert close(gaussian.log_scale.detach(), given["log_scale"], 1e-6)
        gaussian.log_scale = given["log_scale" + end] = nn.Parameter(given["log_scale" + end])
    return distiller


def ft(spots: Spots, case: Case, given: Given) -> Distiller:
    """The vectors are translated and paraphrased already."""
    constants = case["constants"]
    distiller = FT(spots, FTConfig(name="ft", factor_power=constants["p1"], power=constants["p2"]))
    distiller.translate = distiller.warmup.encode = nn.Identity()
    return distiller


def reviewkd(spots: Spots, case: Case, given: Given) -> Distiller:
    """The vectors are fused already."""
    distiller = ReviewKD(spots, ReviewKDConfig())
    distiller.fused = lambda maps: maps
    return distiller


def ofd(spots: Spots, case: Case, given: Given) -> Distiller:
    """The vectors have passed the connector already."""
    distiller = OFD(spots, OFDConfig(), [(given["bn_weight"], given["bn_bias"])])
    distiller.connectors = nn.ModuleList([nn.Identity()])
    return distiller


# Method as the vectors call it -> our distiller for a case.
OURS: dict[str, Callable[[Spots, Case, Given], Distiller]] = {
    "KD": lambda spots, case, given: KD(spots, KDConfig(temperature=case["constants"]["T"])),
    "DKD": dkd,
    "FitNet": fitnet,
    "AT": lambda spots, case, given: AT(spots, ATConfig(power=case["constants"]["p"])),
    "SP": lambda spots, case, given: SP(spots, SPConfig()),
    "NST": lambda spots, case, given: NST(spots, NSTConfig()),
    "RKD": rkd,
    "PKT": lambda spots, case, given: PKT(spots, PKTConfig()),
    "CC": cc,
    "VID": vid,
    "FT": ft,
    "ReviewKD": reviewkd,
    "OFD": ofd,
}
AT_LOGITS = {"KD", "DKD"}
# Cases whose call or figures are of another form; they have tests of their own.
OWN_TEST = {"CRD", "AB", "FSP", "KDSVD"}


def cases(group: str, methods: Iterable[str]) -> list[Any]:
    chosen = [case for case in oracle(group)[0] if case["method"] in methods]
    return [pytest.param(group, case, id=f"{group}-{case['id']}") for case in chosen]


class Probe(NamedTuple):
    """A distiller, what it is called with, and the tensors whose gradients are compared, by the vectors' names."""

    distiller: Distiller
    call: tuple[Features, Features, Tensor, Batch]
    leaves: Given


def probe(group: str, case: Case, dtype: torch.dtype) -> Probe:
    given = tensors_of(group, case["id"], "in")
    given = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in given.items()}
    ends = [name[1:] for name in sorted(given) if name[0] == "s" and name[1:].isdigit()] or [""]
    ours, theirs = ([given[side + end] for end in ends] for side in "st")
    n, shapes = len(ours[0]), [(s.shape[1:], t.shape[1:]) for s, t in zip(ours, theirs, strict=True)]
    spots = tuple(Spot(str(k), "map", k, k, *both) for k, both in enumerate(shapes))
    distiller = OURS[case["method"]](spots, case, given).to(dtype)
    leaves = {name: given[name].requires_grad_() for name in case["grad_of"]}
    mask = given.get("masks", given.get("mask", torch.ones(n)).reshape(n, 1).expand(n, len(ends)))
    batch = Batch(images=EMPTY, labels=given.get("target", torch.zeros(n).long()), index=torch.arange(n), noise=EMPTY)
    if case["method"] in AT_LOGITS:
        features = Features((), ours[0]), Features((), theirs[0])
    else:
        features = Features(tuple(ours), EMPTY, tuple(ours)), Features(tuple(theirs), EMPTY, tuple(theirs))
    return Probe(distiller, (*features, mask.to(dtype).T, batch), leaves)


def tolerance(case: Case, name: str, dtype: torch.dtype) -> tuple[float, float]:
    """rtol and atol of the vectors' README."""
    if dtype == torch.float64:
        return 1e-9, 1e-12
    nothing = "exact_value_zero" in case or 0 in torch.tensor(case.get("n_selected", 1)).reshape(-1).tolist()
    return max(1e-5, 10 * case["f32_rel_err"].get(name, 0.0)), 1e-6 if nothing else 1e-9


def compare(case: Case, ours: Given, figures: Given, dtype: torch.dtype) -> None:
    """Every figure of a case; `_samples` stands in for a whole tensor in the small copies."""
    for name, figure in figures.items():
        tensor = ours[name.removesuffix("_samples")]
        tensor = samples(tensor) if name.endswith("_samples") else tensor
        assert close(tensor, figure, *tolerance(case, name.removesuffix("_samples"), dtype)), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize(("group", "case"), cases("losses", OURS) + cases("masked", OURS))
def test_value_and_gradients_agree_with_the_reference(group: str, case: Case, dtype: torch.dtype) -> None:
    torch.set_default_dtype(dtype)
    try:
        distiller, call, leaves = probe(group, case, dtype)
    finally:
        torch.set_default_dtype(torch.float32)
    losses = distiller(*call)
    assert losses.shape == (len(distiller.spots),)
    gradients = dict(zip(leaves, torch.autograd.grad(losses.sum(), list(leaves.values())), strict=True))
    if "reference_is_nan" in case:
        assert losses.sum() == 0
        assert all(torch.count_nonzero(gradient) == 0 for gradient in gradients.values())
        return
    figures = tensors_of(group, case["id"], "f64")
    ours = {"loss": losses.sum(), "parts": losses} | {f"g_{name}": gradient for name, gradient in gradients.items()}
    ours |= {name.replace("margin0", "margin"): buffer for name, buffer in distiller.named_buffers()}
    assert len(figures) >= 1 + len(leaves)
    compare(case, ours, figures, dtype)


def contrast(case: Case, given: Given, dtype: torch.dtype) -> tuple[CRD, Given]:
    """Our CRD with a case's embeddings, banks and constants; and its embeddings by the vectors' names."""
    constants = case["constants"]
    (n, width_s), width_t = given.get("f_s", given.get("s")).shape, given["embed_t_w"].shape[1]
    fields = {"width": constants["feat_dim"], "negatives": constants["K"], "momentum": constants["momentum"]}
    config = CRDConfig(**fields, contrast_temperature=constants["T"])
    spot = Spot("pooled", "embedding", 0, 0, (width_s,), (width_t,))
    distiller = CRD((spot,), config, torch.arange(constants["n_data"]), n).to(dtype)
    leaves: Given = {}
    for side, embed in (("s", distiller.embed_s.linear), ("t", distiller.embed_t.linear)):
        leaves |= {f"embed_{side}_w": embed.weight, f"embed_{side}_b": embed.bias}
        getattr(distiller, f"bank_{side}").copy_(given[f"memory_{side}"])
    with torch.no_grad():
        for name, parameter in leaves.items():
            parameter.copy_(given[name])
    return distiller, leaves


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize(("group", "case"), cases("losses", {"CRD"}) + cases("masked", {"CRD"}))
def test_crd_agrees_with_the_reference(group: str, case: Case, dtype: torch.dtype) -> None:
    """Value, gradients, Z and banks; two calls in a row where the vectors have a second one."""
    given = tensors_of(group, case["id"], "in")
    given = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in given.items()}
    distiller, leaves = contrast(case, given, dtype)
    calls = [("1", "f_s", "f_t", ""), ("2", "f_s_2", "f_t_2", "_2")] if group == "losses" else [("", "s", "t", "")]
    weight = given.get("mask", torch.ones(len(given["idx"]))).to(dtype)
    ours: Given = {}
    for call, s, t, end in calls:
        rows, leaves[s], before = given[f"contrast_idx{end}"], given[s].requires_grad_(), distiller.bank_s.clone()
        assert torch.equal(rows[:, 0], given[f"idx{end}"])
        ours[f"loss{call}"] = distiller.contrast(given[s], given[t], weight, rows)
        changed = (distiller.bank_s != before).any(dim=1).nonzero().flatten()
        assert set(changed.tolist()) == set(rows[weight > 0, 0].tolist())
        for side in "st":
            ours[f"memory_{side}_after{call}"] = getattr(distiller, f"bank_{side}").clone()
            ours[f"z_{side}_after"] = getattr(distiller, f"z_{side}").clone()
    ours["loss"] = sum(ours[f"loss{call}"] for call, *_ in calls)
    gradients = torch.autograd.grad(ours["loss"], list(leaves.values()))
    ours |= {f"g_{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}
    compare(case, ours, tensors_of(group, case["id"], "f64"), dtype)


WARMUPS: dict[str, Callable[[Spots, Case], Warmup]] = {
    "AB": lambda spots, case: AB(spots, ABConfig(name="ab", margin=case["constants"]["margin"])),
    "FSP": lambda spots, case: FSP(spots, FSPConfig(name="fsp")),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize(("group", "case"), cases("losses", WARMUPS))
def test_what_warms_up_agrees_with_the_reference(group: str, case: Case, dtype: torch.dtype) -> None:
    given = tensors_of(group, case["id"], "in")
    maps = {name: tensor.to(dtype).requires_grad_() for name, tensor in given.items()}
    ours, theirs = (tuple(maps[name] for name in sorted(maps) if name[0] == side) for side in "st")
    spots = tuple(Spot(str(k), "map", k, k, s.shape[1:], s.shape[1:]) for k, s in enumerate(ours))
    terms = WARMUPS[case["method"]](spots, case)(Features(ours, EMPTY, ours), Features(theirs, EMPTY, theirs))
    gradients = torch.autograd.grad(terms.sum(), ours)
    found = {"loss": terms.sum(), "parts": terms} | {f"g_s{k}": gradient for k, gradient in enumerate(gradients)}
    compare(case, found, tensors_of(group, case["id"], "f64"), dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize(("group", "case"), cases("losses", {"KDSVD"}))
@pytest.mark.parametrize("lapack", [False, True], ids=["products", "lapack"])
def test_kdsvd_agrees_with_the_reference_where_its_signs_are_taken(
    lapack: bool, group: str, case: Case, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = tensors_of(group, case["id"], "f64")
    signs = [figures.pop(name) for name in sorted(figures) if name.startswith("teacher_v")]
    for name in [name for name in figures if name.startswith("teacher_s")]:
        figures.pop(name)
    given = {name: tensor.to(dtype) for name, tensor in tensors_of(group, case["id"], "in").items()}
    ours, theirs = (tuple(given[name] for name in sorted(given) if name[0] == side) for side in "st")
    spots = tuple(Spot(str(k), "map", k, k, s.shape[1:], s.shape[1:]) for k, s in enumerate(ours))
    distiller, left = KDSVD(spots, KDSVDConfig(directions=case["constants"]["k"])), iter(signs)
    distiller.dynamic_shapes = lapack

    def as_theirs(v: Tensor) -> Tensor:
        wanted = next(left).to(v)
        assert close((v * wanted).sum(dim=1).abs(), torch.ones_like(v[:, 0]), 1e-5)
        return torch.where((v * wanted).sum(dim=1, keepdim=True) < 0, -v, v)

    monkeypatch.setattr("sakd_cli.distillers.kdsvd.oriented", as_theirs)
    for s in ours:
        s.requires_grad_()
    batch = Batch(images=EMPTY, labels=EMPTY, index=EMPTY, noise=EMPTY)
    weight = torch.ones(len(spots), len(ours[0]), dtype=dtype)
    losses = distiller(Features(ours, EMPTY), Features(theirs, EMPTY), weight, batch)
    found = {"loss": losses.sum(), "parts": losses[1:]}
    found |= {f"g_s{k}": gradient for k, gradient in enumerate(torch.autograd.grad(losses.sum(), ours))}
    compare(case, found, figures, dtype)


@pytest.mark.parametrize("case", [case for case in oracle("adapters")[0] if case["id"][:5] in ("parap", "trans")])
def test_the_modules_of_factor_transfer_agree_with_the_reference(case: Case) -> None:
    x, figures = tensors_of("adapters", case["id"], "in")["x"].double().requires_grad_(), {}
    if case["id"] == "translator/map":
        module: nn.Module = translator(case["student_shape"][1], case["teacher_shape"][1], 0.5)
        run: Callable[[Tensor], Tensor] = module
    else:
        module = paraphraser = Paraphraser((Spot("", "map", 0, 0, (), tuple(case["teacher_shape"][1:])),), 0.5)
        whole = case["id"] == "paraphraser/reconstruction"
        run = lambda x: paraphraser.decode(paraphraser.encode(x)) if whole else paraphraser.encode(x)  # noqa: E731
    assert sum(parameter.numel() for parameter in module.parameters()) == case["parameters"]
    fill(module, case["salt"]).double()
    figures["eval_out"] = module.eval() and run(x)
    figures["train_out"] = out = module.train() and run(x)
    wave = torch.arange(out.numel(), dtype=torch.float64).cos().reshape(out.shape)
    (figures["train_grad_x"],) = torch.autograd.grad((out * wave).sum(), [x])
    norms = [layer for layer in module.modules() if isinstance(layer, nn.BatchNorm2d)]
    for name in ("running_mean", "running_var"):
        figures[f"after_{name}"] = torch.cat([getattr(norm, name) for norm in norms]) if norms else EMPTY
    compare(case, figures, tensors_of("adapters", case["id"], "f64"), torch.float64)


def test_every_method_of_the_vectors_is_compared() -> None:
    found = {case["method"] for group in ("losses", "masked") for case in oracle(group)[0]}
    assert found <= set(OURS) | OWN_TEST


# At least one small case per method, so that the copies stay small.
FEW = {
    "losses": (
        "reviewkd/hcl_one_b1",
        "kd/b1_c10_t4",
        "kd/b2_c10_t4_extreme",
        "dkd/b17_c5_t1",
        "fitnet/vec_b2",
        "at/eq_b1",
        "nst/eq_b1",
        "vid/eq_b1",
        "ft/eq_b1",
        "cc/b2_d32",
        "cc/b1_d8",
        "rkd/both_b8",
        "pkt/b8",
        "pkt/b2",
        "crd/b2",
        "ab/one_b1",
        "ofd/b1",
        "kdsvd/three_b2",
    ),
    "masked": ("kd/b8_random", "sp/b8_random", "cc/b8_random", "rkd/b8_random", "pkt/b8_random"),
}


def write_small() -> None:
    """Inputs as they are, figures as at most 32 samples."""
    for group, names in FEW.items():
        kept = {}
        chosen = [case for case in oracle(group)[0] if case["id"] in names]
        for case in chosen:
            inputs, figures = (tensors_of(group, case["id"], part) for part in ("in", "f64"))
            tensors = {f"in/{name}": tensor for name, tensor in inputs.items()}
            for name, tensor in figures.items():
                tensors[f"f64/{name}_samples" if tensor.numel() > 32 else f"f64/{name}"] = samples(tensor).reshape(
                    tensor.shape if tensor.numel() <= 32 else (32,)
                )
            for name, tensor in tensors.items():
                values = [float(f"{value:.{13 if 'f64' in name else 9}g}") for value in tensor.reshape(-1).tolist()]
                fields = {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}
                kept[f"{case['id']}/{name}"] = fields | {"values": values}
        facts = ("id", "method", "constants", "n_selected", "f32_rel_err", "grad_of")
        facts += ("exact_value_zero", "reference_is_nan")
        written = [{key: case[key] for key in facts if key in case} for case in chosen]
        text = json.dumps({"cases": written, "tensors": kept}, separators=(",", ":"))
        (SMALL / f"{group}.json").write_text(text.replace('},"', '},\n"') + "\n", encoding="utf-8")


if __name__ == "__main__":
    write_small()
