"""Residual students in words: how many, which, how they are trained, when to stop, and who may leave early."""

from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from sakd_cli.config.base import Config
from sakd_cli.config.networks import NetworkName

Share = Annotated[float, Field(ge=0.0, le=1.0)]
EXITS = ("rule", "delta", "theta", "budget", "uncertainty")  # words that need no training


def _names(value: Any) -> Any:
    return None if value in ("auto", ["auto"]) else value


class ResidualConfig(Config):
    """Lighter networks that are trained one after another on what the student still lacks (Li et al., ResKD).

    students         how many at most; 0: the student alone
    architectures    one name per student; None (or auto): each the largest network of the student's family with at most
                     `ratio` of the MACs of the one before
    loss             kl: (1 - alpha) CE + alpha T^2 KL of the summed logits; mse: regression of the logits that are
                     missing; inner: the run's own method and router, on the summed logits
    init             zero: the last layer starts at zero, so that a residual student starts by changing nothing
    max_cost         no further one that would take all of them together above this share of the teacher's MACs
    energy           none where the relative energy of what is missing is below this already
    min_gain         the last one is dropped, and the end, where it lowered the energy by less than this share
    calibration      share of the training images that no student sees: they decide when to stop and who leaves early
    calibration_min  at least so many of them, though never more than a fifth of the training images
    rule             how the thresholds are fitted: agreement with all members, or accuracy, up to delta; fixed: theta;
                     budget: the mean cost as a share of the teacher's MACs
    uncertainty      what is compared with a threshold: entropy, maxprob, margin or energy of the logits, in [0, 1]
    """

    students: NonNegativeInt = 0
    architectures: Annotated[tuple[NetworkName, ...] | None, BeforeValidator(_names)] = None
    ratio: PositiveFloat = 0.7
    loss: Literal["kl", "mse", "inner"] = "kl"
    alpha: Share = 0.9
    temperature: PositiveFloat = 4.0
    init: Literal["default", "zero"] = "default"
    max_cost: PositiveFloat = 0.6
    energy: NonNegativeFloat = 0.02
    min_gain: float = 0.02
    calibration: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.05
    calibration_min: PositiveInt = 500
    rule: Literal["agreement", "accuracy", "fixed", "budget"] = "agreement"
    delta: Share = 0.01
    theta: Share = 0.5
    budget: PositiveFloat = 0.5
    uncertainty: Literal["entropy", "maxprob", "margin", "energy"] = "entropy"

    @model_validator(mode="after")
    def _one_name_per_student(self) -> "ResidualConfig":
        if self.architectures is not None and len(self.architectures) != self.students:
            raise ValueError(f"{len(self.architectures)} architectures are named for {self.students} residual students")
        return self

    def exits(self) -> dict[str, Any]:
        """The words that say who leaves early."""
        return {word: getattr(self, word) for word in EXITS}
