"""The student branches of a student-friendly teacher: beside its training, on the disk, and as a student's start."""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, final

from torch import Tensor

from sakd_cli.documents.evaluation import Branch
from sakd_cli.documents.training import FriendlyTraining, PlannedNetwork
from sakd_cli.engine.evaluate import evaluate
from sakd_cli.errors import UsageError
from sakd_cli.files import folder_of
from sakd_cli.models.artifact import Artifact
from sakd_cli.models.branches import Branches, load_branches, save_branches
from sakd_cli.models.cost import cost
from sakd_cli.models.staged import StagedModel
from sakd_cli.runs.extension import RunExtension, TrainerFactory
from sakd_cli.tasks.pretrain import SftnTask

FILE = Path("branches", "model.safetensors")  # in the run directory


@final
class BranchesExtension(RunExtension):
    """What a student-friendly teacher has beside itself: its branches on the disk, and what is said of them."""

    def __init__(self, task: SftnTask) -> None:
        self.network, self.branches, self.settings = task.network, task.branches, task.settings
        students = self.settings.students
        self.label = f"friendly-{'-'.join(students)}"
        self.notice = f"student-friendly: together with branches of {', '.join(students)}"
        self.rows = branch_rows(self.network, self.branches)

    def networks(self) -> list[PlannedNetwork]:
        return [
            PlannedNetwork(role=f"branch at {row.behind}", name=row.student, parameters=row.parameters, macs=row.macs)
            for row in self.rows
        ]

    def metadata(self) -> dict[str, Any]:
        """For whom the teacher is made, how, and what each branch costs; as in the summary and beside the weights."""
        return {"friendly": self._described(self.rows)}

    def _described(self, rows: list[Branch]) -> FriendlyTraining:
        settings = self.settings.model_dump(mode="json")
        return FriendlyTraining(**settings, training_macs=sum(row.macs for row in rows), branches=rows)

    def publish(self, run: Path, weights: bytes) -> None:
        (run / FILE).parent.mkdir(exist_ok=True)
        save_branches(run / FILE, self.branches, hashlib.sha256(weights).hexdigest())

    def finalize(self, factory: TrainerFactory, figures: dict[str, dict[str, Any]]) -> dict[str, Any]:
        """The same with each branch's metrics on the test images."""
        return {"friendly": self._described(branch_rows(self.network, self.branches, factory.evaluation.test))}


def branch_rows(
    teacher: StagedModel, branches: Branches, batches: Iterable[tuple[Tensor, Tensor]] | None = None
) -> list[Branch]:
    """Of each branch where it hangs and what it adds to one image's forward pass; with batches its metrics on them."""
    rows = []
    for k, place in enumerate(branches.places):
        through = branches.through(teacher, k)
        macs = cost(through, branches.side).macs - cost(through[: place.stage + 1], branches.side).macs
        scores = None if batches is None else evaluate(through, batches, teacher.num_classes)
        row = Branch(
            student=place.student,
            behind=teacher.infos[place.stage].name,
            transform=str(branches.transforms[k].geometry),
            parameters=branches.parameters_of(k),
            macs=macs,
            **({} if scores is None else scores.metrics()),
        )
        rows.append(row)
    return rows


def branches_of(weights: Path, teacher: Artifact) -> Branches | None:
    """The branches in the run directory that this weights file (or folder) lies in; None where it has none."""
    folder = folder_of(weights.resolve())
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
