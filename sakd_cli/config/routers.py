"""Routers in words: where to distil. One small class per policy; the objects are in `routing/table.py`."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, SerializeAsAny

from sakd_cli.config.base import Config, by_name, chosen_by_name

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


class RouterConfig(Config):
    """Where to distil."""

    name: str


class LearnedConfig(RouterConfig):
    """What the two learned routers share; None means the published value.

    tau                   Gumbel-Softmax temperature; shapes the gradient, not the sampling rate
    gamma                 scale of the routed cross-entropy; None: the method's
    teacher_bias          added once to every teacher score; None: 10 for two networks of one family, else 0
    min_teacher_fraction  share of the batch below which the count term pushes the logit spot; 0 switches it off
    lr, weight_decay      of the router's parameter group; lr None: half the student's
    """

    tau: PositiveFloat = 5.0
    gamma: PositiveFloat | None = None
    teacher_bias: float | None = None
    min_teacher_fraction: Fraction = 0.5
    lr: PositiveFloat | None = None
    weight_decay: NonNegativeFloat = 1e-3


class AdaptiveConfig(LearnedConfig):
    """Learned per sample, spot and step: the published method"""

    name: Literal["adaptive"] = "adaptive"


class AntiConfig(LearnedConfig):
    """Learned likewise, but distils exactly where the adaptive router would not"""

    name: Literal["anti"] = "anti"


class AlwaysConfig(RouterConfig):
    """Every sample at every spot: ordinary distillation"""

    name: Literal["always"] = "always"


class NeverConfig(RouterConfig):
    """No sample at any spot: plain training of the network"""

    name: Literal["never"] = "never"


class RandomConfig(RouterConfig):
    """An independent coin per sample and spot"""

    name: Literal["random"] = "random"
    rate: Fraction = 0.5


class RandomMatchedConfig(RouterConfig):
    """Coins with the rates that an adaptive run logged per spot and epoch"""

    name: Literal["random-matched"] = "random-matched"
    run: str | None = None


ROUTERS = by_name(RouterConfig)
PLAIN, CLASSICAL = NeverConfig().name, AlwaysConfig().name  # the two controls: no distillation, and the ordinary one
Router = Annotated[SerializeAsAny[RouterConfig], chosen_by_name("router", ROUTERS, default="adaptive")]
