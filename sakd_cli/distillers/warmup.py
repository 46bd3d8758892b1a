"""The warm-up contract: training in front of the distillation proper.

A method either learns a module of its own from the teacher first (FT's paraphraser) or initialises the student's stages
by a loss that the main stage does not have (AB, FSP). The loop is the engine's; here is only what it minimises.
"""

from abc import ABC, abstractmethod

from torch import Tensor, nn

from sakd_cli.models.spot import Spot
from sakd_cli.models.staged import Features


class Warmup(nn.Module, ABC):
    """A loss that is minimised before everything else; afterwards the module's parameters are frozen.

    trains_student   the student is trained too, with the module's parameters; otherwise only the latter are, and the
                     student need not be run
    preactivations   the features must hold them (`StagedModel.features_with_preactivations`)
    """

    def __init__(self, spots: tuple[Spot, ...], *, trains_student: bool, preactivations: bool = False) -> None:
        super().__init__()
        self.spots = spots
        self.trains_student = trains_student
        self.preactivations = preactivations

    @abstractmethod
    def forward(self, student: Features | None, teacher: Features) -> Tensor:
        """The terms of the loss, [terms]; their sum is minimised. `student` is None where it is not trained."""
