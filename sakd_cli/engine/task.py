"""The task contract: one training procedure as a module, pure tensor code, the unit that is compiled."""

from abc import ABC, abstractmethod
from collections.abc import Hashable
from typing import NamedTuple

from torch import Tensor, nn

from sakd_cli.batch import Batch


class SpotUse(NamedTuple):
    """What the routing did with one batch, without gradient.

    weight       [S, N] how much each sample was distilled at each spot
    probability  [S, N] the teacher-routing probability; None without a policy
    events       name -> scalar of this step, logged as its mean over an epoch's steps: flags (which branch of the
                 router's loss was taken), cross-entropies
    lengths      [S, 2] of the gradients of task and distillation at each spot, in this process's rows; known only
                 after the backward pass
    """

    weight: Tensor
    probability: Tensor | None
    events: dict[str, Tensor]
    lengths: Tensor | None = None


class StepOutput(NamedTuple):
    """loss: to minimise; logits [N, C] of the delivered network, if it was run; parts: named scalars for the log."""

    loss: Tensor
    logits: Tensor | None
    parts: dict[str, Tensor]
    use: SpotUse | None = None


class ParamGroup(NamedTuple):
    """Parameters that share a learning rate (at the start of training) and a weight decay."""

    name: str
    parameters: list[nn.Parameter]
    lr: float
    weight_decay: float


class Task(nn.Module, ABC):
    """One training procedure. Its state dict is all that a checkpoint must hold beside the optimizer."""

    noise_width: int = 0
    """Uniform numbers per sample that `forward` needs in `batch.noise`."""

    network: nn.Module
    """What the task delivers."""
    regions: tuple[str, ...] = ("forward",)
    """Names of the methods that are compiled, each as one graph."""
    has_unused_parameters: bool = False
    """Whether some parameters of its groups get no gradient."""

    constants: Hashable = ()
    """What the host decides of a step beside its batch; a captured step is made anew where it changes."""

    @abstractmethod
    def groups(self) -> list[ParamGroup]:
        """Every trained parameter, each in exactly one group."""

    def begin_epoch(self, epoch: int) -> None:
        """Called before the first step of each epoch, counted from 1."""
        return

    def begin_step(self, step: int) -> None:
        """Called before each step, counted from 0 over the whole run."""
        return

    @abstractmethod
    def forward(self, batch: Batch) -> StepOutput:
        """One step's loss, without reading anything back from the device."""
