"""Distillation with a router that decides per sample and spot: the method of the paper, and its controls.

Song, Chen, Ye, Song, "Spot-adaptive Knowledge Distillation", IEEE TIP 31, 2022.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, NamedTuple, final

import torch
from torch import Tensor, nn

from sakd_cli import distributed
from sakd_cli.batch import Batch
from sakd_cli.config.code import GUIDE, line_of
from sakd_cli.distillers.distiller import Distiller
from sakd_cli.distillers.table import Distillers
from sakd_cli.engine.converted import ConvertedWeights
from sakd_cli.engine.runtime import Mode, to_fp32
from sakd_cli.engine.streams import Fork
from sakd_cli.engine.task import ParamGroup, SpotUse, StepOutput, Task
from sakd_cli.errors import NonFiniteError, UsageError
from sakd_cli.models.spot import Spot
from sakd_cli.models.staged import Features, StagedModel, Want
from sakd_cli.routing.ahead import along, held_out_gradient
from sakd_cli.routing.dose import Doses
from sakd_cli.routing.graft import Graft, router_loss
from sakd_cli.routing.router import Answers, Decision, Router
from sakd_cli.tasks.criterion import Criterion

ROUTER = "router"  # the group of what decides and of the adapters on its paths
TINY = 1e-30  # of a product of gradients
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
        self.criterion = criterion or Criterion()
        self.noise_width = router.noise_width
        self._fork = Fork(enabled=self.mode.graphed)
        trained = [module for module in (network, graft) if module is not None]
        views = [] if graft is None else [getattr(graft.run_student, "__self__", None)]
        dtype = None if self.mode.compiled else self.mode.autocast_dtype  # a compiled pass converts them on its way
        self._converted = ConvertedWeights(trained, [one for one in views if isinstance(one, nn.Module)], dtype)
        self._routed = True
        self.has_unused_parameters = router.rests or (graft is not None and rates.update_every > 1)
        self._rest()

    def groups(self) -> list[ParamGroup]:
        learners = [self.network, self.feature_distiller, self.logit_distiller]
        routing = [self.router, self.graft]
        student = [p for module in learners if module is not None for p in module.parameters() if p.requires_grad]
        router = [p for module in routing if module is not None for p in module.parameters()]
        return [
            ParamGroup("student", student, self.rates.lr, self.rates.weight_decay),
            ParamGroup(ROUTER, router, self.rates.router_lr, self.rates.router_weight_decay),
        ]

    def begin_epoch(self, epoch: int) -> None:
        self.router.begin_epoch(epoch)
        if self.router.decides:
            self.router.epoch.fill_(epoch)
        if self.feature_distiller is not None:
            self.feature_distiller.begin_epoch(epoch)
        if self.scales is not None:
            whole, of_logits = (1.0 if factor is None else factor(epoch) for factor in self._schedules)
            self.scales.copy_(torch.tensor([whole, whole * of_logits]))
            if self.doses.scale is not None:
                self.doses.scale.copy_(self.scales[0 if self.feature_distiller is not None else 1])
        self._rest()

    def begin_step(self, step: int) -> None:
        self._routed = step % self.rates.update_every == 0
        self.constants = self._active, self._routed

    def _rest(self) -> None:
        """Let the distillers know at which of their spots they need not look."""
        self._active = active = self.router.active or (True,) * len(self.spots)
        self.constants = active, self._routed
        self.logit_distiller.active = active[-1:]
        if self.feature_distiller is not None:
            self.feature_distiller.active = active[:-1]

    @torch.no_grad()
    def precompute(self, images: Tensor) -> Features:
        """What a step reads of the teacher's plain pass over these images, for `Batch.precomputed`, and no more."""
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
        return features.only(
            {*more, *(places if want == "stages" else ())},
            places if want == "preactivations" else (),
            places if want == "blocks" else (),
        )

    def forward(self, batch: Batch) -> StepOutput:
        device = batch.images.device
        with self.mode.networks(device), torch.no_grad():
            seen = self.teacher_features(batch)
            if self.mode.autocast_dtype is None:  # a cache's are in 16 bits
                seen = seen.map(to_fp32)
            offset = None if self.offset is None else to_fp32(self.offset(batch.images))
        benefits = self._benefits(batch, seen) if self.router.meta and self._routed else None
        self.doses.begin()
        with self._converted():
            student, ce = self.learn(batch, offset)
            embedding = to_fp32(seen.embedding)
            answers = self.answers(seen, student, batch.labels)
            decision = self.decide(embedding, student.embedding.detach(), batch.noise, *answers)
            # Independent of the student's losses and of both backward passes of theirs.
            alone = ce.detach()
            gates = [decision.gate] if decision.gate is not None else []
            with self._fork.beside([*batch.tensors(), *seen.tensors(), *gates, alone]):
                if benefits is None or decision.gate is None:
                    routing_loss, events = self.route(batch, seen, alone, decision.gate, offset)
                else:
                    routing_loss, events = -(decision.gate * benefits.T).mean(dim=0).sum(), {}
        loss, parts = self.objective(batch, student, seen, ce, decision.weight)
        self._fork.join([routing_loss, *events.values()])
        parts |= {"router": routing_loss.detach()} if events or benefits is not None else {}
        weight = self.doses.kept[:, : len(batch.labels)] if self.router.agreement else decision.weight
        use = SpotUse(weight, decision.probability, events, self.doses.lengths)
        return StepOutput(loss + routing_loss, student.logits, parts, use)

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

    def _benefits(self, batch: Batch, seen: Features) -> Tensor:
        """[S, N] by how much distilling a sample at a spot lowers the held-out cross-entropy, at root mean square 1.

        In evaluation mode, so that nothing is recorded; in fp32, in whose last bits the difference lies.
        """
        assert batch.held_out is not None, "the builder gives such a router held-out images"
        modules = [module for module in self.modules() if module.training]
        mode, self.mode = self.mode, Mode()
        for module in modules:
            module.training = False
        try:
            way = held_out_gradient(self.network, [(batch.held_out.images, batch.held_out.labels)])
            known = replace(batch, precomputed=seen)
            products = along(self.network, way, lambda: self.sample_losses(known))
        finally:
            self.mode = mode
            for module in modules:
                module.training = True
        return products / products.square().mean(dim=1, keepdim=True).sqrt().clamp(min=TINY)

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

    def answers(self, teacher: Features, student: Features, labels: Tensor) -> list[Answers]:
        """What a router that needs answers gets beside the pooled vectors; nothing for the others."""
        logits = to_fp32(teacher.logits), student.logits.detach()
        return [Answers(*logits, labels)] if self.router.needs_answers else []

    def decide(self, teacher: Tensor, student: Tensor, noise: Tensor, *answers: Answers) -> Decision:
        """Where each sample is distilled, from the pooled vectors of both networks; some routers get their answers."""
        decision = self.router(teacher, student, noise, *answers)
        if not isinstance(decision, Decision):
            where = _method(self.router)
            raise UsageError(f"{where}: must return a Decision, not a {type(decision).__name__}", GUIDE)
        shape = len(self.spots), len(student)
        _require(self.router, "the weight of its Decision [spots, N]", decision.weight, shape)
        if self.router.decides and decision.gate is not None:
            _require(self.router, "the gate of its Decision [N, spots]", decision.gate, shape[::-1])
            if self.graft is None:
                text = "gives a gate, and nothing is routed by it: that needs `settings` of a LearnedConfig"
                raise UsageError(f"{_method(self.router)}: {text}", GUIDE)
        return decision

    def objective(
        self, batch: Batch, student: Features, seen: Features, ce: Tensor, weight: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The student's loss and its terms for the log."""
        teacher = self._compared(seen, "teacher", self.distillers.want).map(to_fp32)
        logit = self.factors.logit * self._matched(self.logit_distiller, student, teacher, weight[-1:], batch)
        if self.scales is not None:
            logit = logit * self.scales[1].to(logit.dtype)
        parts = {"router_weight": weight.mean()} if self.router.decides else {}
        parts |= {"ce": ce, "logit": logit}
        loss = self.factors.ce * ce + logit
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
            student, teacher = (_of_all(features, distiller.spots, batch) for features in (student, teacher))
            weight = distributed.all_gather(weight.T, batch).T
            labels, index = (distributed.all_gather(rows, batch) for rows in (batch.labels, batch.index))
            batch = Batch(batch.images, labels, index, batch.noise)
        losses: Tensor = distiller(student, teacher, weight, batch)
        _require(distiller, "what it returns, a loss per spot [spots],", losses, (len(distiller.spots),))
        return losses.sum() if scale is None else (losses * scale).sum()

    def route(
        self, batch: Batch, teacher: Features, ce: Tensor, gate: Tensor | None, offset: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The router's loss and what happened in it; nothing where the router does not learn, or not in this step."""
        if self.graft is None or gate is None or not self._routed:
            return torch.zeros_like(ce), {}
        with self.mode.networks(batch.images.device):
            routed = to_fp32(self.graft(batch.images, teacher, gate))
        if offset is not None:  # as far as the routed pass ends in the student's head
            routed = routed + (1 - gate[:, -1:]) * offset
        result = router_loss(
            routed,
            batch,
            ce,
            gate,
            gamma=self.factors.gamma,
            min_teacher_fraction=self.factors.min_teacher_fraction,
            criterion=self.criterion,
        )
        events = {"router_loss_scaled_up": result.raised, "router_loss_scaled_down": result.lowered}
        events |= {"count_penalty_active": result.count_active}
        return result.loss, events | {"routed_ce": result.ce, "student_ce": result.student_ce}


def _require(module: nn.Module, what: str, value: object, shape: tuple[int, ...]) -> None:
    """Raise UsageError where it is no floating tensor of this shape. Nothing is read from the device."""
    if isinstance(value, Tensor) and value.shape == shape and value.is_floating_point():
        return
    got = f"{value.dtype} of shape {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
    raise UsageError(f"{_method(module)}: {what} must be a floating tensor of shape {list(shape)}, not {got}", GUIDE)


def _method(module: nn.Module) -> str:
    """The method that a module is called by, and where it stands if that is somebody's own code."""
    line = line_of(module, "decide", "spot_loss", "forward")
    name = next((name for name in ("decide", "spot_loss") if line and name in vars(type(module))), "forward")
    return f"{f'{line}: ' if line else ''}{type(module).__name__}.{name}"


def of_own_code(error: NonFiniteError, task: Task) -> NonFiniteError:
    """The same, with the place of somebody's own code where that gave the number."""
    if not isinstance(task, DistillTask):
        return error
    given = {"router_weight": task.router, "feature": task.feature_distiller, "logit": task.logit_distiller}
    for term, module in given.items():
        if module is not None and term in error.message and line_of(module):
            text = "gives weights that are NaN or outside of 0 to 1: " if module is task.router else ""
            return NonFiniteError(f"{_method(module)}: {text}{error.message}", GUIDE)
    return error


@contextmanager
def naming_own_code(task: Task) -> Iterator[None]:
    """Whatever is not finite is told as `of_own_code` has it."""
    try:
        yield
    except NonFiniteError as error:
        raise of_own_code(error, task) from None


def _of_all(features: Features, spots: tuple[Spot, ...], batch: Batch) -> Features:
    """The logits and what the spots need of the stages, of all processes' samples; the other stages as they are."""
    places = {place for spot in spots for place in (spot.student, spot.teacher)}
    stages = [distributed.all_gather(x, batch) if k in places else x for k, x in enumerate(features.stages)]
    return Features(tuple(stages), distributed.all_gather(features.logits, batch))
