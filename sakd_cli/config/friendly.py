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
    """Student branches on a teacher in training (Park et al., NeurIPS 2021); the defaults are the paper's."""

    students: Students
    """Networks whose tails are attached to the teacher; the losses are averaged over all branches."""
    lambda_t: NonNegativeFloat = 1.0
    """Weight of the teacher's cross-entropy."""
    lambda_kl: NonNegativeFloat = 3.0
    """Weight of the KL divergence between teacher and branches."""
    lambda_ce: NonNegativeFloat = 1.0
    """Weight of the branches' own cross-entropy."""
    tau: PositiveFloat = 1.0
    """Softmax temperature of the KL divergence."""
    kl: Literal["forward", "reverse"] = "forward"
    """Direction of the divergence: forward is KL(teacher || branch), reverse is KL(branch || teacher)."""
    share_branches: bool = False
    """One student serves all its branches; otherwise each branch has its own."""
    detach_target: bool = False
    """Stop the gradient of the KL divergence at the teacher's logits."""
    detach_features: bool = False
    """Stop the branches' gradient at the teacher's maps; an ablation, which removes the point of the method."""
