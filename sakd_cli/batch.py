"""What the data floor hands to a task: one batch, ready for the networks."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol, Self

from torch import Tensor


class Precomputed(Protocol):
    """Tensors [B, ...] that were computed of a batch's images before its step; the task knows what they are."""

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """The same with every tensor changed."""


@dataclass(frozen=True, slots=True)
class Batch:
    """One training batch; every tensor is on the run's device.

    images  [B, 3, H, W]  float, augmented and normalised
    labels  [B]           int64 class index
    index   [B]           int64 position of the sample in the training split
    noise   [B, W]        uniform in [0, 1), W numbers per sample for whatever the task draws
    view    [B]           int64 which of its possible crops and flips each image shows; None where nobody asks
    known   what a frozen network makes of the images, where that was computed ahead (`engine/ahead.py`)

    Where several processes train together (`parallel.py`) this is one's part of the whole batch:

    whole   samples of the whole batch; None: these are all
    share   what the mean over these samples counts for: 1 on the average over the processes
    """

    images: Tensor
    labels: Tensor
    index: Tensor
    noise: Tensor
    view: Tensor | None = None
    precomputed: Precomputed | None = None
    global_size: int | None = None
    shard_weight: float = 1.0

    @property
    def size(self) -> int:
        """Samples of the whole batch."""
        return len(self.labels) if self.global_size is None else self.global_size

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """The same with every tensor [B, ...] changed."""
        held = {field.name: getattr(self, field.name) for field in fields(self)}
        changed: dict[str, Any] = {name: change(tensor) for name, tensor in held.items() if isinstance(tensor, Tensor)}
        return replace(self, **changed, precomputed=None if self.precomputed is None else self.precomputed.map(change))


@dataclass(frozen=True, slots=True)
class UpperBatch(Batch):
    """One batch for the upper level of a search in two levels.

    lower  the lower level's next batch, for a gradient that looks one of its steps ahead; None: it does not
    """

    lower: Batch | None = None
