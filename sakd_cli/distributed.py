"""Collectives of several processes that train one network together: ranks, shards, and values of the global batch.

`torchrun` starts the processes; each gets a shard of every batch, and DistributedDataParallel averages their gradients.
What is linear in the batch needs nothing else: a process's loss is multiplied by its `shard_weight`. What is not (a
comparison of two means, a count, a loss between samples) is computed by every process from the rows of all.

A value of the global batch is the same function in every process, so its gradient by a process's own rows is known
there: no collective runs in the backward pass. It is written `processes / shard_weight` times as large, because the
loss is then multiplied by `shard_weight` and averaged over the processes. With one process every function returns its
argument.
"""

import atexit
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager
from datetime import timedelta
from itertools import islice
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from sakd_cli.batch import Batch
from sakd_cli.errors import LostProcessError, first_line
from sakd_cli.torchrun import requested_world_size

WAIT = timedelta(hours=1)  # while the main process decodes, writes or reports
TIMEOUT = timedelta(minutes=5)  # of every exchange within a step: the longest that a lost process can go unnoticed
PATIENCE = 3  # seconds until it is told that the others are not there yet
Item = TypeVar("Item")


_WAITING: list[Any] = []  # the group of those that wait for the main process, where `init_process_group` made one


def world_size() -> int:
    """How many train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Which of them this one is, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_main_process() -> bool:
    """Whether this is the process that writes files and logs."""
    return rank() == 0


def init_process_group(
    device: torch.device,
    say: Callable[[str], None] = lambda text: None,
    raise_if_stopped: Callable[[], None] = lambda: None,
) -> None:
    """Join the process group, if torchrun has started one; once per process.

    say               is told where it takes long
    raise_if_stopped  is called again and again until all are there
    """
    if requested_world_size() > 1 and not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        atexit.register(destroy_process_group)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        own, address, port = (os.environ.get(name, "") for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"))
        found: Future[Any] = Future()
        threading.Thread(target=_meet, args=(found,), daemon=True).start()
        begin, told = time.monotonic(), False
        while not wait([found], timeout=0.2).done:  # inside of torch no signal would be heard
            raise_if_stopped()
            if not told and time.monotonic() - begin > PATIENCE:
                told = True
                say(f"process {own} of {requested_world_size()} waits for the others at {address}:{port}")
        try:
            store, rank, count = found.result()
        except (dist.DistError, ValueError) as error:
            text = f"process {own}: the others were not found at {address}:{port}: {first_line(error)}"
            raise LostProcessError(text) from None
        # After a restart by torchrun the store still holds the addresses of those that are gone.
        store = PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=TIMEOUT)
        _WAITING.append(dist.new_group(backend="gloo", timeout=WAIT))


def _meet(found: "Future[Any]") -> None:
    """Keep what the rendezvous gives, or how it fails."""
    try:
        found.set_result(next(rendezvous("env://", timeout=WAIT)))
    except BaseException as error:
        found.set_exception(error)


def destroy_process_group() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        _WAITING.clear()
        dist.destroy_process_group()


@contextmanager
def translate_dist_errors() -> Iterator[None]:
    """Turn what an exchange says when another process has gone into a LostProcessError."""
    try:
        yield
    except RuntimeError as error:
        gone = isinstance(error, dist.DistError) or "onnection closed" in str(error) or "onnection reset" in str(error)
        if world_size() == 1 or not gone:
            raise
        raise LostProcessError(
            f"process {rank()} of {world_size()}: another one has ended", "its own message says why; then --resume auto"
        ) from None


def _waiting() -> Any:
    return _WAITING[0] if _WAITING else None


def barrier() -> None:
    """Wait until every process is here."""
    if world_size() > 1:
        dist.all_reduce(torch.zeros(1), group=_waiting())


def broadcast_object(item: Item) -> Item:
    """What the first process has, in every process; a plain object."""
    if world_size() == 1:
        return item
    box = [item]
    dist.broadcast_object_list(box, device=torch.device("cpu"), group=_waiting())
    return box[0]


def shard_sizes(global_size: int) -> list[int]:
    """Rows of a batch of `global_size` samples that each process gets; they differ by at most one.

    No process gets a single row, of which BatchNorm could make nothing: of a small batch the last ones get none.
    """
    working = min(world_size(), max(1, global_size // 2))
    each, more = divmod(global_size, working)
    return [each + (place < more) for place in range(working)] + [0] * (world_size() - working)


def shard_rows(global_size: int) -> slice:
    """This process's rows. Where there are too few for all, a process that has none gets the first two (share 0)."""
    parts = shard_sizes(global_size)
    start = sum(parts[: rank()])
    return slice(start, start + parts[rank()]) if parts[rank()] else slice(0, min(2, global_size))


def shard_weight(global_size: int) -> float:
    """Factor of this process's mean: number of processes times its share of the batch."""
    return shard_sizes(global_size)[rank()] * world_size() / global_size


def gather(x: Tensor) -> list[Tensor]:
    """What every process has; a tensor in main memory, of one shape in all."""
    if world_size() == 1:
        return [x]
    found = [torch.empty_like(x) for _ in range(world_size())]
    dist.all_gather(found, x, group=_waiting())
    return found


def all_reduce_sum(x: Tensor) -> Tensor:
    """Sum over the processes, without gradient; a tensor in main memory."""
    if world_size() > 1:
        dist.all_reduce(x)
    return x


def all_reduce_sum_with_grad(x: Tensor, batch: Batch) -> Tensor:
    """Sum over the processes of a value that each has of its own rows, with its gradient (see above)."""
    if world_size() == 1:
        return x
    own = x.detach() * (batch.shard_weight > 0)
    summed = own.clone()
    dist.all_reduce(summed)
    return summed + (x - x.detach()) * _gradient_scale(batch)


def all_reduce_mean(x: Tensor, batch: Batch) -> Tensor:
    """Mean over the whole batch of something of which `x` is the mean over this process's rows; without gradient."""
    if world_size() == 1:
        return x.detach()
    summed = x.detach() * batch.shard_weight
    dist.all_reduce(summed)
    return summed / world_size()


def all_gather(x: Tensor, batch: Batch) -> Tensor:
    """Rows [n, ...] of every process, in the order of the whole batch: [whole, ...], with gradient by its own rows."""
    if world_size() == 1:
        return x
    parts = shard_sizes(batch.size)
    own = x.detach()[: parts[rank()]].contiguous()
    padded = own.new_zeros((max(parts), *own.shape[1:]))
    padded[: len(own)] = own
    found = [torch.empty_like(padded) for _ in parts]
    dist.all_gather(found, padded)
    rows = [theirs[:count] for theirs, count in zip(found, parts, strict=True)]
    if x.requires_grad and len(own):
        rows[rank()] = own + (x - x.detach()) * _gradient_scale(batch)
    return torch.cat(rows)


def all_gather_packed(rows: Sequence[Tensor], batch: Batch) -> list[Tensor]:
    """Tensors [n, ...] or [n] of few numbers in rows of every process, in one exchange, without gradient."""
    flat = [x.detach().double().reshape(len(x), -1) for x in rows]
    parts = all_gather(torch.cat(flat, dim=1), batch).split([x.shape[1] for x in flat], dim=1)
    return [found.reshape(-1, *x.shape[1:]).to(x.dtype) for found, x in zip(parts, rows, strict=True)]


def shard(items: Iterable[Item]) -> Iterator[Item]:
    """Every process's own items: the first takes the first, the second the second, and so on in turn."""
    return islice(iter(items), rank(), None, world_size())


def average_buffers(buffers: Sequence[Tensor]) -> None:
    """Put into every process the mean over the processes of what each has, in place."""
    if world_size() == 1 or not buffers:
        return
    flat = torch.cat([buffer.detach().flatten() for buffer in buffers])
    dist.all_reduce(flat)
    means = flat.div_(world_size()).split([buffer.numel() for buffer in buffers])
    torch._foreach_copy_(list(buffers), [mean.view_as(buffer) for mean, buffer in zip(means, buffers, strict=True)])


def running_statistics(module: nn.Module) -> list[Tensor]:
    """Means and variances that BatchNorms of this process record of its own rows alone."""
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    own = [m for m in norms if m.track_running_stats and not isinstance(m, SyncBatchNorm)]
    return [buffer for m in own for buffer in (m.running_mean, m.running_var) if buffer is not None]


class AsyncMax:
    """The maximum over the processes of a number, one call late, so that nobody waits for it."""

    def __init__(self) -> None:
        self._pending: tuple[Tensor, Any] | None = None

    def __call__(self, mine: int) -> int:
        """The largest number that any process gave in the call before; with one process, its own of now."""
        if world_size() == 1:
            return mine
        answer = 0
        if self._pending is not None:
            number, work = self._pending
            work.wait()
            answer = int(number)
        number = torch.tensor(mine)
        self._pending = number, dist.all_reduce(number, dist.ReduceOp.MAX, async_op=True)
        return answer


class _Sum(torch.autograd.Function):
    """Sum over the processes of different functions of it: the gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        found = x.clone()
        dist.all_reduce(found)
        return found

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        found = gradient.clone()
        dist.all_reduce(found)
        return found


class SyncBatchNorm(nn.BatchNorm2d):
    """BatchNorm with the statistics of all processes' rows, of maps [N, C, H, W] or vectors [N, C], on any device."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or world_size() == 1:
            return super().forward(input)
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        dims, shape = [d for d in range(input.dim()) if d != 1], [1, -1, *[1] * (input.dim() - 2)]
        wide = input.to(torch.promote_types(input.dtype, torch.float32))
        count = wide.new_full((1,), wide.numel() / wide.shape[1])
        found: Tensor = _Sum.apply(torch.cat([wide.sum(dims), count]))
        center = found[:-1] / found[-1]
        centred = wide - center.view(shape)
        variance = _Sum.apply(centred.square().sum(dims)) / found[-1]
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            momentum = self.momentum if self.momentum is not None else 1 / float(self.num_batches_tracked)
            self.running_mean.lerp_(center.to(self.running_mean.dtype), momentum)
            unbiased = variance * found[-1] / (found[-1] - 1)
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), momentum)
        scaled = centred * torch.rsqrt(variance + self.eps).view(shape)
        if self.affine:
            scaled = scaled * self.weight.view(shape) + self.bias.view(shape)
        return scaled.to(input.dtype)

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected rows of channels, got {tuple(input.shape)}")


def convert_sync_batchnorm(module: nn.Module) -> None:
    """Make every BatchNorm below a module a SyncBatchNorm with the very same tensors."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.modules.batchnorm._BatchNorm) and not isinstance(child, SyncBatchNorm):
                synced = SyncBatchNorm(child.num_features, child.eps, child.momentum, child.affine)
                for kind in ("_parameters", "_buffers"):
                    getattr(synced, kind).update(getattr(child, kind))
                synced.track_running_stats = child.track_running_stats
                setattr(parent, name, synced.train(child.training))


def _gradient_scale(batch: Batch) -> float:
    return world_size() / batch.shard_weight if batch.shard_weight else 1.0
