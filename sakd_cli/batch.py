"""What the data floor hands to a task: one batch, ready for the networks."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import Any, Protocol, Self

from torch import Tensor


class Precomputed(Protocol):
    """Tensors [B, ...] of a batch's images that were computed before its step; the task knows what they are."""

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """The same with every tensor changed."""


@dataclass(frozen=True, slots=True)
class Batch:
    """One training batch; every tensor is on the run's device.

    images  [B, 3, H, W]  float, augmented and normalised
    labels  [B]           int64 class index
    index   [B]           int64 position of the sample in the training split
    noise   [B, W]        uniform in [0, 1), W numbers per sample for whatever the task draws
    view    [B]           int64 which of its possible crops and flips each image shows; None where it is not needed
    precomputed   a frozen network's output for the images, where it was computed ahead (`engine/look_ahead.py`)
    global_size   samples of the global batch, of which each process has a shard; None: these are all
    shard_weight  factor of the mean over these samples, 1 on the average over the processes (`distributed.py`)
    teacher_images  [B, 3, H', W']  the same crops at the size that the teacher sees; None: `images`
    held_out      a batch of images that the student does not train on, for a router that learns from such
    ratio   [B]           of mixed images: how much of each is the sample `index` with its label, 0 to 1; the rest is
    other_index, other_labels  [B]  of the other sample in it; None: nothing is mixed
    part    share of the batch that this is, where gradients of several parts are added up (`cut`)
    """

    images: Tensor
    labels: Tensor
    index: Tensor
    noise: Tensor
    view: Tensor | None = None
    precomputed: Precomputed | None = None
    global_size: int | None = None
    shard_weight: float = 1.0
    teacher_images: Tensor | None = None
    held_out: "Batch | None" = None
    ratio: Tensor | None = None
    other_index: Tensor | None = None
    other_labels: Tensor | None = None
    part: float = 1.0

    @property
    def for_teacher(self) -> Tensor:
        """What the teacher sees."""
        return self.images if self.teacher_images is None else self.teacher_images

    @property
    def size(self) -> int:
        """Samples of the global batch."""
        return len(self.labels) if self.global_size is None else self.global_size

    def tensors(self) -> list[Tensor]:
        """All of its own, without what was computed before."""
        return [x for x in (getattr(self, field.name) for field in fields(self)) if isinstance(x, Tensor)]

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """The same with every tensor [B, ...] changed, those of a batch in it too."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        changed: dict[str, Any] = {name: change(x) for name, x in values.items() if isinstance(x, Tensor)}
        changed |= {name: x.map(change) for name, x in values.items() if isinstance(x, Batch)}
        return replace(self, **changed, precomputed=None if self.precomputed is None else self.precomputed.map(change))

    def cut(self, parts: int) -> Iterator[Self]:
        """At most so many parts of two samples or more, alike in size."""
        count = len(self.labels)
        parts = max(1, min(parts, count // 2))
        ends = [count * k // parts for k in range(parts + 1)]
        for start, end in pairwise(ends):
            part = self.map(lambda x, rows=slice(start, end): x[rows])  # type: ignore[misc]
            yield replace(part, global_size=None, held_out=self.held_out, part=(end - start) / count)


@dataclass(frozen=True, slots=True)
class UpperBatch(Batch):
    """A batch for the upper level of a search; `lower`: the lower level's next batch, for a gradient one step ahead."""

    lower: Batch | None = None


class Loader(Protocol):
    """Batches `start`, `start` + 1, ... of an epoch, counted from 1, whatever was or was not iterated before."""

    steps_per_epoch: int

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]: ...
