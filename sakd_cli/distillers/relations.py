"""Losses between the samples of a batch: how they lie to each other in both networks."""

from typing import final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sakd_cli.config.methods import CCConfig, RKDConfig
from sakd_cli.distillers.distiller import SpotwiseDistiller
from sakd_cli.models.adapters import LinearAdapter
from sakd_cli.models.spot import Spot


def similarities(x: Tensor, weight: Tensor) -> Tensor:
    """Row-normalised Gram matrix of the batch, [N, N]; rows and columns of samples with weight 0 are 0."""
    flat = x.flatten(1)
    return F.normalize(weight[:, None] * (flat @ flat.T) * weight[None, :], dim=1)


@final
class SP(SpotwiseDistiller):
    """Samples that are alike for the teacher become alike for the student.

    loss = |G(s) - G(t)|_F^2 / n^2,  G(f) = f f^T with each row scaled to length 1

    Tung and Mori, "Similarity-Preserving Knowledge Distillation", ICCV 2019, equation 4. With a selection of n of N
    samples the matrices have those rows and columns only, and the loss is multiplied by n/N: divided by n N.
    """

    scope = "batch"

    def spot_loss(self, k: int, student: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
        difference = similarities(student, weight) - similarities(teacher, weight)
        return difference.square().sum() / (weight.sum().clamp(min=1.0) * len(weight))


FLOOR = 1e-12  # of squared distances and of lengths, as published


def distances(x: Tensor, pair: Tensor) -> Tensor:
    """Euclidean distances between all samples over their mean: [N, D] to [N, N].

    pair [N, N] weighs what the mean is taken over; the diagonal of `pair` is 0, and what lies outside is not used.
    """
    square = x.square().sum(dim=1)
    squared = (square[:, None] + square[None, :] - 2 * x @ x.T).clamp(min=FLOOR)
    found = squared.sqrt()
    total, count = (found * pair).sum(), pair.sum()
    mean = torch.where(count > 0, total / count.clamp(min=FLOOR), torch.ones_like(total))
    return found / mean


def angles(x: Tensor) -> Tensor:
    """Cosine of the angle at sample i between the ways to j and to k: [N, D] to [N, N, N]."""
    ways = x[None, :, :] - x[:, None, :]
    length = torch.linalg.vector_norm(ways, dim=2, keepdim=True)
    # Two equal samples have no way between them: 0, with a gradient that stays finite.
    units = ways / torch.where(length > FLOOR, length, torch.ones_like(length))
    return torch.bmm(units, units.transpose(1, 2))


@final
class RKD(SpotwiseDistiller):
    """Distances and angles between the samples of a batch are the same for student and teacher.

    loss = a mean_ij h(d_ij(s), d_ij(t)) + b mean_ijk h(cos_ijk(s), cos_ijk(t)),  h = smooth L1 (Huber, delta 1)
    d = Euclidean distance over its mean in the batch;  cos_ijk = angle at i between j and k;  a = 25, b = 50

    Park, Kim, Lu, Cho, "Relational Knowledge Distillation", CVPR 2019, equations 5, 6 and 8 to 10. The means run over
    all n^2 and n^3 entries, degenerate ones included. With n of N samples chosen, pairs and triples of chosen ones
    count, and the loss is multiplied by n/N; below two it is 0 (the published code gives NaN).
    """

    scope = "batch"
    config: RKDConfig

    def spot_loss(self, k: int, student: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
        s, t = student.flatten(1), teacher.flatten(1)
        chosen, size = weight.sum().clamp(min=1.0), len(weight)
        both = weight[:, None] * weight[None, :]
        pair = both * (1 - torch.eye(size, dtype=weight.dtype, device=weight.device))
        apart = F.smooth_l1_loss(distances(s, pair), distances(t, pair), reduction="none") * pair
        turned = F.smooth_l1_loss(angles(s), angles(t), reduction="none") * (both[:, :, None] * weight)
        loss = self.config.distance * apart.sum() / (chosen * size)
        return loss + self.config.angle * turned.sum() / (chosen.square() * size)


EPSILON = 1e-7  # added to lengths and probabilities, as published


def neighbours(x: Tensor, weight: Tensor) -> Tensor:
    """Probability of each sample to be a neighbour of another: [N, D] to [N, N], rows sum to 1.

    Columns of samples with weight 0 are 0.
    """
    unit = x / (torch.linalg.vector_norm(x, dim=1, keepdim=True) + EPSILON)
    near = (unit @ unit.T + 1) / 2 * weight[None, :]
    total = near.sum(dim=1, keepdim=True)
    return near / torch.where(total > 0, total, torch.ones_like(total))


@final
class PKT(SpotwiseDistiller):
    """The probabilities that samples of a batch are neighbours are the same for student and teacher.

    loss = mean_ij p_ij(t) ln((p_ij(t) + e) / (p_ij(s) + e)),  p_ij = (cos_ij + 1) / sum_j (cos_ij + 1),  e = 1e-7

    Passalis and Tefas, "Learning Deep Representations with Probabilistic Knowledge Transfer", ECCV 2018, equations 4 to
    6 with the cosine kernel. The mean runs over all n^2 pairs. With a selection of n of N samples only chosen columns
    and rows count, and the loss is multiplied by n/N: divided by n N.
    """

    scope = "batch"

    def spot_loss(self, k: int, student: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
        p_s, p_t = (neighbours(x.flatten(1), weight) for x in (student, teacher))
        terms = p_t * ((p_t + EPSILON) / (p_s + EPSILON)).log()
        return (terms * weight[:, None]).sum() / (weight.sum().clamp(min=1.0) * len(weight))


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
