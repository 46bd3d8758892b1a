"""The device a run works on, in which way and number types, and what is worth knowing about the machine.

What PyTorch holds for a whole process is inside of a call as in a new one, and afterwards as the program had it.
"""

import copy
import ctypes
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._triton import has_triton

from sakd_cli import __version__, distributed, torchrun
from sakd_cli.config.training import Runtime
from sakd_cli.engine.foreach import layers_of
from sakd_cli.engine.task import Task
from sakd_cli.errors import MemoryLimitError, UsageError, is_out_of_memory, not_deterministic, one_line

backends: Any = torch.backends  # the types of its newer parts are not known to a checker
Module = TypeVar("Module", bound=nn.Module)
Seen = TypeVar("Seen")
# torch looks at it once, at a process's first product on a GPU: maybe long before the run that must be deterministic.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
REPAID = 50_000  # steps of a run that win back a minute of compiling
AHEAD = 8  # steps of a teacher's pass on CUDA: an eighth of its launches
GRAPHS = 64  # of one function: of batch sizes, of spots that rest, of runs in one process


class Mode(NamedTuple):
    """How a run computes on its device. The only place that decides on number types and memory layout.

    autocast_dtype  of the networks' products and convolutions; None: that of their weights. Losses, the router, the
                    optimizer and BatchNorm's statistics are outside of it, behind `to_fp32`
    gather_batch    losses between samples get those of all processes
    graphed         a step is captured and replayed as one CUDA graph
    ahead           steps whose images the teacher gets in one pass; 1: no look-ahead
    """

    autocast_dtype: torch.dtype | None = None
    channels_last: bool = False
    dynamic_shapes: bool = False
    compiled: bool = False
    gather_batch: bool = False
    graphed: bool = False
    ahead: int = 1

    def __str__(self) -> str:
        parts = ["bf16" if self.autocast_dtype else "fp32", "channels_last" if self.channels_last else "contiguous"]
        parts += ["dynamic shapes" if self.dynamic_shapes else "static shapes", *["compiled"] * self.compiled]
        parts += ["graph"] * self.graphed
        return ", ".join([*parts, *[f"look-ahead {self.ahead}"] * (self.ahead > 1)])

    def networks(self, device: torch.device) -> torch.autocast:
        """Networks, and what is trained to translate between them, run inside of this."""
        dtype = self.autocast_dtype
        return torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None)

    def frozen(self, network: Module) -> Module:
        """A frozen network for use inside of `networks`: autocast would convert its weights anew in every pass.

        The same bits; itself where there is nothing to convert.
        """
        if self.autocast_dtype is None:
            return network
        converted = copy.deepcopy(network)
        for layer in layers_of(converted):
            layer.to(self.autocast_dtype)
        return converted

    def to_memory_format(self, module: Module) -> Module:
        """The same module with its weights in the layout of this mode; who shares them must be made afterwards."""
        return module.to(memory_format=torch.channels_last) if self.channels_last else module


def to_fp32(x: Tensor) -> Tensor:
    """At least fp32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def resolve_mode(config: Runtime, device: torch.device, steps: int = 0) -> Mode:
    """What the settings mean on this device, for a run of so many steps."""
    cuda, distributed_run = device.type == "cuda", torchrun.requested_world_size() > 1
    look_ahead = (AHEAD if cuda else 1) if config.look_ahead == "auto" else config.look_ahead
    auto_shapes = "dynamic" if device.type == "cpu" and config.compile is not True else "static"
    dynamic = (auto_shapes if config.shapes == "auto" else config.shapes) == "dynamic"
    has_bf16 = cuda and torch.cuda.is_available() and torch.cuda.get_device_capability(device) >= (8, 0)
    bf16 = has_bf16 if config.precision == "auto" else config.precision == "bf16"
    graphed = bool(config.graph) and cuda and not distributed_run and not dynamic
    repaid = graphed and steps >= REPAID and not config.deterministic and has_triton()
    return Mode(
        autocast_dtype=torch.bfloat16 if bf16 else None,
        channels_last=device.type in ("cpu", "cuda") if config.channels_last == "auto" else config.channels_last,
        dynamic_shapes=dynamic,
        compiled=repaid if config.compile == "auto" else config.compile,
        gather_batch=config.global_batch,
        graphed=graphed,
        ahead=1 if distributed_run else look_ahead,  # a group is cut into steps, not into the shards of each
    )


def check_compiler(device: torch.device) -> None:
    """Raise UsageError where a step cannot be compiled: on a CPU that needs a C++ compiler."""
    name = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if device.type == "cpu" and shutil.which(name) is None:
        raise UsageError(f"--compile: no C++ compiler {name!r} here", "install one, name it in CXX, or leave it out")


def compile_task(task: Task, refuse: Callable[[str], None], backend: Any = "inductor") -> None:
    """Compile the regions of a task in place, each as one graph for each batch size, backward passes included."""
    for name in task.regions:
        setattr(task, name, compiled(getattr(task, name), refuse, backend))


def compiled(
    plain: Callable[..., Seen], refuse: Callable[[str], None], backend: Any = "inductor"
) -> Callable[..., Seen]:
    """A function compiled whole at its first call; never a CUDA graph, whose results the next call would overwrite.

    refuse  is told why it cannot be compiled; it is called as it is from then on
    """
    import torch._dynamo.config
    import torch._functorch.config
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

    # Else a backward pass is lowered in the first one, and what cannot be raises there.
    torch._functorch.config.force_non_lazy_backward_lowering = True
    torch._dynamo.config.recompile_limit = GRAPHS
    warnings.filterwarnings("ignore", "TensorFloat32")  # torch 2.11 advises what `runtime.tf32` decides
    chosen: Callable[..., Seen] = torch.compile(plain, fullgraph=True, dynamic=False, backend=backend)

    def call(*given: Any) -> Seen:
        nonlocal chosen
        if chosen is plain:
            return plain(*given)
        try:
            return chosen(*given)
        except (TorchDynamoException, FailOnRecompileLimitHit) as error:
            chosen = plain  # which tells a user's own mistake
            result = plain(*given)
            refuse(f"runtime.compile: {plain.__name__} cannot be compiled ({one_line(error)}); it is called")
            return result

    return call


def keep_freed_memory() -> None:
    """Have glibc keep freed memory for the next step: blocks below 1 GiB come from a heap that does not shrink.

    Only steps on a CPU gain: 1.05 times at batch 64, 1.1 at 256.
    """
    if platform.libc_ver()[0] == "glibc":
        trim_threshold, map_threshold = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h
        library = ctypes.CDLL(None)
        library.mallopt(map_threshold, 2**30)
        library.mallopt(trim_threshold, 2**31 - 1)


@contextmanager
def translate_oom(
    batch_size: int, hint: str = "--batch-size {} should fit; less data: --set data.limit=..."
) -> Iterator[None]:
    """Turn an out-of-memory error into a MemoryLimitError; `hint` with a batch size that should fit: half of this."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise not_deterministic(error) or error from None
        fits = hint.format(max(1, batch_size // 2))
        raise MemoryLimitError(f"out of memory with batches of {batch_size} images", fits) from None


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
    card = torch.cuda.current_device() if cards else 0
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
            if torch.cuda.is_initialized():
                torch.cuda.set_device(card)
                if cards is None:
                    torch.cuda.manual_seed_all(seed)  # where the program's own first use of a card would have begun


def set_backends(config: Runtime, *, compiled: bool = False) -> None:
    """How CUDA computes in the rest of this process: which fp32, and whether the same seed gives the same bits.

    A step that is compiled is worth a search for cuDNN's fastest algorithms too: 12 s that make it 2 % faster (H100).
    """
    set_tf32(config.tf32)
    backends.cudnn.benchmark = compiled and not config.deterministic
    torch.use_deterministic_algorithms(config.deterministic)


@contextmanager
def full_fp32() -> Iterator[None]:
    """Without TF32 inside, whatever `runtime.tf32` says: so that a run reports what `sakd eval` finds."""
    with fp32_kept():
        set_tf32(False)
        yield


def exact_mode(device: torch.device) -> Mode:
    """fp32 throughout, from here on in the whole process: what results are computed in."""
    exact = Runtime(precision="fp32")
    if device.type == "cuda":
        set_backends(exact)
    return resolve_mode(exact, device)


def pick_device(name: str) -> torch.device:
    """`auto` (a GPU if there is one), `cpu`, `cuda`, `cuda:1`, `mps`. Raises UsageError where it is not to be had."""
    cuda = not name.startswith("cpu") and torch.cuda.is_available()  # a run on the CPU asks no driver
    mps = torch.backends.mps.is_available()
    if cuda and torchrun.requested_world_size() > 1 and name in ("auto", "cuda"):
        name = f"cuda:{torchrun.local_rank()}"  # each process has one of its own
    if name == "auto":
        return torch.device("cuda" if cuda else "mps" if mps else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"device: unknown device {name!r}", hint="auto, cpu, cuda, cuda:1 or mps") from None
    count = {"cpu": 1, "cuda": torch.cuda.device_count() if cuda else 0, "mps": int(mps)}.get(device.type, 0)
    if (device.index or 0) >= count:
        raise UsageError(f"device: {name!r} is not available here ({count} of that kind)", hint="--device auto")
    if device.type == "cuda" and device.index:  # for what is asked of no card in particular: pinned memory, clocks
        torch.cuda.set_device(device)
    return device


def environment(device: torch.device, mode: Mode) -> dict[str, Any]:
    """What `env.json` holds."""
    chip = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "sakd": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": version("torchvision"),
        "platform": platform.platform(),
        "device": str(device),
        "mode": str(mode),
        "chip": chip,
        "threads": torch.get_num_threads(),
        "processes": distributed.world_size(),
        "command": _command(),
        "commit": _commit(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _command() -> str:
    """The command line of this process: sakd's, or that of the program that calls it."""
    program = Path(sys.argv[0])
    ours = program.stem == "sakd" or Path(__file__).parents[1] in program.absolute().parents
    return shlex.join(["sakd", *sys.argv[1:]] if ours else ["python", *sys.argv])


def _commit() -> str | None:
    """Commit of the checkout that sakd runs from; None where it was installed."""
    here = Path(__file__).parents[2]
    if not (here / ".git").exists():
        return None
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=False)
    return git.stdout.strip() or None
