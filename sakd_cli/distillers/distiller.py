"""The distiller contract: WHAT to distil; and several distillers as one.

A distiller compares features at its spots and multiplies by a weight per spot and sample, never choosing rows by index:
shapes stay fixed, nothing is read back from the device, and one graph serves every selection. There is one exception,
for losses that are dear: `Distiller.selected`, which does nothing unless the distiller is allowed `dynamic_shapes`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, NamedTuple, cast, final

import torch
from torch import Tensor, nn

from sakd_cli.batch import Batch
from sakd_cli.config.method import MethodConfig
from sakd_cli.errors import UsageError
from sakd_cli.models.adapters import mean_pool
from sakd_cli.models.spot import Spot
from sakd_cli.models.staged import Features, Want

Autocast = Callable[[torch.device], AbstractContextManager[Any]]


class Translating(nn.Module):
    """Has modules that translate a map into another network's: as dear as layers of a network, and computed like these.

    autocast  the number type of the networks, on a device (`Mode.networks`); by default that of the weights
    """

    autocast: Autocast = staticmethod(lambda device: nullcontext())

    def translated(self, module: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """What `module` makes of `x`, in the number type of the networks, for losses: in at least fp32."""
        with self.autocast(x.device):
            y = module(x)
        return y.to(torch.promote_types(y.dtype, torch.float32))


class Warmup(Translating, ABC):
    """Training in front of the distillation proper; afterwards the module's parameters are frozen.

    A method either learns a module of its own from the teacher first (FT's paraphraser) or initialises the student's
    stages by a loss that the main stage does not have (AB, FSP). The loop is the engine's; this is only the loss.

    trains_student   the student is trained too, with the module's parameters; otherwise only the latter are, and the
                     student need not be run
    want             what else both networks' features must hold (`StagedModel.features`)
    """

    def __init__(self, spots: tuple[Spot, ...], *, trains_student: bool, want: Want = "stages") -> None:
        super().__init__()
        self.spots = spots
        self.trains_student = trains_student
        self.want = want

    @abstractmethod
    def forward(self, student: Features | None, teacher: Features) -> Tensor:
        """The terms of the loss, [terms]; their sum is minimised. `student` is None where it is not trained."""


class Distiller(Translating, ABC):
    """A loss at some spots. Subclasses are final and say in one sentence what they match, with formula and source.

    places  where it acts, for a class that stands in no row of a table: a name of `distillers/table.py`
    dynamic_shapes  shapes may depend on the selection, which the host must read: good on a CPU, bad on a GPU (`Mode`)
    scope           what a sample's loss depends on beside the sample: nothing, the other samples of the batch, or a
                    memory of earlier batches, which must see the whole batch in every process
    """

    config: MethodConfig
    places: str = "last_map"
    dynamic_shapes = False
    scope: Literal["sample", "batch", "memory"] = "sample"

    def __init__(
        self,
        spots: tuple[Spot, ...],
        config: MethodConfig | None = None,
        *,
        warmup: Warmup | None = None,
        want: Want = "stages",
    ) -> None:
        """What every distiller has.

        config  the settings of its method, for those that have any
        warmup  what must have been trained, and then frozen, before this distils
        want    what else the features must hold (`StagedModel.features`): "preactivations" of both networks, which are
                compared there; "blocks" of the teacher
        """
        super().__init__()
        self.spots = spots
        if config is not None:
            self.config = config
        self.warmup = warmup
        self.want = want
        self.active = (True,) * len(spots)  # where the weights are not known to be 0

    def begin_epoch(self, epoch: int) -> None:
        """Called before the first step of each epoch, counted from 1."""
        return

    @abstractmethod
    def forward(self, student: Features, teacher: Features, weight: Tensor, batch: Batch) -> Tensor:
        """The loss at each spot, [K].

        student  features with gradient; teacher: features without
        weight   [K, N] in [0, 1], no gradient. Ones give the classical loss; a 0/1 mask with n ones gives the classical
                 loss of the chosen samples times n/N; zeros give exactly 0 and zero gradients.
        """

    def pairs(self, student: Features, teacher: Features) -> list[tuple[Tensor, Tensor]]:
        """(student feature, teacher feature without gradient) at every spot."""
        ours, theirs = (f.preactivations if self.want == "preactivations" else f.stages for f in (student, teacher))
        return [(ours[spot.student], theirs[spot.teacher].detach()) for spot in self.spots]

    def selected(self, weight: Tensor, *features: Tensor) -> tuple[Tensor, ...]:
        """weight [N] of one spot and tensors [N, ...], cut to the samples that count where that is allowed.

        For what compares sample by sample and knows no other sample's numbers: behind a BatchNorm, not in front of one.
        The mean over what is left of weight times loss is the mean over the batch. Where no sample counts one stays,
        with weight 0, so that gradients are 0 and not missing.
        """
        if not self.dynamic_shapes:
            return weight, *features
        rows = weight.nonzero()[:, 0]
        if len(rows) == len(weight):
            return weight, *features
        if not len(rows):
            rows = rows.new_zeros(1)
        weight = weight[rows] * (len(rows) / len(weight))
        return weight, *(feature.index_select(0, rows) for feature in features)


class SpotwiseDistiller(Distiller, ABC):
    """A distiller whose spots do not depend on each other, nor on anything else of the batch."""

    @abstractmethod
    def spot_loss(self, k: int, student: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
        """The loss at spot k, a scalar, from both features there, the teacher's without gradient, and weight [N]."""

    def forward(self, student: Features, teacher: Features, weight: Tensor, batch: Batch) -> Tensor:
        losses = [weight.new_zeros(())] * len(self.spots)
        for k, ((s, t), w) in enumerate(zip(self.pairs(student, teacher), weight, strict=True)):
            if self.active[k]:
                losses[k] = self.spot_loss(k, s, t, w)
        return torch.stack(losses)


def require_equal_channels(method: str, spots: tuple[Spot, ...]) -> None:
    """Raise UsageError where the networks' maps differ in their number of channels."""
    for spot in spots:
        if (ours := spot.student_shape[0]) != (theirs := spot.teacher_shape[0]):
            channels = f"{ours} channels in the student and {theirs} in the teacher"
            raise UsageError(f"method {method}: stage {spot.name} has {channels}; they must be equal")


def weighted_mean(per_sample: Tensor, weight: Tensor) -> Tensor:
    """Mean over the batch of weight times loss, both [N]: the loss of the chosen samples times n/N."""
    return (per_sample * weight).mean()


def pooled_to_smaller(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Average-pool the larger map to the smaller one's height; [N, C, H, W] each."""
    ours, theirs = student.shape[2], teacher.shape[2]
    if ours > theirs:
        return mean_pool(student, (theirs, teacher.shape[3])), teacher
    if ours < theirs:
        return student, mean_pool(teacher, (ours, student.shape[3]))
    return student, teacher


SCOPES = ("sample", "batch", "memory")


class Ingredient(NamedTuple):
    """A loss with its weight, and the factor of that weight by epoch (None: always 1)."""

    distiller: Distiller
    weight: float
    schedule: Callable[[int], float] | None = None


@final
class Composed(Distiller):
    """At every spot the sum of the losses that have it, each times its weight.

    Each loss sees its own spots and their rows of the weights, as if it were alone; a spot that two losses share is
    routed once, for both.
    """

    scales: Tensor

    def __init__(self, spots: tuple[Spot, ...], ingredients: Sequence[Ingredient]) -> None:
        (want,) = {one.distiller.want for one in ingredients}
        super().__init__(spots, want=want)
        self.parts = nn.ModuleList([one.distiller for one in ingredients])
        self.rows = [[spots.index(spot) for spot in one.distiller.spots] for one in ingredients]
        self.ingredients = tuple((one.weight, one.schedule) for one in ingredients)
        self.register_buffer("scales", torch.ones(len(ingredients)), persistent=False)  # set in every epoch
        self.scope = max((one.distiller.scope for one in ingredients), key=SCOPES.index)

    def begin_epoch(self, epoch: int) -> None:
        for part in self._distillers:
            part.begin_epoch(epoch)
        self.scales.copy_(torch.tensor([1.0 if f is None else f(epoch) for _, f in self.ingredients]))

    @property
    def _distillers(self) -> list[Distiller]:
        return cast("list[Distiller]", list(getattr(self, "parts", ())))

    def __setattr__(self, name: str, value: Any) -> None:
        """What holds for it (`active`, `autocast`, `dynamic_shapes`) holds for its parts."""
        super().__setattr__(name, value)
        if name in ("autocast", "dynamic_shapes"):
            for part in self._distillers:
                setattr(part, name, value)
        if name == "active":
            for part, rows in zip(self._distillers, vars(self).get("rows", ()), strict=True):
                part.active = tuple(value[k] for k in rows)

    def forward(self, student: Features, teacher: Features, weight: Tensor, batch: Batch) -> Tensor:
        losses = [weight.new_zeros(())] * len(self.spots)
        parts = zip(self._distillers, self.rows, self.ingredients, self.scales, strict=True)
        for part, rows, (factor, _), scale in parts:
            if not any(part.active):
                continue
            found = part(student, teacher, torch.stack([weight[k] for k in rows]), batch)
            for k, loss in zip(rows, found, strict=True):
                losses[k] = losses[k] + factor * scale.to(loss.dtype) * loss
        return torch.stack(losses)
