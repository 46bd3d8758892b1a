"""The further teachers of a run: loaded and held to their cards as the first one is, and joined to its task."""

from pathlib import Path
from typing import NamedTuple

from sakd_cli.config.methods import ALONE
from sakd_cli.config.training import DistillConfig
from sakd_cli.errors import UsageError
from sakd_cli.models.artifact import Artifact
from sakd_cli.models.cost import Cost
from sakd_cli.models.spot import Spot
from sakd_cli.runs.claims import Claim
from sakd_cli.runs.teacher_logits import SavedLogits
from sakd_cli.tasks.distill import DistillTask


class Teacher(NamedTuple):
    """A network to learn from, where its weights lie, what its card says, and what it costs."""

    network: Artifact
    path: Path | None
    claim: Claim | None
    cost: Cost


def require_team(config: DistillConfig, task: DistillTask) -> None:
    """Raise UsageError where something cannot be with several teachers."""
    method, selected = config.method, config.router.dose == "selected-mean"
    for text, refused, hint in (
        (f"method {method.name} trains something before, from one", task.distillers.warmup is not None, None),
        (f"method {method.name} {ALONE.get(type(method), '')}, of one", type(method) in ALONE, None),
        ("router.dose=selected-mean would undo their shares", selected, "--set router.dose=published"),
        ("teacher.cache keeps the answers of one", config.teacher.cache, None),
        ("residual students complete one", config.residual.students > 0, "--set residual.students=0"),
    ):
        if refused:
            raise UsageError(f"teacher: {1 + len(config.teacher.others)} are named, and {text}", hint)


def require_alike(first: Artifact, other: Artifact, source: str) -> None:
    """Raise UsageError where a teacher was trained on pictures of another kind than the first one: all see the same."""
    ours, theirs = first.card.preprocessing, other.card.preprocessing
    if ours is None or theirs is None:
        return
    seen = ours.model_copy(update=theirs.model_dump(include={"mean", "std"}))  # these each network has for itself
    if found := theirs.differences(seen, "the first teacher's card"):
        raise UsageError(f"teacher: {source}: all teachers see the same pictures; {found[0]}")


def require_one_teacher(task: DistillTask) -> None:
    """Raise UsageError for what is measured between a student and its one teacher."""
    if isinstance(task.teacher_features, SavedLogits):
        raise UsageError("this run has a teacher's logits of its training images alone; there is nothing to measure")
    if task.others:
        raise UsageError(
            f"this run has {len(task.members)} teachers; images are measured one by one for runs with one",
            "its record by epoch and class: sakd inspect-spots without these options",
        )


def join(task: DistillTask, others: list[DistillTask], config: DistillConfig) -> None:
    """Let a task learn from the teachers of the others too. UsageError where they have not the same spots."""
    for other, source in zip(others, config.teacher.others, strict=True):
        ours, theirs = ([(spot.name, spot.student) for spot in one.spots] for one in (task, other))
        if ours != theirs:
            names = [", ".join(name for name, _ in places) for places in (ours, theirs)]
            hint = "--set stage_map=[[1,1],...] says which stages belong together"
            raise UsageError(f"teacher: {source} has spots {names[1]}, {config.teacher.source} has {names[0]}", hint)
    task.join(others, config.teacher.combine)


def spots_of(task: DistillTask, names: list[str]) -> tuple[Spot, ...]:
    """The spots of all teachers, one after another; of several each with its teacher's name."""
    if len(names) == 1:
        return task.spots
    own = [f"{name}-{names[:k].count(name) + 1}" if names.count(name) > 1 else name for k, name in enumerate(names)]
    return tuple(
        spot._replace(name=f"{spot.name}/{name}")
        for member, name in zip(task.members, own, strict=True)
        for spot in member.spots
    )
