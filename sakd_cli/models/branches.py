"""Student branches: tails of students that hang on a teacher in training, and on the disk beside it.

Park, Cha, Jeong, Kim, Han, "Learning Student-Friendly Teacher Networks for Knowledge Distillation", NeurIPS 2021,
section 3. Branch i leaves the teacher behind stage i, is transformed to the shape that the student
has behind its stage i, and ends in the student's own stages i + 1, ... and head. There is one behind every stage of
maps that both networks have, but the last. Stages are paired in order, also where the networks have different numbers
of them (spots are then paired by stride); where two differ in stride, the transform makes up for it.
"""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple, cast

import torch
from pydantic import TypeAdapter
from torch import Tensor, nn

from sakd_cli.config.preprocessing import ImageSize, height_width
from sakd_cli.errors import UsageError
from sakd_cli.models.adapters import Transform
from sakd_cli.models.artifact import LARGEST_SIDE, Artifact, load_module, module_bytes
from sakd_cli.models.staged import Relayout, StagedModel
from sakd_cli.models.table import create
from sakd_cli.writing import write_aside

FORMAT = "sakd.branches/1"


class BranchPoint(NamedTuple):
    """A branch: behind this stage of the teacher, for this stage of the student, ending in tail number `tail`."""

    student: str
    stage: int
    tail: int


class BranchCard(NamedTuple):
    """What the branches need to be used; teacher: SHA-256 of the weights file they were trained with."""

    students: tuple[str, ...]
    share: bool
    side: ImageSize
    teacher: str


_CARD = TypeAdapter(BranchCard)


class Tail(nn.Module):
    """The stages of a student from `first` on, and its head."""

    def __init__(self, student: StagedModel, first: int) -> None:
        super().__init__()
        self.first = first
        self.stages = nn.ModuleList(list(student.stages)[first:])
        self.head = student.head

    def behind(self, stage: int) -> list[nn.Module]:
        """What follows stage `stage`, which is at least `first` - 1."""
        return [*list(self.stages)[stage + 1 - self.first :], self.head]

    def forward(self, x: Tensor, stage: int) -> Tensor:
        """The student's output behind `stage`, [N, C, H, W], to logits [N, classes]."""
        for module in self.behind(stage):
            x = module(x)
        return x


class Branches(nn.Module):
    """All branches of `students` (names of networks) on a teacher for images of `side` pixels.

    share  all branches of a student end in one tail, entered at different stages; otherwise each has its own
    """

    def __init__(self, teacher: StagedModel, students: Sequence[str], side: ImageSize, *, share: bool) -> None:
        super().__init__()
        self.students, self.side, self.share = tuple(students), side, share
        self.places: list[BranchPoint] = []
        self.transforms = nn.ModuleList()
        self.tails = nn.ModuleList()
        for name in students:
            student = create(name, teacher.num_classes, side)
            for stage in range(1, min(len(teacher.map_stages), len(student.map_stages))):
                if stage > 1 and not share:
                    student = create(name, teacher.num_classes, side)
                if stage == 1 or not share:
                    self.tails.append(Tail(student, stage + 1))
                source, target = teacher.infos[stage], student.infos[stage]
                self.transforms.append(Transform(source.shape(side), target.shape(side), target.layout))
                self.places.append(BranchPoint(name, stage, len(self.tails) - 1))

    def forward(self, stages: Sequence[Tensor]) -> Tensor:
        """The teacher's features, one per stage, to the logits of every branch, [branches, N, classes]."""
        branches = zip(self.places, self.transforms, strict=True)
        return torch.stack([self._tail(at)(change(stages[at.stage]), at.stage) for at, change in branches])

    def through(self, teacher: StagedModel, branch: int) -> nn.Sequential:
        """A classifier of images: the teacher up to a branch, then this branch. Shares their weights."""
        last = self.places[branch].stage
        info = teacher.infos[last]
        to_map = Relayout(partial(info.layout.to_map, shape=info.shape(self.side)))
        before = [*list(teacher.stages)[: last + 1], to_map]
        return nn.Sequential(*before, *self._alone(branch)).train(teacher.training)

    def start(self, student: StagedModel) -> None:
        """Copy the longest tail of this student's branches into it. Raises UsageError where it has none."""
        if student.name not in self.students:
            known = ", ".join(self.students)
            raise UsageError(f"init_from_branches: the teacher's branches are of {known}, not of {student.name}")
        place = next(place for place in self.places if place.student == student.name)
        tail = self._tail(place).behind(place.stage)
        for mine, theirs in zip([*student.stages[place.stage + 1 :], student.head], tail, strict=True):
            mine.load_state_dict(theirs.state_dict())

    def _tail(self, place: BranchPoint) -> Tail:
        return cast(Tail, self.tails[place.tail])

    def _alone(self, branch: int) -> list[nn.Module]:
        place = self.places[branch]
        return [self.transforms[branch], *self._tail(place).behind(place.stage)]

    def parameters_of(self, branch: int) -> int:
        """Number of trained parameters of a branch, those that it shares with others too."""
        return sum(parameter.numel() for module in self._alone(branch) for parameter in module.parameters())


def save_branches(path: Path, branches: Branches, teacher: str) -> None:
    """Write the branches of the teacher whose weights file has this SHA-256, atomically."""
    card = BranchCard(branches.students, branches.share, branches.side, teacher)
    write_aside(path, module_bytes(FORMAT, branches, json.dumps(card._asdict())))


def load_branches(path: Path, teacher: Artifact) -> Branches | None:
    """Read branches; None where they were trained with another teacher's weights. UsageError where damaged."""

    def build(header: str, numbers: int) -> tuple[Branches, BranchCard]:
        card = _CARD.validate_json(header)
        if not all(0 < side <= LARGEST_SIDE for side in height_width(card.side)):
            raise ValueError(f"its card has images of {card.side} pixels")
        return Branches(teacher.model, card.students, card.side, share=card.share), card

    branches, card, _ = load_module(path, FORMAT, "student branches", build)
    return branches if card.teacher == teacher.sha256 else None
