"""Factor transfer."""

from typing import final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sakd_cli.config.methods import FTConfig
from sakd_cli.distillers.at import attention
from sakd_cli.distillers.distiller import SpotwiseDistiller, Warmup, pooled_to_smaller, weighted_mean
from sakd_cli.models.spot import Spot
from sakd_cli.models.staged import Features

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
        return F.mse_loss(self.decode(self.encode(t)), t)[None]


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
        weight, translated, teacher = self.selected(weight, self.translate(student), teacher)
        with torch.no_grad():
            encoded = self.warmup.encode(teacher)
        s, t = (attention(x, self.factor_power) for x in pooled_to_smaller(translated, encoded))
        return weighted_mean((s - t).abs().pow(self.power).mean(dim=1), weight)
