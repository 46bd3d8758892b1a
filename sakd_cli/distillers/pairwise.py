"""What several losses share: weighting per sample, and maps of two sizes made comparable."""

from torch import Tensor
from torch.nn import functional as F


def weighted_mean(per_sample: Tensor, weight: Tensor) -> Tensor:
    """Mean over the batch of weight times loss, both [N]: the loss of the chosen samples times n/N."""
    return (per_sample * weight).mean()


def pooled_to_smaller(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Average-pool the larger map to the smaller one's height; [N, C, H, W] each."""
    ours, theirs = student.shape[2], teacher.shape[2]
    if ours > theirs:
        return F.adaptive_avg_pool2d(student, (theirs, theirs)), teacher
    if ours < theirs:
        return student, F.adaptive_avg_pool2d(teacher, (ours, ours))
    return student, teacher
