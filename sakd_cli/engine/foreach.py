"""What PyTorch does in every pass layer by layer, done for all layers at once: one launch instead of one for each."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

LAYERS = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)  # whose weights autocast converts; no classes derived from them
PACKAGES = ("sakd_cli", "torch", "torchvision", "timm")  # whose modules call such layers under the autocast around them


def layers_of(module: nn.Module) -> Iterator[nn.Module]:
    """Its LAYERS, but those in modules that may switch autocast off: somebody's own often do."""
    if type(module) in LAYERS:
        yield module
    elif type(module).__module__.partition(".")[0] in PACKAGES:
        for child in module.children():
            yield from layers_of(child)


class ConvertedWeights:
    """What autocast does to the weights of some layers anew in every pass and weight by weight; the same bits.

    trained  modules whose layers (`layers_of`) are trained; those that are not stay with autocast
    views    modules that share weights with them and give these no gradient
    dtype    None: nothing is converted
    """

    def __init__(self, trained: Sequence[nn.Module], views: Sequence[nn.Module], dtype: torch.dtype | None) -> None:
        self._dtype = dtype
        self._trained, self._views = ([*modules] if dtype is not None else [] for modules in (trained, views))
        self._places: list[tuple[dict[str, Any], str, int, bool]] | None = None
        self._weights: list[nn.Parameter] = []
        self._converted: list[Tensor] = []

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Inside of it these layers have the converted weights; only then, so that nothing outside sees old ones."""
        if self._places is None:  # when all are on their device and in their memory format
            self._places = self._find()
        if not self._weights:
            yield
            return
        given = _Convert.apply(self._converted, *self._weights)
        before = [parameters[name] for parameters, name, _, _ in self._places]
        for parameters, name, k, view in self._places:
            parameters[name] = self._converted[k] if view else given[k]
        try:
            yield
        finally:
            for (parameters, name, _, _), weight in zip(self._places, before, strict=True):
                parameters[name] = weight

    def _find(self) -> list[tuple[dict[str, Any], str, int, bool]]:
        """Parameters of a layer, name of one, its number among the weights, whether it is a view of that."""
        places: list[tuple[dict[str, Any], str, int, bool]] = []
        numbers: dict[int, int] = {}
        for view, modules in ((False, self._trained), (True, self._views)):
            for layer in (layer for module in modules for layer in layers_of(module)):
                for name, weight in layer.named_parameters(recurse=False):
                    if not view and weight.requires_grad and weight.data_ptr() not in numbers:
                        numbers[weight.data_ptr()] = len(self._weights)
                        self._weights.append(weight)
                    if weight.data_ptr() in numbers:
                        places.append((layer._parameters, name, numbers[weight.data_ptr()], view))
        self._converted = [torch.empty_like(weight, dtype=self._dtype, requires_grad=False) for weight in self._weights]
        return places


class _Convert(torch.autograd.Function):
    """Weights into tensors of another type, which are overwritten; the gradients back. One launch each."""

    @staticmethod
    def forward(ctx: Any, converted: list[Tensor], *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)  # a weight that a step does not use has no gradient
        ctx.dtypes = [weight.dtype for weight in weights]
        torch._foreach_copy_(converted, list(weights))
        return tuple(tensor.detach() for tensor in converted)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        there = [(g, dtype) for g, dtype in zip(gradients, ctx.dtypes, strict=True) if g is not None]
        found = [torch.empty_like(g, dtype=dtype) for g, dtype in there]
        if found:
            torch._foreach_copy_(found, [g for g, _ in there])
        back = iter(found)
        return None, *(None if g is None else next(back) for g in gradients)


NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)  # no classes derived from them, which may need their count


class CountedBatches:
    """`num_batches_tracked` of every BatchNorm in training mode of some modules, each of which a pass runs once.

    A BatchNorm without momentum reads its count to weigh the mean: it counts for itself, as one does that is shared by
    processes.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._modules = [*modules]
        self._norms: list[nn.BatchNorm2d] | None = None

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Inside of it they do not count; behind it they have."""
        if self._norms is None:  # when those are there that are trained
            found = [norm for one in self._modules for norm in one.modules() if type(norm) in NORMS]
            norms = cast("list[nn.BatchNorm2d]", found)
            self._norms = [norm for norm in norms if norm.momentum is not None and norm.track_running_stats]
        counting = [norm for norm in self._norms if norm.training]
        counts = [cast(Tensor, norm.num_batches_tracked) for norm in counting]
        for norm in counting:
            norm._buffers["num_batches_tracked"] = None
        try:
            yield
        finally:
            for norm, count in zip(counting, counts, strict=True):
                norm._buffers["num_batches_tracked"] = count
        if counts:
            torch._foreach_add_(counts, 1)
