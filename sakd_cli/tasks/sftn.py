"""Student-friendly teachers: a teacher that learns its task together with branches of its students.

Park, Cha, Jeong, Kim, Han, "Learning Student-Friendly Teacher Networks for Knowledge Distillation", NeurIPS 2021,
section 3. What is delivered is the teacher alone; any distillation takes it like any other.
"""

from typing import final

from torch import Tensor
from torch.nn import functional as F

from sakd_cli.batch import Batch
from sakd_cli.config.training import FriendlyConfig
from sakd_cli.engine.runtime import Mode, to_fp32
from sakd_cli.engine.task import ParamGroup, StepOutput, Task
from sakd_cli.models.branches import Branches
from sakd_cli.models.staged import StagedModel


def imitation(teacher: Tensor, branches: Tensor, tau: float, *, reverse: bool) -> Tensor:
    """tau^2 KL(teacher || branch) in nats, the mean over batch and branches; `reverse`: KL(branch || teacher).

    teacher [N, C] and branches [K, N, C] are logits; both get a gradient.
    """
    p = F.log_softmax(teacher / tau, dim=-1).expand_as(branches)
    q = F.log_softmax(branches / tau, dim=-1)
    target, log_ratio = (q, q - p) if reverse else (p, p - q)
    return tau**2 * (target.exp() * log_ratio).sum(dim=-1).mean()


@final
class SftnTask(Task):
    """loss = lambda_t CE(z_T, y) + lambda_kl tau^2 KL(q_T || q_i) + lambda_ce CE(z_i, y), means over all branches i.

    The branches' terms reach the teacher through its maps, the imitation through its logits as well (equation 4). We
    differ from the one public implementation, which cuts the maps' gradient and so loses what the method is for.
    """

    network: StagedModel

    def __init__(
        self,
        network: StagedModel,
        branches: Branches,
        settings: FriendlyConfig,
        *,
        lr: float,
        weight_decay: float,
        mode: Mode | None = None,
    ) -> None:
        super().__init__()
        self.mode = mode or Mode()
        self.network = network
        self.branches = branches
        self.settings = settings
        self.lr = lr
        self.weight_decay = weight_decay

    def groups(self) -> list[ParamGroup]:
        return [
            ParamGroup("network", list(self.network.parameters()), self.lr, self.weight_decay),
            ParamGroup("branches", list(self.branches.parameters()), self.lr, self.weight_decay),
        ]

    def forward(self, batch: Batch) -> StepOutput:
        settings = self.settings
        with self.mode.networks(batch.images.device):
            features = self.network.features(batch.images)
            stages = [stage.detach() for stage in features.stages] if settings.detach_features else features.stages
            branches = to_fp32(self.branches(stages))
        features = features.map(to_fp32)
        target = features.logits.detach() if settings.detach_target else features.logits
        parts = {
            "ce": F.cross_entropy(features.logits, batch.labels),
            "branch_kl": imitation(target, branches, settings.tau, reverse=settings.kl == "reverse"),
            "branch_ce": F.cross_entropy(branches.flatten(0, 1), batch.labels.repeat(len(branches))),
        }
        loss = (
            settings.lambda_t * parts["ce"]
            + settings.lambda_kl * parts["branch_kl"]
            + settings.lambda_ce * parts["branch_ce"]
        )
        parts["loss"] = loss
        return StepOutput(loss, features.logits, {name: part.detach() for name, part in parts.items()})
