"""The search in front of a distillation by mixtures: which blocks of the teacher to mix, and how much of each."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sakd_cli.batch import Batch, Loader, UpperBatch
from sakd_cli.config.methods import DFAConfig
from sakd_cli.data.dataset import Dataset, Split
from sakd_cli.data.loader import AlternatingLoader, TrainLoader, split_in_halves
from sakd_cli.distillers.dfa import BlockGroup, Match, connect
from sakd_cli.engine.optim import BilevelOptimizer
from sakd_cli.engine.runtime import Mode, to_fp32
from sakd_cli.engine.task import ParamGroup, StepOutput, Task
from sakd_cli.models.spot import Spot
from sakd_cli.models.staged import Features, StagedModel, untracked_view


class Sought(NamedTuple):
    """One mixture to be found: the distiller's spot, its place among the spots, the teacher's blocks."""

    place: int
    spot: Spot
    group: BlockGroup


class Losses(NamedTuple):
    """Sums over the groups (`ce`: over the students); `rest` holds the mixtures back."""

    ce: Tensor
    st: Tensor
    ts: Tensor
    rest: Tensor


def batches(
    settings: DFAConfig,
    dataset: Dataset,
    train: Split,
    *,
    batch_size: int,
    seed: int,
    device: torch.device,
    wrap: Callable[[Loader], Loader] = lambda loader: loader,
) -> AlternatingLoader:
    """Those of the two levels in turn, from two parts of the training images; `wrap`: what is made of either part's."""
    dataset = replace(dataset, mixing=None)
    upper, lower = (
        wrap(TrainLoader(half, dataset, batch_size=batch_size, seed=seed, noise_width=0, device=device))
        for half in split_in_halves(dataset, train, settings.search_split, seed)
    )
    return AlternatingLoader(upper, lower, ahead=settings.second_order)


@final
class SearchTask(Task):
    """The mixtures alpha_i = softmax(beta_i) of all groups, each searched with a student of its own, side by side.

    A_i  = sum_j alpha_ij n(t_ij)                             the mixture
    ST_i = mean of D(A_i, P_i(s_i))                           a student can learn it: prefers early blocks
    TS_i = CE(student behind group i, fed with Q_i(A_i); y)   it says what the image is: prefers late ones
    upper level: min over beta of    sum_i st ST_i + ts TS_i + R(beta_i)          on one part of the images
    lower level: min over weights of sum_i CE(student_i; y) + st ST_i + ts TS_i   on the other

    Guan et al., ECCV 2020 (bridge loss, group by group; the direction of Q is opposite to that of P). The groups share
    no parameter, so side by side is one after another, number for number. Ours: the optimizers, the division of the
    images, R (Adam's weight decay, or the entropy of alpha), and `joint`, one student for all groups. The students are
    thrown away. Their BatchNorms do not record what the foreign features behind Q do to them.
    """

    def __init__(
        self,
        students: Sequence[StagedModel],
        teacher_features: Callable[[Tensor], Features],
        sought: Sequence[Sought],
        settings: DFAConfig,
        hand_over: Callable[[int, Tensor, Tensor], None],
        mode: Mode | None = None,
    ) -> None:
        """What is searched with.

        students   on their device, as many as there are groups; or one for all
        hand_over  takes the place, alpha and beta of each mixture in the end
        """
        super().__init__()
        self.mode = mode or Mode()
        self.network = nn.ModuleList(students)
        self.teacher_features, self.sought, self.settings = teacher_features, tuple(sought), settings
        self._hand_over = hand_over
        matches = [Match(spot, group, settings) for _, spot, group in sought]
        drops = [connect(match.shape, one.spot.student_shape) for match, one in zip(matches, sought, strict=True)]
        self.matches, self.drops = nn.ModuleList(matches), nn.ModuleList(drops)
        self.beta = nn.ParameterList([nn.Parameter(torch.zeros(len(group.places))) for _, _, group in sought])
        self._searches = list(zip(self.sought, matches, drops, strict=True))
        self._students = list(students)
        self._tails = [untracked_view(student).train() for student in students]
        self._at_hand: Batch | None = None

    def groups(self) -> list[ParamGroup]:
        settings = self.settings
        weights = [p for part in (self.network, self.matches, self.drops) for p in part.parameters()]
        decay = settings.arch_decay if settings.arch_reg == "l2" else 0.0
        return [
            ParamGroup("mixtures", list(self.beta), settings.arch_lr, decay),
            ParamGroup("weights", weights, settings.search_lr, settings.search_weight_decay),
        ]

    def alphas(self) -> list[Tensor]:
        """The mixtures as they are now, [blocks] each."""
        return [torch.softmax(beta, dim=0) for beta in self.beta]

    def optimizer(self, momentum: float) -> BilevelOptimizer:
        settings = self.settings
        return BilevelOptimizer(
            self, *self.groups(), momentum=momentum, epochs=settings.search_epochs, second_order=settings.second_order
        )

    def settle(self) -> None:
        for one, beta, alpha in zip(self.sought, self.beta, self.alphas(), strict=True):
            self._hand_over(one.place, alpha.detach(), beta.detach())

    def forward(self, batch: Batch) -> StepOutput:
        self._at_hand = batch
        losses = self.losses(batch)
        loss = self._bridge(losses) + self._labels(losses)
        with torch.no_grad():
            entropy = torch.stack([_entropy(alpha) for alpha in self.alphas()]).mean()
        mean = {name: part.detach() / len(self.sought) for name, part in (("st", losses.st), ("ts", losses.ts))}
        ce = losses.ce.detach() / len(self._students)
        return StepOutput(loss, None, {"loss": loss.detach(), "ce": ce, "entropy": entropy} | mean)

    @torch.no_grad()
    def precompute(self, images: Tensor) -> Features:
        """What a step reads of the teacher, for `Batch.precomputed`."""
        with self.mode.networks(images.device):
            return self.teacher_features(images).only("blocks", {one.spot.teacher for one in self.sought})

    def losses(self, batch: Batch) -> Losses:
        known, networks = batch.precomputed, self.mode.networks(batch.images.device)
        theirs = (known if isinstance(known, Features) else self.precompute(batch.for_teacher)).map(to_fp32).blocks
        with networks:
            ours = [student.features(batch.images).map(to_fp32) for student in self._students]
        ce = torch.stack([F.cross_entropy(features.logits, batch.labels) for features in ours]).sum()
        st, ts = [], []
        for k, ((one, match, drop), alpha) in enumerate(zip(self._searches, self.alphas(), strict=True)):
            student, stage = k % len(ours), one.spot.student  # one student each, or one for all
            mixed = match.mixture(theirs[one.spot.teacher], alpha)
            tail = self._tails[student]
            with networks:
                connected = to_fp32(match.connector(ours[student].stages[stage]))
                dropped = tail.infos[stage].layout.from_map(drop(mixed))
                passed = tail.run(dropped, stage + 1, len(ours[student].stages) + 1)
            st.append(match(connected, mixed, alpha).mean())
            ts.append(F.cross_entropy(to_fp32(passed), batch.labels))
        rest = torch.stack([_entropy(alpha) for alpha in self.alphas()]).sum() * self.settings.arch_decay
        return Losses(ce, torch.stack(st).sum(), torch.stack(ts).sum(), rest)

    @property
    def upper_turn(self) -> bool:
        """Whether the last batch was one for the mixtures."""
        return isinstance(self._at_hand, UpperBatch)

    def upper_loss(self) -> Tensor:
        assert self._at_hand is not None
        return self._bridge(self.losses(self._at_hand))

    def lower_loss(self) -> Tensor:
        """The students' loss on the batch that they get next."""
        assert isinstance(self._at_hand, UpperBatch)
        assert self._at_hand.lower is not None
        losses = self.losses(self._at_hand.lower)
        return self._bridge(losses) + self._labels(losses)

    def _bridge(self, losses: Losses) -> Tensor:
        bridge = self.settings.st * losses.st + self.settings.ts * losses.ts
        return bridge + losses.rest if self.settings.arch_reg == "entropy" else bridge

    def _labels(self, losses: Losses) -> Tensor:
        return losses.ce * float(self.settings.search_ce)


def _entropy(alpha: Tensor) -> Tensor:
    """In nats."""
    return -(alpha * alpha.clamp(min=1e-30).log()).sum()
