"""Spots: named places where knowledge may pass from the teacher to the student."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

from sakd_cli.config.preprocessing import ImageSize
from sakd_cli.errors import UsageError
from sakd_cli.models.staged import PLANES, Layout, Shape, StagedModel


class Spot(NamedTuple):
    """A pair of stages, by index; shapes are of one sample. Layouts: how a network's map lies in the stage's output."""

    name: str
    kind: Literal["map", "embedding", "logits"]
    student: int
    teacher: int
    student_shape: Shape
    teacher_shape: Shape
    student_layout: Layout = PLANES
    teacher_layout: Layout = PLANES


def align_stages(student: StagedModel, teacher: StagedModel) -> list[tuple[int, int]]:
    """Pairs (student stage, teacher stage) of maps that belong together.

    Networks with equally many stages are paired in order, as published. Otherwise each stage of the shorter one takes
    the stage of the longer one whose stride is nearest, later ones first, always rising; of several as near, such as
    all of a vision transformer, the one that is as deep in its network.
    """
    ours, theirs = student.map_stages, teacher.map_stages
    if len(ours) == len(theirs):
        return list(zip(ours, theirs, strict=True))
    if len(ours) > len(theirs):
        return [(s, t) for t, s in align_stages(teacher, student)]
    pairs: list[tuple[int, int]] = []
    limit = len(teacher.infos) - 1
    for place in reversed(range(len(ours))):
        stride = student.infos[ours[place]].stride
        candidates = theirs[place : limit - 1]
        depth = (place + 1) / len(ours) * len(theirs)
        best = min(reversed(candidates), key=lambda k: (abs(teacher.infos[k].stride - stride), abs(k - depth)))
        pairs.insert(0, (ours[place], best))
        limit = best
    return pairs


def resolve_stage_map(
    student: StagedModel, teacher: StagedModel, wanted: Sequence[tuple[int, int]] | None
) -> list[tuple[int, int]]:
    """The pairs of maps that the user wants, checked; those of `align_stages` where there is no wish. UsageError."""
    if wanted is None:
        return align_stages(student, teacher)
    for side, network, stages in (
        ("student", student, [pair[0] for pair in wanted]),
        ("teacher", teacher, [pair[1] for pair in wanted]),
    ):
        known = network.map_stages
        if not stages or any(stage not in known for stage in stages) or stages != sorted(set(stages)):
            raise UsageError(
                f"stage_map: {list(map(list, wanted))}: the {side}'s stages must rise and lie in {list(known)}",
                hint=f"the default for this pair is {list(map(list, align_stages(student, teacher)))}",
            )
    return list(wanted)


def spots_at(
    student: StagedModel,
    teacher: StagedModel,
    places: Sequence[tuple[int, int]],
    side: ImageSize,
    teacher_side: ImageSize | None = None,
) -> list[Spot]:
    """The spots at these pairs of stages, then the logit spot, which every method has.

    side  of the student's images; teacher_side: of the teacher's, None: the same
    """
    spots = []
    for s, t in places:
        ours, theirs = student.infos[s], teacher.infos[t]
        shapes = ours.shape(side), theirs.shape(side if teacher_side is None else teacher_side)
        spots.append(Spot(ours.name, ours.kind, s, t, *shapes, ours.layout, theirs.layout))
    classes = (student.num_classes,)
    spots.append(Spot("logits", "logits", len(student.infos), len(teacher.infos), classes, classes))
    return spots
