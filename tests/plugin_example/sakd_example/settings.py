"""Settings of the method. No torch here: `sakd list` reads it."""

from typing import Literal

from pydantic import NonNegativeFloat

from sakd_cli.api import MethodConfig


class CosineConfig(MethodConfig):
    """Direction of the pooled vector (an example of a plug-in)"""

    name: Literal["cosine"] = "cosine"
    weight: NonNegativeFloat = 5.0
