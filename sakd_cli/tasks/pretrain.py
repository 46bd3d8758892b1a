"""What is trained in front of a distillation: a network alone, a student-friendly teacher, a method's warm-up.

Student-friendly teachers: Park, Cha, Jeong, Kim, Han, "Learning Student-Friendly Teacher Networks for Knowledge
Distillation", NeurIPS 2021, section 3. What is delivered is the teacher alone.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import chain
from typing import NotRequired, TypedDict, Unpack, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sakd_cli.batch import Batch
from sakd_cli.config.training import FriendlyConfig
from sakd_cli.distillers.distiller import Warmup
from sakd_cli.engine.foreach import ConvertedWeights, CountedBatches
from sakd_cli.engine.runtime import Mode, to_fp32
from sakd_cli.engine.task import ParamGroup, StepOutput, Task
from sakd_cli.models.branches import Branches
from sakd_cli.models.staged import Features, StagedModel
from sakd_cli.tasks.criterion import Criterion


class Recipe(TypedDict):
    """Learning rate and weight decay of all groups, how the task computes, and its classification term."""

    lr: float
    weight_decay: float
    mode: NotRequired[Mode]
    criterion: NotRequired[Criterion]


class SingleRateTask(Task, ABC):
    """A task whose groups share a learning rate and a weight decay.

    trained      the modules of each group, by its name
    in_networks  of what is trained, what is run once in a step within `mode.networks`; None: all
    """

    network: StagedModel
    regions = ("outcome",)

    def __init__(
        self,
        network: StagedModel,
        trained: Mapping[str, Sequence[nn.Module]],
        in_networks: Sequence[nn.Module] | None = None,
        **recipe: Unpack[Recipe],
    ) -> None:
        super().__init__()
        self.network, self.trained, self.recipe = network, trained, recipe
        self.mode, self.criterion = recipe.get("mode") or Mode(), recipe.get("criterion") or Criterion()
        inside = list(chain(*trained.values())) if in_networks is None else in_networks
        self._converted = ConvertedWeights(inside, [], self.mode.autocast_dtype)
        self._counted = CountedBatches(inside)

    def groups(self) -> list[ParamGroup]:
        of_groups = {name: [p for one in modules for p in one.parameters()] for name, modules in self.trained.items()}
        rate, decay = self.recipe["lr"], self.recipe["weight_decay"]
        return [ParamGroup(name, parameters, rate, decay) for name, parameters in of_groups.items()]

    def forward(self, batch: Batch) -> StepOutput:
        with self._converted(), self._counted():
            return self.outcome(batch)

    @abstractmethod
    def outcome(self, batch: Batch) -> StepOutput:
        """What `forward` gives; networks have converted weights."""


@final
class PretrainTask(SingleRateTask):
    """loss = CE(network(x), y): teachers, and students alone."""

    def __init__(self, network: StagedModel, **recipe: Unpack[Recipe]) -> None:
        super().__init__(network, {"network": [network]}, **recipe)

    def outcome(self, batch: Batch) -> StepOutput:
        with self.mode.networks(batch.images.device):
            logits = to_fp32(self.network(batch.images))
        loss = self.criterion(logits, batch)
        return StepOutput(loss, logits, {"loss": loss.detach()})


def imitation(teacher: Tensor, branches: Tensor, tau: float, *, reverse: bool) -> Tensor:
    """tau^2 KL(teacher || branch) in nats, the mean over batch and branches; `reverse`: KL(branch || teacher).

    teacher [N, C] and branches [K, N, C] are logits; both get a gradient.
    """
    p = F.log_softmax(teacher / tau, dim=-1).expand_as(branches)
    q = F.log_softmax(branches / tau, dim=-1)
    target, log_ratio = (q, q - p) if reverse else (p, p - q)
    return tau**2 * (target.exp() * log_ratio).sum(dim=-1).mean()


@final
class SftnTask(SingleRateTask):
    """loss = lambda_t CE(z_T, y) + lambda_kl tau^2 KL(q_T || q_i) + lambda_ce CE(z_i, y), means over all branches i.

    The branches' terms reach the teacher through its maps, the imitation through its logits as well (equation 4). We
    differ from the one public implementation, which cuts the maps' gradient and so loses what the method is for.
    """

    def __init__(
        self, network: StagedModel, branches: Branches, settings: FriendlyConfig, **recipe: Unpack[Recipe]
    ) -> None:
        super().__init__(network, {"network": [network], "branches": [branches]}, **recipe)
        self.branches, self.settings = branches, settings

    def outcome(self, batch: Batch) -> StepOutput:
        settings = self.settings
        with self.mode.networks(batch.images.device):
            features = self.network.features(batch.images)
            stages = [stage.detach() for stage in features.stages] if settings.detach_features else features.stages
            branches = to_fp32(self.branches(stages))
        features = features.map(to_fp32)
        target = features.logits.detach() if settings.detach_target else features.logits
        parts = {
            "ce": self.criterion(features.logits, batch),
            "branch_kl": imitation(target, branches, settings.tau, reverse=settings.kl == "reverse"),
            "branch_ce": self.criterion(branches, batch),
        }
        loss = (
            settings.lambda_t * parts["ce"]
            + settings.lambda_kl * parts["branch_kl"]
            + settings.lambda_ce * parts["branch_ce"]
        )
        parts["loss"] = loss
        return StepOutput(loss, features.logits, {name: part.detach() for name, part in parts.items()})


@final
class WarmupTask(SingleRateTask):
    """loss = sum of the warm-up's terms on the teacher's features and, where it is trained too, the student's."""

    has_unused_parameters = True

    def __init__(self, network: StagedModel, teacher: StagedModel, warmup: Warmup, **recipe: Unpack[Recipe]) -> None:
        inside = [network] if warmup.trains_student else []
        # A head that the loss does not reach gets no gradient and must not be decayed either: SGD leaves it out.
        super().__init__(network, {"warmup": [warmup, *inside]}, inside, **recipe)
        self.warmup = warmup.requires_grad_(True)
        self.warmup.autocast = self.mode.networks
        self.student_features = partial(network.features, want=warmup.want)
        self.teacher_features = partial(teacher.features, want=warmup.want)

    @torch.no_grad()
    def precompute(self, images: Tensor) -> Features:
        """What a step reads of the teacher, for `Batch.precomputed`."""
        compared = {spot.teacher for spot in self.warmup.spots}
        with self.mode.networks(images.device):
            whole = self.teacher_features(images)
        return whole.only(self.warmup.want, compared)

    def outcome(self, batch: Batch) -> StepOutput:
        known = batch.precomputed
        teacher = known if isinstance(known, Features) else self.precompute(batch.for_teacher)
        student = None
        if self.warmup.trains_student:
            with self.mode.networks(batch.images.device):
                student = self.student_features(batch.images).map(to_fp32)
        loss = self.warmup(student, teacher.map(to_fp32)).sum()
        return StepOutput(loss, None, {"loss": loss.detach()})
