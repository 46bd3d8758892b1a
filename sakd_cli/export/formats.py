"""Networks as files for programs that do not have sakd: safetensors with plain source, ONNX, `.pt2`, OpenVINO.

Every form is a row of `FORMS`: how its file is written, how it is opened again, and the lines that open it elsewhere.
"""

import copy
import importlib
import importlib.util
import io
import json
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple, cast
from unittest.mock import patch

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from sakd_cli.errors import UsageError, first_line
from sakd_cli.export.source import executed, opening_imports, opening_lines, source
from sakd_cli.models.artifact import NetworkCard
from sakd_cli.models.staged import StagedModel
from sakd_cli.writing import write_aside

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # onnxruntime 1.32 would keep a database of its uses in the home

Function = Callable[[Tensor], Tensor]
Precision = Literal["fp32", "fp16", "int8"]
TRACED = 18  # the first opset that torch's exporter of programs writes; older ones come from that of traces
WEIGHTS, SOURCE = "model.safetensors", "network.py"
CALIBRATION = 256  # training images that ranges of int8 are taken from
# A network with attention keeps its sums, norms and softmax in floats: in 8 bits they cost accuracy and no time.
ATTENTION = {"LayerNormalization", "Softmax"}
PRODUCTS = ["Conv", "Gemm", "MatMul"]
WEIGHTS_LINES = """\
import torch
{imports}

network = {network}
network.load_state_dict(load_file("model.safetensors"))
network.eval()"""
PROGRAM_LINES = 'import torch\n\nnetwork = torch.export.load("model.pt2").module()'
ONNX_LINES = 'import onnxruntime\n\nsession = onnxruntime.InferenceSession("model.onnx")'
OPENVINO_LINES = """\
import openvino

exact = {{"INFERENCE_PRECISION_HINT": "f32"}}  # without it some CPUs compute in bf16
network = openvino.Core().compile_model("model.xml", "CPU", exact)"""


class FromPixels(nn.Module):
    """A network behind the normalisation that it was trained with: pixel values in [0, 1] to logits."""

    def __init__(self, network: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.network = network
        self.mean, self.std = (nn.Buffer(torch.tensor(values).view(-1, 1, 1)) for values in (mean, std))

    def forward(self, images: Tensor) -> Tensor:
        """Images [N, 3, H, W] to logits [N, classes]."""
        return self.network((images - self.mean) / self.std)


class Half(nn.Module):
    """A network in fp16 between fp32 images and fp32 logits."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = copy.deepcopy(network).half()

    def forward(self, images: Tensor) -> Tensor:
        """Images [N, 3, H, W] to logits [N, classes]."""
        return self.network(images.half()).float()


def to_fp16(network: nn.Module) -> nn.Module:
    """The same in fp16; pixels are still normalised in fp32."""
    if not isinstance(network, FromPixels):
        return Half(network).eval()
    mean, std = (numbers.flatten().tolist() for numbers in (network.mean, network.std))
    return FromPixels(Half(network.network), mean, std).eval()


class Writing(NamedTuple):
    """How a file is written: the opset of ONNX (None: the exporter's own), the numbers, images to calibrate int8 on."""

    opset: int | None = None
    precision: Precision = "fp32"
    calibration: Sequence[Tensor] = ()


class Form(NamedTuple):
    """One form of export.

    files   their names, the first of which opens the network
    write   network in evaluation mode, example images, its card, the folder, how
    opened  the file in that folder as a function of images on the CPU
    text    Python that opens it, with nothing of sakd, in the folder itself; run: by which `images` then give `logits`
    arrays  how that makes its arrays of numpy's and of a list
    needs   packages
    library what opens it, as the Hugging Face hub calls it, and the extra of sakd that brings the packages
    inside  whether it can hold the normalisation
    int8    whether it can be quantised
    """

    files: tuple[str, ...]
    write: Callable[[nn.Module, Tensor, NetworkCard, Path, Writing], None]
    opened: Callable[[NetworkCard, Path], Function]
    text: str
    run: str = "with torch.inference_mode():\n    logits = network(images)"
    arrays: tuple[str, str] = ("torch.from_numpy(pixels)", "torch.tensor")
    needs: tuple[str, ...] = ()
    library: str = "pytorch"
    inside: bool = True
    int8: bool = False

    @property
    def file(self) -> str:
        """The file that opens the network."""
        return self.files[0]

    def check(self) -> None:
        """Raise UsageError where a package is missing."""
        if missing := [name for name in self.needs if importlib.util.find_spec(name) is None]:
            raise UsageError(f"{self.file} needs {', '.join(missing)}", hint=f"pip install 'sakd[{self.library}]'")

    def lines(self, card: NetworkCard, inside: bool) -> str:
        """The text for a network, which opens a picture file; `inside`: the network's file normalises it itself."""
        pixels, array = self.arrays
        images = f"{opening_lines(card.seen)}\nimages = {pixels}"
        if not inside:
            images = f"{opening_lines(card.seen)}\nmean, std = {array}({list(card.mean)}), {array}({list(card.std)})\n"
            images += f"images = ({pixels} - mean[:, None, None]) / std[:, None, None]"
        call, imports = card.library_call(), ["from safetensors.torch import load_file"]
        if call:
            imports.insert(0, f"import {call.module}")
        else:
            imports.append("from network import Network  # network.py, beside the weights")
        text = self.text.format(imports="\n".join(imports), network=call or "Network()")
        return f"{opening_imports(card.seen)}\n{text}\n{images}\n{self.run}"


def _metadata(card: NetworkCard) -> dict[str, str]:
    """What a program needs to know of a file beside the network, each as JSON."""
    about = card.config_entries()
    return {key: json.dumps(about[key]) for key in ("classes", "mean", "std", "preprocessing")}


def _write_weights(network: nn.Module, example: Tensor, card: NetworkCard, folder: Path, how: Writing) -> None:
    tensors = network.state_dict()
    if card.library_call() is not None:
        assert isinstance(network, StagedModel)
        tensors = network.plain_state_dict()
    else:
        text = source(network, example, f"{card.architecture} for {len(card.classes)} classes.")
        write_aside(folder / SOURCE, text.encode())
    # Clones: some networks hold one tensor under two names, which the format refuses.
    tensors = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }
    if how.precision == "fp16":
        tensors = {name: one.half() if one.is_floating_point() else one for name, one in tensors.items()}
    write_aside(folder / WEIGHTS, save(tensors, {"format": "pt"}))


def _open_weights(card: NetworkCard, folder: Path) -> Function:
    call = card.library_call()
    network = call() if call else executed((folder / SOURCE).read_text(encoding="utf-8"))()
    network.load_state_dict(load_file(folder / WEIGHTS))
    return cast(Function, network.eval().forward)


def _write_onnx(network: nn.Module, example: Tensor, card: NetworkCard, folder: Path, how: Writing) -> None:
    """In the numbers that are asked for, with what its card says as metadata."""
    onnx = importlib.import_module("onnx")
    known = onnx.defs.onnx_opset_version()
    if how.opset is not None and how.opset > known:
        raise UsageError(f"--opset {how.opset}: the installed onnx knows opsets up to {known}")
    network = to_fp16(network) if how.precision == "fp16" else network
    traced = how.opset is not None and how.opset < TRACED
    named: dict[str, Any] = {"input_names": ["images"], "output_names": ["logits"], "opset_version": how.opset}
    buffer: Any = io.BytesIO()
    try:
        # Where it fails, the exporter of traces would print its whole graph, and that of programs log its doubts.
        with (
            warnings.catch_warnings(action="ignore"),
            redirect_stdout(io.StringIO()),
            patch("torch._C._jit_onnx_log", create=True),
            patch.object(logging.getLogger("onnxscript.version_converter"), "disabled", True),
        ):
            if traced:
                axes = {name: {0: "batch"} for name in ("images", "logits")}
                torch.onnx.export(network, (example,), buffer, dynamo=False, dynamic_axes=axes, **named)
                model = buffer.getvalue()
            else:
                shapes = ({0: torch.export.Dim("batch")},)
                program: Any = torch.onnx.export(
                    network, (example,), None, dynamo=True, verbose=False, dynamic_shapes=shapes, **named
                )
                model = program.model_proto.SerializeToString()
    except ImportError as error:  # torch's exporter asks for a part of onnxscript that bears torch's version
        text = f"the installed onnxscript and torch {torch.__version__} do not go together ({first_line(error)})"
        raise UsageError(text, "pip install --upgrade onnxscript") from None
    except (RuntimeError, ValueError) as error:
        hint = f"--opset {TRACED} or later" if traced else "a lower --opset, --format pt2"
        raise UsageError(f"{card.architecture} cannot be written as ONNX ({first_line(error)})", hint) from None
    if how.precision == "int8":
        model = quantised(model, how.calibration)
    proto = onnx.load_model_from_string(model)
    for key, text in _metadata(card).items():
        proto.metadata_props.add(key=key, value=text)
    write_aside(folder / "model.onnx", proto.SerializeToString())


def quantised(model: bytes, batches: Iterable[Tensor]) -> bytes:
    """The ONNX model with int8 weights (per channel) and activations, as QuantizeLinear and DequantizeLinear nodes.

    Activations are uint8 and weights int8 in 7 bits (U8S8 with onnxruntime's `reduce_range`): x86 has kernels for these
    types, for depthwise convolutions too (S8S8 was 3 to 9 times slower), and without VNNI 8 bits would overflow there.
    Ranges are the least and greatest values in the batches. Raises UsageError where the model cannot be quantised.
    """
    tools = importlib.import_module("onnxruntime.quantization")
    prepare = importlib.import_module("onnxruntime.quantization.shape_inference").quant_pre_process
    given = ({"images": batch.numpy()} for batch in batches)
    with tempfile.TemporaryDirectory() as folder:
        plain, ready, done = (Path(folder) / f"{name}.onnx" for name in ("plain", "ready", "done"))
        plain.write_bytes(model)
        before = logging.root.level
        logging.root.setLevel(logging.ERROR)  # it would say on the root logger what it thinks of our preparation
        try:
            prepare(plain, ready, skip_symbolic_shape=True)
            nodes = {node.op_type for node in importlib.import_module("onnx").load(ready).graph.node}
            tools.quantize_static(
                ready,
                done,
                SimpleNamespace(get_next=lambda: next(given, None)),  # as onnxruntime asks for them
                quant_format=tools.QuantFormat.QDQ,
                per_channel=True,
                reduce_range=True,
                activation_type=tools.QuantType.QUInt8,
                weight_type=tools.QuantType.QInt8,
                op_types_to_quantize=PRODUCTS if nodes & ATTENTION else None,
            )
        except Exception as error:  # whatever the library raises on a model that it does not know
            raise UsageError(f"--int8: cannot be quantised ({first_line(error)})", "--fp16 halves the size") from None
        finally:
            logging.root.setLevel(before)
        return done.read_bytes()


def _write_openvino(network: nn.Module, example: Tensor, card: NetworkCard, folder: Path, how: Writing) -> None:
    openvino = importlib.import_module("openvino")
    plain = how._replace(precision="fp32") if how.precision == "fp16" else how
    with tempfile.TemporaryDirectory() as aside:
        _write_onnx(network, example, card, Path(aside), plain)
        try:
            model = openvino.convert_model(Path(aside) / "model.onnx")
        except Exception as error:  # whatever its front end raises on an operator that it does not know
            raise UsageError(f"{card.architecture} cannot be written for OpenVINO ({first_line(error)})") from None
        for key, text in _metadata(card).items():
            model.set_rt_info(text, ["model_info", key])
        openvino.save_model(model, folder / "model.xml", compress_to_fp16=how.precision == "fp16")


def _open_openvino(card: NetworkCard, folder: Path) -> Function:
    openvino = importlib.import_module("openvino")
    exact = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    network = openvino.Core().compile_model(folder / "model.xml", "CPU", exact)
    return lambda images: torch.from_numpy(network(images.numpy())[0].copy())


def _open_onnx(card: NetworkCard, folder: Path) -> Function:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 3
    session = onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def _write_program(network: nn.Module, example: Tensor, card: NetworkCard, folder: Path, how: Writing) -> None:
    network = to_fp16(network) if how.precision == "fp16" else network
    try:
        program = torch.export.export(network, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    except (RuntimeError, ValueError) as error:
        reason = first_line(error)
        raise UsageError(f"{card.architecture} cannot be exported ({reason})", hint="--format safetensors") from None
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={f"{key}.json": text for key, text in _metadata(card).items()})
    write_aside(folder / "model.pt2", buffer.getvalue())


def _open_program(card: NetworkCard, folder: Path) -> Function:
    return cast(Function, torch.export.load(folder / "model.pt2").module().forward)


_ONNX, _NUMPY = ("onnx", "onnxscript", "onnxruntime"), ("pixels", "np.float32")
_SESSION = '(logits,) = session.run(None, {"images": images})'
FORMS = {
    "safetensors": Form((WEIGHTS,), _write_weights, _open_weights, WEIGHTS_LINES, inside=False),
    "onnx": Form(("model.onnx",), _write_onnx, _open_onnx, ONNX_LINES, _SESSION, _NUMPY, _ONNX, "onnx", int8=True),
    "pt2": Form(("model.pt2",), _write_program, _open_program, PROGRAM_LINES),
    "openvino": Form(
        ("model.xml", "model.bin"),
        _write_openvino,
        _open_openvino,
        OPENVINO_LINES,
        "logits = network(images)[0]",
        _NUMPY,
        (*_ONNX, "openvino"),
        "openvino",
        int8=True,
    ),
}
