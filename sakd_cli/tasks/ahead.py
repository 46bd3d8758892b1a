"""What a small change of a network's weights does: the gradient of held-out images, and derivatives along it."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sakd_cli import distributed
from sakd_cli.batch import Batch
from sakd_cli.engine.optim import moved
from sakd_cli.engine.runtime import Mode
from sakd_cli.models.staged import Features

if TYPE_CHECKING:
    from sakd_cli.tasks.distill import DistillTask

TINY = 1e-30  # of a product of gradients
STEP = 1e-3  # of the finite difference, as a fraction of the length of all weights


def held_out_gradient(
    network: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], *, shared: bool = False
) -> list[Tensor]:
    """Of the summed cross-entropy of (images, labels) by every weight that is trained, at length 1.

    shared  each process has a part of the batches
    """
    weights = [p for p in network.parameters() if p.requires_grad]
    total = [torch.zeros_like(p) for p in weights]
    for images, labels in batches:
        loss = F.cross_entropy(network(images).float(), labels, reduction="sum")
        found = torch.autograd.grad(loss, weights, allow_unused=True, materialize_grads=True)
        total = [a + b for a, b in zip(total, found, strict=True)]
    if shared:
        distributed.average_buffers(total)
    length = torch.stack([part.norm() for part in total]).norm().clamp(min=1e-30)
    return [part / length for part in total]


@torch.no_grad()
def along(network: nn.Module, way: Sequence[Tensor], value: Callable[[], Tensor]) -> Tensor:
    """The derivative of `value` by the network's trained weights in a direction of length 1; they stay as they are.

    A central difference, which reads nothing back from the device.
    """
    weights = [p for p in network.parameters() if p.requires_grad]
    step = STEP * torch.stack([p.norm() for p in weights]).norm()
    forth, back = (value() for _ in moved(weights, way, step, -step))
    return (forth - back) / (2 * step)


def benefits_of(task: "DistillTask", batch: Batch, seen: Features) -> Tensor:
    """[S, N] by how much distilling a sample at a spot lowers the held-out cross-entropy, at root mean square 1.

    In evaluation mode, so that nothing is recorded; in fp32, in whose last bits the difference lies.
    """
    held_out = batch.held_out
    assert held_out is not None, "the builder gives such a router held-out images"
    modules = [module for module in task.modules() if module.training]
    mode, task.mode = task.mode, Mode()
    for module in modules:
        module.training = False
    try:
        own = [(held_out.images, held_out.labels)] if held_out.shard_weight else []  # borrowed rows count elsewhere
        way = held_out_gradient(task.network, own, shared=True)
        known = replace(batch, precomputed=seen)
        products = along(task.network, way, lambda: task.sample_losses(known))
    finally:
        task.mode = mode
        for module in modules:
            module.training = True
    square = distributed.all_reduce_mean(products.square().mean(dim=1, keepdim=True), batch)
    return products / square.sqrt().clamp(min=TINY)
