"""How good a network is on a split: large batches, inference mode, evaluation mode."""

import math
from collections.abc import Iterable, Iterator
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sakd_cli import distributed
from sakd_cli.config.train import Metric
from sakd_cli.engine.reporter import Reporter, raise_if_stopped
from sakd_cli.engine.runtime import translate_oom
from sakd_cli.errors import NonFiniteError

FEWER = "sakd eval --batch-size {} should fit; in a training, free the device of other programs"
Batches = Iterable[tuple[Tensor, Tensor]]  # images or logits, and labels
Item = TypeVar("Item")


class InterruptibleBatches(Generic[Item]):
    """Batches of an evaluation that ends with Stopped, between two of them, if someone wants it."""

    def __init__(self, batches: Iterable[Item], reporter: Reporter) -> None:
        self._batches, self._reporter = batches, reporter

    def __iter__(self) -> Iterator[Item]:
        for batch in self._batches:
            if distributed.world_size() == 1:  # several stop between two steps only, all at the same one
                raise_if_stopped(self._reporter)
            yield batch


class Scores(NamedTuple):
    """top1, top5 in percent, loss: mean cross-entropy in nats; by class: images, top-1 in percent, times answered."""

    images: int
    top1: float
    top5: float
    loss: float
    images_of_class: tuple[int, ...]
    top1_of_class: tuple[float | None, ...]
    answers_of_class: tuple[int, ...] = ()

    def value(self, metric: Metric) -> float:
        """A metric, the higher the better: in percent, or the loss with a minus; of classes that have images."""
        if metric in ("top1", "nll"):
            return self.top1 if metric == "top1" else -self.loss
        rows = zip(self.top1_of_class, self.images_of_class, self.answers_of_class, strict=True)
        there = [(recall, images, answers) for recall, images, answers in rows if recall is not None]
        if metric == "balanced_accuracy":
            return sum(recall for recall, *_ in there) / len(there)
        return sum(2 * recall * images / (images + answers) for recall, images, answers in there) / len(there)

    def metrics(self) -> dict[str, Any]:
        """The three metrics that the logs hold."""
        return {"top1": self.top1, "top5": self.top5, "loss": self.loss}


@torch.inference_mode()
def evaluate(network: nn.Module, batches: Batches, classes: int, *, together: bool = False) -> Scores:
    """Score `network` on (images, labels) batches; `together`: on those of all processes, each evaluating its share."""
    mode = network.training
    network.eval()
    own = distributed.shard(batches) if together else batches

    def answer(images: Tensor) -> Tensor:
        with translate_oom(len(images), FEWER):
            return network(images).float()

    answers = ((answer(images), labels) for images, labels in own)
    scores = score_logits(answers, classes, together=together, network=network)
    network.train(mode)
    return scores


def score_logits(batches: Batches, classes: int, *, together: bool = False, network: nn.Module | None = None) -> Scores:
    """The same from (logits [N, classes] in fp32, labels [N]) batches of `network`; together: of every process.

    The host reads the device once. Raises NonFiniteError where the loss is NaN or infinite (finite weights may have
    such outputs), or a tensor of the network (an infinite running variance has finite outputs; no reader takes it).
    """
    sums = []
    for logits, labels in batches:
        first5 = logits.topk(min(5, classes), dim=1).indices
        ranked = first5 == labels[:, None]
        # Added at an index, which CUDA can do deterministically; a histogram would read back the number of classes.
        counted = torch.stack([ranked[:, 0], torch.ones_like(labels)]).float()
        by_class = counted.new_zeros(3, classes)
        by_class[:2].index_add_(1, labels, counted)
        by_class[2].index_add_(0, first5[:, 0], counted[1])
        loss = F.cross_entropy(logits, labels, reduction="sum")
        sums.append(torch.cat([by_class.flatten(), ranked.any(dim=1).sum()[None], loss[None]]))
    width, state = 3 * classes + 2, {} if network is None else network.state_dict()
    finite = [tensor.isfinite().all()[None] for tensor in state.values()]
    read = torch.cat([*sums, *finite]).cpu().double() if sums else torch.zeros(0, dtype=torch.float64)
    own, flags = read[: width * len(sums)].view(-1, width).sum(dim=0), read[width * len(sums) :]
    numbers = torch.cat([distributed.all_reduce_sum(own) if together else own, flags]).tolist()
    *of_class, right5, loss_sum = numbers[:width]
    hits, counts, answers = (of_class[k * classes : (k + 1) * classes] for k in range(3))
    images_seen = sum(counts)
    if not math.isfinite(loss_sum):
        name = getattr(network, "name", "network")
        raise NonFiniteError(f"{name}: the loss on {round(images_seen)} evaluated images is {loss_sum}")
    if odd := [name for name, whole in zip(state, numbers[width:], strict=False) if not whole]:
        raise NonFiniteError(f"tensor {odd[0]!r} of the network holds a number that is NaN or infinite")
    return Scores(
        images=round(images_seen),
        top1=100.0 * sum(hits) / images_seen,
        top5=100.0 * right5 / images_seen,
        loss=loss_sum / images_seen,
        images_of_class=tuple(round(count) for count in counts),
        top1_of_class=tuple(100.0 * hit / n if n else None for hit, n in zip(hits, counts, strict=True)),
        answers_of_class=tuple(round(count) for count in answers),
    )
