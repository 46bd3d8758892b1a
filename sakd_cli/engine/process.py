"""What PyTorch holds for a whole process or thread: inside as in a new process, afterwards as the program had it."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch

backends: Any = torch.backends  # the types of its newer parts are not known to a checker


def set_tf32(on: bool) -> None:
    """Whether CUDA rounds the factors of fp32 products; PyTorch's two ways of saying so agree afterwards."""
    torch.set_float32_matmul_precision("high" if on else "highest")
    backends.cudnn.allow_tf32 = on
    for kind in (backends.cudnn.conv, backends.cudnn.rnn):  # else a general setting of the program's would win
        kind.fp32_precision = "tf32" if on else "ieee"


@contextmanager
def fp32_kept() -> Iterator[None]:
    """How fp32 products are computed is afterwards as it was."""
    places = [backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn]
    places += [backends.mkldnn.matmul, backends.mkldnn.conv, backends.mkldnn.rnn]
    before = [place.fp32_precision for place in places]
    matmul = convolutions = None
    with suppress(RuntimeError):  # where it was said in the newer way the older one cannot be read
        matmul = torch.get_float32_matmul_precision()
    with suppress(RuntimeError):
        convolutions = backends.cudnn.allow_tf32
    try:
        yield
    finally:
        if matmul is not None:
            torch.set_float32_matmul_precision(matmul)
        if convolutions is not None:
            backends.cudnn.allow_tf32 = convolutions
        for place, value in zip(places, before, strict=True):
            place.fp32_precision = value


@contextmanager
def as_in_new_process() -> Iterator[None]:
    """Inside, torch computes by its defaults, whatever the program has set; afterwards that is as it was."""
    dtype, warn_only = torch.get_default_dtype(), torch.is_deterministic_algorithms_warn_only_enabled()
    deterministic, benchmark = torch.are_deterministic_algorithms_enabled(), backends.cudnn.benchmark
    cards, seed = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else None, torch.initial_seed()
    with ExitStack() as stack:
        stack.enter_context(fp32_kept())
        stack.enter_context(torch.random.fork_rng(cards or []))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for kind in ("cpu", "cuda", "mps"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)
            torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
            backends.cudnn.benchmark = benchmark
            if cards is None and torch.cuda.is_initialized():
                torch.cuda.manual_seed_all(seed)  # where the program's own first use of a card would have begun
