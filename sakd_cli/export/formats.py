"""Networks as files for programs that do not have sakd: safetensors with plain source, ONNX, torch's own `.pt2`.

Every form is a row of `FORMS`: how its file is written, how it is opened again, and the lines that open it elsewhere.
"""

import importlib
import importlib.util
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast, final

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from sakd_cli.errors import UsageError
from sakd_cli.export.source import executed, source
from sakd_cli.files import write_aside
from sakd_cli.models.artifact import NetworkCard
from sakd_cli.models.external import Call, library_call
from sakd_cli.models.staged import StagedModel

Function = Callable[[Tensor], Tensor]
WEIGHTS, SOURCE = "model.safetensors", "network.py"


@final
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
    lines   Python that opens it, with nothing of sakd, in the folder itself; then `images` give `logits`
    needs   packages, and the extra of sakd that brings them
    inside  whether it can hold the normalisation
    """

    file: str
    write: Callable[[nn.Module, Tensor, NetworkCard, Path, int | None], None]
    opened: Callable[[NetworkCard, Path], Function]
    lines: Callable[[NetworkCard, bool], str]
    needs: tuple[str, ...] = ()
    extra: str = ""
    inside: bool = True

    def check(self) -> None:
        """Raise UsageError where a package is missing."""
        missing = [name for name in self.needs if importlib.util.find_spec(name) is None]
        if missing:
            raise UsageError(f"{self.file} needs {', '.join(missing)}", hint=f"pip install 'sakd[{self.extra}]'")


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


def _lines_of_weights(card: NetworkCard, inside: bool) -> str:
    call = _call_of(card)
    first = f"import {call.module}" if call else "from network import Network  # network.py, beside the weights"
    build = call or "Network()"
    imports = sorted(
        ["import torch", first, "from safetensors.torch import load_file"], key=lambda line: line[:6] == "from n"
    )
    return "\n".join(
        [
            *imports,
            "",
            f"network = {build}",
            f'network.load_state_dict(load_file("{WEIGHTS}"))',
            "network.eval()",
            *_torch_images(card, inside),
            "with torch.inference_mode():",
            "    logits = network(images)",
        ]
    )


def _torch_images(card: NetworkCard, inside: bool) -> list[str]:
    if inside:
        return [f"images = torch.rand(1, 3, {card.side}, {card.side})  # RGB, between 0 and 1"]
    return [
        f"mean, std = torch.tensor({list(card.mean)}), torch.tensor({list(card.std)})",
        f"pixels = torch.rand(1, 3, {card.side}, {card.side})  # RGB, between 0 and 1",
        "images = (pixels - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)",
    ]


def _write_onnx(network: nn.Module, example: Tensor, card: NetworkCard, folder: Path, opset: int | None) -> None:
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
    write_aside(folder / "model.onnx", program.model_proto.SerializeToString())


def _open_onnx(card: NetworkCard, folder: Path) -> Function:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 3
    session = onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def _lines_of_onnx(card: NetworkCard, inside: bool) -> str:
    shape = f"1, 3, {card.side}, {card.side}"
    images = [f"images = np.random.rand({shape}).astype(np.float32)  # RGB, between 0 and 1"]
    if not inside:
        images = [
            f"mean, std = np.float32({list(card.mean)}), np.float32({list(card.std)})",
            f"pixels = np.random.rand({shape}).astype(np.float32)  # RGB, between 0 and 1",
            "images = (pixels - mean[:, None, None]) / std[:, None, None]",
        ]
    return "\n".join(
        [
            "import numpy as np",
            "import onnxruntime",
            "",
            'session = onnxruntime.InferenceSession("model.onnx")',
            *images,
            '(logits,) = session.run(None, {"images": images})',
        ]
    )


def _write_program(network: nn.Module, example: Tensor, card: NetworkCard, folder: Path, opset: int | None) -> None:
    try:
        program = torch.export.export(network, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    except (RuntimeError, ValueError) as error:
        first = str(error).strip().partition("\n")[0][:100]
        raise UsageError(f"{card.architecture} cannot be exported ({first})", hint="--format safetensors") from None
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    write_aside(folder / "model.pt2", buffer.getvalue())


def _open_program(card: NetworkCard, folder: Path) -> Function:
    return cast(Function, torch.export.load(folder / "model.pt2").module().forward)


def _lines_of_program(card: NetworkCard, inside: bool) -> str:
    return "\n".join(
        [
            "import torch",
            "",
            'network = torch.export.load("model.pt2").module()',
            *_torch_images(card, inside),
            "with torch.inference_mode():",
            "    logits = network(images)",
        ]
    )


FORMS = {
    "safetensors": Form(WEIGHTS, _write_weights, _open_weights, _lines_of_weights, inside=False),
    "onnx": Form(
        "model.onnx", _write_onnx, _open_onnx, _lines_of_onnx, ("onnx", "onnxscript", "onnxruntime"), extra="onnx"
    ),
    "pt2": Form("model.pt2", _write_program, _open_program, _lines_of_program),
}
