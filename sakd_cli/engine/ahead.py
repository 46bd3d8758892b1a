"""What a frozen network makes of the next few batches, computed for all of them at once, in front of their steps.

At batch 64 a GPU waits for launches: one pass over the images of k steps needs a k-th of them, and nothing in it
depends on those steps (performance spec, section 4.4).
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import final

import torch
from torch import Tensor

from sakd_cli.batch import Batch, Known
from sakd_cli.engine.trainer import Loader


@final
class LookAhead:
    """The batches of a loader, each with what `look` makes of its images in `Batch.known`.

    wide     the same epochs in batches of `steps` times `size` images: sample k of an epoch is the same one, augmented
             alike, however the epoch is cut
    look     images [B, 3, H, W] to tensors [B, ...], each row from its own image alone: a network in evaluation mode
    size     images of a step; samples: images of an epoch

    Groups of steps begin at the epoch's first step. An epoch that is taken up inside of a group computes all of that
    group, so a resumed run sees the very bits of one that was never stopped. Against one pass per step the numbers
    differ by what a convolution's algorithm for a larger batch makes of them: in float64 below 1e-12 of the largest, in
    fp32 in the last bits.

    On CUDA a group is prepared on a stream of its own while the steps of the group before run: two groups are held.
    """

    def __init__(
        self,
        wide: Loader,
        look: Callable[[Tensor], Known],
        *,
        size: int,
        steps: int,
        samples: int,
        device: torch.device,
    ) -> None:
        self.wide, self.look, self.size, self.steps = wide, look, size, steps
        self.steps_per_epoch = -(-samples // size)
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Batches `start`, `start` + 1, ... of that epoch, whatever was or was not iterated before."""
        group, done = divmod(start, self.steps)
        groups = self._groups(self.wide.epoch(epoch, group))
        for batch in groups:
            for first in range(done * self.size, len(batch.labels), self.size):
                rows = slice(first, first + self.size)
                yield batch.each(lambda tensor, rows=rows: tensor[rows])  # type: ignore[misc]
            done = 0

    def _groups(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        if self._side is None:
            for batch in batches:
                yield replace(batch, known=self.look(batch.images))
            return
        # What the loader draws from was put there by the stream that trains.
        self._side.wait_stream(torch.cuda.current_stream(self._side.device))
        coming = self._prepared(batches, self._side)
        while coming is not None:
            batch, ready = coming
            coming = self._prepared(batches, self._side)
            here = torch.cuda.current_stream(self._side.device)
            here.wait_event(ready)
            yield batch.each(lambda tensor, here=here: _used_on(tensor, here))  # type: ignore[misc]

    def _prepared(self, batches: Iterator[Batch], side: torch.cuda.Stream) -> tuple[Batch, torch.cuda.Event] | None:
        """The next group, asked of the device but not waited for, and the event after which it is there."""
        with torch.cuda.stream(side):
            batch = next(batches, None)
            if batch is None:
                return None
            return replace(batch, known=self.look(batch.images)), side.record_event()


def _used_on(tensor: Tensor, stream: torch.cuda.Stream) -> Tensor:
    """The same tensor; its memory is not given away before `stream` has done what it was asked until it is dropped."""
    tensor.record_stream(stream)
    return tensor
