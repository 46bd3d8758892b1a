"""Distillers in words: one small class per method. Its defaults are the published recipe.

To add one: a class here, a file in `distillers/`, one line in `distillers/table.py`.
"""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, SerializeAsAny

from sakd_cli.config.words import Words, by_name, chosen_by_name


class MethodConfig(Words):
    """What to distil.

    weight       factor of the feature loss (beta); the spec's section 3.1 lists them
    kl_weight    factor of the logit loss (alpha)
    temperature  softmax temperature of the logit loss
    gamma        scale of the router's cross-entropy (section 2.2), used unless `router.gamma` is set
    """

    name: str
    weight: NonNegativeFloat = 1.0
    kl_weight: NonNegativeFloat = 1.0
    temperature: PositiveFloat = 4.0
    gamma: PositiveFloat = 1.0


class KDConfig(MethodConfig):
    """Softened logits (Hinton et al. 2015)"""

    name: Literal["kd"] = "kd"


class FitNetConfig(MethodConfig):
    """Regression of one hidden map (Romero et al., ICLR 2015)"""

    name: Literal["fitnet"] = "fitnet"
    stage: Annotated[int, Field(ge=1)] = 2


class ATConfig(MethodConfig):
    """Attention maps of every stage (Zagoruyko and Komodakis, ICLR 2017)"""

    name: Literal["at"] = "at"
    weight: NonNegativeFloat = 1000.0
    gamma: PositiveFloat = 2.0
    power: Annotated[int, Field(ge=1)] = 2


class SPConfig(MethodConfig):
    """Pairwise similarities inside the batch (Tung and Mori, ICCV 2019)"""

    name: Literal["sp"] = "sp"
    weight: NonNegativeFloat = 3000.0


METHODS = by_name(MethodConfig)
Method = Annotated[SerializeAsAny[MethodConfig], chosen_by_name("method", METHODS, default="fitnet")]
