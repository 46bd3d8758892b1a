"""A run's teachers: what their cards claim, held against what is measured here, and several of them in one task."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from sakd_cli.config.methods import ALONE
from sakd_cli.config.training import DistillConfig
from sakd_cli.errors import UsageError
from sakd_cli.files import folder_of, read_about
from sakd_cli.models.artifact import Artifact
from sakd_cli.models.cost import Cost
from sakd_cli.models.spot import Spot
from sakd_cli.runs.teacher_outputs import SavedLogits
from sakd_cli.tasks.distill import DistillTask

GAP = 0.2  # percentage points of top-1
PUBLISHED_ON = 10_000  # test images of CIFAR, on which teachers of `RELEASES` were scored


class Claim(NamedTuple):
    """How a teacher scored: top-1 in percent on so many test images of a data set; None where a card does not say."""

    dataset: str | None
    images: int | None
    top1: float | None


def read_claim(path: Path, sha256: str) -> Claim | None:
    """What the card beside a weights file says; None where there is none. `path`: the file or its folder.

    Raises UsageError where the card is damaged, or is of other weights than these, whose SHA-256 is given.
    """
    card = folder_of(path) / "config.json"
    if (path.is_file() and path.name != "model.safetensors") or not card.is_file():
        return None
    try:
        about = read_about(card.parent)
        known: str = about["sha256"]
        values: tuple[tuple[Any, str], ...] = ((str, "dataset"), (int, "images"), (float, "top1"))
        claim = Claim(*(None if about.get(key) is None else kind(about[key]) for kind, key in values))
        if claim.top1 is None and (about.get("imported") or {}).get("published_top1") is not None:
            claim = Claim(claim.dataset, PUBLISHED_ON, float(about["imported"]["published_top1"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UsageError(f"{card}: the teacher's card is damaged") from None
    if known != sha256:
        raise UsageError(
            f"{card}: is the card of other weights (SHA-256 {str(known)[:12]}, the file's is {sha256[:12]})",
            hint="take the whole folder from where it came, or remove the card",
        )
    return claim


def warn_of_chance(top1: float, images: int, classes: int, tell: Callable[[str], None], whose: str = "") -> None:
    """Say so where a top-1 in percent on so many images cannot be told from chance, within 3 standard errors."""
    share = 1 / classes
    if images and top1 / 100 <= share + 3 * (share * (1 - share) / images) ** 0.5:
        tell(
            f"{whose}top-1 {top1:.2f} % on {images} test images is chance for {classes} classes: another order of "
            "classes (import-weights --classes), other preprocessing, or untrained weights"
        )


def compare_with_card(path: Path, claim: Claim | None, measured: Claim, *, allowed: bool) -> str | None:
    """Hold what was measured against the card. What is worth saying of it; None where they agree.

    They agree within 0.2 points, or one image where there are fewer than 500. Raises UsageError where they do not,
    unless that is allowed.
    """
    if claim is None:
        return f"teacher: no card beside {path}; its accuracy was compared with nothing"
    if claim.top1 is None or measured.top1 is None:
        return f"teacher: the card of {path} names no accuracy to compare with"
    if claim[:2] != measured[:2]:
        theirs, ours = (f"{one.images} test images of {one.dataset}" for one in (claim, measured))
        return f"teacher: not compared with its card, which is of {theirs}; here are {ours}"
    gap = abs(claim.top1 - measured.top1)
    if gap <= max(GAP, 100 / (measured.images or 1)) + 1e-9:
        return None
    text = f"top-1 {measured.top1:.2f} % on {measured.images} test images, its card says {claim.top1:.2f} %"
    if allowed:
        return f"teacher: {text}; taken as it is"
    raise UsageError(f"{path}: {text}", "other weights or other images than then; --allow-teacher-mismatch takes it")


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
