"""A second CUDA stream inside of a step, for work that does not depend on what follows it.

A step at batch 64 leaves most of a GPU idle in every kernel. The autograd engine runs a backward pass on the stream of
its forward pass, so what is forked here is beside the rest in both directions, and a captured step keeps the fork.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


class Fork:
    """`with fork.beside(...)` puts work on the second stream and `join` waits for it; nothing where there is none."""

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
