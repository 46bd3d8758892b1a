"""Networks of torchvision, of timm and of the user's own code, cut into stages (`models/cutting.py`).

`torchvision/NAME` and `timm/NAME` are built by their library, for the classes and the side of the images; transformers
get that side as their image size. `package.module:factory` is called with `num_classes=N` and returns an nn.Module or a
StagedModel; its module is imported from the installed packages or from the folder that sakd is run in.
`my.py:factory` is the same in a file.
"""

import importlib
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sakd_cli.config import code
from sakd_cli.config.base import of_file
from sakd_cli.config.preprocessing import HUB, ImageSize, height_width, of_timm, timm_config_of
from sakd_cli.errors import UsageError, download_error, first_line, unknown
from sakd_cli.models.cutting import cut
from sakd_cli.models.staged import StagedModel


class Call(NamedTuple):
    """How a library builds a network: `module.function(entry, name=value, ...)`."""

    module: str
    function: str
    entry: str
    arguments: dict[str, Any]

    def __call__(self) -> nn.Module:
        return getattr(importlib.import_module(self.module), self.function)(self.entry, **self.arguments)

    def __str__(self) -> str:
        arguments = "".join(f", {name}={value!r}" for name, value in self.arguments.items())
        return f"{self.module}.{self.function}({self.entry!r}{arguments})"


def from_library(name: str, num_classes: int, side: ImageSize, *, entry: str, drop_path: float = 0.0) -> StagedModel:
    """A network of torchvision or timm with fresh weights. UsageError where there is none or it cannot be cut.

    drop_path  largest chance that a residual block is skipped in training; UsageError where the network has no such
    """
    library = name.partition("/")[0]
    calls = _CALLS[library](entry, num_classes, side)
    if not drop_path:
        return _cut(name, library, num_classes, side, lambda: _first_that_fits(name, calls)[0])
    calls = [call._replace(arguments=call.arguments | {_DROP_PATH[library]: drop_path}) for call in calls]
    try:
        made = _cut(name, library, num_classes, side, lambda: _first_that_fits(name, calls)[0])
        if any(getattr(m, "drop_prob", 0) or (hasattr(m, "mode") and getattr(m, "p", 0)) for m in made.modules()):
            return made
        reason = "nothing in it is skipped"
    except UsageError as error:
        reason = error.message
    raise UsageError(f"train.drop_path: {name} has no stochastic depth ({reason})", "--set train.drop_path=0")


def factory(name: str, num_classes: int, side: ImageSize, *, entry: str) -> StagedModel:
    """The network of a user's function, whose code this runs: the caller checks that the user named it."""
    return _cut(name, "factory", num_classes, side, lambda: _made(entry, num_classes))


def check_size(name: str, num_classes: int, side: ImageSize, numbers: int) -> None:
    """Raise ValueError where a network of a library has more numbers than a file that is to fill it.

    Its library builds it without its numbers for that; a network of our own is built without them anyway.
    """
    for part in name.split("-", 2) if name.startswith("simkd") else [name]:
        library, _, entry = part.partition("/")
        if library not in _CALLS:
            continue
        try:
            with torch.device("cpu"), _parameters_on_meta(), warnings.catch_warnings(action="ignore"):
                network = _first_that_fits(part, _CALLS[library](entry, num_classes, side))[0]
        except UsageError:  # said where it is built in earnest
            continue
        if (size := sum(tensor.numel() for tensor in network.state_dict().values())) > numbers:
            raise ValueError(f"{part} has {size} numbers, the file {numbers}")


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Each parameter of a module loses its numbers as it is made; RegNets cannot be built on the meta device."""
    register = nn.Module.register_parameter

    def emptied(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        kept = None if parameter is None else nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
        register(module, name, kept)

    nn.Module.register_parameter = emptied  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def library_weights(name: str, entry: str, library: str) -> dict[str, Tensor]:
    """The library's own trained weights of a network, downloaded where needed. UsageError where there are none."""
    try:
        with warnings.catch_warnings(action="ignore"):
            if library == "timm":
                return dict(of_timm(name).create_model(entry, pretrained=True).state_dict())
            weights = importlib.import_module("torchvision.models").get_model_weights(entry)
            if not len(weights):
                raise UsageError(f"torchvision has no trained weights of {entry}")
            return dict(weights.DEFAULT.get_state_dict(progress=False, check_hash=True))
    except UsageError:
        raise
    except Exception as error:  # whatever a download raises
        raise download_error(f"{name}: its trained weights could not be fetched", error) from None


def library_classes(entry: str, library: str) -> tuple[str, ...] | None:
    """The names of the classes that a library's weights are for, in their order; None where it does not say."""
    if library == "torchvision":
        weights = importlib.import_module("torchvision.models").get_model_weights(entry).DEFAULT
        return tuple(weights.meta["categories"])
    names = getattr(timm_config_of(entry), "label_names", None)
    return tuple(map(str, names)) if names else None


def _cut(name: str, family: str, num_classes: int, side: ImageSize, build: Callable[[], nn.Module]) -> StagedModel:
    # On the CPU whatever the caller asks for: a cut is checked with numbers, and buffers that are not saved have some.
    with torch.device("cpu"), warnings.catch_warnings(action="ignore"):
        network = build()
        return network if isinstance(network, StagedModel) else cut(network, name, family, num_classes, side)


def library_call(name: str, num_classes: int, side: ImageSize) -> Call | None:
    """How torchvision or timm builds this network; None for others. UsageError where it is unknown or not installed."""
    library, _, entry = name.partition("/")
    if library not in _CALLS:
        return None
    return _first_that_fits(name, _CALLS[library](entry, num_classes, side))[1]


def _of_torchvision(entry: str, num_classes: int, side: ImageSize) -> list[Call]:
    from torchvision import models

    known = models.list_models(module=models)
    if entry not in known:
        raise UsageError(unknown("torchvision classifier", entry, known))
    fixed = {"weights": None, "num_classes": num_classes}
    sizes: list[dict[str, Any]] = [{"image_size": side}, {"input_size": height_width(side)}]
    more = [*sizes, {"aux_logits": False, "init_weights": True}, {}]
    return [Call("torchvision.models", "get_model", entry, fixed | arguments) for arguments in more]


def _of_timm(entry: str, num_classes: int, side: ImageSize) -> list[Call]:
    library = of_timm(f"timm/{entry}")
    if not (entry.startswith(HUB) or library.is_model(entry)):
        raise UsageError(unknown("timm classifier", entry, library.list_models()))
    fixed = {"pretrained": False, "num_classes": num_classes}
    return [Call("timm", "create_model", entry, fixed | arguments) for arguments in ({"img_size": side}, {})]


_CALLS: dict[str, Callable[[str, int, ImageSize], list[Call]]] = {"torchvision": _of_torchvision, "timm": _of_timm}

_DROP_PATH = {"torchvision": "stochastic_depth_prob", "timm": "drop_path_rate"}


def _first_that_fits(name: str, calls: Sequence[Call]) -> tuple[nn.Module, Call]:
    """The network, built by the first of these calls whose arguments its builder knows, and that call."""
    for call in calls:
        try:
            return call(), call
        except Exception as error:
            unknown_name = isinstance(error, TypeError) and any(argument in str(error) for argument in call.arguments)
            if unknown_name and call is not calls[-1]:
                continue
            if HUB in name:
                raise download_error(f"{name}: cannot be had from the hub", error) from None
            images = "" if call is calls[-1] else " for these images"
            raise UsageError(f"{name}: cannot be built{images} ({first_line(error)})") from None
    raise AssertionError("at least one call")


def _made(entry: str, num_classes: int) -> nn.Module:
    module, _, function = entry.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        with code.as_usage_errors(), code.contained():
            make = code.load(entry) if of_file(entry) else getattr(importlib.import_module(module), function)
            found = make(num_classes=num_classes)
    except UsageError:
        raise
    except Exception as error:  # whatever the user's code raises
        raise UsageError(f"{entry}: {type(error).__name__}: {first_line(error)}") from None
    finally:
        sys.path.remove(os.getcwd())
    if not isinstance(found, nn.Module):
        raise UsageError(f"{entry}: returned a {type(found).__name__}, not an nn.Module")
    return found
