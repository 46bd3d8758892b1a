"""CUDA graphs played on a CPU: a step is recorded as its operations on fixed tensors, and replayed as just these.

What Python decides in a step is recorded for good, as in a graph; only memory changes from one replay to the next.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from launches import FREE
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Call = Callable[[], None]


class Operation(NamedTuple):
    """One operation of a recorded step, with the very tensors it was given and gave."""

    function: Any
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    given: Any

    def __call__(self) -> None:
        """Do it again, into the same tensors."""
        again = self.function(*self.arguments, **self.keywords)
        theirs = {id(x) for x in tree_leaves((self.arguments, self.keywords)) if isinstance(x, Tensor)}
        for ours, new in zip(tree_leaves(self.given), tree_leaves(again), strict=True):
            if not isinstance(ours, Tensor):
                assert ours == new, f"{self.function} told the host {ours}, and now {new}"
            elif id(ours) not in theirs and ours.numel():  # else it was done in place
                ours.detach().copy_(new)


class Tape(TorchDispatchMode):
    """Records every operation made while it is on; views are none, they are tensors of what they show."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Operation] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = func(*args, **(kwargs or {}))
        if not func.is_view and func.overloadpacket.__name__ not in FREE and func.namespace != "profiler":
            self.operations.append(Operation(func, args, kwargs or {}, given))
        return given

    @torch.no_grad()
    def replay(self) -> None:
        """All of them, in order."""
        for operation in self.operations:
            operation()


class Called(TorchDispatchMode):
    """Changes nothing. Under it operations are taken apart in the same way as under a `Tape`."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Emulator:
    """In the place of `engine.graphs.Cuda`: what is captured is recorded while it is done once, and then replayed."""

    def __init__(self, device: object = None) -> None:
        self.tapes: list[Tape] = []
        self.replays = 0

    def warm_up(self, call: Call) -> None:
        with Called():
            call()

    def capture(self, call: Call) -> Call:
        tape, first = Tape(), [True]
        self.tapes.append(tape)
        with tape:
            call()

        def replay() -> None:
            if first:
                first.clear()
                return
            self.replays += 1
            tape.replay()

        return replay


class Uncaptured:
    """In the same place, for the comparison: every step is called."""

    def __init__(self, device: object = None) -> None:
        pass

    def warm_up(self, call: Call) -> None:
        with Called():
            call()

    def capture(self, call: Call) -> Call:
        def replay() -> None:
            with Called():
                call()

        return replay
