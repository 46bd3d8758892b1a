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
    """Residual students (ResKD, Li et al., IEEE TIP 2021): lighter networks, trained on the remaining error."""

    students: NonNegativeInt = 0
    """Number of residual students at most; 0: the student without any."""
    architectures: Annotated[tuple[NetworkName, ...] | None, BeforeValidator(_names)] = None
    """One network per residual student; None or auto: the largest of the family within ratio of the one before."""
    ratio: PositiveFloat = 0.7
    """Largest MACs of an automatic residual student, as a fraction of the network before it; this project's choice."""
    loss: Literal["kl", "mse", "inner"] = "kl"
    """kl: (1 - alpha) CE + alpha T^2 KL of the summed logits; mse: the missing logits; inner: the run's own method."""
    alpha: Share = 0.9
    """Weight of the KL term of loss kl; 0.9 as in RepDistiller."""
    temperature: PositiveFloat = 4.0
    """Softmax temperature of loss kl; 4 as in RepDistiller."""
    init: Literal["default", "zero"] = "default"
    """zero: the last layer starts at zero, so that a residual student changes nothing at first."""
    max_cost: PositiveFloat = 0.6
    """Largest MACs of all members, as a fraction of the teacher's; this project's choice."""
    energy: NonNegativeFloat = 0.02
    """Relative energy of the missing logits below which no further student is trained; this project's choice."""
    min_gain: float = 0.02
    """Fraction by which a residual student must lower that energy to be used; this project's choice."""
    calibration: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.05
    """Fraction of the training images that no student sees: they decide when to stop and when images exit."""
    calibration_min: PositiveInt = 500
    """Least number of calibration images, though never more than a fifth of the training images."""
    rule: Literal["agreement", "accuracy", "fixed", "budget"] = "agreement"
    """How exit thresholds are fitted: agreement or accuracy, up to delta; fixed: theta; budget: mean cost."""
    delta: Share = 0.01
    """Largest loss of agreement or accuracy that early exit may cost, as a fraction of the images."""
    theta: Share = 0.5
    """Exit threshold of rule fixed."""
    budget: PositiveFloat = 0.5
    """Mean cost of rule budget, as a fraction of the teacher's MACs."""
    uncertainty: Literal["entropy", "maxprob", "margin", "energy"] = "entropy"
    """What is compared with the threshold: entropy, maxprob, margin or energy of the logits, in [0, 1]."""

    @model_validator(mode="after")
    def _one_name_per_student(self) -> "ResidualConfig":
        if self.architectures is not None and len(self.architectures) != self.students:
            raise ValueError(f"{len(self.architectures)} architectures are named for {self.students} residual students")
        return self

    def exits(self) -> dict[str, Any]:
        """The words that say who leaves early."""
        return {word: getattr(self, word) for word in EXITS}
