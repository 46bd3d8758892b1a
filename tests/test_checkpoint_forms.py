"""Checkpoints as trainers write them: equal tensors, or one right line; never code, never half of a network.

Each form is written as its trainer does, with the same kinds of objects beside the weights.
"""

import argparse
import datetime
import functools
import pathlib
import pickle
import uuid
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable
from decimal import Decimal
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from test_import import foreign
from test_import_command import published
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from sakd_cli.errors import UsageError
from sakd_cli.models.dialects import DIALECTS, translate_name
from sakd_cli.models.external import library_call
from sakd_cli.models.foreign import load_foreign

Tensors = dict[str, Tensor]
NAME = "resnet8"


class Plain(nn.Module):
    """A module whose state dict has the published names of resnet8, for the trainers' own wrappers."""

    def __init__(self, tensors: Tensors) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            *path, last = name.split(".")
            parent: nn.Module = self
            for part in path:
                if part not in dict(parent.named_children()):
                    parent.add_module(part, nn.Module())
                parent = parent.get_submodule(part)
            if tensor.is_floating_point() and "running" not in last:
                parent.register_parameter(last, nn.Parameter(tensor.clone()))
            else:
                parent.register_buffer(last, tensor.clone())


@cache
def tensors() -> Tensors:
    """The weights, under the names that RepDistiller gives them; a resnet8 has those of resnet20 with fewer blocks."""
    return published(NAME, 3)


@cache
def others() -> Tensors:
    return {name: tensor + 1 if tensor.is_floating_point() else tensor for name, tensor in tensors().items()}


@cache
def teacher() -> Tensors:
    return foreign("resnet20")[0]


def prefixed(prefix: str, of: Tensors | None = None) -> Tensors:
    return {prefix + name: tensor for name, tensor in (tensors() if of is None else of).items()}


def split(body: str, head: str) -> Tensors:
    """The last layer `fc` elsewhere than the others."""
    return {head + n[3:] if n.startswith("fc.") else body + n: tensor for n, tensor in tensors().items()}


def trained(wrap: Callable[[nn.Module], nn.Module] = lambda module: module) -> tuple[nn.Module, Any, Any]:
    """A module with its optimizer after a step and its schedule."""
    module = wrap(Plain(tensors()))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.0, momentum=0.9)
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return module, optimizer, torch.optim.lr_scheduler.MultiStepLR(optimizer, [150, 180], 0.1)


def options(**more: Any) -> argparse.Namespace:
    """What argparse gives a training script."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--path", type=pathlib.Path, default=pathlib.Path("save"))
    parser.set_defaults(iterations=[150, 180, 210], model=NAME, betas=(0.9, 0.999), device=torch.device("cpu"), **more)
    return parser.parse_args([])


def ema() -> nn.Module:
    averaged = AveragedModel(Plain(tensors()), multi_avg_fn=get_ema_multi_avg_fn(0.9))
    averaged.update_parameters(Plain(others()))
    with torch.no_grad():
        for name, parameter in averaged.module.named_parameters():
            parameter.copy_(others()[name])
        for name, buffer in averaged.module.named_buffers():
            buffer.copy_(others()[name])
    return averaged


def repdistiller(accuracy: Any) -> dict[str, Any]:
    return {"epoch": 240, "model": tensors(), "accuracy": accuracy, "optimizer": trained()[1].state_dict()}


def reference() -> dict[str, Any]:
    """As torchvision's references/classification writes it."""
    module, optimizer, schedule = trained()
    checkpoint = {"model": module.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 5, "args": options()}
    return checkpoint | {"lr_scheduler": schedule.state_dict(), "scaler": torch.amp.GradScaler("cpu").state_dict()}


def lightning(prefix: str = "model.", **more: Any) -> dict[str, Any]:
    return {
        "epoch": 3,
        "global_step": 120,
        "pytorch-lightning_version": "2.4.0",
        "state_dict": OrderedDict(prefixed(prefix) | more),
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 4}}}},
        "callbacks": {"ModelCheckpoint{'monitor': None}": {"best_model_score": torch.tensor(0.7), "dirpath": "/x"}},
        "optimizer_states": [trained()[1].state_dict()],
        "lr_schedulers": [],
        "hparams_name": "kwargs",
        "hyper_parameters": {"lr": 0.1, "args": options()},
    }


def numpy_state() -> dict[str, Any]:
    return {"numpy": np.random.default_rng(0).bit_generator.state, "legacy": np.random.RandomState(0).get_state()}


# What is written, which weights it holds: "own", "other" (the averaged ones), and the key that is asked for.
FORMS: dict[str, tuple[Callable[[], Any], str, str | None]] = {
    "bare": (tensors, "own", None),
    "ordered, of a module": (lambda: Plain(tensors()).state_dict(), "own", None),
    "DataParallel": (lambda: nn.DataParallel(Plain(tensors())).state_dict(), "own", None),
    "compiled": (lambda: torch.compile(Plain(tensors())).state_dict(), "own", None),
    "compiled in DataParallel": (lambda: nn.DataParallel(torch.compile(Plain(tensors()))).state_dict(), "own", None),
    "DataParallel compiled": (lambda: prefixed("_orig_mod.module."), "own", None),
    "a compiled part": (
        lambda: {n.replace("layer2.", "layer2._orig_mod."): t for n, t in tensors().items()},
        "own",
        None,
    ),
    "FSDP": (lambda: prefixed("_fsdp_wrapped_module."), "own", None),
    "RepDistiller, float": (lambda: repdistiller(72.5), "own", None),
    "RepDistiller, numpy scalar": (lambda: repdistiller(np.float64(72.5)), "own", None),
    "RepDistiller, numpy float32": (lambda: repdistiller(np.float32(72.5)), "own", None),
    "RepDistiller, 0-d tensor": (lambda: repdistiller(torch.tensor(72.5)), "own", None),
    "RepDistiller, tensor of one": (lambda: repdistiller(torch.tensor([72.5])), "own", None),
    "RepDistiller, best": (lambda: {"epoch": 3, "model": tensors(), "best_acc": torch.tensor(7.5)}, "own", None),
    "RepDistiller, last": (lambda: {"opt": options(), "model": tensors()}, "own", None),
    "mdistiller, student": (lambda: {"model": tensors()}, "own", None),
    "mdistiller, full": (
        lambda: {"epoch": 9, "model": prefixed("module.student.") | prefixed("module.teacher.", teacher())},
        "own",
        None,
    ),
    "mdistiller, full, two alike, student": (
        lambda: {"model": prefixed("module.student.") | prefixed("module.teacher.", others())},
        "own",
        "student",
    ),
    "mdistiller, full, two alike, teacher": (
        lambda: {"model": prefixed("module.student.") | prefixed("module.teacher.", others())},
        "other",
        "module.teacher",
    ),
    "timm": (
        lambda: {"epoch": 1, "arch": NAME, "state_dict": tensors(), "version": 2, "args": options(), "metric": 0.7},
        "own",
        None,
    ),
    "timm, numpy metric, with averaged": (
        lambda: {"state_dict": tensors(), "state_dict_ema": others(), "args": options(), "metric": np.float64(0.7)},
        "own",
        None,
    ),
    "timm, the averaged": (lambda: {"state_dict": tensors(), "state_dict_ema": others()}, "other", "state_dict_ema"),
    "torchvision": (reference, "own", None),
    "torchvision with averaged": (lambda: reference() | {"model_ema": ema().state_dict()}, "own", None),
    "torchvision, the averaged": (lambda: reference() | {"model_ema": ema().state_dict()}, "other", "model_ema"),
    "only averaged": (lambda: {"model_ema": ema().state_dict()}, "other", None),
    "Lightning": (lightning, "own", None),
    "Lightning, net": (lambda: lightning("net."), "own", None),
    "Lightning, compiled": (lambda: lightning("model._orig_mod."), "own", None),
    "Lightning, with a loss of its own": (
        lambda: lightning(**{"criterion.weight": torch.ones(5), "val_acc.tp": torch.tensor(3)}),
        "own",
        None,
    ),
    "DeepSpeed": (
        lambda: {"module": tensors(), "optimizer": None, "global_steps": 7, "ds_config": {"zero": 1}, "mp_world": 1},
        "own",
        None,
    ),
    "DeepSpeed of a Lightning module": (lambda: {"module": prefixed("model."), "dp_world_size": 1}, "own", None),
    "under two keys": (lambda: {"checkpoint": {"model": tensors()}, "args": options()}, "own", None),
    "a pair": (lambda: (tensors(), trained()[1].state_dict()), "own", None),
    "parameters of nn": (lambda: {n: nn.Parameter(t) if t.ndim > 1 else t for n, t in tensors().items()}, "own", None),
    "random states": (lambda: {"model": tensors(), "rng": torch.get_rng_state(), "np": numpy_state()}, "own", None),
    "a simple namespace": (lambda: {"model": tensors(), "cfg": SimpleNamespace(lr=1)}, "own", None),
    "counts": (lambda: {"model": tensors(), "history": defaultdict(list, loss=[1.0, 2.0])}, "own", None),
    "beside the tensors": (lambda: tensors() | {"epoch": 3, "best_acc": torch.tensor(0.5)}, "own", None),
    "without counters": (
        lambda: {"net": {n: t for n, t in tensors().items() if "tracked" not in n}, "acc": 91.2, "epoch": 199},
        "own",
        None,
    ),
    "a linear probe's head beside its backbone": (lambda: {"state_dict": split("backbone.", "fc.")}, "own", None),
    "OpenMMLab": (
        lambda: {"meta": {"CLASSES": ("a", "b"), "time": "now"}, "state_dict": split("backbone.", "head.fc.")},
        "own",
        None,
    ),
    "a head in front of nothing": (lambda: split("", "head.fc."), "own", None),
    "when, who and how": (
        lambda: {
            "model": tensors(),
            "when": datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC),
            "last": deque([1.0], maxlen=5),
            "id": uuid.UUID(int=3),
            "make": functools.partial(dict, lr=Decimal("0.1")),
        },
        "own",
        None,
    ),
    "a state dict in a model in a file": (lambda: {"model": {"state_dict": tensors(), "arch": NAME}}, "own", None),
    "averaged, asked for": (lambda: {"model": tensors(), "ema": {"module": others()}}, "other", "ema.module"),
    "half precision": (
        lambda: {"model": {n: t.half() if t.is_floating_point() else t for n, t in tensors().items()}},
        "half",
        None,
    ),
}


def assert_loaded(file: Path, expected: Tensors, key: str | None, told: list[str]) -> None:
    found = load_foreign(file, NAME, 100, key=key, tell=told.append).state_dict()
    for name, tensor in found.items():
        theirs = expected.get(translate_name(name, DIALECTS["resnet"][0]), torch.tensor(0))
        assert torch.equal(tensor, theirs.to(tensor.dtype)) or "tracked" in name, name


# The older file format too, once for every kind of content.
WRITTEN = [(form, legacy) for form, (_, whose, _) in FORMS.items() for legacy in (False, True)[: 1 + (whose == "own")]]


@pytest.mark.parametrize(("form", "legacy"), WRITTEN)
def test_a_form_loads_to_equal_tensors(tmp_path: Path, form: str, legacy: bool) -> None:
    make, whose, key = FORMS[form]
    torch.save(make(), tmp_path / "a.pth", _use_new_zipfile_serialization=not legacy)
    half = {name: one.half() if one.is_floating_point() else one for name, one in tensors().items()}
    assert_loaded(tmp_path / "a.pth", {"own": tensors(), "other": others(), "half": half}[whose], key, [])
    assert argparse.Namespace not in torch.serialization.get_safe_globals(), "nothing is allowed for longer"


def test_safetensors_with_a_prefix(tmp_path: Path) -> None:
    save_file(prefixed("module."), tmp_path / "a.safetensors")
    assert_loaded(tmp_path / "a.safetensors", tensors(), None, [])


def test_what_timms_own_saver_writes(tmp_path: Path) -> None:
    utils = pytest.importorskip("timm.utils")
    module, optimizer, _ = trained()
    averaged = utils.ModelEmaV3(module, decay=0.5)
    averaged.module.load_state_dict(others())
    saver = utils.CheckpointSaver(
        module, optimizer, args=options(), model_ema=averaged, checkpoint_dir=str(tmp_path), recovery_dir=str(tmp_path)
    )
    saver.save_checkpoint(0, metric=1.0)
    told: list[str] = []
    assert_loaded(tmp_path / "model_best.pth.tar", tensors(), None, told)
    assert told[0] == "raw weights taken (state_dict); averaged ones (EMA) are there too: --key state_dict_ema"
    assert told[1].startswith("left in the file, beside the weights: ")
    for name in ("epoch", "arch", "optimizer", "args", "metric"):
        assert name in told[1]
    assert_loaded(tmp_path / "model_best.pth.tar", others(), "state_dict_ema", [])


@pytest.mark.parametrize("name", ["torchvision/resnet18", "timm/resnet10t"])
def test_a_librarys_network_in_a_trainers_checkpoint(tmp_path: Path, name: str) -> None:
    pytest.importorskip(name.partition("/")[0])
    call = library_call(name, 5, 32)
    assert call is not None
    network = call()
    checkpoint = {"state_dict": {f"model.{n}": t for n, t in network.state_dict().items()}, "args": options()}
    torch.save(checkpoint, tmp_path / "a.ckpt")
    assert load_foreign(tmp_path / "a.ckpt", name, 5).plain_state_dict().keys() == network.state_dict().keys()
    found = load_foreign(tmp_path / "a.ckpt", name, 5).plain_state_dict()
    assert all(torch.equal(found[n], t) for n, t in network.state_dict().items())


def without(name: str) -> Tensors:
    return {key: tensor for key, tensor in tensors().items() if key != name}


LATE = "layer3.0.conv2.weight"
REFUSED: dict[str, tuple[Callable[[], Any], str, str | None]] = {
    "a tensor is missing": (lambda: {"model": without(LATE), "args": options()}, f"missing: {LATE}", None),
    "the first is missing": (lambda: prefixed("module.", without("conv1.weight")), "missing: conv1.weight", None),
    "the head is missing": (lambda: {"state_dict": prefixed("model.", without("fc.bias"))}, "missing: fc.bias", None),
    "one too many": (
        lambda: {"model": tensors() | {"layer4.0.conv1.weight": torch.zeros(1)}},
        "left over: layer4.0.conv1.weight",
        None,
    ),
    "the head of another network": (
        lambda: (
            prefixed("student.", {n: t for n, t in tensors().items() if "fc" not in n})
            | prefixed("teacher.", teacher())
        ),
        "missing: fc.weight, fc.bias",
        None,
    ),
    "two heads": (
        lambda: split("body.", "one.") | {"two.weight": torch.ones(100, 64), "two.bias": torch.ones(100)},
        "missing: fc.weight, fc.bias",
        None,
    ),
    "a head for other vectors": (
        lambda: split("body.", "one.") | {"one.weight": torch.ones(100, 32)},
        "missing: fc.weight, fc.bias",
        None,
    ),
    "half averaged, half raw": (
        lambda: {
            "a": {n: t for n, t in tensors().items() if "layer" in n},
            "ema": {n: t for n, t in tensors().items() if "layer" not in n},
        },
        "missing: ",
        None,
    ),
    "two alike": (
        lambda: {"model": prefixed("module.student.") | prefixed("module.teacher.", others())},
        "holds 2 networks that fit: model.module.student, model.module.teacher",
        None,
    ),
    "another network": (lambda: {"model": teacher()}, f"is no {NAME}; ", None),
    "a key that is not there": (
        lambda: {"model": tensors()},
        "has no weights under 'state_dict_ema'",
        "state_dict_ema",
    ),
    "asked for the wrong one": (
        lambda: {"model": prefixed("module.student.") | prefixed("module.teacher.", teacher())},
        f"is no {NAME}; ",
        "teacher",
    ),
    "a tensor twice": (lambda: tensors() | {"module.fc.bias": torch.ones(100)}, "left over: module.fc.bias", None),
    "a whole module": (lambda: Plain(tensors()), "more than plain tensors; it was not loaded", None),
    "a function beside": (lambda: {"model": tensors(), "loss": torch.nn.functional.relu}, "it was not loaded", None),
    "a class beside": (lambda: {"model": tensors(), "kind": pickle.Pickler}, "it was not loaded", None),
    "weights as arrays": (lambda: {"model": {n: t.numpy() for n, t in tensors().items()}}, "no state dict", None),
    "only an optimizer": (lambda: trained()[1].state_dict(), f"is no {NAME}; ", None),
    "other classes": (
        lambda: {"model": tensors() | {"fc.weight": torch.ones(7, 64), "fc.bias": torch.ones(7)}},
        "is for 7 classes, not for 100",
        None,
    ),
}


@pytest.mark.parametrize("form", REFUSED)
def test_a_form_is_refused_in_one_line(tmp_path: Path, form: str) -> None:
    make, text, key = REFUSED[form]
    torch.save(make(), tmp_path / "a.pth")
    with pytest.raises(UsageError) as caught:
        load_foreign(tmp_path / "a.pth", NAME, 100, key=key)
    assert text in caught.value.message, caught.value.message
    assert "\n" not in caught.value.message + (caught.value.hint or "")
    if "two alike" in form:
        assert "--key model.module.teacher" in str(caught.value.hint)


class Canary:
    """Any object whose creation would run code."""

    def __reduce__(self) -> Any:
        return (pathlib.Path.touch, (pathlib.Path("canary"),))


def test_what_stands_for_an_object_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model": tensors(), "args": options(canary=Canary())}, "a.pth")
    with pytest.raises(UsageError, match="it was not loaded"):
        load_foreign(Path("a.pth"), NAME, 100)
    assert not Path("canary").exists()
    torch.load("a.pth", weights_only=False)
    assert Path("canary").exists(), "the file does what it is said to do"
