"""Student-friendly teachers in words: whose branches are trained with a network, and how much they weigh."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, NonNegativeFloat, PositiveFloat

from sakd_cli.config.base import Config
from sakd_cli.config.networks import NetworkName


def _each_once(names: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(names)) < len(names):
        raise ValueError(f"{', '.join(names)}: a student is named twice")
    return names


Names = Annotated[tuple[NetworkName, ...], Field(min_length=1)]
Students = Annotated[Names, AfterValidator(_each_once)]


class FriendlyConfig(Config):
    """Student branches on a teacher in training (Park et al., NeurIPS 2021).

    students         networks whose tails hang on the teacher; the losses are averaged over all branches
    lambda_t         weight of the teacher's cross-entropy
    lambda_kl        weight of the branches' imitation of the teacher
    lambda_ce        weight of the branches' own cross-entropy
    tau              softmax temperature of the imitation
    kl               forward: KL(teacher || branch); reverse: KL(branch || teacher)
    share_branches   one student serves all its branches; otherwise each branch has its own
    detach_target    the imitation does not reach the teacher through its logits
    detach_features  the branches do not reach the teacher through its maps; for ablation, it takes the point away
    """

    students: Students
    lambda_t: NonNegativeFloat = 1.0
    lambda_kl: NonNegativeFloat = 3.0
    lambda_ce: NonNegativeFloat = 1.0
    tau: PositiveFloat = 1.0
    kl: Literal["forward", "reverse"] = "forward"
    share_branches: bool = False
    detach_target: bool = False
    detach_features: bool = False
