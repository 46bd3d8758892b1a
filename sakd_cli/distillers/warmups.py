"""Methods with a training in front: activation boundaries and flows of the student, the paraphraser of FT."""

from itertools import pairwise
from typing import final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sakd_cli.config.methods import ABConfig, FSPConfig, FTConfig
from sakd_cli.distillers.distiller import (
    SpotwiseDistiller,
    Warmup,
    pooled_to_smaller,
    require_equal_channels,
    weighted_mean,
)
from sakd_cli.distillers.maps import attention
from sakd_cli.models.adapters import ConvAdapter
from sakd_cli.models.spot import Spot
from sakd_cli.models.staged import Features

SCALE = 3 / 1000  # of the sum over all elements of a sample, as in the CRD benchmark


@final
class AB(Warmup):
    """The student's neurons, before the distillation proper, are on and off where the teacher's are.

    loss_k = 0.003 2^(k-K+1) mean over samples of the sum over elements of
             (s + m)^2 where s > -m and t <= 0,  (s - m)^2 where s <= m and t > 0;  k = 0 .. K-1, m = 1

    Heo, Lee, Yun, Choi, "Knowledge Transfer via Distillation of Activation Boundaries Formed by Hidden Neurons", AAAI
    2019, equation 4. On maps in front of their activation. The student's passes a connector: the routing adapter
    without ReLU, or nothing where the shapes agree.
    """

    def __init__(self, spots: tuple[Spot, ...], config: ABConfig) -> None:
        super().__init__(spots, trains_student=True, want="preactivations")
        self.margin = config.margin
        shapes = [(spot.student_shape, spot.teacher_shape) for spot in spots]
        layers = [nn.Identity() if ours == theirs else ConvAdapter(ours, theirs, relu=False) for ours, theirs in shapes]
        self.connectors = nn.ModuleList(layers)

    def forward(self, student: Features | None, teacher: Features) -> Tensor:
        assert student is not None
        losses = []
        for k, (spot, connector) in enumerate(zip(self.spots, self.connectors, strict=True)):
            s = self.translated(connector, student.preactivations[spot.student])
            t = teacher.preactivations[spot.teacher].detach()
            too_high = (s + self.margin).square() * ((s > -self.margin) & (t <= 0))
            too_low = (s - self.margin).square() * ((s <= self.margin) & (t > 0))
            depth = 2.0 ** (k - len(self.spots) + 1)
            losses.append(SCALE * depth * (too_high + too_low).sum() / len(s))
        return torch.stack(losses)


def flow(first: Tensor, second: Tensor) -> Tensor:
    """Inner products of the channels of two maps, mean over positions: [N, A, ..] and [N, B, ..] to [N, A, B]."""
    first, second = (x.flatten(2) for x in pooled_to_smaller(first, second))
    return torch.bmm(first, second.transpose(1, 2)) / first.shape[2]


@final
class FSP(Warmup):
    """The flow from each stage to the next, before the distillation proper, is the teacher's.

    loss_k = mean over samples and pairs of channels of (G_k(s) - G_k(t))^2,  G_k = f_k f_(k+1)^T / positions

    Yim, Joo, Bae, Kim, "A Gift from Knowledge Distillation", CVPR 2017, equations 1 and 2 with equal weights. Spots
    from the stem to the last map; the larger of two maps is pooled to the smaller. Both networks need equal channels.
    """

    def __init__(self, spots: tuple[Spot, ...], config: FSPConfig) -> None:
        super().__init__(spots, trains_student=True)
        require_equal_channels("fsp", spots)

    def forward(self, student: Features | None, teacher: Features) -> Tensor:
        assert student is not None
        ours = [student.stages[spot.student] for spot in self.spots]
        theirs = [teacher.stages[spot.teacher].detach() for spot in self.spots]
        flows = zip(pairwise(ours), pairwise(theirs), strict=True)
        return torch.stack([(flow(*s) - flow(*t)).square().mean() for s, t in flows])


SLOPE = 0.1  # of every LeakyReLU here


@final
class Paraphraser(Warmup):
    """Learns to encode the teacher's map in fewer channels, from which it can be decoded again.

    loss = mean over all elements of (decode(encode(t)) - t)^2;  encode: [N, C, H, W] to the factor [N, rate C, H, W]
    """

    def __init__(self, spots: tuple[Spot, ...], rate: float) -> None:
        super().__init__(spots, trains_student=False)
        (spot,) = spots
        wide, few = spot.teacher_shape[0], int(spot.teacher_shape[0] * rate)
        down = [nn.Conv2d(a, b, 3, padding=1) for a, b in ((wide, wide), (wide, few), (few, few))]
        up = [nn.ConvTranspose2d(a, b, 3, padding=1) for a, b in ((few, few), (few, wide), (wide, wide))]
        self.encode = nn.Sequential(*[layer for conv in down for layer in (conv, nn.LeakyReLU(SLOPE))])
        self.decode = nn.Sequential(*[layer for conv in up for layer in (conv, nn.LeakyReLU(SLOPE))])

    def forward(self, student: Features | None, teacher: Features) -> Tensor:
        t = teacher.stages[self.spots[0].teacher].detach()
        return F.mse_loss(self.translated(lambda x: self.decode(self.encode(x)), t), t)[None]


def translator(student: int, teacher: int, rate: float) -> nn.Sequential:
    """The student's map in as many channels as the teacher's factor: three 3x3 convolutions with BatchNorm."""
    few = int(teacher * rate)
    layers: list[nn.Module] = []
    for a, b in ((student, student), (student, few), (few, few)):
        layers += [nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.LeakyReLU(SLOPE)]
    return nn.Sequential(*layers)


@final
class FT(SpotwiseDistiller):
    """A translation of the student's last map matches a paraphrase of the teacher's.

    loss = mean over samples and positions of |q(translate(s)) - q(encode(t))|^r,  q(f) = normalised mean of f^p
    p = 2, r = 1

    Kim, Park, Kwak, "Paraphrasing Complex Network: Network Compression via Factor Transfer", NeurIPS 2018, equation 3,
    with the mean over channels of the CRD benchmark. The paraphraser is trained first (`warmup`) and frozen here; the
    translator sees the whole batch, so that its BatchNorm does not depend on the selection. Without a chosen sample the
    loss is 0 (the published step keeps the whole batch's).
    """

    def __init__(self, spots: tuple[Spot, ...], config: FTConfig) -> None:
        (spot,) = spots
        super().__init__(spots, warmup=Paraphraser(spots, config.rate))
        self.translate = translator(spot.student_shape[0], spot.teacher_shape[0], config.rate)
        self.factor_power, self.power = config.factor_power, config.power

    def spot_loss(self, k: int, student: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
        assert isinstance(self.warmup, Paraphraser)
        weight, translated, teacher = self.selected(weight, self.translated(self.translate, student), teacher)
        with torch.no_grad():
            encoded = self.translated(self.warmup.encode, teacher)
        s, t = (attention(x, self.factor_power) for x in pooled_to_smaller(translated, encoded))
        return weighted_mean((s - t).abs().pow(self.power).mean(dim=1), weight)
