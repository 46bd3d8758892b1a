"""What the data floor hands to a task: one batch, ready for the networks."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Batch:
    """One training batch; every tensor is on the run's device.

    images  [B, 3, H, W]  float, augmented and normalised
    labels  [B]           int64 class index
    index   [B]           int64 position of the sample in the training split
    noise   [B, W]        uniform in [0, 1), W numbers per sample for whatever the task draws
    view    [B]           int64 which of its possible crops and flips each image shows; None where nobody asks
    """

    images: Tensor
    labels: Tensor
    index: Tensor
    noise: Tensor
    view: Tensor | None = None


@dataclass(frozen=True, slots=True)
class UpperBatch(Batch):
    """One batch for the upper level of a search in two levels.

    lower  the lower level's next batch, for a gradient that looks one of its steps ahead; None: it does not
    """

    lower: Batch | None = None
