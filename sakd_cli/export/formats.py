"""Networks as files for programs that do not have sakd: safetensors with plain source, ONNX, torch's own `.pt2`.

Every form is a row of `FORMS`: how its file is written, how it is opened again, and the lines that open it elsewhere.
"""

import importlib
import importlib.util
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from sakd_cli.errors import UsageError
from sakd_cli.export import opening
from sakd_cli.export.source import executed, source
from sakd_cli.files import write_aside
from sakd_cli.models.artifact import NetworkCard
from sakd_cli.models.external import Call, library_call
from sakd_cli.models.staged import StagedModel

Function = Callable[[Tensor], Tensor]
WEIGHTS, SOURCE = "model.safetensors", "network.py"
WEIGHTS_LINES = """\
{opening}
import torch
{imports}

network = {network}
network.load_state_dict(load_file("model.safetensors"))
network.eval()
{images}
with torch.inference_mode():
    logits = network(images)"""
PROGRAM_LINES = """\
{opening}
import torch

network = torch.export.load("model.pt2").module()
{images}
with torch.inference_mode():
    logits = network(images)"""
ONNX_LINES = """\
{opening}
import onnxruntime

session = onnxruntime.InferenceSession("model.onnx")
{images}
(logits,) = session.run(None, {{"images": images}})"""


class FromPixels(nn.Module):
    """A network behind the normalisation that it was trained with: pixel values in [0, 1] to logits."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Images [N, 3, H, W] to logits [N, classes]."""
        logits: Tensor = self.network((images - self.mean) / self.std)
        return logits


class Form(NamedTuple):
    """One form of export.

    file    its name
    write   network in evaluation mode, example images, its card, the folder, opset (None: the exporter's own)
    opened  the file in that folder as a function of images on the CPU
    text    Python that opens it, with nothing of sakd, in the folder itself; then `images` give `logits`
    arrays  how that makes its arrays of numpy's and of a list
    needs   packages, which `sakd[onnx]` brings
    inside  whether it can hold the normalisation
    """

    file: str
    write: Callable[[nn.Module, Tensor, NetworkCard, Path, int | None], None]
    opened: Callable[[NetworkCard, Path], Function]
    text: str
    arrays: tuple[str, str] = ("torch.from_numpy(pixels)", "torch.tensor")
    needs: tuple[str, ...] = ()
    inside: bool = True

    def check(self) -> None:
        """Raise UsageError where a package is missing."""
        missing = [name for name in self.needs if importlib.util.find_spec(name) is None]
        if missing:
            raise UsageError(f"{self.file} needs {', '.join(missing)}", hint="pip install 'sakd[onnx]'")

    def lines(self, card: NetworkCard, inside: bool) -> str:
        """The text for a network, which opens a picture file; `inside`: the network's file normalises it itself."""
        pixels, array = self.arrays
        images = f"{opening.lines(card.seen)}\nimages = {pixels}"
        if not inside:
            images = f"{opening.lines(card.seen)}\nmean, std = {array}({list(card.mean)}), {array}({list(card.std)})\n"
            images += f"images = ({pixels} - mean[:, None, None]) / std[:, None, None]"
        call = _call_of(card)
        imports = ["from safetensors.torch import load_file"]
        if call:
            imports.insert(0, f"import {call.module}")
        else:
            imports.append("from network import Network  # network.py, beside the weights")
        opened = opening.imports(card.seen)
        return self.text.format(opening=opened, images=images, imports="\n".join(imports), network=call or "Network()")


def _metadata(card: NetworkCard) -> dict[str, str]:
    """What a program needs to know of a file beside the network, each as JSON."""
    about = card.told()
    return {key: json.dumps(about[key]) for key in ("classes", "mean", "std", "preprocessing")}


def _call_of(card: NetworkCard) -> Call | None:
    """How a library builds the network; None where its architecture is of our own."""
    return library_call(card.architecture, len(card.classes), card.side)


def _write_weights(network: nn.Module, example: Tensor, card: NetworkCard, folder: Path, opset: int | None) -> None:
    tensors = network.state_dict()
    if _call_of(card) is not None:
        assert isinstance(network, StagedModel)
        tensors = network.plain_state_dict()
    else:
        text = source(network, example, f"{card.architecture} for {len(card.classes)} classes.")
        write_aside(folder / SOURCE, text.encode())
    # Clones: some networks hold one tensor under two names, which the format refuses.
    tensors = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }
    write_aside(folder / WEIGHTS, save(tensors, {"format": "pt"}))


def _open_weights(card: NetworkCard, folder: Path) -> Function:
    call = _call_of(card)
    network = call() if call else executed((folder / SOURCE).read_text(encoding="utf-8"))()
    network.load_state_dict(load_file(folder / WEIGHTS))
    return cast(Function, network.eval().forward)


def _write_onnx(network: nn.Module, example: Tensor, card: NetworkCard, folder: Path, opset: int | None) -> None:
    known = importlib.import_module("onnx").defs.onnx_opset_version()
    if opset is not None and opset > known:
        raise UsageError(f"--opset {opset}: the installed onnx knows opsets up to {known}")
    try:
        shapes = ({0: torch.export.Dim("batch")},)
        program: Any = torch.onnx.export(
            network,
            (example,),
            None,
            dynamo=True,
            verbose=False,
            dynamic_shapes=shapes,
            opset_version=opset,
            input_names=["images"],
            output_names=["logits"],
        )
    except (RuntimeError, ValueError) as error:
        first = str(error).strip().partition("\n")[0][:100]
        raise UsageError(
            f"{card.architecture} cannot be written as ONNX ({first})", hint="--opset N, --format pt2"
        ) from None
    model = program.model_proto
    for key, text in _metadata(card).items():
        model.metadata_props.add(key=key, value=text)
    write_aside(folder / "model.onnx", model.SerializeToString())


def _open_onnx(card: NetworkCard, folder: Path) -> Function:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 3
    session = onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def _write_program(network: nn.Module, example: Tensor, card: NetworkCard, folder: Path, opset: int | None) -> None:
    try:
        program = torch.export.export(network, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    except (RuntimeError, ValueError) as error:
        first = str(error).strip().partition("\n")[0][:100]
        raise UsageError(f"{card.architecture} cannot be exported ({first})", hint="--format safetensors") from None
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={f"{key}.json": text for key, text in _metadata(card).items()})
    write_aside(folder / "model.pt2", buffer.getvalue())


def _open_program(card: NetworkCard, folder: Path) -> Function:
    return cast(Function, torch.export.load(folder / "model.pt2").module().forward)


FORMS = {
    "safetensors": Form(WEIGHTS, _write_weights, _open_weights, WEIGHTS_LINES, inside=False),
    "onnx": Form(
        "model.onnx",
        _write_onnx,
        _open_onnx,
        ONNX_LINES,
        ("pixels", "np.float32"),
        needs=("onnx", "onnxscript", "onnxruntime"),
    ),
    "pt2": Form("model.pt2", _write_program, _open_program, PROGRAM_LINES),
}
