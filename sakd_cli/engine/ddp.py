"""One process's step as a part of the whole: its task under DistributedDataParallel, the numbers of all processes."""

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sakd_cli import distributed
from sakd_cli.batch import Batch
from sakd_cli.engine.task import SpotUse, Task


def wrap_ddp(task: Task) -> nn.Module:
    """The task; where several processes train it, with gradients that are the mean of theirs.

    Buffers are not broadcast: what a step records of its own rows is averaged by `distributed.average_buffers`, and
    everything else is the same in every process.
    """
    if distributed.world_size() == 1:
        return task
    # Under the name of the argument for it torch 2.15 warns and torch 2.11 knows no other.
    none = [name for name, _ in task.named_buffers()]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(task, none)
    return DistributedDataParallel(task, find_unused_parameters=task.has_unused_parameters)


def of_all_processes(
    parts: dict[str, Tensor], use: SpotUse | None, batch: Batch
) -> tuple[dict[str, Tensor], SpotUse | None, Tensor, Tensor]:
    """Means, the routing, labels [N] and index [N] of the whole batch, of which each process has its own rows."""
    if distributed.world_size() == 1:
        return parts, use, batch.labels, batch.index
    means = distributed.all_reduce_mean(torch.stack([part.detach().double() for part in parts.values()]), batch)
    parts = dict(zip(parts, means.unbind(), strict=True))
    if use is None:
        return parts, None, batch.labels, batch.index
    chances = [] if use.probability is None else [use.probability.T]
    weight, labels, index, *chance = distributed.all_gather_packed(
        [use.weight.T, batch.labels, batch.index, *chances], batch
    )
    return parts, SpotUse(weight.T, chance[0].T if chance else None, use.events), labels, index
