"""The optimizers: SGD over the task's parameter groups, and two in turn for a task of two levels.

Learning rates are pure functions of the epoch. Of two levels, what the lower learns depends on what the upper sets.
"""

import math
from collections.abc import Callable, Hashable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from sakd_cli.engine.task import ParamGroup

GradientHook = Callable[[list[torch.Tensor]], torch.Tensor]


def updates_on_device(parameter: nn.Parameter) -> bool:
    """Whether they are made by fused kernels, which read their rate, and whether to skip, where the parameter is."""
    return parameter.is_cuda


def set_rates(optimizer: torch.optim.Optimizer, rates: Sequence[float]) -> None:
    """Set each group's rate; where the updates are fused, in a tensor that captured updates read too."""
    for settings, rate in zip(optimizer.param_groups, rates, strict=True):
        if not optimizer.defaults["fused"]:
            settings["lr"] = rate
        elif isinstance(settings["lr"], Tensor):
            settings["lr"].fill_(rate)
        else:
            settings["lr"] = torch.full((), rate, device=settings["params"][0].device)


def update(optimizer: torch.optim.Optimizer, gradient_hook: GradientHook | None) -> None:
    """Make the update. `gradient_hook` gets the gradients; it may raise, or return a scalar on the device: where that
    is 1 no fused update is made.
    """
    if gradient_hook is not None:
        parameters = [parameter for settings in optimizer.param_groups for parameter in settings["params"]]
        skip = gradient_hook([parameter.grad for parameter in parameters if parameter.grad is not None])
        if optimizer.defaults["fused"]:
            setattr(optimizer, "found_inf", skip)  # noqa: B010  torch reads it and declares it nowhere
    optimizer.step()


class Optimizer:
    """SGD with momentum; every group's rate is multiplied by `decay` after each of the `milestones` (epochs from 1).

    Fixed-shape losses give zeros where nothing was selected, never a missing gradient, so momentum and weight decay
    act on every parameter in every step, as in the published runs.
    """

    def __init__(
        self,
        groups: Sequence[ParamGroup],
        *,
        momentum: float,
        milestones: Sequence[int],
        decay: float,
        nesterov: bool = False,
    ) -> None:
        self.groups = tuple(group for group in groups if group.parameters)
        self.milestones = tuple(milestones)
        self.decay = decay
        settings = [{"params": g.parameters, "lr": g.lr, "weight_decay": g.weight_decay} for g in self.groups]
        self._fused = updates_on_device(self.groups[0].parameters[0])
        self.sgd = torch.optim.SGD(settings, lr=0.0, momentum=momentum, nesterov=nesterov, fused=self._fused)
        self.rates = tuple(group.lr for group in self.groups)  # of this epoch

    def factor(self, epoch: int) -> float:
        """What the starting rates are multiplied by in this epoch, counted from 1."""
        return float(self.decay ** sum(epoch > milestone for milestone in self.milestones))

    def begin_epoch(self, epoch: int) -> None:
        """Set the rates of this epoch."""
        self.rates = tuple(group.lr * self.factor(epoch) for group in self.groups)
        set_rates(self.sgd, self.rates)

    def constants(self) -> Hashable:
        """What a captured update would hold for good; on CUDA the rates are read from the device."""
        return () if self._fused else self.rates

    def step(self, loss: torch.Tensor, gradient_hook: GradientHook | None = None) -> None:
        """One backward pass and one update of all groups, with the hook of `update` in between."""
        self.sgd.zero_grad(set_to_none=True)
        loss.backward()
        update(self.sgd, gradient_hook)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Momentum of every parameter that has one, keyed by its place: `group/position`."""
        return {
            name: self.sgd.state[parameter]["momentum_buffer"]
            for name, parameter in places(self.groups).items()
            if "momentum_buffer" in self.sgd.state[parameter]
        }

    def load_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        """Put the momentum back. ValueError where it is that of other parameters."""
        known = places(self.groups)
        for name, buffer in tensors.items():
            if name not in known or known[name].shape != buffer.shape:
                raise ValueError(f"momentum of an unknown parameter: {name} {tuple(buffer.shape)}")
            self.sgd.state[known[name]]["momentum_buffer"] = torch.empty_like(known[name]).copy_(buffer)


def places(groups: Sequence[ParamGroup]) -> dict[str, torch.nn.Parameter]:
    """Name of every parameter in a checkpoint, `group/position`, and the parameter."""
    return {f"{group.name}/{k}": parameter for group in groups for k, parameter in enumerate(group.parameters)}


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
    rate: Tensor | float,
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
        self.rates: tuple[float, ...] = (lower.lr,)  # of this epoch: the lower level's
        self._fused = fused = updates_on_device(lower.parameters[0])
        of_upper, of_lower = (
            [{"params": level.parameters, "lr": level.lr, "weight_decay": level.weight_decay}]
            for level in (upper, lower)
        )
        self.adam = torch.optim.Adam(of_upper, betas=(0.5, 0.999), fused=fused, capturable=fused)
        self.sgd = torch.optim.SGD(of_lower, lr=0.0, momentum=momentum, nesterov=momentum > 0, fused=fused)

    def begin_epoch(self, epoch: int) -> None:
        """Set the lower rate of this epoch, counted from 1."""
        self.rates = (self.lower.lr * (1 + math.cos(math.pi * (epoch - 1) / self.epochs)) / 2,)
        set_rates(self.sgd, self.rates)

    def constants(self) -> Hashable:
        """What a captured update would hold for good; on CUDA the rate is read from the device."""
        return () if self._fused else self.rates

    def step(self, loss: Tensor, gradient_hook: GradientHook | None = None) -> None:
        """One update of the level whose turn it is, with the hook of `update`; the other one gets no gradient."""
        turn = self.levels.upper_turn
        optimizer, group = (self.adam, self.upper) if turn else (self.sgd, self.lower)
        optimizer.zero_grad(set_to_none=True)
        if turn and self.second_order:
            self._look_ahead()
        else:
            loss.backward(inputs=group.parameters)
        update(optimizer, gradient_hook)

    def _look_ahead(self) -> None:
        rate = self.sgd.param_groups[0]["lr"]
        losses = self.levels.upper_loss, self.levels.lower_loss
        gradients = unrolled_gradient(*losses, self.upper.parameters, self.lower.parameters, rate)
        for parameter, gradient in zip(self.upper.parameters, gradients, strict=True):
            parameter.grad = gradient

    def tensors(self) -> dict[str, Tensor]:
        """All that both remember of every parameter: `group/position/what`."""
        return {
            f"{place}/{what}": tensor
            for place, (optimizer, parameter) in self._places().items()
            for what, tensor in optimizer.state[parameter].items()
            if tensor is not None
        }

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Put it back. ValueError where it is of other parameters."""
        known = self._places()
        for name, tensor in tensors.items():
            place, _, what = name.rpartition("/")
            if place not in known or tensor.shape not in (torch.Size(), known[place][1].shape):
                raise ValueError(f"memory of an unknown parameter: {name} {tuple(tensor.shape)}")
            optimizer, parameter = known[place]
            # Adam counts its steps on the CPU, unless it is fused.
            there = tensor.dim() or self._fused
            optimizer.state[parameter][what] = tensor.to(parameter) if there else tensor.clone()

    def _places(self) -> dict[str, tuple[torch.optim.Optimizer, nn.Parameter]]:
        levels = (self.upper, self.adam), (self.lower, self.sgd)
        return {name: (optimizer, p) for group, optimizer in levels for name, p in places([group]).items()}
