"""What can be read from a network's answers beside accuracy: calibration, confusions, agreement with a teacher"""

import importlib
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from sakd_cli.documents.evaluation import Agreement, Averages, Confusion

BINS = 15  # of the calibration error, as in Guo et al., ICML 2017
WORST = 20  # confusions that are listed


def _metrics() -> Any:
    """Loaded where it is used: with scipy and matplotlib it takes as long as torch, and `predict` needs none of it."""
    return importlib.import_module("torchmetrics.functional.classification")


class Answers(NamedTuple):
    """What a network says of N images: logits [N, C] in fp32 and the pooled vector in front of its head, [N, D]."""

    logits: Tensor
    embedding: Tensor


def calibration(logits: Tensor, labels: Tensor) -> tuple[float, float]:
    """Brier score: mean over images of the squared distance between probabilities and one-hot label, in [0, 2].

    ECE: expected calibration error of the largest probability, in [0, 1], 15 bins of equal width (Guo et al., "On
    Calibration of Modern Neural Networks", ICML 2017, equation 3).
    """
    classes = logits.shape[1]
    chances = logits.softmax(dim=1)
    brier = (chances - F.one_hot(labels, classes)).square().sum(dim=1).mean()
    ece = _metrics().multiclass_calibration_error(chances, labels, num_classes=classes, n_bins=BINS, norm="l1")
    return float(brier), float(ece)


def confusion_matrix(logits: Tensor, labels: Tensor) -> Tensor:
    """Images of each class, a row, by what they are predicted as, [classes, classes] int64 on the CPU."""
    return _metrics().multiclass_confusion_matrix(logits, labels, num_classes=logits.shape[1]).cpu()


def confusions(logits: Tensor, labels: Tensor, names: Sequence[str]) -> tuple[list[Confusion], list[Confusion | None]]:
    """The most frequent pairs (class, predicted as); of each class its most frequent wrong answer, None without one."""
    counts = confusion_matrix(logits, labels)
    images = counts.sum(dim=1)
    counts.fill_diagonal_(0)

    def pair(true: int, predicted: int) -> Confusion | None:
        if not (times := int(counts[true, predicted])):
            return None
        fraction = times / int(images[true])
        return Confusion(class_=names[true], predicted_as=names[predicted], images=times, fraction=fraction)

    order = counts.flatten().sort(descending=True, stable=True).indices[:WORST].tolist()
    pairs = [found for place in order if (found := pair(*divmod(place, len(names))))]
    return pairs, [pair(true, predicted) for true, predicted in enumerate(counts.argmax(dim=1).tolist())]


def averages(logits: Tensor, labels: Tensor) -> tuple[Averages, list[tuple[float | None, float | None]]]:
    """Precision, recall and F1 over the classes, balanced accuracy and ROC-AUC; precision and F1 of each class.

    Of classes that are neither there nor predicted nothing is counted, as torchmetrics and scikit-learn have it.
    """
    classes, metrics = logits.shape[1], _metrics()
    precision, recall, f1 = metrics.multiclass_precision, metrics.multiclass_recall, metrics.multiclass_f1_score
    given: dict[str, Any] = {"preds": logits.argmax(dim=1), "target": labels, "num_classes": classes}
    found = {
        f"{name}_{kind}": 100 * float(score(**given, average=kind))
        for name, score in {"precision": precision, "recall": recall, "f1": f1}.items()
        for kind in ("macro", "weighted")
    }
    images, answers = (torch.bincount(one, minlength=classes) for one in (labels, given["preds"]))
    balanced = recall(**given, average="none")[images > 0].mean()
    both = (images > 0) & (images < len(labels))
    auroc = None
    if bool(both.any()):
        with warnings.catch_warnings(action="ignore"):  # of classes without images, which are left out
            chances = logits.softmax(dim=1)
            areas = metrics.multiclass_auroc(chances, labels, num_classes=classes, average="none")
        auroc = 100 * float(areas[both].mean())
    per_class = precision(**given, average="none"), f1(**given, average="none")
    rows = zip(*(100 * one.cpu().double() for one in per_class), answers.tolist(), images.tolist(), strict=True)
    each = [(float(p) if said else None, float(f) if said + there else None) for p, f, said, there in rows]
    return Averages(**found, balanced_accuracy=100 * float(balanced), auroc=auroc), each


def agreement(student: Answers, teacher: Answers, labels: Tensor) -> Agreement:
    """How far a student answers as its teacher does on the same images; KL at temperature 1, mean over images.

    Linear CKA of the pooled vectors (Kornblith et al., "Similarity of Neural Network Representations Revisited", ICML
    2019, equation 3); None where one is constant.
    """
    mine, theirs = student.logits.argmax(dim=1), teacher.logits.argmax(dim=1)
    right, teacher_right = mine == labels, theirs == labels
    p, q = teacher.logits.log_softmax(dim=1), student.logits.log_softmax(dim=1)
    return Agreement(
        top1=100.0 * float((mine == theirs).cpu().double().mean()),
        kl=float(F.kl_div(q, p, log_target=True, reduction="batchmean")),
        cka=_cka(student.embedding, teacher.embedding),
        both_wrong=int((~right & ~teacher_right).sum()),
        same_wrong_answer=int((~right & (mine == theirs)).sum()),
        teacher_only_wrong=int((right & ~teacher_right).sum()),
        student_only_wrong=int((~right & teacher_right).sum()),
    )


def _cka(x: Tensor, y: Tensor) -> float | None:
    # Centred products of size width x width in double precision, on the CPU: not every device has doubles.
    x, y = ((z - z.mean(dim=0)) for z in (x.cpu().double(), y.cpu().double()))
    own = torch.linalg.matrix_norm(x.T @ x) * torch.linalg.matrix_norm(y.T @ y)
    return float((x.T @ y).square().sum() / own) if own > 0 else None
