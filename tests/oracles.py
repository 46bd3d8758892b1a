"""Reference figures for the tests: where they are read, the formula that fills weights and images, the comparison.

The full vectors lie beside the checkout, in `shared/oracles` (its README explains every figure). Where that folder is
absent, the small copies committed in `tests/figures` stand in, so that the suite still means something; a group with no
copy has no cases then, and pytest skips what is parametrised by it. `python tests/oracles.py` writes the copies anew;
it needs the full vectors.
"""

import functools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import safe_open
from torch import Tensor, nn

FULL = Path(__file__).parents[2] / "shared" / "oracles"
SMALL = Path(__file__).parent / "figures"
_PRIME = 2147483647

Case = dict[str, Any]
Module = TypeVar("Module", bound=nn.Module)


@functools.cache
def oracle(group: str) -> tuple[list[Case], dict[str, Tensor]]:
    """The cases of `losses`, `masked`, `models`, `adapters` or `routing`, and their tensors by `<id>/<part>/<name>`."""
    full, small = FULL / f"{group}.json", SMALL / f"{group}.json"
    if full.is_file():
        with safe_open(FULL / f"{group}.safetensors", framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return json.loads(full.read_text(encoding="utf-8"))["cases"], tensors
    if small.is_file():
        found = json.loads(small.read_text(encoding="utf-8"))
        tensors = {
            name: torch.tensor(fields["values"], dtype=getattr(torch, fields["dtype"])).reshape(fields["shape"])
            for name, fields in found["tensors"].items()
        }
        return found["cases"], tensors
    return [], {}


def tensors_of(group: str, case: str, part: str) -> dict[str, Tensor]:
    """One part (`in`, `f64`, `f32`) of one case, by bare name."""
    start = f"{case}/{part}/"
    return {name.removeprefix(start): tensor for name, tensor in oracle(group)[1].items() if name.startswith(start)}


def numbers(numel: int, kind: int, salt: int) -> Tensor:
    """The sequence r(i) of the README: float64 in (-1, 1), exact integers modulo a prime."""
    i = torch.arange(numel, dtype=torch.int64)
    h = ((i * i) % _PRIME) * 1103515245 % _PRIME + i * 747796405 % _PRIME
    h = (h + numel * 277803737 % _PRIME + (16 * salt + kind) * 1013904223 % _PRIME) % _PRIME
    return 2.0 * ((h.double() + 0.5) / _PRIME) - 1.0


@torch.no_grad()
def fill(module: Module, salt: int) -> Module:
    """Fill convolutions, linear layers and batch norms by the formula, in place; other parameters stay as they are."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            _put(layer.weight, 0, salt, _gain(layer.weight), 0.0)
            if layer.bias is not None:
                _put(layer.bias, 5, salt, 0.05, 0.0)
        elif isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            assert layer.running_mean is not None
            assert layer.running_var is not None
            _put(layer.weight, 1, salt, 0.1, 1.0)
            _put(layer.bias, 2, salt, 0.05, 0.0)
            _put(layer.running_mean, 3, salt, 0.05, 0.0)
            _put(layer.running_var, 4, salt, 0.2, 1.0)
            if layer.num_batches_tracked is not None:
                layer.num_batches_tracked.zero_()
    return module


def image(shape: tuple[int, int, int, int], salt: int) -> Tensor:
    """The image batch [N, C, H, W] of the formula, in float64, holding numbers that float32 can hold."""
    n, c, h, w = shape
    noise = numbers(n * c * h * w, 6, salt).reshape(shape)
    offset = numbers(n * c, 7, salt).reshape(n, c, 1, 1)
    return (1.25 * noise + 1.5 * offset).float().double()


def samples(tensor: Tensor, most: int = 32) -> Tensor:
    """Entries of the flattened tensor at floor(j * numel / k), k = min(numel, most)."""
    count = min(tensor.numel(), most)
    places = torch.arange(count, dtype=torch.int64) * tensor.numel() // max(count, 1)
    return tensor.detach().reshape(-1)[places]


def stats(tensor: Tensor) -> Tensor:
    """[mean, population standard deviation, largest absolute value, L2 norm]."""
    flat = tensor.detach().reshape(-1)
    return torch.stack([flat.mean(), flat.std(correction=0), flat.abs().max(), flat.norm()])


def gap(ours: Tensor, reference: Tensor) -> float:
    """Largest difference over the reference's largest entry (over 1 where that is zero); shapes must agree."""
    assert ours.shape == reference.shape, f"shape {tuple(ours.shape)}, reference {tuple(reference.shape)}"
    if reference.numel() == 0:
        return 0.0
    ours, reference = ours.detach().cpu().double(), reference.detach().cpu().double()
    return ((ours - reference).abs().max() / (reference.abs().max() or 1.0)).item()


def close(ours: Tensor | float, reference: Tensor | float, rtol: float, atol: float = 0.0) -> bool:
    """Assert max|a - b| <= rtol max|b| + atol; True, so that `assert close(...)` reads well. NaN is never close."""
    a, b = torch.as_tensor(ours).detach().cpu().double(), torch.as_tensor(reference).detach().cpu().double()
    assert a.shape == b.shape, f"shape {tuple(a.shape)}, reference {tuple(b.shape)}"
    if b.numel():
        difference, scale = (a - b).abs().max().item(), b.abs().max().item()
        assert difference <= rtol * scale + atol, f"differs by {difference:.3g} at scale {scale:.3g}, rtol {rtol:g}"
    return True


def _gain(weight: Tensor) -> float:
    """Factor of r for a weight: sqrt(3 G / fan)."""
    if weight.dim() == 2:
        gain = 6.0
    elif weight.shape[1] == 1:
        gain = 3.0
    else:
        gain = 1.0 if weight.shape[2] == 1 else 2.0 * min(1.0, weight.shape[0] / 512)
    return float((3.0 * gain / (weight.numel() / weight.shape[0])) ** 0.5)


def _put(tensor: Tensor, kind: int, salt: int, factor: float, offset: float) -> None:
    tensor.copy_((offset + factor * numbers(tensor.numel(), kind, salt)).float().reshape(tensor.shape))


# What the small copies keep: inputs; figures of at most this many entries as they are, without samples of single maps
# (their statistics are kept); logits and outputs of adapters as samples, named `<name>_samples`; facts that tests read.
_WHOLE = 32
_SAMPLED = ("logits", "eval_out", "train_out", "train_grad_x")
_WORDS = {"tensors", "logit_check", "numerical_noise_f64", "same_in_other_references_max_rel_diff", "module", "run_in"}


def write_small(group: str, cases: Iterable[Case]) -> None:
    """Write the copy of these cases to `tests/figures`; 13 digits, since figures are compared to 1e-9."""
    kept: dict[str, Any] = {}
    cases = list(cases)
    for case in cases:
        for part in ("in", "f64", "f32"):
            for name, tensor in tensors_of(group, case["id"], part).items():
                if name.endswith(_SAMPLED):
                    kept[f"{case['id']}/{part}/{name}_samples"] = _words(samples(tensor))
                elif part == "in" or (tensor.numel() <= _WHOLE and not name.endswith("_samples")):
                    kept[f"{case['id']}/{part}/{name}"] = _words(tensor)
    facts = [{key: value for key, value in case.items() if key not in _WORDS} for case in cases]
    lines = [json.dumps(name) + ": " + json.dumps(fields, separators=(",", ":")) for name, fields in kept.items()]
    text = '{"cases": ' + json.dumps(facts) + ',\n"tensors": {\n' + ",\n".join(lines) + "\n}}\n"
    (SMALL / f"{group}.json").write_text(text, encoding="utf-8")


def write_routing() -> None:
    """Write the routed step's copy: all its float64 figures, and the inputs that the formula does not give."""
    cases, tensors = oracle("routing")
    kept = {
        name: _words(tensor)
        for name, tensor in tensors.items()
        if "/f64/" in name or name.endswith(("in/uniform", "in/target"))
    }
    facts = [{key: value for key, value in case.items() if key not in _WORDS} for case in cases]
    (SMALL / "routing.json").write_text(json.dumps({"cases": facts, "tensors": kept}) + "\n", encoding="utf-8")


def _words(tensor: Tensor) -> dict[str, Any]:
    digits = 13 if tensor.dtype == torch.float64 else 9
    values = [float(f"{value:.{digits}g}") for value in tensor.reshape(-1).tolist()]
    return {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape), "values": values}


if __name__ == "__main__":
    write_routing()
    write_small("models", oracle("models")[0])
    few = {"conv_regressor/same", "conv_regressor/double", "conv_regressor/grow", "embed/linear"}
    write_small("adapters", [case for case in oracle("adapters")[0] if case["id"] in few])
