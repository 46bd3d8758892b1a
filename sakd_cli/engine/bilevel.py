"""Two optimizers in turn, for a task of two levels: what the lower learns depends on what the upper sets."""

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from sakd_cli.engine.optim import GradientHook
from sakd_cli.engine.task import ParamGroup

RADIUS = 0.01  # of the finite difference: length of the step in the space of all lower parameters


class Levels(Protocol):
    """What the optimizer asks a task, of the batch that its `forward` was given last."""

    @property
    def upper_turn(self) -> bool:
        """Whether that batch is one of the upper level."""

    def upper_loss(self) -> Tensor:
        """The upper level's loss on it, with the parameters as they are now."""

    def lower_loss(self) -> Tensor:
        """The lower level's loss on the batch that comes next, likewise."""


def unrolled_gradient(
    upper_loss: Callable[[], Tensor],
    lower_loss: Callable[[], Tensor],
    upper: Sequence[nn.Parameter],
    lower: Sequence[nn.Parameter],
    rate: float,
) -> list[Tensor]:
    """d/d upper of upper_loss at w' = w - rate d lower_loss/dw; the lower parameters w stay as they are.

    The mixed second derivative is a finite difference around w, as in Liu et al., "DARTS", ICLR 2019, equations 7, 8.
    """
    origins = [parameter.detach().clone() for parameter in lower]

    def move(direction: Sequence[Tensor], length: Tensor | float) -> None:
        with torch.no_grad():
            for parameter, origin, way in zip(lower, origins, direction, strict=True):
                parameter.copy_(origin + length * way)

    def gradient(loss: Tensor, parameters: Sequence[nn.Parameter]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss, list(parameters), allow_unused=True, materialize_grads=True)

    move(gradient(lower_loss(), lower), -rate)
    found = gradient(upper_loss(), [*upper, *lower])
    direct, way = found[: len(upper)], found[len(upper) :]
    length = RADIUS / torch.stack([part.norm() for part in way]).norm().clamp(min=1e-12)
    sides = []
    for sign in (1, -1):
        move(way, sign * length)
        sides.append(gradient(lower_loss(), upper))
    with torch.no_grad():
        for parameter, origin in zip(lower, origins, strict=True):
            parameter.copy_(origin)
    return [d - rate * (plus - minus) / (2 * length) for d, plus, minus in zip(direct, *sides, strict=True)]


class BilevelOptimizer:
    """Adam for the upper level's parameters, SGD with Nesterov momentum for the lower's, whichever has its turn.

    The lower rate falls to 0 as half a cosine, from epoch to epoch. `second_order`: the upper level's gradient is that
    of a loss one step of the lower level ahead (without its momentum).
    """

    def __init__(
        self,
        levels: Levels,
        upper: ParamGroup,
        lower: ParamGroup,
        *,
        momentum: float,
        epochs: int,
        second_order: bool,
    ) -> None:
        self.levels, self.upper, self.lower = levels, upper, lower
        self.epochs, self.second_order = epochs, second_order
        self.adam = torch.optim.Adam(upper.parameters, lr=upper.lr, betas=(0.5, 0.999), weight_decay=upper.weight_decay)
        self.sgd = torch.optim.SGD(
            lower.parameters, lr=lower.lr, momentum=momentum, nesterov=momentum > 0, weight_decay=lower.weight_decay
        )

    def begin_epoch(self, epoch: int) -> None:
        """Set the lower rate of this epoch, counted from 1."""
        self.sgd.param_groups[0]["lr"] = self.lower.lr * (1 + math.cos(math.pi * (epoch - 1) / self.epochs)) / 2

    def step(self, loss: Tensor, gradient_hook: GradientHook | None = None) -> None:
        """One update of the level whose turn it is; the other one gets no gradient. The hook is that of Optimizer."""
        turn = self.levels.upper_turn
        optimizer, group = (self.adam, self.upper) if turn else (self.sgd, self.lower)
        optimizer.zero_grad(set_to_none=True)
        if turn and self.second_order:
            self._look_ahead()
        else:
            loss.backward(inputs=group.parameters)
        if gradient_hook is not None:
            gradient_hook([parameter.grad for parameter in group.parameters if parameter.grad is not None])
        optimizer.step()

    def _look_ahead(self) -> None:
        rate = self.sgd.param_groups[0]["lr"]
        losses = self.levels.upper_loss, self.levels.lower_loss
        gradients = unrolled_gradient(*losses, self.upper.parameters, self.lower.parameters, rate)
        for parameter, gradient in zip(self.upper.parameters, gradients, strict=True):
            parameter.grad = gradient

    def tensors(self) -> dict[str, Tensor]:
        """All that both remember of every parameter: `group/position/what`."""
        return {
            f"{group.name}/{place}/{what}": tensor
            for group, optimizer in ((self.upper, self.adam), (self.lower, self.sgd))
            for place, parameter in enumerate(group.parameters)
            for what, tensor in optimizer.state[parameter].items()
            if tensor is not None
        }

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Put it back. ValueError where it is of other parameters."""
        places = {
            f"{group.name}/{place}": (optimizer, parameter)
            for group, optimizer in ((self.upper, self.adam), (self.lower, self.sgd))
            for place, parameter in enumerate(group.parameters)
        }
        for name, tensor in tensors.items():
            place, _, what = name.rpartition("/")
            if place not in places or tensor.shape not in (torch.Size(), places[place][1].shape):
                raise ValueError(f"memory of an unknown parameter: {name} {tuple(tensor.shape)}")
            optimizer, parameter = places[place]
            # Adam counts its steps on the CPU.
            optimizer.state[parameter][what] = tensor.to(parameter) if tensor.dim() else tensor.clone()
