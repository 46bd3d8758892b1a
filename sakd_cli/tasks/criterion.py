"""The classification term of a loss: cross-entropy, by weights of the classes and focal where that is asked for."""

from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sakd_cli import distributed
from sakd_cli.batch import Batch
from sakd_cli.config.train import Train
from sakd_cli.errors import UsageError

BALANCED = "balanced"


def class_weights(wanted: Any, labels: Tensor, classes: Sequence[str]) -> Tensor | None:
    """The weight of every class, [classes] in float64; None: all count alike.

    wanted  as `train.class_weights`. balanced: images / (classes x images of the class), as scikit-learn has it; a
            class without images has weight 1, which nothing sees
    Raises UsageError where numbers or names are not those of the classes.
    """
    if wanted is None:
        return None
    if wanted == BALANCED:
        images = torch.bincount(labels.cpu()[labels.cpu() >= 0], minlength=len(classes)).double()
        return torch.where(images > 0, images.sum() / (len(classes) * images.clamp(min=1)), 1.0)
    if isinstance(wanted, dict):
        if strange := [name for name in wanted if name not in classes]:
            raise UsageError(f"train.class_weights: no class is called {strange[0]!r}", "sakd data check lists them")
        wanted = [wanted.get(name, 1.0) for name in classes]
    if len(wanted) != len(classes):
        raise UsageError(f"train.class_weights: {len(wanted)} numbers for {len(classes)} classes")
    return torch.tensor(wanted, dtype=torch.float64)


@final
class Criterion(nn.Module):
    """sum_i w(y_i) l_i / sum_i w(y_i), w = 1 unless classes have weights; l = cross-entropy, or (1 - p_y)^g times it.

    The focal factor is that of Lin, Goyal, Girshick, He, Dollar, "Focal Loss for Dense Object Detection", ICCV 2017,
    equation 4, for the softmax of several classes; as there it has a gradient. Weights as torch.nn.CrossEntropyLoss has
    them. Both sums are of the whole batch where several processes share it. Logits are [..., N, classes].
    """

    weights: Tensor | None

    def __init__(self, weights: Tensor | None = None, *, focal: float = 0.0) -> None:
        super().__init__()
        self.focal = focal
        self.register_buffer("weights", weights, persistent=False)  # a setting, or known from the images

    @classmethod
    def of(cls, train: Train, labels: Tensor, classes: Sequence[str]) -> "Criterion":
        """As the settings say, for training images of these labels."""
        return cls(class_weights(train.class_weights, labels, classes), focal=train.focal_gamma)

    def forward(self, logits: Tensor, batch: Batch) -> Tensor:
        labels = batch.labels.expand(logits.shape[:-1])
        if self.weights is None and not self.focal:
            return F.cross_entropy(logits.flatten(0, -2), labels.flatten())
        each = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="none").view(labels.shape)
        if self.focal:
            each = (-torch.expm1(-each)).clamp(min=1e-12) ** self.focal * each
        if self.weights is None:
            return each.mean()
        weight = self.weights.to(each.dtype)[labels]
        return (weight * each).mean() / distributed.all_reduce_mean(weight.mean(), batch)
