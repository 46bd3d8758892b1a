"""Knowledge review."""

from typing import final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sakd_cli.batch import Batch
from sakd_cli.config.methods import ReviewKDConfig
from sakd_cli.distillers.distiller import Distiller, weighted_mean
from sakd_cli.models.adapters import mean_pool
from sakd_cli.models.spot import Spot
from sakd_cli.models.staged import Features

LEVELS = (4, 2, 1)  # heights to which maps are pooled, beside their own


def as_map(x: Tensor) -> Tensor:
    return x if x.dim() == 4 else x[:, :, None, None]


def context_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean square of the difference at several sizes, the map's own first, each half as heavy: [N, C, H, W] to [N]."""
    difference, factor = student - teacher, 1.0
    total, factors = difference.square().flatten(1).mean(dim=1), 1.0
    for level in LEVELS:
        if level < student.shape[2]:
            factor /= 2
            total = total + factor * mean_pool(difference, level).square().flatten(1).mean(dim=1)
            factors += factor
    return total / factors


class Norm(nn.Module):
    """BatchNorm; by its running statistics where there is one number per channel, of which a batch has no variance."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        if x.numel() > x.shape[1]:
            return self.norm(x)
        return F.batch_norm(x, self.norm.running_mean, self.norm.running_var, self.norm.weight, self.norm.bias)


class Fusion(nn.Module):
    """A student's map [N, C1, H, W] and what came down from the deeper ones [N, M, ..] to a map in the teacher's shape.

    Returns that map, and what is passed to the shallower ones.
    """

    def __init__(self, student: int, middle: int, teacher: int, size: tuple[int, int], *, deepest: bool) -> None:
        super().__init__()
        self.size = size
        convolutions = nn.Conv2d(student, middle, 1, bias=False), nn.Conv2d(middle, teacher, 3, padding=1, bias=False)
        for convolution in convolutions:
            nn.init.kaiming_uniform_(convolution.weight, a=1)
        self.enter = nn.Sequential(convolutions[0], Norm(middle))
        self.leave = nn.Sequential(convolutions[1], Norm(teacher))
        self.attend = None if deepest else nn.Sequential(nn.Conv2d(2 * middle, 2, 1), nn.Sigmoid())

    def forward(self, x: Tensor, deeper: Tensor | None) -> tuple[Tensor, Tensor]:
        x = self.enter(x)
        if self.attend is not None and deeper is not None:
            deeper = F.interpolate(deeper, x.shape[2:], mode="nearest")
            share = self.attend(torch.cat([x, deeper], dim=1))
            x = x * share[:, :1] + deeper * share[:, 1:]
        if x.shape[2:] != self.size:
            x = F.interpolate(x, self.size, mode="nearest")
        return self.leave(x), x


@final
class ReviewKD(Distiller):
    """Each of the student's maps, together with all deeper ones, matches the teacher's map of its depth.

    loss_k = mean over samples of h(u_k, t_k);  u_k = fusion of s_k with the fused map of k + 1, by learned attention
    h(u, t) = mean square of u - t, and of it pooled to 4, 2 and 1 positions a side with factors 1/2, 1/4, 1/8, over the
    sum of factors

    Chen, Liu, Zhao, Jia, "Distilling Knowledge via Knowledge Review", CVPR 2021, equation 8 and figure 3. Spots are
    every map and the pooled vector. Maps after their activation (the authors take them before it), and no warm-up
    factor min(epoch / 20, 1). Fusions see the whole batch, so that their BatchNorm does not depend on the selection.
    """

    def __init__(self, spots: tuple[Spot, ...], config: ReviewKDConfig) -> None:
        super().__init__(spots)
        middle = min(config.width, spots[-1].student_shape[0])
        self.fusions = nn.ModuleList()
        for spot in spots:
            size = spot.teacher_shape[1:] if len(spot.teacher_shape) == 3 else (1, 1)
            channels = spot.student_shape[0], middle, spot.teacher_shape[0]
            self.fusions.append(Fusion(*channels, size, deepest=spot is spots[-1]))

    def fused(self, maps: list[Tensor]) -> list[Tensor]:
        """The student's maps, shallow to deep, fused and in the teacher's shapes."""
        found: list[Tensor] = []
        deeper = None
        for fusion, x in zip(reversed(self.fusions), reversed(maps), strict=True):
            out, deeper = fusion(as_map(x), deeper)
            found.insert(0, out)
        return found

    def forward(self, student: Features, teacher: Features, weight: Tensor, batch: Batch) -> Tensor:
        ours, theirs = zip(*self.pairs(student, teacher), strict=True)
        parts = zip(self.fused(list(ours)), theirs, weight, strict=True)
        return torch.stack([weighted_mean(context_loss(u, as_map(t)), w) for u, t, w in parts])
