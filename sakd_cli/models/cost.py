"""What a network costs: parameters, multiply-accumulates and memory."""

import copy
import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from sakd_cli.config.preprocessing import ImageSize, height_width


class Cost(NamedTuple):
    """parameters: weights and biases; macs: multiply-accumulates of convolutions and linear layers for one image."""

    parameters: int
    macs: int


def cost(model: nn.Module, side: ImageSize) -> Cost:
    """Counted on the meta device, so that nothing is computed. `side`: of the image in pixels, or height and width."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    on_meta = all(parameter.is_meta for parameter in model.parameters())
    ghost, training = (model if on_meta else copy.deepcopy(model).to("meta")), model.training
    norms = [module for module in ghost.eval().modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.forward = lambda x: x  # type: ignore[method-assign, assignment]  # half of the time, none of the MACs
    with Flops() as counter, torch.no_grad():
        ghost(torch.empty(1, 3, *height_width(side), device="meta"))
    for norm in norms:
        del norm.forward
    ghost.train(training)
    return Cost(parameters, counter.total // 2)


class Flops(TorchDispatchMode):
    """Counts by torch's own formulas, four times as fast as `FlopCounterMode`, which counts module by module."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if (formula := flop_registry.get(func._overloadpacket)) is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=result)
        return result


class _Living(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive at once."""

    def __init__(self, before: list[Tensor]) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known = set[int]()
        for tensor in before:
            self._add(tensor)

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._add(tensor)
        return result


def peak_memory(model: nn.Module, side: ImageSize, batch: int) -> int:
    """Most bytes alive at once while `batch` images are classified: weights, buffers, activations in fp32.

    Counted on the meta device, the same on every machine, without the workspace of kernels and of the allocator.
    """
    ghost = copy.deepcopy(model).to("meta").eval()
    own = [*ghost.parameters(), *ghost.buffers()]
    with _Living(own) as living, torch.no_grad():
        ghost(torch.empty(batch, 3, *height_width(side), device="meta"))
    return living.peak
