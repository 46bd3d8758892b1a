"""HOW MUCH to distil: where a spot compares, the task's gradient and the distillation's meet, and may be balanced."""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sakd_cli import distributed
from sakd_cli.models.spot import Spot
from sakd_cli.models.staged import Features

FAINT = 1e-6  # |g_hint| / |g_task| below which it may be rounding alone: it is drawn up no further than from there
TINY = 1e-18  # length of a gradient below which its squares vanish in fp32


class _Meet(torch.autograd.Function):
    """A value of the student's, and a stand-in for what a spot compares of it, by which `_Compare` sends g_hint here.

    Backward, where nothing is balanced: what came to the value, g_task and g_hint, passes as autograd has added them,
    so that a run is the same to the bit with and without. With a share, g_task alone came, and
    g_task + share |g_task| / |g_hint| g_hint passes. Both lengths, [2], are the gradient of `probe`: so nothing is
    written in passing, and a compiler can follow. Where samples have to agree (`kept`, [rows], has room for them) a
    sample's g_hint counts where its inner product with g_task is at least 0, and 1 for each such is the gradient of it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        probe: Tensor,
        kept: Tensor,
        share: float,
        view: Callable[[Tensor], Tensor],
        scale: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(scale)
        ctx.share, ctx.view, ctx.dtype, ctx.room = share, view, probe.dtype, len(kept)
        stand_in = x.new_zeros((), dtype=torch.promote_types(x.dtype, torch.float32))
        return x.view_as(x), stand_in.expand(view(x).shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None, None, None]:
        came, hint = gradients
        kept, whole = None, ctx.share or ctx.room
        task = ctx.view(came) if whole else ctx.view(came) - hint
        if ctx.room:
            agree = ((task * hint).flatten(1).sum(dim=1) >= 0).to(ctx.dtype)
            hint = hint * agree.view(-1, *[1] * (hint.dim() - 1)).to(hint.dtype)
            kept = F.pad(agree, (0, ctx.room - len(agree)))
        norms = [torch.linalg.vector_norm(gradient, dtype=ctx.dtype) for gradient in (task, hint)]
        own = lengths = torch.stack(norms)
        if not whole:
            return came, own, None, None, None, None
        if distributed.world_size() > 1:
            lengths = distributed.all_reduce_sum(lengths.square()).sqrt()
        least = torch.maximum(lengths[1], lengths[0] * FAINT).clamp(min=TINY)
        factor = (ctx.share * lengths[0] / least).to(hint.dtype) if ctx.share else hint.new_ones(())
        (scale,) = ctx.saved_tensors
        factor = factor if scale is None else factor * scale.to(factor.dtype)
        if task is came:  # in one pass over the memory
            return torch.addcmul(came.to(hint.dtype), hint, factor).to(came.dtype), own, kept, None, None, None
        passed = came.clone()
        ctx.view(passed).add_(hint * factor)
        return passed, own, kept, None, None, None


class _Compare(torch.autograd.Function):
    """x in at least fp32; its gradient goes to the stand-in, and to x as well where it may pass as it is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, stand_in: Tensor, passing: bool) -> Tensor:
        ctx.passing, ctx.dtype = passing, x.dtype
        return x.view_as(x) if x.dtype == stand_in.dtype else x.to(stand_in.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor, None]:
        (hint,) = gradients
        return hint.to(ctx.dtype) if ctx.passing else None, hint, None


class Doses(nn.Module):
    """Measures at every spot how strong the distillation is beside the task, and balances it where that is asked for.

    g = g_task + balance/K |g_task| / |g_hint| g_hint  at each of K spots

    g_task is all that comes back from the layers behind: cross-entropy, logit loss, and the deeper spots' hints as they
    were balanced there. Lengths are over the whole batch, of all processes. The weight of the feature loss cancels
    here; what is trained beside the network (adapters) learns by the loss as it is weighted. K counts the feature
    spots, which are balanced; of a method without any the logits are, K = 1, and g_task is the cross-entropy's.

    balance  0: nothing is changed
    rows     largest batch, where a sample's hint counts only as far as it agrees with its task; else 0
    lengths  [S, 2] of g_task and g_hint in the last backward pass, in this process's rows
    scale    factor of the balance in this epoch, where it has a schedule
    kept     [S, rows] 1 for each sample of the last batch whose two gradients have an inner product of at least 0
    """

    lengths: Tensor
    kept: Tensor
    scale: Tensor | None

    def __init__(self, spots: Sequence[Spot], balance: float, rows: int = 0, *, scheduled: bool = False) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(()) if scheduled and balance else None, persistent=False)
        features = len(spots) - 1
        share = balance / max(features, 1)
        self.shares = [share] * features + [0.0 if features else share]
        self.views = [partial(spot.student_layout.to_map, shape=spot.student_shape) for spot in spots]
        self._places = {spot.student: k for k, spot in enumerate(spots)}  # the stage behind the last one is the logits
        self.register_buffer("lengths", torch.zeros(len(spots), 2), persistent=False)
        self.register_buffer("kept", torch.zeros(len(spots), rows), persistent=False)
        self._probes: list[list[Tensor]] = []

    def begin(self) -> None:
        """Forget the last backward pass; to be called in front of every step."""
        self.lengths.zero_()
        self.kept.zero_()
        if not self._probes or self._probes[0][0].device != self.lengths.device:
            rows = list(zip(self.lengths, self.kept, strict=True))
            self._probes = [[torch.zeros_like(row).requires_grad_() for row in two] for two in rows]
            for probe, row in zip(chain(*self._probes), chain(*rows), strict=True):
                probe.grad = row

    def mark(self, stand_ins: dict[int, Tensor], stage: int, x: Tensor) -> Tensor:
        """The student's value at a stage, for the layers behind it; a spot's stand-in is put into `stand_ins`."""
        if (k := self._places.get(stage)) is not None and x.requires_grad:
            x, stand_ins[stage] = _Meet.apply(x, *self._probes[k], self.shares[k], self.views[k], self.scale)
        return x

    def compare(self, stand_ins: dict[int, Tensor], stage: int, x: Tensor) -> Tensor:
        """What the spot compares at a stage that was marked, in at least fp32; called when the network has run."""
        if stage not in stand_ins:
            return x
        passing = not self.shares[self._places[stage]] and not self.kept.shape[1]
        compared: Tensor = _Compare.apply(x, stand_ins[stage], passing)
        return compared

    def compared(self, features: Features, stand_ins: dict[int, Tensor]) -> Features:
        """The student's marked features as the spots compare them; the logits are left."""
        seen = tuple(self.compare(stand_ins, k, x) for k, x in enumerate(features.preactivations or features.stages))
        stages, before = (features.stages, seen) if features.preactivations else (seen, ())
        return Features(stages, features.logits, before, features.blocks, features.raw)
