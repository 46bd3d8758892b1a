"""What the configs of all distillers share: the base of every method's class, of those with a warm-up, of several."""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar, Literal

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from sakd_cli.config.base import Config

AUTO = "auto"
SHARED = ("balance", "kl_weight", "ce_weight", "temperature")  # said once, for all parts


def _factor(epoch: int, *, warmup: int, shape: str, epochs: int) -> float:
    rise = min(epoch / warmup, 1.0) if warmup else 1.0
    done = max(epoch - 1 - warmup, 0) / max(epochs - warmup, 1)
    return rise * {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[shape]


class MethodConfig(Config):
    """What to distill. The defaults of each method are those of its paper, or of RepDistiller where that differs."""

    trains_student: ClassVar[bool] = False  # beside its losses: by a warm-up, or by another last layer
    of_logits: ClassVar[bool] = False  # compares no feature in its main stage
    auto_balance: ClassVar[float] = 1.0  # the balance that a weight of `auto` stands for
    name: str
    """Distillation method, as in `sakd list methods`."""
    weight: NonNegativeFloat = 1.0
    """Weight of the feature loss (beta)."""
    balance: NonNegativeFloat = 0.0
    """Gradient of the feature loss over the task's, set so in each step and shared by the spots; 0: as weight says."""
    kl_weight: NonNegativeFloat = 1.0
    """Weight of the logit loss (alpha)."""
    ce_weight: NonNegativeFloat = 1.0
    """Weight of the cross-entropy."""
    temperature: PositiveFloat = 4.0
    """Softmax temperature of the logit loss."""
    gamma: PositiveFloat = 1.0
    """Scale of the router's cross-entropy, used unless router.gamma is set."""
    weight_warmup: NonNegativeInt = 0
    """Epochs over which the weights of feature and logit loss rise from 0 to their value; DKD's published runs: 20."""
    weight_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How these weights go on afterwards: constant, or falling to 0 at the end of the run."""

    @property
    def parts(self) -> "tuple[MethodConfig, ...]":
        return (self,)

    @property
    def warmed(self) -> "WarmedConfig | None":
        """The part that trains something before the distillation proper."""
        return next((part for part in self.parts if isinstance(part, WarmedConfig)), None)

    def schedule(self, epochs: int) -> Callable[[int], float] | None:
        """Factor of the weights by epoch, from 1, of a run of `epochs`; None: always 1. The rise is mdistiller's."""
        if not self.weight_warmup and self.weight_schedule == "constant":
            return None
        return partial(_factor, warmup=self.weight_warmup, shape=self.weight_schedule, epochs=epochs)

    @model_validator(mode="before")
    @classmethod
    def _auto_is_balanced(cls, values: Any) -> Any:
        """A weight of `auto` is the default one, balanced: by default both gradients are as long as each other."""
        if isinstance(values, dict) and str(values.get("weight")).lower() == AUTO:
            others = {key: value for key, value in values.items() if key != "weight"}
            return others | {"balance": others.get("balance") or cls.auto_balance}
        return values

    @model_validator(mode="after")
    def _a_weight_has_a_use(self) -> "MethodConfig":
        given = self.weight != type(self).model_fields["weight"].default
        if self.of_logits and given:
            raise ValueError(f"weight {self.weight:g} is of a feature loss, and {self.name} has none: method.kl_weight")
        if self.balance and given:
            raise ValueError(f"weight {self.weight:g} cancels under balance {self.balance:g}: leave one of them out")
        return self


class WarmedConfig(MethodConfig):
    """What methods share that train something before the distillation proper."""

    warmup_epochs: PositiveInt = 30
    """Epochs of that stage."""
    warmup_lr: PositiveFloat | None = None
    """Its learning rate; null: the published one for the pair, or the student's."""

    trains_student: ClassVar[bool] = True
    published_lr: ClassVar[float | None] = None
    published_lr_of: ClassVar[Mapping[tuple[str, str], float]] = {}  # (teacher, student), where it is another one

    def lr_of_warmup(self, teacher: str, student: str, own: float) -> float:
        """Rate of the stage for these two networks; `own`: the student's."""
        return self.warmup_lr or self.published_lr_of.get((teacher, student)) or self.published_lr or own


class ComposedConfig(MethodConfig):
    """Several methods at once, such as fitnet+crd: the settings and weight of each are below its name"""

    @property
    def parts(self) -> tuple[MethodConfig, ...]:
        return tuple(getattr(self, name) for name in self.name.split("+"))

    @model_validator(mode="after")
    def _is_of_one_piece(self) -> "ComposedConfig":
        """What all share is said once, above them."""
        for part in self.parts:
            for key in SHARED:
                value, own = getattr(part, key), type(part).model_fields[key].default
                if value not in (own, getattr(self, key)):
                    raise ValueError(f"{part.name}.{key} is of all parts together: --set method.{key}={value}")
            if self.balance and part.schedule(1) is not None:
                raise ValueError(f"{part.name}.weight_warmup, weight_schedule: of the whole method under a balance")
            self.__dict__[part.name] = part.model_copy(update={key: getattr(self, key) for key in SHARED})
        return self
