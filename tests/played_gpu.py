"""A GPU played by the CPU, for whole commands: `python -m pytest -p played_gpu tests/test_gpu.py`.

Tensors say that they are on cuda:0 and are computed with on the CPU. As on a GPU, an operation that is given tensors of
both devices raises, and numpy takes none; nor are there floats of 64 bits, as on Apple's. What cannot be seen: speed,
streams, capturing (a captured step is called), and a tensor that a backward pass makes on the CPU. Private parts of
PyTorch are used; a new release may need changes.
"""

import contextlib
import copy
import importlib
import types
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

GPU = torch.device("cuda", 0)
BETWEEN = {"copy_", "_to_copy", "_foreach_copy_"}  # operations that take tensors of two devices
to_of_torch = Tensor.to


class Played(Tensor):
    """A tensor on the GPU; `inner` holds its numbers. For PyTorch's own code below Python it is one on the CPU."""

    inner: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: GPU)
    is_cuda = property(lambda self: True)

    @staticmethod
    def __new__(cls, inner: Tensor) -> "Played":
        made: Played = Tensor._make_subclass(cls, inner.detach(), False)
        made.inner = inner
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self) not in memo:
            new = Played(self.inner.clone())
            parameter = getattr(self, "_is_param", False)
            memo[id(self)] = nn.Parameter(new, self.requires_grad) if parameter else new
        return memo[id(self)]

    def cpu(self) -> Tensor:
        return self.to("cpu")

    def new_tensor(self, values: Any, dtype: Any = None) -> Tensor:
        return torch.tensor(values, dtype=dtype or self.dtype, device=GPU)

    def tolist(self) -> Any:
        return self.inner.tolist()

    def record_stream(self, stream: Any) -> None:
        return

    def numpy(self, *given: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")

    __array__ = numpy

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(func, args, kwargs or {})


class _Mode(TorchDispatchMode):
    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(func, args, kwargs or {})


MODE = _Mode()


def _compute(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    composite = torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")
    if composite and torch.is_inference_mode_enabled():  # else it arrives in its parts
        with MODE:
            parts = func.decompose(*args, **kwargs)
        if parts is not NotImplemented:
            return parts
    name = func.overloadpacket.__name__
    given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    ours = [x for x in given if isinstance(x, Played)]
    others = [x for x in given if not isinstance(x, Played)]
    free = name in BETWEEN or (name in ("index", "index_put_") and isinstance(args[0], Played))
    if ours and not free and any(x.dim() for x in others):
        shapes = [tuple(x.shape) for x in others]
        raise RuntimeError(f"Expected all tensors to be on the same device: {name} got {shapes} on cpu")
    device, backward = kwargs.get("device"), torch._C._current_graph_task_id() != -1
    here = bool(ours) or backward or (device is not None and torch.device(device).type == "cuda")
    if device is not None and torch.device(device).type == "cuda":
        kwargs = kwargs | {"device": torch.device("cpu")}
    plain = tree_map(lambda x: x.inner if isinstance(x, Played) else x, (args, kwargs))
    known = {id(x.inner): x for x in ours} | {id(x): x for x in others}

    def told(x: Any) -> Any:
        wrapped = isinstance(x, Tensor) and not x.is_meta and here and not isinstance(x, Played)
        if wrapped and x.dtype == torch.float64:
            raise TypeError(f"no numbers of 64 bits on this device: {name}")
        return known.get(id(x), Played(x) if wrapped else x) if isinstance(x, Tensor) else x

    return tree_map(told, func(*plain[0], **plain[1]))


class _Stream:
    """Of work that is done at once."""

    device = GPU

    def __getattr__(self, name: str) -> Any:
        return lambda *given: None


def pytest_configure() -> None:
    """Whoever asks for CUDA finds the played GPU, in the rest of this process."""
    importlib.import_module("torch._dynamo.trace_rules").get_torch_obj_rule_map()  # before its functions are others
    answers = {"is_available": True, "device_count": 1, "current_device": 0, "get_device_capability": (9, 0)}
    answers |= {"get_device_name": "played by the CPU", "is_initialized": True, "get_rng_state_all": []}
    answers |= {"is_bf16_supported": True, "mem_get_info": (2**36, 2**36), "max_memory_allocated": 0}
    answers |= {"current_stream": _Stream(), "Stream": _Stream(), "graph_pool_handle": (0, 0)}
    answers |= {"is_current_stream_capturing": False, "get_device_properties": types.SimpleNamespace(major=9)}
    nothing = ("_lazy_init", "init", "synchronize", "empty_cache", "set_device", "set_rng_state", "get_rng_state")
    answers |= dict.fromkeys((*nothing, "reset_peak_memory_stats"))
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *given, answer=answer, **named: answer)
    for name in ("stream", "device"):
        setattr(torch.cuda, name, lambda *given: contextlib.nullcontext())
    stands_for = {"synchronize": None, "current_stream": types.SimpleNamespace(is_capturing=lambda: False)}
    for name, answer in stands_for.items():
        setattr(torch.accelerator, name, lambda *given, answer=answer: answer)
    torch.backends.cudnn.enabled = False
    _play_conversions()
    runtime = importlib.import_module("sakd_cli.engine.runtime")
    pick = runtime.pick_device
    # With its number, for which PyTorch would ask the driver.
    runtime.pick_device = lambda name: GPU if (found := pick(name)).type == "cuda" else found
    for name in ("extension", "forecast"):
        importlib.import_module(f"sakd_cli.runs.{name}").Cuda = importlib.import_module("emulator").Called
    MODE.__enter__()


def _play_conversions() -> None:
    """Functions of PyTorch that decide below Python by the device."""
    of_torch, one_hot, alike = torch.autocast, nn.functional.one_hot, torch._has_compatible_shallow_copy_type

    class Autocast(of_torch):
        def __init__(self, device: str, *given: Any, **named: Any) -> None:
            super().__init__("cpu", *given, **named)

    def to(self: Tensor, *given: Any, copy: bool = False, **named: Any) -> Tensor:
        like = (given[0].device, given[0].dtype, None, None) if given and isinstance(given[0], Tensor) else None
        device, dtype, _, layout = like or torch._C._nn._parse_to(*given, **named)
        device, dtype = device or self.device, dtype or self.dtype
        kept = {"copy": copy} | ({} if layout is None else {"memory_format": layout})
        if device.type == "cuda":
            return to_of_torch(self, *() if isinstance(self, Played) else (GPU,), dtype, **kept)
        return to_of_torch(self.inner.detach().clone() if isinstance(self, Played) else self, device, dtype, **kept)

    def shallow(one: Tensor, other: Tensor) -> bool:
        return not isinstance(one, Played) and not isinstance(other, Played) and alike(one, other)

    torch.autocast, torch._has_compatible_shallow_copy_type = Autocast, shallow
    nn.functional.one_hot = lambda x, n=-1: Played(one_hot(x.inner, n)) if isinstance(x, Played) else one_hot(x, n)
    Tensor.to = to
    torch._C._set_only_lift_cpu_tensors(True)
    loader = torch.utils.data.DataLoader
    begin = copy.copy(loader.__init__)
    loader.__init__ = lambda self, *given, pin_memory=False, **named: begin(self, *given, **named)
