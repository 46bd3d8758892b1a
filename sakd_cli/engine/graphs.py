"""CUDA in a step: one launch for all of it, captured once and replayed for batches of its size; a stream beside it.

After torch's notes on CUDA graphs (whole-network capture).
"""

import gc
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from sakd_cli.batch import Batch
from sakd_cli.errors import is_out_of_memory, not_deterministic, one_line

KEPT = 64  # graphs, more than there are kinds of steps: with one torch 2.14 frees what products in the others work in
WARMUP = 3  # steps of a size in front of its capture: whatever is made once (momentum, workspaces, plans) is there then

Step = Callable[[Batch], None]
Call = Callable[[], None]


class Capturer(Protocol):
    """What captures steps: a GPU, or what a test has in its place."""

    def warm_up(self, call: Call) -> None:
        """Run it on the stream of the captures."""

    def capture(self, call: Call) -> Call:
        """Note what it asks of the device, without doing it; the function that does it."""


class Cuda:
    """A GPU and the stream that warm-up and captures have to themselves."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        # Shared by the graphs of all batch sizes: what a replay leaves for the next one lies outside of it.
        self._pool = torch.cuda.graph_pool_handle()

    def warm_up(self, call: Call) -> None:
        here = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(here)
        with torch.cuda.stream(self._stream):
            call()
        here.wait_stream(self._stream)

    def capture(self, call: Call) -> Call:
        """As said; what `call` raises is raised as it is, and the stream is then as it was before."""
        torch.cuda.synchronize(self._device)
        gc.collect()
        torch.cuda.empty_cache()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self._stream):
            # thread_local: what threads that pin memory ask of the device meanwhile is no part of the step.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                call()
                graph.capture_end()
            except BaseException:
                self._give_up(graph)
                raise
        return graph.replay

    def _give_up(self, graph: torch.cuda.CUDAGraph) -> None:
        """Without it torch 2.11 takes the capture for unfinished: nothing can be drawn, freed memory is kept for it."""
        with suppress(RuntimeError):  # a second report of the same error
            graph.capture_end()
        graph.reset()
        here = self._stream.device_index
        with suppress(RuntimeError, AttributeError):  # of a newer torch, which has done so
            torch._C._cuda_endAllocateToPool(here, self._pool)
            torch._C._cuda_releasePool(here, self._pool)
        draws = torch.cuda.default_generators[here]
        draws.graphsafe_set_state(draws.clone_state())


@dataclass
class _Captured:
    """The graph of one batch size: what it reads its batch from, and how it is replayed."""

    seen: int = 0
    given: Batch | None = None
    replay: Call | None = None


class GraphedStep:
    """Called like `step`, with the same numbers: batches are replayed, each size from a graph of its own.

    A part of a batch that several processes share is not: they communicate within the step.

    step    one step in fixed shapes: it changes tensors in place only and reads nothing back
    key     what the host decides of a step beside its batch: each has graphs of its own
    refuse  is told why a step cannot be captured; from then on all are called
    """

    def __init__(
        self, step: Step, device: Capturer, key: Callable[[], Hashable], refuse: Callable[[str], None]
    ) -> None:
        self._step, self._device, self._key, self._refuse = step, device, key, refuse
        self._graphs: dict[Hashable, _Captured] = {}
        self._refused = False

    def __call__(self, batch: Batch) -> None:
        if self._refused or len(batch.labels) < batch.size:
            return self._step(batch)
        key = self._key(), type(batch), *(tensor.shape for tensor in tensors_of(batch))
        known = self._graphs[key] = self._graphs.pop(key) if key in self._graphs else _Captured()
        if len(self._graphs) > KEPT:
            del self._graphs[next(iter(self._graphs))]  # the one that was not used for the longest time
        if known.seen < WARMUP:
            known.seen += 1
            return self._device.warm_up(partial(self._step, batch))
        if known.replay is None or known.given is None:
            known.given = batch.map(torch.clone)
            try:
                known.replay = self._device.capture(partial(self._step, known.given))
            except RuntimeError as error:
                if is_out_of_memory(error) or not_deterministic(error):
                    raise
                self._refuse(one_line(error))
                self._refused = True
            if known.replay is None:  # behind the error, which held what the step had in memory
                return self._step(batch)
        else:  # one launch for each number type
            pairs: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = defaultdict(lambda: ([], []))
            for ours, new in zip(tensors_of(known.given), tensors_of(batch), strict=True):
                pairs[ours.dtype][0].append(ours)
                pairs[ours.dtype][1].append(new)
            for to, of in pairs.values():
                torch._foreach_copy_(to, of)
        return known.replay()


def tensors_of(batch: Batch) -> list[Tensor]:
    """All that `Batch.map` changes: what was computed before, and those of a batch in it, too."""
    found: list[Tensor] = []

    def noted(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    batch.map(noted)
    return found


class Fork:
    """A second CUDA stream inside of a step, for work that does not depend on what follows it.

    `with fork.beside(...)` puts work on it and `join` waits for it; nothing where there is none. A step at batch 64
    leaves most of a GPU idle in every kernel. The autograd engine runs a backward pass on the stream of its forward
    pass, so what is forked here is beside the rest in both directions, and a captured step keeps the fork.
    """

    def __init__(self, *, enabled: bool) -> None:
        self._enabled = enabled
        self._side: torch.cuda.Stream | None = None

    @contextmanager
    def beside(self, shared: Sequence[Tensor]) -> Iterator[None]:
        """`shared`: every tensor of the first stream that is read inside; their memory is kept until it has been."""
        if not self._enabled:
            yield
            return
        if self._side is None:
            self._side = torch.cuda.Stream(shared[0].device)
        self._side.wait_stream(torch.cuda.current_stream(self._side.device))
        for tensor in shared:
            tensor.record_stream(self._side)
        with torch.cuda.stream(self._side):
            yield

    def join(self, results: Iterable[Tensor]) -> None:
        """From here on the first stream may read `results`, which were made on the second."""
        if self._side is None:
            return
        here = torch.cuda.current_stream(self._side.device)
        here.wait_stream(self._side)
        for tensor in results:
            tensor.record_stream(here)
