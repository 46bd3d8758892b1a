"""Plain Python: a network with the same layers and tensor names, in torch alone; what opens a picture as it sees it."""

import re
from typing import Any

import torch
from torch import Tensor, fx, nn

from sakd_cli.config.preprocessing import Preprocessing, height_width
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


# Beside grey of more than 8 bits, which needs to know what white is.
OPENING = """\
picture = {opened}.convert("RGBA")
rgb = Image.new("RGB", picture.size, {background})
rgb.paste(picture, mask=picture.getchannel("A"))  # what is transparent shows this colour
{resized}{cut}
pixels = {array}[None] / 255"""


def opening_imports(seen: Preprocessing) -> str:
    """What the lines need."""
    more = ", ImageOps" if seen.orientation else ""
    torchvision = "" if _with_pillow(seen) else "\nfrom torchvision.transforms.v2 import functional"
    return f"import numpy as np\nfrom PIL import Image{more}{torchvision}"


def opening_lines(seen: Preprocessing, file: str = "photo.jpg") -> str:
    """Lines after which `pixels` are the picture, [1, 3, H, W] between 0 and 1."""
    opened = f'Image.open("{file}")'
    if seen.orientation:
        opened = f"ImageOps.exif_transpose({opened})"
    height, width = height_width(seen.size)
    if not _with_pillow(seen):
        cut = f"rgb = functional.center_crop(rgb, [{height}, {width}])"
    else:
        cut = f"left, top = round((rgb.width - {width}) / 2), round((rgb.height - {height}) / 2)\n"
        cut += f"rgb = rgb.crop((left, top, left + {width}, top + {height}))"
    array = "np.asarray(rgb, dtype=np.float32).transpose(2, 0, 1)"
    if not seen.antialias:
        array = "rgb.numpy().astype(np.float32)"
    return OPENING.format(opened=opened, background=seen.background, resized=_resized(seen), cut=cut, array=array)


def _with_pillow(seen: Preprocessing) -> bool:
    """Whether Pillow does the same: it has no resizing without a low-pass, and cuts small pictures otherwise."""
    return seen.antialias and seen.resize_mode != "none"


def _resized(seen: Preprocessing) -> str:
    """The line that resizes; empty where nothing does."""
    if seen.resize_mode == "none":
        return "" if seen.antialias else "rgb = functional.pil_to_tensor(rgb)\n"
    height, width = (round(side * seen.resize / min(own)) for own in [height_width(seen.size)] for side in own)
    if seen.resize_mode == "squash":
        size = f"({width}, {height})"
    elif height == width:
        size = f"[{height} * side // min(rgb.size) for side in rgb.size]"
    else:  # as small as covers the box
        size = f"(max({width}, {height} * rgb.width // rgb.height), max({height}, {width} * rgb.height // rgb.width))"
    if _with_pillow(seen):
        return f"rgb = rgb.resize({size}, Image.Resampling.{seen.interpolation.upper()})\n"
    scaled = f"wide, high = {size}\nrgb = functional.pil_to_tensor(rgb)\n"
    mode = f"functional.InterpolationMode.{seen.interpolation.upper()}"
    return scaled + f"rgb = functional.resize(rgb, [high, wide], {mode}, antialias=False)\n"
