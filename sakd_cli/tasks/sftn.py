"""Student-friendly teachers: a teacher that learns its task together with branches of its students.

Park, Cha, Jeong, Kim, Han, "Learning Student-Friendly Teacher Networks for Knowledge Distillation", NeurIPS 2021 (SFTN
spec, sections 1 and 2). What is delivered is the teacher alone; any distillation takes it like any other.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, final

from torch import Tensor
from torch.nn import functional as F

from sakd_cli.batch import Batch
from sakd_cli.config.friendly import FriendlyConfig
from sakd_cli.engine.evaluate import evaluate
from sakd_cli.engine.runtime import Mode, to_fp32
from sakd_cli.engine.task import ParamGroup, StepOutput, Task
from sakd_cli.errors import UsageError
from sakd_cli.models.artifact import Artifact
from sakd_cli.models.branches import Branches, load_branches, save_branches
from sakd_cli.models.cost import cost
from sakd_cli.models.staged import StagedModel
from sakd_cli.rundir import sha256
from sakd_cli.runs.extra import RunExtension, TrainerFactory

FILE = Path("branches", "model.safetensors")  # in the run directory


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
        words: FriendlyConfig,
        *,
        lr: float,
        weight_decay: float,
        mode: Mode | None = None,
    ) -> None:
        super().__init__()
        self.mode = mode or Mode()
        self.network = network
        self.branches = branches
        self.words = words
        self.lr = lr
        self.weight_decay = weight_decay

    def groups(self) -> list[ParamGroup]:
        return [
            ParamGroup("network", list(self.network.parameters()), self.lr, self.weight_decay),
            ParamGroup("branches", list(self.branches.parameters()), self.lr, self.weight_decay),
        ]

    def forward(self, batch: Batch) -> StepOutput:
        words = self.words
        with self.mode.networks(batch.images.device):
            features = self.network.features(batch.images)
            stages = [stage.detach() for stage in features.stages] if words.detach_features else features.stages
            branches = to_fp32(self.branches(stages))
        features = features.map(to_fp32)
        target = features.logits.detach() if words.detach_target else features.logits
        parts = {
            "ce": F.cross_entropy(features.logits, batch.labels),
            "branch_kl": imitation(target, branches, words.tau, reverse=words.kl == "reverse"),
            "branch_ce": F.cross_entropy(branches.flatten(0, 1), batch.labels.repeat(len(branches))),
        }
        loss = (
            words.lambda_t * parts["ce"] + words.lambda_kl * parts["branch_kl"] + words.lambda_ce * parts["branch_ce"]
        )
        parts["loss"] = loss
        return StepOutput(loss, features.logits, {name: part.detach() for name, part in parts.items()})


@final
class StudentBranches(RunExtension):
    """What a student-friendly teacher has beside itself: its branches on the disk, and what is said of them."""

    def __init__(self, task: SftnTask) -> None:
        self.network, self.branches, self.words = task.network, task.branches, task.words
        students = self.words.students
        self.label = f"friendly-{'-'.join(students)}"
        self.notice = f"student-friendly: together with branches of {', '.join(students)}"
        self.rows = branch_rows(self.network, self.branches)

    def networks(self) -> list[dict[str, Any]]:
        return [
            {"role": f"branch at {row['behind']}", "name": row["student"]}
            | {key: row[key] for key in ("parameters", "macs")}
            for row in self.rows
        ]

    def facts(self) -> dict[str, Any]:
        """For whom the teacher is made, how, and what each branch costs; as in the summary and beside the weights."""
        weights = self.words.model_dump(mode="json", exclude={"students"})
        extra = sum(row["macs"] for row in self.rows)
        about = {"students": list(self.words.students)} | weights | {"training_macs": extra, "branches": self.rows}
        return {"friendly": about}

    def publish(self, run: Path, weights: Path) -> None:
        (run / FILE).parent.mkdir(exist_ok=True)
        save_branches(run / FILE, self.branches, sha256(weights))

    def close(self, shop: TrainerFactory, figures: dict[str, dict[str, Any]]) -> dict[str, Any]:
        """The facts with each branch's figures on the test images."""
        rows = branch_rows(self.network, self.branches, shop.evaluation.test)
        return {"friendly": self.facts()["friendly"] | {"branches": rows}}


def branch_rows(
    teacher: StagedModel, branches: Branches, batches: Iterable[tuple[Tensor, Tensor]] | None = None
) -> list[dict[str, Any]]:
    """Of each branch where it hangs and what it adds to one image's forward pass; with batches its figures on them."""
    rows = []
    for k, place in enumerate(branches.places):
        through = branches.through(teacher, k)
        macs = cost(through, branches.side).macs - cost(through[: place.stage + 1], branches.side).macs
        row = {
            "student": place.student,
            "behind": teacher.infos[place.stage].name,
            "transform": branches.transforms[k].geometry,
            "parameters": branches.parameters_of(k),
            "macs": macs,
        }
        rows.append(row | (evaluate(through, batches, teacher.num_classes).headline() if batches is not None else {}))
    return rows


def branches_of(weights: Path, teacher: Artifact) -> Branches | None:
    """The branches in the run directory that this weights file (or folder) lies in; None where it has none."""
    folder = weights.resolve() if weights.is_dir() else weights.resolve().parent
    in_a_run = (folder.parent / "config.yaml").is_file() and (folder.parent / FILE).is_file()
    return load_branches(folder.parent / FILE, teacher) if in_a_run else None


def start_from_branches(student: StagedModel, weights: Path | None, teacher: Artifact) -> None:
    """Copy the longest tail of the student's branches into it. Raises UsageError where the teacher has none."""
    branches = None if weights is None else branches_of(weights, teacher)
    if branches is None:
        raise UsageError(
            f"init_from_branches: {weights or 'a teacher that is yet to be trained'} has no student branches beside it",
            hint=f"sakd pretrain-teacher {teacher.card.architecture} --student-friendly {student.name}",
        )
    branches.start(student)
