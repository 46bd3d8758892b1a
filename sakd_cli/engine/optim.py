"""SGD over the task's parameter groups, with a learning rate that is a pure function of the epoch."""

from collections.abc import Callable, Sequence

import torch

from sakd_cli.engine.task import ParamGroup

GradientHook = Callable[[list[torch.Tensor]], torch.Tensor]


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
        self._fused = self.groups[0].parameters[0].is_cuda  # only fused SGD can skip a step by a flag on the device
        self.sgd = torch.optim.SGD(settings, lr=0.0, momentum=momentum, nesterov=nesterov, fused=self._fused)

    def factor(self, epoch: int) -> float:
        """What the starting rates are multiplied by in this epoch, counted from 1."""
        return float(self.decay ** sum(epoch > milestone for milestone in self.milestones))

    def begin_epoch(self, epoch: int) -> None:
        """Set the rates of this epoch."""
        for settings, group in zip(self.sgd.param_groups, self.groups, strict=True):
            settings["lr"] = group.lr * self.factor(epoch)

    def step(self, loss: torch.Tensor, gradient_hook: GradientHook | None = None) -> None:
        """One backward pass and one update of all groups. `gradient_hook` gets the gradients in between; it may raise,
        or return a scalar on the device: on CUDA no update is made where that is 1.
        """
        self.sgd.zero_grad(set_to_none=True)
        loss.backward()
        if gradient_hook is not None:
            skip = gradient_hook([p.grad for group in self.groups for p in group.parameters if p.grad is not None])
            if self._fused:
                setattr(self.sgd, "found_inf", skip)  # noqa: B010  torch reads it and declares it nowhere
        self.sgd.step()

    def tensors(self) -> dict[str, torch.Tensor]:
        """Momentum of every parameter that has one, keyed by its place: `group/position`."""
        return {
            f"{group.name}/{place}": self.sgd.state[parameter]["momentum_buffer"]
            for group in self.groups
            for place, parameter in enumerate(group.parameters)
            if "momentum_buffer" in self.sgd.state[parameter]
        }

    def load_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        """Put the momentum back. ValueError where it is that of other parameters."""
        places = {f"{g.name}/{place}": parameter for g in self.groups for place, parameter in enumerate(g.parameters)}
        for name, buffer in tensors.items():
            if name not in places or places[name].shape != buffer.shape:
                raise ValueError(f"momentum of an unknown parameter: {name} {tuple(buffer.shape)}")
            self.sgd.state[places[name]]["momentum_buffer"] = torch.empty_like(places[name]).copy_(buffer)
