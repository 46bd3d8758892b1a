"""What can be read from a network's answers beside accuracy: calibration, confusions, agreement with a teacher"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.functional.classification import multiclass_calibration_error, multiclass_confusion_matrix

BINS = 15  # of the calibration error, as in Guo et al., ICML 2017
WORST = 20  # confusions that are listed


class Answers(NamedTuple):
    """What a network says of N images: logits [N, C] in fp32 and the pooled vector in front of its head, [N, D]."""

    logits: Tensor
    embedding: Tensor


def calibration(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """brier: mean over images of the squared distance between probabilities and one-hot label, in [0, 2].

    ece: expected calibration error of the largest probability, in [0, 1], 15 bins of equal width (Guo et al., "On
    Calibration of Modern Neural Networks", ICML 2017, equation 3).
    """
    classes = logits.shape[1]
    chances = logits.softmax(dim=1)
    brier = (chances - F.one_hot(labels, classes)).square().sum(dim=1).mean()
    ece = multiclass_calibration_error(chances, labels, num_classes=classes, n_bins=BINS, norm="l1")
    return {"brier": float(brier), "ece": float(ece)}


def confusions(
    logits: Tensor, labels: Tensor, names: Sequence[str]
) -> tuple[list[dict[str, Any]], list[dict[str, Any] | None]]:
    """The most frequent pairs of (class, what it was taken for), and for each class its most frequent wrong answer.

    share: of the class's images, in [0, 1]. None for a class of which no image was mistaken.
    """
    counts = multiclass_confusion_matrix(logits, labels, num_classes=len(names)).cpu()
    images = counts.sum(dim=1)
    counts.fill_diagonal_(0)

    def told(true: int, said: int) -> dict[str, Any] | None:
        times = int(counts[true, said])
        about = {"class": names[true], "taken_for": names[said], "images": times}
        return about | {"share": times / int(images[true])} if times else None

    order = counts.flatten().sort(descending=True, stable=True).indices[:WORST].tolist()
    pairs = [pair for place in order if (pair := told(*divmod(place, len(names))))]
    return pairs, [told(true, said) for true, said in enumerate(counts.argmax(dim=1).tolist())]


def agreement(student: Answers, teacher: Answers, labels: Tensor) -> dict[str, Any]:
    """How far a student answers as its teacher does, on the same images.

    top1        % of the images with the same first answer
    kl          KL(teacher || student) of the class probabilities at temperature 1, nats, mean over the images
    cka         linear CKA of the two pooled vectors, in [0, 1] (Kornblith et al., "Similarity of Neural Network
                Representations Revisited", ICML 2019, equation 3 with a linear kernel); None where one is constant
    inherited   images that both get wrong, and of these same_answer: with the same wrong class
    corrected   images that only the teacher gets wrong
    new         images that only the student gets wrong
    """
    mine, theirs = student.logits.argmax(dim=1), teacher.logits.argmax(dim=1)
    right, taught_right = mine == labels, theirs == labels
    p, q = teacher.logits.log_softmax(dim=1), student.logits.log_softmax(dim=1)
    return {
        "top1": 100.0 * float((mine == theirs).float().mean()),
        "kl": float(F.kl_div(q, p, log_target=True, reduction="batchmean")),
        "cka": _cka(student.embedding, teacher.embedding),
        "inherited": int((~right & ~taught_right).sum()),
        "same_answer": int((~right & (mine == theirs)).sum()),
        "corrected": int((right & ~taught_right).sum()),
        "new": int((~right & taught_right).sum()),
    }


def _cka(x: Tensor, y: Tensor) -> float | None:
    # Centred products of size width x width in double precision, on the CPU: not every device has doubles.
    x, y = ((z - z.mean(dim=0)) for z in (x.cpu().double(), y.cpu().double()))
    own = torch.linalg.matrix_norm(x.T @ x) * torch.linalg.matrix_norm(y.T @ y)
    return float((x.T @ y).square().sum() / own) if own > 0 else None
