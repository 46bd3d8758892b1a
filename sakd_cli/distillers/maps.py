"""Losses of maps, sample by sample: hints, attention, distributions, partial distances, review."""

import math
from typing import cast, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sakd_cli.batch import Batch
from sakd_cli.config.methods import ATConfig, FitNetConfig, OFDConfig, ReviewKDConfig, SimKDConfig, VIDConfig
from sakd_cli.config.networks import reusing
from sakd_cli.distillers.distiller import Distiller, SpotwiseDistiller, pooled_to_smaller, weighted_mean
from sakd_cli.models.adapters import ConvAdapter, build_reused, mean_pool
from sakd_cli.models.spot import Spot
from sakd_cli.models.staged import Affine, Features, StagedModel


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
        error = F.mse_loss(self.translated(self.regressors[k], student), teacher, reduction="none")
        return weighted_mean(error.flatten(1).mean(dim=1), weight)


def attention(x: Tensor, power: int) -> Tensor:
    """Mean over channels of the map to a power, scaled to length 1: [N, C, H, W] to [N, HW].

    A sum instead of the mean: the scale cancels. And the product instead of `pow`, whose backward pass is five times
    as dear on a CPU.
    """
    energy = x * x if power == 2 else x.pow(power)
    return F.normalize(energy.sum(dim=1).flatten(1), dim=1)


@final
class AT(SpotwiseDistiller):
    """The student looks where the teacher looks, at every stage.

    loss_k = mean over samples and positions of (a(s) - a(t))^2,  a(f) = normalised mean over channels of f^p

    Zagoruyko and Komodakis, "Paying More Attention to Attention", ICLR 2017, equation 2, p = 2 by default, with the
    mean of squares of the CRD benchmark in place of the norm. Maps of two sizes are pooled to the smaller.
    """

    config: ATConfig

    def spot_loss(self, k: int, student: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
        s, t = (attention(x, self.config.power) for x in pooled_to_smaller(student, teacher))
        return weighted_mean((s - t).square().mean(dim=1), weight)


def neurons(x: Tensor) -> Tensor:
    """Every channel as a vector over positions, scaled to length 1: [N, C, H, W] to [N, C, HW]."""
    return F.normalize(x.flatten(2), dim=2)


def kernel_mean(a: Tensor, b: Tensor) -> Tensor:
    """Mean of (u v)^2 over all pairs of channels of a sample: [N, C, D] and [N, E, D] to [N]."""
    return torch.bmm(a, b.transpose(1, 2)).square().mean(dim=(1, 2))


@final
class NST(SpotwiseDistiller):
    """The student's channels are distributed over positions as the teacher's are, at every stage.

    loss_k = mean over samples of k(t, t) + k(s, s) - 2 k(s, t),  k = mean over pairs of channels of (u v)^2

    Huang and Wang, "Like What You Like: Knowledge Distill via Neuron Selectivity Transfer", arXiv 1707.01219, equation
    8 with the polynomial kernel of degree 2, offset 0. Maps of two sizes are pooled to the smaller. One product per
    kernel, where the published form makes a tensor of all pairs and positions.
    """

    def spot_loss(self, k: int, student: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
        weight, student, teacher = self.selected(weight, student, teacher)
        s, t = map(neurons, pooled_to_smaller(student, teacher))
        return weighted_mean(kernel_mean(t, t) + kernel_mean(s, s) - 2 * kernel_mean(s, t), weight)


EPSILON = 1e-5  # smallest variance
FIRST_VARIANCE = 5.0


class Gaussian(nn.Module):
    """A Gaussian for the teacher's map given the student's: `mean` of [N, C1, H, W] is [N, C2, H, W]."""

    def __init__(self, student: int, teacher: int) -> None:
        super().__init__()
        self.mean = nn.Sequential(
            nn.Conv2d(student, teacher, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(teacher, teacher, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(teacher, teacher, 1, bias=False),
        )
        self.log_scale = nn.Parameter(torch.full((teacher,), math.log(math.expm1(FIRST_VARIANCE - EPSILON))))

    def variance(self) -> Tensor:
        """Of each channel, [C2]."""
        return F.softplus(self.log_scale) + EPSILON


@final
class VID(SpotwiseDistiller):
    """The student's map tells as much as possible about the teacher's, at every stage.

    loss_k = mean over samples, channels and positions of ((m(s) - t)^2 / v + ln v) / 2
    m = three 1x1 convolutions with ReLU between;  v = ln(1 + exp(r)) + 1e-5 per channel, 5 at the start

    Ahn et al., "Variational Information Distillation for Knowledge Transfer", CVPR 2019, equations 5 and 6 without the
    constant; it may be negative. Maps of two sizes are pooled to the smaller.
    """

    def __init__(self, spots: tuple[Spot, ...], config: VIDConfig) -> None:
        super().__init__(spots)
        self.gaussians = nn.ModuleList([Gaussian(spot.student_shape[0], spot.teacher_shape[0]) for spot in spots])

    def spot_loss(self, k: int, student: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
        weight, student, teacher = self.selected(weight, student, teacher)
        s, t = pooled_to_smaller(student, teacher)
        gaussian = cast(Gaussian, self.gaussians[k])
        mean, variance = self.translated(gaussian.mean, s), gaussian.variance()[:, None, None]
        surprise = (mean - t).square() / variance + variance.log()
        return weighted_mean(surprise.flatten(1).mean(dim=1) / 2, weight)


RARE = 0.001  # a channel that is negative no more often than this gets FAR standard deviations as its margin
FAR = -3.0


def margins(affine: Affine) -> Tensor:
    """E[x | x < 0], x normal with the BatchNorm's bias as mean and |weight| as standard deviation: [C] to [C].

    -3 |weight| where x < 0 is as rare as 0.001. Of a constant (weight 0): itself where it is negative, else 0.
    """
    weight, bias = (numbers.detach().cpu().double() for numbers in affine)
    deviation = weight.abs()
    mean = bias / torch.where(deviation > 0, deviation, torch.ones_like(deviation))  # in deviations
    negative = torch.special.erfc(mean / math.sqrt(2)) / 2
    density = torch.exp(-mean.square() / 2) / math.sqrt(2 * math.pi)
    usual = deviation * (mean - density / negative)
    found = torch.where(negative > RARE, usual, FAR * deviation)
    return torch.where(deviation > 0, found, bias.clamp(max=0)).to(affine[0])


def partial_distance(student: Tensor, teacher: Tensor, margin: Tensor) -> Tensor:
    """Sum over a sample of (s - max(t, m))^2, but where t <= 0 and s is low enough: [N, C, H, W], [C] to [N]."""
    wanted = torch.maximum(teacher, margin[:, None, None])
    counted = (teacher > 0) | (student > wanted)
    return ((student - wanted).square() * counted).flatten(1).sum(dim=1)


def connector(student: int, teacher: int) -> nn.Sequential:
    """1x1 convolution and BatchNorm; [N, C1, H, W] to [N, C2, H, W]."""
    convolution = nn.Conv2d(student, teacher, 1, bias=False)
    nn.init.normal_(convolution.weight, 0.0, math.sqrt(2 / teacher))
    return nn.Sequential(convolution, nn.BatchNorm2d(teacher))


@final
class OFD(SpotwiseDistiller):
    """The student's maps in front of their activation match the teacher's, wherever that is heard behind it.

    loss_k = 2^(k-K+1) mean over samples of the sum over elements of
             0 where t <= 0 and r(s) <= max(t, m),  else (r(s) - max(t, m))^2;  k = 0 .. K-1
    r = 1x1 convolution and BatchNorm;  m = E[x | x < 0] per channel, x normal as the teacher's BatchNorm says

    Heo, Kim, Yun, Park, Kwak, Choi, "A Comprehensive Overhaul of Feature Distillation", ICCV 2019, section 3 (margin
    ReLU, partial L2 distance). Maps [N, C, H, W], at every stage. The default `weight` is the authors' factor 1/1000.
    Beyond the paper: maps of two sizes are pooled to the smaller; channels that no BatchNorm stands in front of get
    margin 0. In residual blocks the margin is that of the last BatchNorm alone, without the shortcut, as in public
    code. The teacher stays in evaluation mode. Connectors see the whole batch, so that their BatchNorm does not depend
    on the selection. The published loss has no logit term: `--set method.kl_weight=0`.
    """

    def __init__(self, spots: tuple[Spot, ...], config: OFDConfig, norms: list[Affine]) -> None:
        """norms  of the teacher, in front of its activation at each spot."""
        super().__init__(spots, want="preactivations")
        self.connectors = nn.ModuleList([connector(spot.student_shape[0], spot.teacher_shape[0]) for spot in spots])
        for k, norm in enumerate(norms):
            self.register_buffer(f"margin{k}", margins(norm), persistent=False)  # the teacher's, not the run's

    def spot_loss(self, k: int, student: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
        s, t = pooled_to_smaller(self.translated(self.connectors[k], student), teacher)
        distance = partial_distance(s, t, self.get_buffer(f"margin{k}"))
        return 2.0 ** (k - len(self.spots) + 1) * weighted_mean(distance, weight)


def reuse(config: SimKDConfig, student: StagedModel, teacher: StagedModel) -> StagedModel:
    """The network that learns: the student's stages, a projector, the teacher's pooling and head."""
    name = reusing(student.name, teacher.name, config.factor).name
    made = build_reused(name, teacher.num_classes, student=student, teacher=teacher, factor=config.factor)
    return made.to(next(student.parameters()).device)


@final
class SimKD(SpotwiseDistiller):
    """A projection of the student's last map matches the teacher's, and the teacher's own pooling and head classify it.

    loss = mean over samples, channels and positions of (P(s) - t)^2,  P = the network's last stage of maps

    Chen, Mei, Zhang, Wang, Feng, Chen, "Knowledge Distillation with the Reused Teacher Classifier", CVPR 2022, section
    3. The network delivered is not the plain student: it is named simkd2-STUDENT-TEACHER and ends in the projector and
    in copies of the teacher's pooling and head, which are never trained. Maps [N, C, H, W] of two sizes are pooled to
    the smaller, the student's in front of the projector. Defaults are those of the authors' script: this loss with
    factor 1, neither cross-entropy nor softened logits, factor 2 of the projector.

    Where the teacher's map is signed the projector has no last ReLU, which could not reach it; "pooling" is all that
    the teacher has behind its last map, such as MobileNetV2's last convolution (the authors reuse the last linear layer
    only, of teachers without such). Under a router the weight of a sample counts at the map and, with
    `--set method.kl_weight=1`, at the logits. The cross-entropy that a learned router is compared with is that of the
    delivered network. `never` leaves only the cross-entropy, and so needs `--set method.ce_weight=1`.
    """

    def spot_loss(self, k: int, student: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
        s, t = pooled_to_smaller(student, teacher)
        return weighted_mean((s - t).square().flatten(1).mean(dim=1), weight)


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
        with self.autocast(maps[0].device):
            for fusion, x in zip(reversed(self.fusions), reversed(maps), strict=True):
                out, deeper = fusion(as_map(x), deeper)
                found.insert(0, out)
        return [out.to(torch.promote_types(out.dtype, torch.float32)) for out in found]

    def forward(self, student: Features, teacher: Features, weight: Tensor, batch: Batch) -> Tensor:
        ours, theirs = zip(*self.pairs(student, teacher), strict=True)
        parts = zip(self.fused(list(ours)), theirs, weight, strict=True)
        return torch.stack([weighted_mean(context_loss(u, as_map(t)), w) for u, t, w in parts])
