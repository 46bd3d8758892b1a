"""What steers a training beside its optimizer: what is frozen, which weights are delivered, when to stop."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sakd_cli import distributed
from sakd_cli.config.train import Metric

ESTIMATED = 20  # batches of training images from which BatchNorm's statistics are re-estimated


class Frozen:
    """Parameters that are not trained, in the first `epochs` or (None) ever, and BatchNorms whose statistics stay.

    A BatchNorm with frozen parameters keeps its statistics too; `norms`: all of the network's keep them, always.
    """

    def __init__(
        self, network: nn.Module, parameters: Sequence[nn.Parameter], epochs: int | None, *, norms: bool
    ) -> None:
        self._parameters, self._epochs = list(parameters), epochs
        found = [module for module in network.modules() if isinstance(module, _BatchNorm)]
        self._norms, frozen = found if norms else [], {id(parameter) for parameter in parameters}
        self._with_frozen = [norm for norm in found if any(id(own) in frozen for own in norm.parameters())]
        self.holds = bool(self._parameters)

    def begin_epoch(self, epoch: int) -> None:
        """Of the weights too; to be called behind `train()`."""
        self.holds = bool(self._parameters) and (self._epochs is None or epoch <= self._epochs)
        for parameter in self._parameters:
            parameter.requires_grad_(not self.holds)
        self.keep()

    def keep(self) -> None:
        """To be called behind `train()`, which would have every BatchNorm count."""
        for norm in self._norms + (self._with_frozen if self.holds else []):
            norm.eval()


class Delivered:
    """A second set of weights of a network: what is evaluated and delivered in place of those that are trained.

    decay        of the running average, w <- decay w + (1 - decay) trained, after every step, of weights and
                 statistics, in one launch; it begins with the weights that training begins with. None: a copy
    re_estimate  BatchNorm's statistics are means over training images, as torch's `update_bn` has them, made anew for
                 every evaluation; but for those that training keeps too
    """

    def __init__(self, network: nn.Module, decay: float | None, frozen: Frozen, *, re_estimate: bool) -> None:
        self.network, self._decay, self._re_estimate, self._frozen = network, decay, re_estimate, frozen
        self._own = network.state_dict()  # these share their memory with the network
        self._kept = {name: tensor.clone() for name, tensor in self._own.items()}
        floating = [name for name, tensor in self._own.items() if tensor.is_floating_point() and decay is not None]
        self._averages, self._averaged = ([of[name] for name in floating] for of in (self._kept, self._own))

    def update(self) -> None:
        """Of the average; in place, for CUDA graphs."""
        if self._decay is not None:
            torch._foreach_lerp_(self._averages, self._averaged, 1 - self._decay)

    def estimate(self, images: Iterable[Tensor]) -> None:
        """Make it ready for an evaluation; `images`: batches of training images."""
        averages = {id(kept) for kept in self._averages}
        for name, kept in self._kept.items():
            if id(kept) not in averages:
                kept.copy_(self._own[name])
        if self._re_estimate:
            with self.in_place(), torch.no_grad():
                self._count(images)
                distributed.average_buffers(distributed.running_statistics(self.network))

    def _count(self, images: Iterable[Tensor]) -> None:
        training = self.network.training
        self.network.train()
        self._frozen.keep()
        norms = [norm for norm in self.network.modules() if isinstance(norm, _BatchNorm) and norm.training]
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the mean of all
        for batch in images if norms else ():
            self.network(batch)
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        self.network.train(training)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside the network has these weights."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    def swap(self) -> None:
        own, kept = list(self._own.values()), list(self._kept.values())
        before = [tensor.clone() for tensor in own]
        for to, of in zip(own + kept, kept + before, strict=True):
            to.copy_(of)

    def tensors(self) -> dict[str, Tensor]:
        """The weights that are trained, for a checkpoint whose network is the delivered one."""
        return dict(self._own)

    def load(self, delivered: dict[str, Tensor]) -> None:
        for name, tensor in delivered.items():
            self._kept[name].copy_(tensor)


class Control(NamedTuple):
    """metric: what chooses the best epoch, and ends the training where `patience` epochs brought no better one."""

    metric: Metric = "top1"
    patience: int | None = None
    frozen: Frozen | None = None
    delivered: Delivered | None = None
