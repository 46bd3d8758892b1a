"""CUDA graphs played on a CPU: a step is recorded as its operations on fixed tensors, and replayed as just these.

What Python decides in a step is recorded for good, as in a graph; only memory changes from one replay to the next.
While it records, a tape also notes what would be wrong on a GPU: where the host waits, operations that have no
deterministic form there, and tensors that are made on the CPU or copied from it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from launches import FREE, launch, leaves
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sakd_cli.bench.steps import READS, by_mask

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
        theirs = {id(x) for x in leaves(self.arguments, self.keywords)}
        for ours, new in zip(leaves(self.given), leaves(again), strict=True):
            if not isinstance(ours, Tensor):
                assert ours == new, f"{self.function} told the host {ours}, and now {new}"
            elif id(ours) not in theirs and ours.numel():  # else it was done in place
                ours.detach().copy_(new)


# After the list in the documentation of `torch.use_deterministic_algorithms`, by the names of their operations.
NOT_DETERMINISTIC = {
    *(f"_adaptive_avg_pool{n}d_backward" for n in (2, 3)),
    *(
        "adaptive_max_pool2d_backward",
        "avg_pool3d_backward",
        "bincount",
        "_ctc_loss_backward",
        "histc",
        "median",
        "put_",
    ),
    *(f"fractional_max_pool{n}d_backward" for n in (2, 3)),
    *(f"grid_sampler_{n}d_backward" for n in (2, 3)),
    *(f"max_unpool{n}d" for n in (2, 3)),
    *(f"reflection_pad{n}d_backward" for n in (1, 2, 3)),
    *("nll_loss2d_forward", "nll_loss2d_backward", "_embedding_bag_dense_backward"),
    *(f"upsample_{how}_backward" for how in ("linear1d", "bilinear2d", "bicubic2d", "trilinear3d")),
}
ELSEWHERE = torch.device("meta")  # where a tensor lands that is made on no device in particular


class _Mode(TorchDispatchMode):
    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and telling the compiler so takes a quarter of the time


class Tape(_Mode):
    """Records every operation made while it is on; views are none, they are tensors of what they show.

    faults  "what: operation, place of ours" of all that would be wrong on a GPU
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Operation] = []
        self.faults: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        of, to = ({x.device for x in leaves(*side) if isinstance(x, Tensor)} for side in ((args, kwargs), (given,)))
        for what, wrong in (
            ("the host waits", name in READS or by_mask(name, args)),
            ("not deterministic", name in NOT_DETERMINISTIC),
            ("made on the CPU", ELSEWHERE in to - of or name == "lift_fresh"),
        ):
            if wrong:
                self.faults.append(f"{what}: {name}, {launch(name).place}")
        if not func.is_view and name not in FREE and func.namespace != "profiler":
            self.operations.append(Operation(func, args, kwargs or {}, given))
        return given

    @torch.no_grad()
    def replay(self) -> None:
        """All of them, in order."""
        for operation in self.operations:
            operation()


class _Taken(_Mode):
    """Changes nothing. Under it operations are taken apart in the same way as under a `Tape`."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Emulator:
    """In the place of `engine.graphs.Cuda`: what is captured is recorded while it is done once, and then replayed."""

    def __init__(self, device: object = None) -> None:
        self.tapes: list[Tape] = []
        self.replays = 0

    def warm_up(self, call: Call) -> None:
        with _Taken():
            call()

    def capture(self, call: Call) -> Call:
        tape, first = Tape(), [True]
        self.tapes.append(tape)
        with ELSEWHERE, tape:
            call()

        def replay() -> None:
            if first:
                first.clear()
                return
            self.replays += 1
            tape.replay()

        return replay


class Called:
    """In the same place, for the comparison: every step is called."""

    def __init__(self, device: object = None) -> None:
        pass

    def warm_up(self, call: Call) -> None:
        with _Taken():
            call()

    def capture(self, call: Call) -> Call:
        def replay() -> None:
            with _Taken():
                call()

        return replay
