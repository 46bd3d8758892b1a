"""Several feature losses at once."""

from collections.abc import Callable, Sequence
from typing import NamedTuple, cast, final

import torch
from torch import Tensor, nn

from sakd_cli.batch import Batch
from sakd_cli.distillers.distiller import Distiller
from sakd_cli.models.spot import Spot
from sakd_cli.models.staged import Features

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
        self._dynamic, self._active = False, (True,) * len(spots)
        super().__init__(spots, want=want)
        self.parts = nn.ModuleList([one.distiller for one in ingredients])
        self.rows = [[spots.index(spot) for spot in one.distiller.spots] for one in ingredients]
        self.ingredients = tuple((one.weight, one.schedule) for one in ingredients)
        self.register_buffer("scales", torch.ones(len(ingredients)), persistent=False)  # set in every epoch
        self.scope = max((one.distiller.scope for one in ingredients), key=SCOPES.index)

    def begin_epoch(self, epoch: int) -> None:
        self.scales.copy_(torch.tensor([1.0 if f is None else f(epoch) for _, f in self.ingredients]))

    @property
    def _distillers(self) -> list[Distiller]:
        return cast("list[Distiller]", list(getattr(self, "parts", ())))

    @property
    def dynamic_shapes(self) -> bool:
        return self._dynamic

    @dynamic_shapes.setter
    def dynamic_shapes(self, allowed: bool) -> None:
        self._dynamic = allowed
        for part in self._distillers:
            part.dynamic_shapes = allowed

    @property
    def active(self) -> tuple[bool, ...]:
        return self._active

    @active.setter
    def active(self, active: tuple[bool, ...]) -> None:
        self._active = active
        for part, rows in zip(self._distillers, getattr(self, "rows", ()), strict=True):
            part.active = tuple(active[k] for k in rows)

    def forward(self, student: Features, teacher: Features, weight: Tensor, batch: Batch) -> Tensor:
        losses = [weight.new_zeros(())] * len(self.spots)
        for part, rows, (factor, _), scale in zip(
            self._distillers, self.rows, self.ingredients, self.scales, strict=True
        ):
            if not any(part.active):
                continue
            found = part(student, teacher, torch.stack([weight[k] for k in rows]), batch)
            for k, loss in zip(rows, found, strict=True):
                losses[k] = losses[k] + factor * scale.to(loss.dtype) * loss
        return torch.stack(losses)
