"""Differentiable feature aggregation: mixtures of the teacher's blocks."""

from collections import Counter
from collections.abc import Sequence
from functools import reduce
from typing import NamedTuple, cast, final

import torch
from torch import Tensor, nn

from sakd_cli.batch import Batch
from sakd_cli.config.methods import DFAConfig, Mixtures
from sakd_cli.distillers.distiller import Distiller, weighted_mean
from sakd_cli.distillers.maps import connector, margins, partial_distance
from sakd_cli.errors import UsageError
from sakd_cli.models.adapters import ConvAdapter
from sakd_cli.models.spot import Spot
from sakd_cli.models.staged import Features, Shape, StagedModel

LEAST = 1e-12  # mean square of a map that is divided by its root


class BlockGroup(NamedTuple):
    """Blocks of one stage of the teacher that can be mixed: those of the width that most of them have.

    stage, name, network   which stage of which network
    places                 of these blocks among all of the stage, from 0
    width                  their channels
    norms                  the BatchNorm that reads each one's output; None where blocks do not begin with one
    """

    stage: int
    name: str
    network: str
    places: tuple[int, ...]
    width: int
    norms: tuple[nn.BatchNorm2d, ...] | None


def mixable_blocks(teacher: StagedModel, stage: int) -> BlockGroup:
    """The group of a stage. Raises UsageError where no width is the commonest."""
    info = teacher.infos[stage]
    ranked = Counter(info.blocks).most_common(2)
    if not ranked or (len(ranked) == 2 and ranked[0][1] == ranked[1][1]):
        widths = ", ".join(map(str, info.blocks)) or "none"
        raise UsageError(f"method dfa: {teacher.name} cannot be mixed at {info.name}: widths of its blocks: {widths}")
    width = ranked[0][0]
    places = tuple(place for place, channels in enumerate(info.blocks) if channels == width)
    norms = teacher.norms_behind_blocks(stage)
    chosen = None if norms is None else tuple(norms[place] for place in places)
    return BlockGroup(stage, info.name, teacher.name, places, width, chosen)


class Mixture(nn.Module):
    """sum_j alpha_j n(T_j): block outputs [N, C, H, W] of one stage to one map of that shape; alpha [blocks].

    n: over the root mean square of the sample's map (rms), as it is (none), or what the next BatchNorm makes of it
    (preact; statistics of the frozen teacher).
    """

    def __init__(self, group: BlockGroup, norm: str) -> None:
        super().__init__()
        self.places = group.places
        self.rms = norm == "rms"
        self.preact = norm == "preact"
        low = torch.zeros(len(group.places), group.width)
        if self.preact:
            if group.norms is None:
                raise UsageError(
                    f"method.norm: preact needs a teacher of pre-activation blocks; {group.network} is none",
                    hint="rms, none, or a wide ResNet",
                )
            norms = group.norms
            scale = torch.stack([n.weight / (cast(Tensor, n.running_var) + n.eps).sqrt() for n in norms]).detach()
            bias = torch.stack([n.bias for n in norms]).detach()
            mean = torch.stack([cast(Tensor, n.running_mean) for n in norms])
            self.scale = nn.Buffer(scale, persistent=False)  # the teacher's, not the run's
            self.shift = nn.Buffer(bias - mean * scale, persistent=False)
            low = torch.stack([margins((n.weight, n.bias)) for n in norms])
        self.low = nn.Buffer(low, persistent=False)

    def forward(self, blocks: Sequence[Tensor], alpha: Tensor) -> Tensor:
        parts = [
            a * self._normalised(blocks[place], j)
            for j, (place, a) in enumerate(zip(self.places, alpha.unbind(), strict=True))
        ]
        return reduce(torch.add, parts)

    def _normalised(self, x: Tensor, j: int) -> Tensor:
        if self.preact:
            return x * self.scale[j, :, None, None] + self.shift[j, :, None, None]
        return x * x.square().mean(dim=(1, 2, 3), keepdim=True).clamp(min=LEAST).rsqrt() if self.rms else x


def connect(source: Shape, target: Shape) -> nn.Module:
    """1x1 convolution and BatchNorm; between maps of two sizes the routing adapter without its ReLU."""
    return connector(source[0], target[0]) if source[1:] == target[1:] else ConvAdapter(source, target, relu=False)


class Match(nn.Module):
    """D(A, P(s)) per sample at one spot: the mixture A, and the student's map through the `connector` P."""

    def __init__(self, spot: Spot, group: BlockGroup, config: DFAConfig) -> None:
        super().__init__()
        self.shape = (group.width, *spot.teacher_shape[1:])
        self.mixture = Mixture(group, config.norm)
        self.connector = connect(spot.student_shape, self.shape)
        self.partial = config.distance == "partial_l2"

    def forward(self, ours: Tensor, mixed: Tensor, alpha: Tensor) -> Tensor:
        """Student's map behind the connector, the mixture, and the weights it was mixed with, to [N]."""
        if self.partial:
            low = alpha.detach() @ self.mixture.low
            return partial_distance(ours, mixed, low) / mixed[0].numel()
        return (ours - mixed).square().flatten(1).mean(dim=1)


def initial_weights(kind: str, blocks: int) -> Tensor:
    """The weights of a mixture: random ones uniform on the simplex; those that a search is to find begin equal."""
    if kind == Mixtures.LAST:
        return torch.eye(blocks)[-1]
    if kind == Mixtures.RANDOM:
        weights = -torch.log(1 - torch.rand(blocks))
        return weights / weights.sum()
    return torch.full((blocks,), 1 / blocks)


@final
class DFA(Distiller):
    """The student's map of every stage matches a mixture of the teacher's block outputs there.

    loss_i = mean over samples, channels and positions of (P(s_i) - sum_j alpha_ij n(t_ij))^2
    P = 1x1 convolution and BatchNorm;  n = division by the root mean square of the sample's map;  sum_j alpha_ij = 1

    Guan, Zhao, Wang, Zhang, Yao, Bian, Tang, "Differentiable Feature Aggregation Search for Knowledge Distillation",
    ECCV 2020, equation 3; alpha is found before by a search (`tasks/search.py`) and stays as it is. Maps [N, C, H, W].
    Of blocks of several widths in a stage those of the commonest one are mixed. Ours: n, and the weight that goes with
    it (with `norm=none` 16 is that of the authors' baselines); `partial_l2` is OFD's distance, its margins mixed like
    the maps and 0 unless `norm=preact`. The published loss has no logit term: `--set method.kl_weight=0`. Connectors
    see the whole batch, so that their BatchNorm does not depend on the selection.
    """

    def __init__(self, spots: tuple[Spot, ...], config: DFAConfig, groups: Sequence[BlockGroup]) -> None:
        """groups  of the teacher, one for each spot."""
        super().__init__(spots, want="blocks")
        self._matches = [Match(spot, group, config) for spot, group in zip(spots, groups, strict=True)]
        self.matches = nn.ModuleList(self._matches)
        self.groups = tuple(group._replace(norms=None) for group in groups)
        for k, group in enumerate(groups):
            self.register_buffer(f"alpha{k}", initial_weights(config.weights, len(group.places)))
        self.betas: list[list[float] | None] = [None] * len(groups)  # what a search ended with, for the records
        several = [k for k, group in enumerate(groups) if len(group.places) > 1]
        self.to_be_found = several if config.weights == Mixtures.SEARCH else []  # spots at which a search has a choice

    def alpha(self, k: int) -> Tensor:
        """Weights of the blocks at spot k, [blocks]; they sum to 1."""
        return self.get_buffer(f"alpha{k}")

    def set_weights(self, k: int, alpha: Tensor, beta: Tensor | None = None) -> None:
        """Distil with these weights at spot k from now on; `beta`: what they are the softmax of."""
        self.alpha(k).copy_(alpha)
        self.betas[k] = None if beta is None else beta.tolist()

    def forward(self, student: Features, teacher: Features, weight: Tensor, batch: Batch) -> Tensor:
        losses = []
        for k, (spot, match, w) in enumerate(zip(self.spots, self._matches, weight, strict=True)):
            mixed = match.mixture([block.detach() for block in teacher.blocks[spot.teacher]], self.alpha(k))
            ours = self.translated(match.connector, student.stages[spot.student])
            losses.append(weighted_mean(match(ours, mixed, self.alpha(k)), w))
        return torch.stack(losses)
