"""The optimizers: torch's or timm's over the task's parameter groups, and two in turn for a task of two levels.

Learning rates are pure functions of the step. Of two levels, what the lower learns depends on what the upper sets.
"""

import inspect
import math
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, final

import torch
from torch import Tensor, nn

from sakd_cli.config.preprocessing import of_timm
from sakd_cli.config.train import Train, rate_factor
from sakd_cli.engine.task import ParamGroup
from sakd_cli.errors import UsageError, one_line

GradientHook = Callable[[list[torch.Tensor]], torch.Tensor]
FUSED = ("sgd", "adam", "adamw")  # whose kernels read on the device what their rate is, and whether to skip

UNUSABLE = ("adahessian", "kron")  # of timm's


def updates_on_device(parameter: nn.Parameter) -> bool:
    """Whether they are made by kernels that read their rate where the parameter is."""
    return parameter.is_cuda


def _reads_rate(optimizer: torch.optim.Optimizer) -> bool:
    return bool(optimizer.defaults.get("fused") or optimizer.defaults.get("capturable"))


def set_rates(optimizer: torch.optim.Optimizer, rates: Sequence[float]) -> None:
    """Set each group's rate; where the updates are on a device, in a tensor that captured updates read too."""
    settings = optimizer.param_groups
    if _reads_rate(optimizer) and isinstance(settings[0]["lr"], Tensor):
        there = [group["lr"] for group in settings]
        torch._foreach_zero_(there)
        torch._foreach_add_(there, list(rates))
        return
    for group, rate in zip(settings, rates, strict=True):
        group["lr"] = torch.full((), rate, device=group["params"][0].device) if _reads_rate(optimizer) else rate


def gradients_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]


def update(optimizer: torch.optim.Optimizer, skip: Tensor | None) -> None:
    """Make the update; none on a device where `skip` is 1."""
    if optimizer.defaults.get("fused") and optimizer.defaults.get("momentum"):
        # 0 for parameters that get their first gradient later than others, which torch's fused SGD does not expect.
        for parameter in (p for group in optimizer.param_groups for p in group["params"] if p.grad is not None):
            if optimizer.state[parameter].get("momentum_buffer") is None:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    if skip is not None and optimizer.defaults.get("fused"):
        setattr(optimizer, "found_inf", skip)  # noqa: B010  torch reads it and declares it nowhere
    elif skip is not None and _reads_rate(optimizer):  # a step of length 0 along gradients of 0
        for gradient in gradients_of(optimizer):
            gradient.masked_fill_(skip > 0, 0)
        torch._foreach_mul_([group["lr"] for group in optimizer.param_groups], 1 - skip)
    optimizer.step()


def torch_optimizer(train: Train, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """The optimizer that `train` names over torch's parameter groups. UsageError where it cannot be made."""
    name = train.optimizer
    given = {"momentum": train.momentum, "nesterov": train.nesterov, "betas": train.betas, "eps": train.eps}
    if name.removeprefix("timm/").removeprefix("lookahead_").startswith(UNUSABLE):
        raise UsageError(f"train.optimizer: {name} needs second derivatives, or keeps what a checkpoint cannot hold")
    if name.startswith("timm/"):
        factory = of_timm(f"train.optimizer: {name}", "timm.optim").create_optimizer_v2
        own = {key: value for key, value in given.items() if value is not None and key in ("betas", "eps")}
        try:
            found: torch.optim.Optimizer = factory(
                groups, opt=name.removeprefix("timm/"), lr=groups[0]["lr"], momentum=train.momentum, **own
            )
        except (ValueError, TypeError, AssertionError, KeyError) as error:
            reason = one_line(error)
            raise UsageError(f"train.optimizer: {name}: {reason}", "one of timm.optim.list_optimizers()") from None
        said = [*own, *(["momentum"] if train.momentum != Train.model_fields["momentum"].default else [])]
        if idle := [key for key in said if key not in found.defaults]:
            raise UsageError(f"train.optimizer: {name} makes no use of {idle[0]}", f"leave out the setting {idle[0]}")
        found.state = getattr(found, "_base_optimizer", found).state  # timm's lookahead keeps a second one, empty
        return found
    kind = {key.lower(): value for key, value in vars(torch.optim).items() if isinstance(value, type)}[name]
    known = inspect.signature(kind).parameters
    on_device = updates_on_device(groups[0]["params"][0])
    given |= {"fused": on_device and name in FUSED, "capturable": on_device}
    own = {key: value for key, value in given.items() if key in known and value is not None}
    return kind(groups, lr=groups[0]["lr"], **own)


class Remembered:
    """What optimizers remember of parameters, as tensors for a checkpoint."""

    _places: dict[str, tuple[torch.optim.Optimizer, nn.Parameter]]  # by place, `group/position`; who updates it

    def tensors(self) -> dict[str, Tensor]:
        """All that is remembered of every parameter, `group/position/what`; of a number its type too, `...:int`."""
        of_parameters = {
            f"{place}/{what}": value
            for place, (optimizer, parameter) in self._places.items()
            for what, value in optimizer.state[parameter].items()
        }
        counts = {  # some of timm's count their steps in their settings
            f"#{k}/{number}/{what}": value
            for k, optimizer in enumerate(self._optimizers())
            for number, group in enumerate(optimizer.param_groups)
            for what, value in group.items()
            if what.endswith("step")
        }
        values = of_parameters | counts
        numbers = {name: value for name, value in values.items() if isinstance(value, int | float)}
        typed = {f"{name}:{type(n).__name__}": torch.tensor(n, dtype=torch.float64) for name, n in numbers.items()}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)} | typed

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Put it back. ValueError where it is of other parameters."""
        known, all_of_them = self._places, self._optimizers()
        for name, tensor in tensors.items():
            place, _, what = name.rpartition("/")
            what, _, kind = what.partition(":")
            value: Any = {"int": int, "float": float, "bool": bool}[kind](tensor) if kind else tensor
            if place.startswith("#"):
                k, number = map(int, place[1:].split("/"))
                all_of_them[k].param_groups[number][what] = value
                continue
            if place not in known or not _fits(tensor, known[place][1]):
                raise ValueError(f"memory of an unknown parameter: {name} {tuple(tensor.shape)}")
            optimizer, parameter = known[place]
            if tensor.dim() and tensor.shape == parameter.shape:
                value = torch.empty_like(parameter, dtype=tensor.dtype).copy_(tensor)
            elif isinstance(value, Tensor):  # steps are counted on the CPU, unless updates are made on the device
                value = tensor.to(parameter.device) if tensor.dim() or _reads_rate(optimizer) else tensor.clone()
            optimizer.state[parameter][what] = value

    def _optimizers(self) -> list[torch.optim.Optimizer]:
        return list({id(optimizer): optimizer for optimizer, _ in self._places.values()}.values())


def _fits(tensor: Tensor, parameter: nn.Parameter) -> bool:
    """A number of the parameter, or one for each entry, row or column."""
    sides = zip(tensor.shape, parameter.shape, strict=False)
    return not tensor.dim() or (tensor.dim() == parameter.dim() and all(one in (1, side) for one, side in sides))


class Slice(NamedTuple):
    """Parameters of a task's group that share all: its settings, its rate at the start, and one of torch's groups."""

    train: Train
    lr: float
    settings: dict[str, Any]


@final
class Optimizer(Remembered):
    """The optimizer that the settings name, with their schedule; groups whose settings name another have their own.

    Fixed-shape losses give zeros where nothing was selected, never a missing gradient, so momentum and weight decay
    act on every parameter in every step, as in the published runs.

    own     settings of the groups of these names
    scales  factor of the rate of parameters (layer-wise decay); undecayed: beside norms and biases without norm_decay
    """

    def __init__(
        self,
        groups: Sequence[ParamGroup],
        train: Train,
        *,
        own: Mapping[str, Train] | None = None,
        scales: Mapping[nn.Parameter, float] | None = None,
        undecayed: Collection[nn.Parameter] = (),
    ) -> None:
        self.groups = tuple(group for group in groups if group.parameters)
        self.floor = train.min_lr / self.groups[0].lr
        self._clipped: list[tuple[Train, list[nn.Parameter]]] = []
        slices: dict[Hashable, list[Slice]] = {}
        for group in self.groups:
            settings = (own or {}).get(group.name, train)
            self._clipped += [(settings, group.parameters)] if settings.clip_norm or settings.clip_value else []
            kind = settings.optimizer, settings.momentum, settings.nesterov, settings.betas, settings.eps
            slices.setdefault(kind, []).extend(_slices(group, settings, scales or {}, undecayed))
        self.parts = [(torch_optimizer(of[0].train, [one.settings for one in of]), of) for of in slices.values()]
        who = {p: optimizer for optimizer, _ in self.parts for group in optimizer.param_groups for p in group["params"]}
        self._places = {name: (who[parameter], parameter) for name, parameter in places(self.groups).items()}
        self._on_device = updates_on_device(self.groups[0].parameters[0])
        self.capturable = not self._on_device or all(_reads_rate(optimizer) for optimizer, _ in self.parts)
        self.accumulate = train.accumulate
        self.rates: tuple[float, ...] = ()  # of this step

    def begin_step(self, step: int, steps_per_epoch: int) -> None:
        """Set the rates of this step, counted from 0 over the whole run."""
        before, self.rates = self.rates, ()
        for optimizer, of in self.parts:
            rates = [one.lr * rate_factor(one.train, step, steps_per_epoch, self.floor) for one in of]
            start, self.rates = len(self.rates), (*self.rates, *rates)
            if tuple(rates) != before[start : len(self.rates)]:
                set_rates(optimizer, rates)

    def begin_epoch(self, epoch: int) -> None:
        """Set the rates of the first step of this epoch, counted from 1."""
        self.begin_step(epoch - 1, 1)

    def constants(self) -> Hashable:
        """What a captured update would hold for good; on CUDA the rates are read from the device."""
        return () if self._on_device and self.capturable else self.rates

    def step(self, loss: Tensor | Iterator[Tensor], gradient_hook: GradientHook | None = None) -> None:
        """One backward pass and one update of all groups; of several losses, the sum of their gradients.

        `gradient_hook` gets the gradients; it may raise, or return a scalar on the device: where that is 1 no update
        is made there. Clipping follows: by value, then by the norm of a task's group.
        """
        for optimizer, _ in self.parts:
            optimizer.zero_grad(set_to_none=True)
        for one in [loss] if isinstance(loss, Tensor) else loss:
            if one.requires_grad:  # not where all that this step would train is frozen
                one.backward()
        skip = None
        if gradient_hook is not None:
            skip = gradient_hook([gradient for optimizer, _ in self.parts for gradient in gradients_of(optimizer)])
        for train, parameters in self._clipped:
            if train.clip_value is not None:
                nn.utils.clip_grad_value_(parameters, train.clip_value)
            if train.clip_norm is not None:
                nn.utils.clip_grad_norm_(parameters, train.clip_norm)
        for optimizer, _ in self.parts:
            update(optimizer, skip)


def _slices(
    group: ParamGroup, train: Train, scales: Mapping[nn.Parameter, float], undecayed: Collection[nn.Parameter]
) -> list[Slice]:
    found: dict[tuple[float, float], list[nn.Parameter]] = {}
    apart = set(undecayed)
    for parameter in group.parameters:
        plain = not train.norm_decay and (parameter.ndim <= 1 or parameter in apart)
        key = scales.get(parameter, 1.0), 0.0 if plain else group.weight_decay
        found.setdefault(key, []).append(parameter)
    return [
        Slice(train, group.lr * scale, {"params": parameters, "lr": group.lr * scale, "weight_decay": decay})
        for (scale, decay), parameters in found.items()
    ]


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


@torch.no_grad()
def moved(parameters: Sequence[Tensor], direction: Sequence[Tensor], *lengths: Tensor | float) -> Iterator[None]:
    """For a finite difference: these parameters moved along a direction by each length in turn, and back at the end."""
    origins = [parameter.detach().clone() for parameter in parameters]
    for length in (*lengths, None):
        for parameter, origin, way in zip(parameters, origins, direction, strict=True):
            parameter.copy_(origin if length is None else origin + length * way)
        if length is not None:
            yield


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

    def gradient(loss: Tensor, parameters: Sequence[nn.Parameter]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss, list(parameters), allow_unused=True, materialize_grads=True)

    ahead = moved(lower, gradient(lower_loss(), lower), -rate)
    (found,) = [gradient(upper_loss(), [*upper, *lower]) for _ in ahead]
    direct, way = found[: len(upper)], found[len(upper) :]
    length = RADIUS / torch.stack([part.norm() for part in way]).norm().clamp(min=1e-12)
    sides = [gradient(lower_loss(), upper) for _ in moved(lower, way, length, -length)]
    return [d - rate * (plus - minus) / (2 * length) for d, plus, minus in zip(direct, *sides, strict=True)]


@final
class BilevelOptimizer(Remembered):
    """Adam for the upper level's parameters, SGD with Nesterov momentum for the lower's, whichever has its turn.

    The lower rate falls to 0 as half a cosine, from epoch to epoch. `second_order`: the upper level's gradient is that
    of a loss one step of the lower level ahead (without its momentum).
    """

    def __init__(
        self, levels: Levels, upper: ParamGroup, lower: ParamGroup, *, momentum: float, epochs: int, second_order: bool
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
        levels_by = (upper, self.adam), (lower, self.sgd)
        self._places = {name: (by, p) for group, by in levels_by for name, p in places([group]).items()}

    accumulate = 1
    capturable = True

    def begin_step(self, step: int, steps_per_epoch: int) -> None:
        self.begin_epoch(step // steps_per_epoch + 1)

    def begin_epoch(self, epoch: int) -> None:
        self.rates = (self.lower.lr * (1 + math.cos(math.pi * (epoch - 1) / self.epochs)) / 2,)
        set_rates(self.sgd, self.rates)

    def constants(self) -> Hashable:
        """What a captured update would hold for good; on CUDA the rate is read from the device."""
        return () if self._fused else self.rates

    def step(self, loss: Tensor | Iterator[Tensor], gradient_hook: GradientHook | None = None) -> None:
        """One update of the level whose turn it is, with a hook as above; the other one gets no gradient."""
        loss = loss if isinstance(loss, Tensor) else next(loss)
        turn = self.levels.upper_turn
        optimizer, group = (self.adam, self.upper) if turn else (self.sgd, self.lower)
        optimizer.zero_grad(set_to_none=True)
        if turn and self.second_order:
            losses, rate = (self.levels.upper_loss, self.levels.lower_loss), self.sgd.param_groups[0]["lr"]
            gradients = unrolled_gradient(*losses, self.upper.parameters, self.lower.parameters, rate)
            for parameter, gradient in zip(self.upper.parameters, gradients, strict=True):
                parameter.grad = gradient
        else:
            loss.backward(inputs=group.parameters)
        update(optimizer, None if gradient_hook is None else gradient_hook(gradients_of(optimizer)))
