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
    if not any(wanted):
        raise UsageError("train.class_weights: all are 0, and nothing would be learned")
    return torch.tensor(wanted, dtype=torch.float64)


@final
class Criterion(nn.Module):
    """sum_i w(y_i) l_i / sum_i w(y_i), w = 1 unless classes have weights; l = cross-entropy, or (1 - p_y)^g times it.

    Of a mixed image, r of it of label y and the rest of label y': r w(y) l(y) + (1 - r) w(y') l(y') above and r w(y) +
    (1 - r) w(y') below, which without weights is the cross-entropy with the mixed label. Labels may be smoothed. An
    image without a label has r = 0 and no y': the mean is over the others. Where all weights are 0 the loss is 0.

    The focal factor is that of Lin, Goyal, Girshick, He, Dollar, "Focal Loss for Dense Object Detection", ICCV 2017,
    equation 4, for the softmax of several classes; as there it has a gradient. Weights as torch.nn.CrossEntropyLoss has
    them. Both sums are of the whole batch where several processes share it. Logits are [..., N, classes].
    """

    weights: Tensor | None

    def __init__(self, weights: Tensor | None = None, *, focal: float = 0.0, smoothing: float = 0.0) -> None:
        super().__init__()
        self.focal, self.smoothing = focal, smoothing
        weights = None if weights is None else weights.to(torch.get_default_dtype())  # not every device has doubles
        self.register_buffer("weights", weights, persistent=False)  # a setting, or known from the images

    @classmethod
    def of(cls, train: Train, labels: Tensor, classes: Sequence[str]) -> "Criterion":
        """As the settings say, for training images of these labels."""
        weights = class_weights(train.class_weights, labels, classes)
        return cls(weights, focal=train.focal_gamma, smoothing=train.label_smoothing)

    def forward(self, logits: Tensor, batch: Batch) -> Tensor:
        labels = batch.labels.expand(logits.shape[:-1])
        if self.weights is None and not self.focal and batch.ratio is None:
            return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), label_smoothing=self.smoothing)
        each, weight = self._each(logits, labels)
        if batch.ratio is not None and batch.other_labels is not None:
            others, weight_of_others = self._each(logits, batch.other_labels.expand(logits.shape[:-1]))
            ratio = batch.ratio.to(each.dtype)
            each = ratio * each + (1 - ratio) * others
            if weight is not None and weight_of_others is not None:
                weight = ratio * weight + (1 - ratio) * weight_of_others
        elif batch.ratio is not None:  # 0 for images without a label
            known = batch.ratio.to(each.dtype)
            each, weight = known * each, known if weight is None else known * weight
        if weight is None:
            return each.mean()
        return each.mean() / distributed.all_reduce_mean(weight.mean(), batch).clamp(min=1e-12)

    def _each(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor | None]:
        """Weight times loss of every sample, and the weight."""
        weights = None if self.weights is None else self.weights.to(logits.dtype)
        each = F.cross_entropy(
            logits.flatten(0, -2),
            labels.flatten(),
            None if self.focal else weights,
            label_smoothing=self.smoothing,
            reduction="none",
        ).view(labels.shape)
        weight = None if weights is None else weights[labels]
        if self.focal:
            each = (-torch.expm1(-each)).clamp(min=1e-12) ** self.focal * each
            each = each if weight is None else weight * each
        return each, weight
