"""HOW MUCH to distil: where a spot compares, the task's gradient and the distillation's meet, and may be balanced."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sakd_cli import distributed
from sakd_cli.models.spot import Spot
from sakd_cli.models.staged import Features

TINY = 1e-18  # length of a gradient below which its squares vanish in fp32; a hint so weak is not drawn up further


class _Meet(torch.autograd.Function):
    """A value of the student's, and a stand-in for what a spot compares of it, by which `_Compare` sends g_hint here.

    Backward, where nothing is balanced: what came to the value, g_task and g_hint, passes as autograd has added them,
    so that a run is the same to the bit with and without. With a share, g_task alone came, and
    g_task + share |g_task| / |g_hint| g_hint passes. Both lengths, [2], are the gradient of `probe`: so nothing is
    written in passing, and a compiler can follow.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, probe: Tensor, share: float, view: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        ctx.share, ctx.view, ctx.dtype = share, view, probe.dtype
        stand_in = x.new_zeros((), dtype=torch.promote_types(x.dtype, torch.float32))
        return x.view_as(x), stand_in.expand(view(x).shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        came, hint = gradients
        task = ctx.view(came) if ctx.share else ctx.view(came) - hint
        norms = [torch.linalg.vector_norm(gradient, dtype=ctx.dtype) for gradient in (task, hint)]
        own = lengths = torch.stack(norms)
        if not ctx.share:
            return came, own, None, None
        if distributed.world_size() > 1:
            lengths = distributed.all_reduce_sum(lengths.square()).sqrt()
        passed = came.clone()
        ctx.view(passed).add_(hint * (ctx.share * lengths[0] / lengths[1].clamp(min=TINY)))
        return passed, own, None, None


class _Compare(torch.autograd.Function):
    """x in at least fp32; its gradient goes to the stand-in, and to x as well where nothing is balanced."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, stand_in: Tensor, balanced: bool) -> Tensor:
        ctx.balanced, ctx.dtype = balanced, x.dtype
        return x.view_as(x) if x.dtype == stand_in.dtype else x.to(stand_in.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor, None]:
        (hint,) = gradients
        return None if ctx.balanced else hint.to(ctx.dtype), hint, None


class Doses(nn.Module):
    """Measures at every spot how strong the distillation is beside the task, and balances it where that is asked for.

    g = g_task + balance/K |g_task| / |g_hint| g_hint  at each of K spots

    g_task is all that comes back from the layers behind: cross-entropy, logit loss, and the deeper spots' hints as they
    were balanced there. Lengths are over the whole batch, of all processes. The weight of the feature loss cancels
    here; what is trained beside the network (adapters) learns by the loss as it is weighted. K counts the feature
    spots, which are balanced; of a method without any the logits are, K = 1, and g_task is the cross-entropy's.

    balance  0: nothing is changed
    lengths  [S, 2] of g_task and g_hint in the last backward pass, in this process's rows
    """

    lengths: Tensor

    def __init__(self, spots: Sequence[Spot], balance: float) -> None:
        super().__init__()
        features = len(spots) - 1
        share = balance / max(features, 1)
        self.shares = [share] * features + [0.0 if features else share]
        self.views = [partial(spot.student_layout.to_map, shape=spot.student_shape) for spot in spots]
        self._places = {spot.student: k for k, spot in enumerate(spots)}  # the stage behind the last one is the logits
        self.register_buffer("lengths", torch.zeros(len(spots), 2), persistent=False)
        self._probes: list[Tensor] = []

    def begin(self) -> None:
        """Forget the last backward pass; to be called in front of every step."""
        self.lengths.zero_()
        if not self._probes or self._probes[0].device != self.lengths.device:
            self._probes = [torch.zeros_like(row).requires_grad_() for row in self.lengths]
            for probe, row in zip(self._probes, self.lengths, strict=True):
                probe.grad = row

    def mark(self, stand_ins: dict[int, Tensor], stage: int, x: Tensor) -> Tensor:
        """The student's value at a stage, for the layers behind it; a spot's stand-in is put into `stand_ins`."""
        if (k := self._places.get(stage)) is not None and x.requires_grad:
            x, stand_ins[stage] = _Meet.apply(x, self._probes[k], self.shares[k], self.views[k])
        return x

    def compare(self, stand_ins: dict[int, Tensor], stage: int, x: Tensor) -> Tensor:
        """What the spot compares at a stage that was marked, in at least fp32; called when the network has run."""
        if stage not in stand_ins:
            return x
        compared: Tensor = _Compare.apply(x, stand_ins[stage], self.shares[self._places[stage]] > 0)
        return compared

    def compared(self, features: Features, stand_ins: dict[int, Tensor]) -> Features:
        """The student's marked features as the spots compare them; the logits are left."""
        seen = tuple(self.compare(stand_ins, k, x) for k, x in enumerate(features.preactivations or features.stages))
        stages, before = (features.stages, seen) if features.preactivations else (seen, ())
        return Features(stages, features.logits, before, features.blocks, features.raw)
