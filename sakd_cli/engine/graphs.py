"""A training step as one launch: captured once as a CUDA graph, replayed for every further batch of its size.

After torch's notes on CUDA graphs (whole-network capture). Not tested on a GPU yet: tests/test_graphs.py.
"""

from collections.abc import Callable, Hashable
from typing import Protocol

import torch
from torch import Tensor

from sakd_cli.batch import Batch
from sakd_cli.engine.task import StepOutput
from sakd_cli.errors import UsageError

WARMUP = 3  # steps of a size in front of its capture: whatever is made once (momentum, workspaces, plans) is there then

Step = Callable[[Batch], StepOutput]


class Device(Protocol):
    """Where steps are captured."""

    def warm_up(self, call: Callable[[], StepOutput]) -> StepOutput:
        """Run it on the stream of the captures."""

    def capture(self, call: Callable[[], StepOutput]) -> Callable[[], StepOutput]:
        """Note what it asks of the device, without doing it; the function that does it, ever into the same tensors."""


class Cuda:
    """A GPU and the stream that warm-up and captures have to themselves."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)

    def warm_up(self, call: Callable[[], StepOutput]) -> StepOutput:
        here = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(here)
        with torch.cuda.stream(self._stream):
            output = call()
        here.wait_stream(self._stream)
        return output

    def capture(self, call: Callable[[], StepOutput]) -> Callable[[], StepOutput]:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self._stream):
                output = call()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:100]
            raise UsageError(
                f"runtime.graph: a step of this run cannot be captured ({reason})", "leave it out"
            ) from None

        def replay() -> StepOutput:
            graph.replay()
            return output

        return replay


class GraphedStep:
    """Called like `step`, with the same numbers: full batches are replayed, the smaller last one of an epoch is not.

    Nor is a part of a batch that several processes share: they communicate within the step.

    step  forward, backward and update in fixed shapes. It may change tensors in place only, must read nothing back, and
          its output must hold no autograd graph, whose nodes would remember the stream of the capture
    key   what the host decides of a step beside its batch (learning rates): where it changes, the graph is made anew

    The output's tensors are overwritten by the next replay.
    """

    def __init__(self, step: Step, device: Device, key: Callable[[], Hashable]) -> None:
        self._step, self._device, self._key = step, device, key
        self._about: Hashable = None
        self._size = self._seen = 0
        self._given: Batch | None = None
        self._replay: Callable[[], StepOutput] | None = None

    def __call__(self, batch: Batch) -> StepOutput:
        """One step."""
        size, about = len(batch.labels), self._key()
        if size > self._size or about != self._about:
            self._replay = self._given = None  # the old graph's memory first
            self._size, self._about, self._seen = max(size, self._size), about, 0
        if size < self._size or size < batch.size:
            return self._step(batch)
        if self._seen < WARMUP:
            self._seen += 1
            return self._device.warm_up(lambda: self._step(batch))
        if self._replay is None or self._given is None:
            self._given = given = batch.map(torch.clone)
            self._replay = self._device.capture(lambda: self._step(given))
        else:
            for ours, new in zip(_tensors(self._given), _tensors(batch), strict=True):
                ours.copy_(new)
        return self._replay()


def _tensors(batch: Batch) -> list[Tensor]:
    found: list[Tensor] = []

    def noted(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    batch.map(noted)
    return found
