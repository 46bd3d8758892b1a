"""What a step costs, counted instead of timed: FLOPs, bytes saved for the backward pass, reads by the host."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

# Operations whose result, or its shape, the host must wait for.
READS = {"_local_scalar_dense", "item", "nonzero", "is_nonzero", "masked_select"}
READS |= {"_unique2", "unique_dim", "equal", "bincount"}


class Count(NamedTuple):
    """flops: 2 per multiply-add of products and convolutions; saved_bytes: for the backward pass; reads by the host."""

    flops: int
    saved_bytes: int
    reads: int
    operations: int


def by_mask(name: str, arguments: Sequence[Any]) -> bool:
    """Whether an operation of this name chooses rows by a mask, whose number the host must know."""
    given = arguments[1] if name.startswith("index") and len(arguments) > 1 else ()
    rows = given if isinstance(given, list | tuple) else ()
    return any(isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in rows)


class _Dispatched(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.flops = self.reads = self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.reads += by_mask(name, args) or name in READS
        self.operations += 1
        result = func(*args, **(kwargs or {}))
        if (flops := flop_registry.get(func.overloadpacket)) is not None:
            self.flops += flops(*args, **(kwargs or {}), out_val=result)
        return result


def count(step: Callable[[], Any], given: Iterable[Tensor]) -> Count:
    """Carry out `step` once and count.

    given  what is there anyway (weights, buffers, images): not counted as saved. Every storage that the step saves for
           its backward pass is counted once, from its first saving to the end of the step, whatever is freed meanwhile.
    """
    # Storages stay alive while counting, so that no address stands for two of them.
    free = {tensor.untyped_storage()._cdata for tensor in given}
    saved: dict[int, Any] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in free:
            saved[storage._cdata] = storage
        return tensor

    dispatched = _Dispatched()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), dispatched:
        step()
    saved_bytes = sum(storage.nbytes() for storage in saved.values())
    return Count(dispatched.flops, saved_bytes, dispatched.reads, dispatched.operations)
