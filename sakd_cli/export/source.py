"""A network as plain PyTorch source: one file with the same layers and tensor names, which needs torch alone."""

import re
from typing import Any

import torch
from torch import Tensor, fx, nn

from sakd_cli.errors import UsageError

HEAD = '''"""{about}

Written by sakd export; needs torch alone. `Network()` has random weights, those of the export are in model.safetensors.
"""

import torch
from torch import nn

LAYERS = {{
{layers}
}}


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        for name, layer in LAYERS.items():
            *path, last = name.split(".")
            parent = self
            for part in path:
                if part not in dict(parent.named_children()):
                    parent.add_module(part, nn.Module())
                parent = parent.get_submodule(part)
            parent.add_module(last, layer())

'''


class _Answer(fx.Interpreter):
    """Runs what was recorded so far. A layer is not called but run: calling one is what is being recorded."""

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self.fetch_attr(target).forward(*args, **kwargs)


class _Tracer(fx.Tracer):
    """Records what a network does; where it asks a question of its images, these images answer."""

    def __init__(self, example: Tensor) -> None:
        super().__init__()
        self.example = example

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        return attr_val  # not a proxy of a weight: layers are run while others are recorded

    def to_bool(self, obj: fx.Proxy) -> bool:
        asked = fx.Graph()
        seen: dict[fx.Node, fx.Node] = {}
        asked.graph_copy(self.graph, seen)
        asked.output(seen[obj.node])
        return bool(_Answer(self.root, graph=asked).run(self.example))


def source(network: nn.Module, example: Tensor, about: str) -> str:
    """Python source of a class `Network` that computes what `network` does for images of the example's size.

    Its state dict has the same names. Raises UsageError where the network is not made of torch.nn's layers and
    functions of torch.
    """
    try:
        graph = _Tracer(example).trace(network)
    except (fx.proxy.TraceError, TypeError, RuntimeError) as error:
        first = str(error).strip().partition("\n")[0][:80]
        raise UsageError(f"cannot be written as plain source ({first})", hint="--format onnx or pt2") from None
    used = {str(node.target) for node in graph.nodes if node.op == "call_module"}
    layers = {name: layer for name, layer in network.named_modules() if name in used}
    foreign = not all(type(layer).__module__.startswith("torch.nn.") for layer in layers.values())
    if foreign or any(node.op == "get_attr" for node in graph.nodes):
        raise UsageError("cannot be written as plain source: it has layers of its own", hint="--format onnx or pt2")
    rows = "\n".join(f"    {name!r}: lambda: {_constructor(layer)}," for name, layer in layers.items())
    body = re.sub(r";  .* = None$", "", str(graph.python_code("self").src).strip(), flags=re.MULTILINE)
    forward = "\n".join(f"    {line}".rstrip() for line in body.splitlines())
    return HEAD.format(about=about, layers=rows) + forward + "\n"


def _constructor(layer: nn.Module) -> str:
    """`nn.Conv2d(3, 16, kernel_size=(3, 3))`; newer torch shows a word of BatchNorm's that older ones do not take."""
    shown = repr(layer)
    return f"nn.{shown.replace(', bias=True', '')}" if isinstance(layer, nn.BatchNorm2d) else f"nn.{shown}"


def executed(text: str) -> Any:
    """The class `Network` of such a source."""
    names: dict[str, Any] = {"torch": torch}
    exec(compile(text, "network.py", "exec"), names)
    return names["Network"]
