"""FitNets: hints from one hidden map."""

from typing import final

from torch import Tensor, nn
from torch.nn import functional as F

from sakd_cli.config.methods import FitNetConfig
from sakd_cli.distillers.distiller import SpotwiseDistiller, weighted_mean
from sakd_cli.models.adapters import ConvAdapter
from sakd_cli.models.spot import Spot


@final
class FitNet(SpotwiseDistiller):
    """A regressor of the student's map matches the teacher's map.

    loss = mean over samples, channels and positions of (r(s) - t)^2,  r = convolution, BatchNorm, ReLU

    Romero et al., "FitNets: Hints for Thin Deep Nets", ICLR 2015, equation 3, as one joint stage (CRD benchmark). The
    regressor sees the whole batch, so that its BatchNorm does not depend on the selection.
    """

    def __init__(self, spots: tuple[Spot, ...], config: FitNetConfig) -> None:
        super().__init__(spots)
        self.regressors = nn.ModuleList([ConvAdapter(spot.student_shape, spot.teacher_shape) for spot in spots])

    def spot_loss(self, k: int, student: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
        error = F.mse_loss(self.regressors[k](student), teacher, reduction="none")
        return weighted_mean(error.flatten(1).mean(dim=1), weight)
