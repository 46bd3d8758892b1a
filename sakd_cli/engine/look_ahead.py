"""A frozen network's outputs for the next few batches, computed in one pass in front of their steps.

At batch 64 a GPU waits for launches, and one pass over the images of k steps needs a k-th of them.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import accumulate, islice

import torch
from torch import Tensor

from sakd_cli.batch import Batch, Loader, Precomputed
from sakd_cli.engine.graphs import tensors_of


class LookAhead:
    """The batches of a loader, each with what `forward` makes of its images in `Batch.precomputed`.

    forward  images [B, 3, H, W] to tensors [B, ...], each row from its own image alone: a network in evaluation mode
    steps    batches whose images it sees at once

    Groups of steps begin at the epoch's first step. An epoch that is taken up inside of a group computes all of that
    group, so a resumed run sees the very bits of one that was never stopped. Against one pass per step the numbers
    differ by what a convolution's algorithm for a larger batch makes of them: in float64 below 1e-12 of the largest, in
    fp32 in the last bits.

    On CUDA a group is prepared on a stream of its own while the steps of the one before run: memory for two.
    """

    def __init__(
        self, loader: Loader, forward: Callable[[Tensor], Precomputed], *, steps: int, device: torch.device
    ) -> None:
        self.loader, self.forward, self.steps = loader, forward, steps
        self.steps_per_epoch = loader.steps_per_epoch
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        done = start % self.steps
        groups = self._groups(self.loader.epoch(epoch, start - done))
        for group in groups:
            yield from group[done:]
            done = 0

    def _groups(self, batches: Iterator[Batch]) -> Iterator[list[Batch]]:
        if self._side is None:
            while group := self._compute(batches):
                yield group
            return
        # What the loader draws from was put there by the stream that trains.
        self._side.wait_stream(torch.cuda.current_stream(self._side.device))
        group, ready = self._enqueue(batches, self._side)
        while group:
            coming = self._enqueue(batches, self._side)
            here = torch.cuda.current_stream(self._side.device)
            here.wait_event(ready)
            for tensor in (tensor for batch in group for tensor in tensors_of(batch)):
                tensor.record_stream(here)  # its memory is not reused before the work that this one has by then is done
            yield group
            group, ready = coming

    def _enqueue(self, batches: Iterator[Batch], side: torch.cuda.Stream) -> tuple[list[Batch], torch.cuda.Event]:
        """Launch the next group without waiting for it; returns it and the event after which it is ready."""
        with torch.cuda.stream(side):
            return self._compute(batches), side.record_event()

    def _compute(self, batches: Iterator[Batch]) -> list[Batch]:
        """The next group; empty at the epoch's end."""
        group = list(islice(batches, self.steps))
        if not group:
            return []
        precomputed = self.forward(torch.cat([batch.for_teacher for batch in group]))
        ends = list(accumulate(len(batch.images) for batch in group))
        rows = [slice(end - len(batch.images), end) for batch, end in zip(group, ends, strict=True)]
        parts = [precomputed.map(lambda tensor, of=of: tensor[of]) for of in rows]  # type: ignore[misc]
        return [replace(batch, precomputed=part) for batch, part in zip(group, parts, strict=True)]
