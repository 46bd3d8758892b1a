"""One training step: forward, backward, update, and what is counted of it. Nothing is read back by the host."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sakd_cli import distributed
from sakd_cli.batch import Batch
from sakd_cli.engine.control import Delivered
from sakd_cli.engine.optim import BilevelOptimizer, Optimizer
from sakd_cli.engine.recorder import Guard, Meter, Rows, SpotRecorder, top1
from sakd_cli.engine.task import SpotUse, StepOutput, Task


class TrainStep:
    """All that happens on the device with one batch; what a CUDA graph captures and `sakd bench` times.

    guard     remembers the first number that is not finite, and keeps that step's update from being made
    meter     means of the loss terms since the last log line
    recorder  where each sample was distilled; None for tasks without spots
    delivered  what is delivered, where that is not what is trained
    """

    def __init__(
        self,
        task: Task,
        optimizer: Optimizer | BilevelOptimizer,
        recorder: SpotRecorder | None,
        delivered: Delivered | None = None,
    ) -> None:
        self.optimizer, self.recorder, self.delivered = optimizer, recorder, delivered
        self.guard = Guard(next(task.parameters()).device)
        self.meter = Meter()
        self._ddp = wrap_ddp(task)
        self._statistics = distributed.running_statistics(task)

    def __call__(self, batch: Batch) -> None:
        outputs: list[StepOutput] = []
        losses = self._losses(batch, outputs)
        self.optimizer.step(losses, lambda gradients: self.guard.inspect(batch, join_outputs(outputs), gradients))
        output = join_outputs(outputs)
        distributed.average_buffers(self._statistics)
        if self.delivered is not None:
            self.delivered.update()
        rows = Rows(batch.labels, batch.index, batch.ratio, batch.other_labels, batch.other_index)
        right = {} if output.logits is None else {"top1": top1(output.logits.detach(), rows)}
        parts, use, rows = of_all_processes(output.parts | right, output.use, rows, batch)
        self.meter.add(batch.size, parts)
        if self.recorder is not None and use is not None:
            self.recorder.add(use, rows)

    def _losses(self, batch: Batch, outputs: list[StepOutput]) -> Iterator[Tensor]:
        """Of the batch, or of its parts one after another, each with its share of the mean; their outputs."""
        if self.optimizer.accumulate == 1:
            outputs.append(self._ddp(batch))
            yield outputs[0].loss if batch.shard_weight == 1 else outputs[0].loss * batch.shard_weight
            return
        for part in batch.cut(self.optimizer.accumulate):
            output: StepOutput = self._ddp(part)
            yield output.loss * part.part
            outputs.append(_weighted(output, part.part))  # once its backward pass is done


def _weighted(output: StepOutput, share: float) -> StepOutput:
    """Of a part of a batch: without gradient, means times its share, and nothing that the next part changes."""
    use, logits = output.use, output.logits
    if use is not None:
        lengths = None if use.lengths is None else use.lengths.clone()
        events = {name: event * share for name, event in use.events.items()}
        use = SpotUse(use.weight.clone(), use.probability, events, lengths)
    parts = {name: part * share for name, part in output.parts.items()}
    return StepOutput(output.loss.detach() * share, None if logits is None else logits.detach(), parts, use)


def join_outputs(outputs: list[StepOutput]) -> StepOutput:
    """That of a batch, from those of its parts: means added up, rows one after another."""
    if len(outputs) == 1:
        return outputs[0]

    def added(of: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        return {name: torch.stack([one[name] for one in of]).sum(dim=0) for name in of[0]}

    logits = [output.logits for output in outputs if output.logits is not None]
    uses, use = [output.use for output in outputs if output.use is not None], None
    if uses:
        chances = [one.probability for one in uses if one.probability is not None]
        lengths = [one.lengths.square() for one in uses if one.lengths is not None]
        use = SpotUse(
            torch.cat([one.weight for one in uses], dim=1),
            torch.cat(chances, dim=1) if chances else None,
            added([one.events for one in uses]),
            torch.stack(lengths).sum(dim=0).sqrt() if lengths else None,
        )
    loss = torch.stack([output.loss for output in outputs]).sum()
    return StepOutput(loss, torch.cat(logits) if logits else None, added([one.parts for one in outputs]), use)


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
    parts: dict[str, Tensor], use: SpotUse | None, rows: Rows, batch: Batch
) -> tuple[dict[str, Tensor], SpotUse | None, Rows]:
    """Means, the routing and the samples of the whole batch, of which each process has its own rows."""
    if distributed.world_size() == 1:
        return parts, use, rows
    means = distributed.all_reduce_mean(torch.stack([part.detach().double() for part in parts.values()]), batch)
    parts = dict(zip(parts, means.unbind(), strict=True))
    if use is None:
        return parts, None, rows
    own = [column for column in rows if column is not None]
    chances = [] if use.probability is None else [use.probability.T]
    weight, *gathered = distributed.all_gather_packed([use.weight.T, *own, *chances], batch)
    lengths = None if use.lengths is None else distributed.all_reduce_sum(use.lengths.square()).sqrt()
    chance = gathered[len(own)].T if chances else None
    return parts, SpotUse(weight.T, chance, use.events, lengths), Rows(*gathered[: len(own)])
