"""Correlation congruence."""

from typing import final

import torch
from torch import Tensor, nn

from sakd_cli.config.methods import CCConfig
from sakd_cli.distillers.distiller import SpotwiseDistiller
from sakd_cli.models.adapters import LinearAdapter
from sakd_cli.models.spot import Spot


def neighbouring_products(delta: Tensor, weight: Tensor) -> Tensor:
    """Mean inner product of each chosen sample with the next chosen one, times n/N; 0 below two. [N, D], [N] to []."""
    # A stable sort brings the chosen ones together and keeps their order in the batch.
    order = torch.argsort((weight > 0).to(torch.uint8), descending=True, stable=True)
    delta, weight = delta.index_select(0, order), weight.index_select(0, order)
    products = (delta[:-1] * delta[1:]).sum(dim=1) * weight[:-1] * weight[1:]
    n = weight.sum()
    return products.sum() / (n - 1).clamp(min=1.0) * n / len(weight)


@final
class CC(SpotwiseDistiller):
    """The differences between student and teacher at neighbouring samples of a batch are not alike.

    loss = mean over i < n of sum_d D_id D_(i+1)d,  D = |e_s - e_t|,  e = linear embeddings to 128 numbers

    Peng et al., "Correlation Congruence for Knowledge Distillation", ICCV 2019, in the form of the CRD benchmark (Tian
    et al., ICLR 2020), which the published spot-adaptive runs use; the paper's kernel is not in it. It depends on the
    order of the batch. Both embeddings see the whole batch and both are trained, as in the benchmark (the published
    spot-adaptive step leaves the teacher's at its initial weights; the student's gradient is the same).
    """

    scope = "batch"

    def __init__(self, spots: tuple[Spot, ...], config: CCConfig) -> None:
        super().__init__(spots)
        width = (config.width,)
        self.students = nn.ModuleList([LinearAdapter(spot.student_shape, width) for spot in spots])
        self.teachers = nn.ModuleList([LinearAdapter(spot.teacher_shape, width) for spot in spots])

    def spot_loss(self, k: int, student: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
        return neighbouring_products((self.students[k](student) - self.teachers[k](teacher)).abs(), weight)
