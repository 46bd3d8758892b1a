"""ONNX in 8 bits: onnxruntime's static quantisation, its ranges from training images."""

import importlib
import logging
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from sakd_cli.errors import UsageError, first_line

COUNT = 256  # training images
# A network with attention keeps its sums, norms and softmax in floats: in 8 bits they cost accuracy and no time.
ATTENTION = {"LayerNormalization", "Softmax"}
PRODUCTS = ["Conv", "Gemm", "MatMul"]


class _Reader:
    """Calibration batches as onnxruntime asks for them."""

    def __init__(self, batches: Iterable[Tensor]) -> None:
        self._batches: Iterator[Tensor] = iter(batches)

    def get_next(self) -> dict[str, Any] | None:
        batch = next(self._batches, None)
        return None if batch is None else {"images": batch.numpy()}


def quantised(model: bytes, batches: Iterable[Tensor]) -> bytes:
    """The ONNX model with int8 weights (per channel) and activations, as QuantizeLinear and DequantizeLinear nodes.

    Activations are uint8 and weights int8 in 7 bits (U8S8 with onnxruntime's `reduce_range`): x86 has kernels for these
    types, for depthwise convolutions too (S8S8 was 3 to 9 times slower), and without VNNI 8 bits would overflow there.
    Ranges are the least and greatest values in the batches. Raises UsageError where the model cannot be quantised.
    """
    tools = importlib.import_module("onnxruntime.quantization")
    prepare = importlib.import_module("onnxruntime.quantization.shape_inference").quant_pre_process
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
                _Reader(batches),
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
