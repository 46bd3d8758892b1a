"""One training step: forward, backward, update, and what is counted of it. Nothing is read back by the host."""

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sakd_cli import distributed
from sakd_cli.batch import Batch
from sakd_cli.engine.optim import BilevelOptimizer, Optimizer
from sakd_cli.engine.recorder import Guard, Meter, SpotRecorder, top1
from sakd_cli.engine.task import SpotUse, StepOutput, Task


class TrainStep:
    """All that happens on the device with one batch; what a CUDA graph captures and `sakd bench` times.

    guard     remembers the first number that is not finite, and keeps that step's update from being made
    meter     means of the loss terms since the last log line
    recorder  where each sample was distilled; None for tasks without spots
    """

    def __init__(self, task: Task, optimizer: Optimizer | BilevelOptimizer, recorder: SpotRecorder | None) -> None:
        self.optimizer, self.recorder = optimizer, recorder
        self.guard = Guard(next(task.parameters()).device)
        self.meter = Meter()
        self._ddp = wrap_ddp(task)
        self._statistics = distributed.running_statistics(task)

    def __call__(self, batch: Batch) -> None:
        output: StepOutput = self._ddp(batch)
        loss = output.loss if batch.shard_weight == 1 else output.loss * batch.shard_weight
        self.optimizer.step(loss, partial(self.guard.inspect, batch, output))
        distributed.average_buffers(self._statistics)
        right = {} if output.logits is None else {"top1": top1(output.logits.detach(), batch.labels)}
        parts, use, labels, index = of_all_processes(output.parts | right, output.use, batch)
        self.meter.add(batch.size, parts)
        if self.recorder is not None and use is not None:
            self.recorder.add(use, labels, index)


def wrap_ddp(task: Task) -> nn.Module:
    """The task, under DistributedDataParallel where several processes train it.

    Buffers are not broadcast: `distributed.average_buffers` averages what a step records of its own rows.
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
    lengths = None if use.lengths is None else distributed.all_reduce_sum(use.lengths.square()).sqrt()
    return parts, SpotUse(weight.T, chance[0].T if chance else None, use.events, lengths), labels, index
