"""SimKD's network (Chen et al., CVPR 2022): a student's stages, a projector, a teacher's frozen pooling and head."""

import copy
from functools import partial

from torch import Tensor, nn

from sakd_cli.models.layers import ConvUnit
from sakd_cli.models.staged import PLANES, Relayout, StagedModel, StageInfo


class FrozenCopy(nn.Module):
    """A stage of another network, copied: never trained, and in evaluation mode whatever is asked for."""

    def __init__(self, stage: nn.Module) -> None:
        super().__init__()
        self.stage = copy.deepcopy(stage).requires_grad_(False)
        self.train()

    def train(self, mode: bool = True) -> "FrozenCopy":
        super().train(mode)
        self.stage.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.stage(x)


def projector(student: StageInfo, teacher: StageInfo, factor: int) -> tuple[StageInfo, nn.Sequential]:
    """From the student's last map to the teacher's: mean over squares where it is larger, then convolutions 1, 3, 1.

    Each has BatchNorm and ReLU; the last one no ReLU where the teacher's map is signed. The inner width is the
    teacher's over `factor`. [N, C_S, H, W] to [N, C_T, H/r, W/r], r = teacher's stride / student's, at least 1.
    """
    ratio = max(1, teacher.stride // student.stride)
    inner = max(1, teacher.channels // factor)
    size = None if student.size is None else (student.size[0] // ratio, student.size[1] // ratio)
    stride = student.stride * ratio
    info = StageInfo("projector", teacher.channels, stride, student.halved_from, teacher.signed, size=size)
    convolutions = [
        ConvUnit(student.channels, inner, 1),
        ConvUnit(inner, inner, 3),
        ConvUnit(inner, teacher.channels, 1, relu=not teacher.signed),
    ]
    to_map = partial(student.layout.to_map, shape=student.shape(0))
    before = [] if student.layout == PLANES else [Relayout(to_map)]
    return info, nn.Sequential(*before, *([nn.AvgPool2d(ratio)] if ratio > 1 else []), *convolutions)


def build(name: str, num_classes: int, *, student: StagedModel, teacher: StagedModel, factor: int) -> StagedModel:
    """The student (not copied) with a new projector and copies of the teacher's pooling stage and head."""
    *own, _ = zip(student.infos, student.stages, strict=True)
    added = projector(student.infos[-2], teacher.infos[-2], factor)
    layout = teacher.infos[-2].layout
    rest = teacher.stages[-1] if layout == PLANES else nn.Sequential(Relayout(layout.from_map), teacher.stages[-1])
    pool = teacher.infos[-1], FrozenCopy(rest)
    model = StagedModel(name, "reused", [*own, added, pool], num_classes, None)
    model.head.load_state_dict(teacher.head.state_dict())
    model.head.requires_grad_(False)
    return model
