"""Distillation with a router that decides per sample and spot: the method of the paper, and its controls.

Song, Chen, Ye, Song, "Spot-adaptive Knowledge Distillation", IEEE TIP 31, 2022.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, NamedTuple, cast, final

import torch
from torch import Tensor, nn

from sakd_cli import distributed
from sakd_cli.batch import Batch
from sakd_cli.distillers.distiller import Distiller
from sakd_cli.distillers.table import Distillers
from sakd_cli.engine.foreach import ConvertedWeights, CountedBatches
from sakd_cli.engine.graphs import Fork
from sakd_cli.engine.runtime import Mode, to_fp32
from sakd_cli.engine.task import ParamGroup, StepOutput, Task
from sakd_cli.models.staged import Features, StagedModel, Want
from sakd_cli.routing.dose import Doses
from sakd_cli.routing.graft import Graft, Terms, router_loss
from sakd_cli.routing.router import Answers, Decision, Router
from sakd_cli.tasks.ahead import benefits_of
from sakd_cli.tasks.criterion import Criterion
from sakd_cli.tasks.own_code import check_decision, require_floating
from sakd_cli.tasks.team import COMBINE, TeamFeatures, of_all, used

ROUTER = "router"  # the group of what decides and of the adapters on its paths
FEWEST = 1e-6  # fraction of a batch that is selected: below, there is nothing to take the mean of


class Factors(NamedTuple):
    """The numbers of the objective: cross-entropy, beta, alpha, gamma, and the share that the count term asks for.

    selected_mean  the loss at a spot is the mean of the selected samples, without their fraction of the batch
    balance  length of the feature loss's gradient over the task's, where it is balanced; 0: it is as beta makes it
    schedule  factor of beta, alpha and balance by epoch, counted from 1; None: always 1
    """

    ce: float
    feature: float
    logit: float
    gamma: float
    min_teacher_fraction: float
    balance: float = 0.0
    selected_mean: bool = False
    largest_batch: int = 0
    schedule: Callable[[int], float] | None = None


class Rates(NamedTuple):
    """Learning rate and weight decay of the student's group and of the router's, and in which steps that learns."""

    lr: float
    weight_decay: float
    router_lr: float
    router_weight_decay: float
    update_every: int = 1


@dataclass(frozen=True)
class PlainPass:
    """A teacher's plain pass, in evaluation mode and without gradient; `want` is that of `StagedModel.features`."""

    network: StagedModel
    want: Want = "stages"

    def __call__(self, batch: Batch) -> Features:
        """Features of a batch's images, or what of them came with the batch."""
        if batch.precomputed is None:
            return self.network.features(batch.for_teacher, self.want)
        assert isinstance(batch.precomputed, Features)
        return batch.precomputed


@final
class DistillTask(Task):
    """One step of spot-adaptive distillation; `teacher_features` is the teacher's plain pass, or what stands for it.

    student: a CE(s, y) + beta sum_k D_k(weight_k) + alpha KL(weight_K),  a = 1 for all methods but one
    router:  c CE(routed, y) + max(0, N/2 - count)          only where the router learns (`graft` is given)

    Both are added and one backward pass serves both groups: the routed pass sees no weight of either network with
    gradient, and every weight is cut from the policy, so each group gets exactly its own gradient. Order matters: the
    student's training pass comes first, because the routed pass uses the BatchNorm statistics it has updated. The part
    "ce" of the log is without its factor.

    others: tasks of further teachers, without a student of their own (`join`); `combine` says how much each counts
    offset: logits that the student's are added to, wherever a pass ends in the student's head (a residual student)
    """

    network: StagedModel
    scales: Tensor | None
    regions = ("learn", "decide", "objective", "route")

    def __init__(
        self,
        network: StagedModel,
        teacher_features: Callable[[Batch], Features],
        distillers: Distillers,
        router: Router,
        graft: Graft | None,
        factors: Factors,
        rates: Rates,
        mode: Mode | None = None,
        offset: Callable[[Tensor], Tensor] | None = None,
        criterion: Criterion | None = None,
    ) -> None:
        super().__init__()
        self.network, self.distillers, self.spots = network, distillers, distillers.spots
        self.teacher_features = teacher_features
        self._schedules = factors.schedule, distillers.schedule
        scheduled, rows = self._schedules != (None, None), factors.largest_batch if router.agreement else 0
        self.doses = Doses(self.spots, factors.balance, rows, scheduled=scheduled)
        # Of feature and logit loss, set in every epoch.
        self.register_buffer("scales", torch.ones(2) if scheduled else None, persistent=False)
        self.student_features: Callable[..., Features] = partial(network.features, want=distillers.student_want)
        self.feature_distiller, self.logit_distiller = distillers.features, distillers.logits
        self.router, self.graft = router, graft
        self.factors, self.rates, self.mode, self.offset = factors, rates, mode or Mode(), offset
        if self.feature_distiller is not None:
            self.feature_distiller.autocast = self.mode.networks
        self.criterion = criterion or Criterion()
        self.noise_width = router.noise_width
        self._fork = Fork(enabled=self.mode.graphed)
        trained = [module for module in (network, graft) if module is not None]
        view = None if graft is None else getattr(graft.run_student, "__self__", None)
        views = [view] if isinstance(view, nn.Module) else []
        self._converted = ConvertedWeights(trained, views, self.mode.autocast_dtype)
        self._counted = CountedBatches([network])
        self.others, self.combine = nn.ModuleList(), COMBINE["mean"]
        self._routed = True
        self.has_unused_parameters = router.rests or (graft is not None and rates.update_every > 1)
        self._rest()

    @property
    def members(self) -> "list[DistillTask]":
        """One task for each teacher, this one first."""
        return [self, *cast("list[DistillTask]", list(self.others))]

    def join(self, others: "Sequence[DistillTask]", combine: str) -> None:
        """Learn from their teachers as well. Their spots are at the same stages of the same student."""
        self.combine = COMBINE[combine]
        for other in others:
            other._modules.pop("network")
            other.__dict__["network"] = self.network  # is this task's to save and to train
            self.noise_width += other.noise_width
            self.has_unused_parameters |= other.has_unused_parameters
        self.noise_width += self.combine is COMBINE["draw"]
        self.others.extend(others)

    def groups(self) -> list[ParamGroup]:
        distillers = [one for task in self.members for one in (task.feature_distiller, task.logit_distiller)]
        learners = [self.network, *distillers]
        routing = [module for task in self.members for module in (task.router, task.graft)]
        student = [p for module in learners if module is not None for p in module.parameters() if p.requires_grad]
        router = [p for module in routing if module is not None for p in module.parameters()]
        return [
            ParamGroup("student", student, self.rates.lr, self.rates.weight_decay),
            ParamGroup(ROUTER, router, self.rates.router_lr, self.rates.router_weight_decay),
        ]

    def begin_epoch(self, epoch: int) -> None:
        for other in self.members[1:]:
            other.begin_epoch(epoch)
        self.router.begin_epoch(epoch)
        if self.router.decides:
            self.router.epoch.fill_(epoch)
        for distiller in (self.feature_distiller, self.logit_distiller):
            if distiller is not None:
                distiller.begin_epoch(epoch)
        if self.scales is not None:
            whole, of_logits = (1.0 if factor is None else factor(epoch) for factor in self._schedules)
            self.scales.copy_(torch.tensor([whole, whole * of_logits]))
            if self.doses.scale is not None:
                self.doses.scale.copy_(self.scales[0 if self.feature_distiller is not None else 1])
        self._rest()

    def begin_step(self, step: int) -> None:
        for other in self.members[1:]:
            other.begin_step(step)
        self._routed = step % self.rates.update_every == 0
        self.constants = self._active, self._routed

    def _rest(self) -> None:
        """Let the distillers know at which of their spots they need not look."""
        self._active = active = self.router.active or (True,) * len(self.spots)
        self.constants = active, self._routed
        self.logit_distiller.active = active[-1:]
        if self.feature_distiller is not None:
            self.feature_distiller.active = active[:-1]

    def precompute(self, images: Tensor) -> Features | TeamFeatures:
        """What a step reads of the teachers' plain passes over these images, for `Batch.precomputed`, and no more."""
        seen = tuple(task._precomputed(images) for task in self.members)
        return TeamFeatures(seen) if len(seen) > 1 else seen[0]

    @torch.no_grad()
    def _precomputed(self, images: Tensor) -> Features:
        assert isinstance(self.teacher_features, PlainPass)
        with self.mode.networks(images.device):
            whole = self.teacher_features.network.features(images, self.distillers.want)
        first = {self.spots[0].teacher} if self.graft is not None else set()
        return self._compared(whole, "teacher", self.distillers.want, first)

    def _compared(
        self, features: Features, side: Literal["teacher", "student"], want: Want, more: Collection[int] = ()
    ) -> Features:
        """What the distillers read of one network's features, and stages `more`: whatever is kept costs its bytes."""
        places = {getattr(spot, side) for spot in self.spots[:-1]}
        return features.only(want, places, more)

    def forward(self, batch: Batch) -> StepOutput:
        device = batch.images.device
        with self.mode.networks(device), torch.no_grad():
            known, each = batch.precomputed, [batch] * len(self.members)
            if isinstance(known, TeamFeatures):
                each = [replace(batch, precomputed=own) for own in known.of]
            all_seen = [task.teacher_features(own) for task, own in zip(self.members, each, strict=True)]
            if self.mode.autocast_dtype is None:  # a cache's are in 16 bits
                all_seen = [seen.map(to_fp32) for seen in all_seen]
            offset = None if self.offset is None else to_fp32(self.offset(batch.images))
        benefits = benefits_of(self, batch, all_seen[0]) if self.router.meta and self._routed else None
        self.doses.begin()
        with self._converted():
            with self._counted():
                student, ce = self.learn(batch, offset)
            decisions = self._decisions(batch, student, all_seen)
            # Independent of the student's losses and of both backward passes of theirs.
            alone = ce.detach()
            gates = [decision.gate for decision in decisions if decision.gate is not None]
            read = [x for seen in all_seen for x in seen.tensors()] + [x for x in (offset, benefits) if x is not None]
            with self._fork.beside([*batch.tensors(), *read, *gates, alone]):
                if benefits is None or not gates:
                    routed = [
                        task.route(batch, seen, alone, decision.gate, offset)
                        for task, seen, decision in zip(self.members, all_seen, decisions, strict=True)
                    ]
                    routing_loss, events = sum((more for more, _ in routed[1:]), routed[0][0]), routed[0][1]
                else:
                    routing_loss, events = -(gates[0] * benefits.T).mean(dim=0).sum(), {}
        loss, parts = self.objective(batch, student, all_seen[0], ce, decisions[0].weight)
        for other, seen, decision in zip(self.members[1:], all_seen[1:], decisions[1:], strict=True):
            more_loss, more_parts = other.objective(batch, student, seen, None, decision.weight)
            loss = loss + more_loss
            parts |= {name: parts[name] + more_parts[name] for name in ("logit", "feature") if name in parts}
        self._fork.join([routing_loss, *events.values()])
        parts |= {"loss": loss.detach()} | ({"router": routing_loss.detach()} if events or benefits is not None else {})
        kept = self.doses.kept[:, : len(batch.labels)] if self.router.agreement else None
        use = used(decisions, events, self.doses.lengths, kept)
        return StepOutput(loss + routing_loss, student.logits, parts, use)

    def _decisions(self, batch: Batch, student: Features, all_seen: list[Features]) -> list[Decision]:
        """Where each sample is distilled from each teacher, the teacher's share of the sample in its weights."""
        decisions, first = [], 0
        for task, seen in zip(self.members, all_seen, strict=True):
            answers = task.answers(seen, student, batch.labels, batch)
            width = task.router.noise_width
            noise = batch.noise[:, first : first + width] if self.others else batch.noise
            decisions.append(task.decide(to_fp32(seen.embedding), student.embedding.detach(), noise, *answers))
            first += width
        if not self.others:
            return decisions
        shares = self.combine([to_fp32(seen.logits) for seen in all_seen], batch.labels, batch.noise)
        return [d._replace(weight=d.weight * c.to(d.weight.dtype)) for d, c in zip(decisions, shares, strict=True)]

    def sample_losses(self, batch: Batch) -> Tensor:
        """[S, N] the distillation loss of every sample at every spot, as it is weighted in training, without gradient.

        A loss that is a mean over samples is linear in their weights, so a sample's part is its derivative by that
        sample's weight, times N; of a loss between samples it is what the derivative says: what that weight changes.
        """
        with torch.no_grad(), self.mode.networks(batch.images.device):
            student, teacher = self.student_features(batch.images).map(to_fp32), self.teacher_features(batch)
        weight = batch.images.new_ones(len(self.spots), len(batch.labels), requires_grad=True)
        with torch.enable_grad():
            teacher = teacher.map(to_fp32)
            total = self.factors.logit * self.logit_distiller(student, teacher, weight[-1:], batch).sum()
            if (features := self.feature_distiller) is not None:
                dynamic, features.dynamic_shapes = features.dynamic_shapes, False
                total = total + self.factors.feature * features(student, teacher, weight[:-1], batch).sum()
                features.dynamic_shapes = dynamic
            (found,) = torch.autograd.grad(total, weight)
        return found * len(batch.labels)

    def learn(self, batch: Batch, offset: Tensor | None) -> tuple[Features, Tensor]:
        """The student's features with gradient, and its cross-entropy."""
        with self.mode.networks(batch.images.device):
            marks: dict[int, Tensor] = {}
            whole = self.student_features(batch.images, mark=partial(self.doses.mark, marks))
            seen = self._compared(whole, "student", self.distillers.student_want)
            student = self.doses.compared(seen, marks).map(to_fp32)
        if offset is not None:
            student = student.with_logits(offset + student.logits)
        last = self.spots[-1].student
        logits = self.doses.mark(marks, last, student.logits)
        student = student.with_logits(self.doses.compare(marks, last, logits))
        return student, self.criterion(logits, batch)

    def answers(
        self, teacher: Features, student: Features, labels: Tensor, batch: Batch | None = None
    ) -> list[Answers]:
        """What a router that needs answers gets beside the pooled vectors; nothing for the others."""
        if not self.router.needs_answers:
            return []
        return [Answers(to_fp32(teacher.logits), student.logits.detach(), labels, batch)]

    def decide(self, teacher: Tensor, student: Tensor, noise: Tensor, *answers: Answers) -> Decision:
        """Where each sample is distilled, from the pooled vectors of both networks; some routers get their answers."""
        decision = self.router(teacher, student, noise, *answers)
        return check_decision(self.router, decision, (len(self.spots), len(student)), routed=self.graft is not None)

    def decision_of(self, teacher: Features, student: Features, labels: Tensor, draw: torch.Generator) -> Decision:
        """The router's decision on images of an evaluation, with the noise that `draw` gives."""
        noise = torch.rand(len(labels), self.noise_width, generator=draw).to(teacher.embedding.device)
        return self.router(teacher.embedding, student.embedding, noise, *self.answers(teacher, student, labels))

    def objective(self, batch: Batch, student: Features, seen: Features, ce: Tensor | None, weight: Tensor) -> Terms:
        """The student's loss and its terms for the log; without the cross-entropy, what a further teacher adds."""
        teacher = self._compared(seen, "teacher", self.distillers.want).map(to_fp32)
        logit = self.factors.logit * self._matched(self.logit_distiller, student, teacher, weight[-1:], batch)
        if self.scales is not None:
            logit = logit * self.scales[1].to(logit.dtype)
        parts = {"router_weight": weight.mean()} if self.router.decides else {}
        parts |= {"logit": logit} if ce is None else {"ce": ce, "logit": logit}
        loss = logit if ce is None else self.factors.ce * ce + logit
        if self.feature_distiller is not None:
            matched = self._matched(self.feature_distiller, student, teacher, weight[:-1], batch)
            parts["feature"] = self.factors.feature * matched
            if self.scales is not None:
                parts["feature"] = parts["feature"] * self.scales[0].to(matched.dtype)
            loss = loss + parts["feature"]
        parts["loss"] = loss
        return loss, {name: part.detach() for name, part in parts.items()}

    def _matched(
        self, distiller: Distiller, student: Features, teacher: Features, weight: Tensor, batch: Batch
    ) -> Tensor:
        """A distiller's loss over all its spots; of the whole batch where processes share it and it has to be."""
        if not any(distiller.active):
            return student.logits.new_zeros(())
        scale = None
        if self.factors.selected_mean:
            scale = 1 / distributed.all_reduce_mean(weight.mean(dim=1), batch).clamp(min=FEWEST)
        asked = distiller.scope == "memory" or (distiller.scope == "batch" and self.mode.gather_batch)
        if asked and distributed.world_size() > 1:
            student, teacher = (of_all(features, distiller.spots, batch) for features in (student, teacher))
            weight = distributed.all_gather(weight.T, batch).T
            labels, index = (distributed.all_gather(rows, batch) for rows in (batch.labels, batch.index))
            batch = Batch(batch.images, labels, index, batch.noise)
        losses: Tensor = distiller(student, teacher, weight, batch)
        require_floating(distiller, "what it returns, a loss per spot [spots],", losses, (len(distiller.spots),))
        return losses.sum() if scale is None else (losses * scale).sum()

    def route(self, batch: Batch, teacher: Features, ce: Tensor, gate: Tensor | None, offset: Tensor | None) -> Terms:
        """The router's loss and what happened in it; nothing where the router does not learn, or not in this step."""
        if self.graft is None or gate is None or not self._routed:
            return torch.zeros_like(ce), {}
        with self.mode.networks(batch.images.device):
            routed = to_fp32(self.graft(batch.images, teacher, gate))
        if offset is not None:  # as far as the routed pass ends in the student's head
            routed = routed + (1 - gate[:, -1:]) * offset
        gamma, fewest = self.factors.gamma, self.factors.min_teacher_fraction
        return router_loss(routed, batch, ce, gate, gamma=gamma, min_teacher_fraction=fewest, criterion=self.criterion)
