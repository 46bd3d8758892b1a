"""Is there anything to route? What distilling each image at each spot would do for images that nobody trained on.

The product of two gradients by the student's weights: of an image's distillation loss at a spot, and of the
cross-entropy of held-out images. Where it is positive, a small step along the first lowers the second. It is a finite
difference: the loss of every image, with the weights moved a little along the second gradient, and against it.
"""

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from sakd_cli.batch import Batch
from sakd_cli.config.resolve import ConfigSource
from sakd_cli.data.dataset import Split, seeded_generator
from sakd_cli.documents.spots import Probe, ProbedSpot
from sakd_cli.engine.reporter import Reporter, reporting
from sakd_cli.engine.runtime import to_fp32
from sakd_cli.errors import UsageError
from sakd_cli.report.spots.log import epoch_records, settled_epoch
from sakd_cli.rundir import RunDir
from sakd_cli.runs.extension import eval_batches
from sakd_cli.runs.job import Job
from sakd_cli.runs.survey import BATCH, trained_job
from sakd_cli.runs.teachers import require_one_teacher
from sakd_cli.tasks.ahead import along, held_out_gradient
from sakd_cli.tasks.distill import DistillTask

MOST = 2000  # training images that are probed
RIDGE = 1.0  # penalty of the regression on standardised values, per image


class Answered(NamedTuple):
    """Of n images: losses [S, n]; weights of the router [S, n]; what may explain a product [n, features]."""

    losses: Tensor
    weight: Tensor
    features: Tensor


def probe(run: RunDir, sources: Iterable[ConfigSource], reporter: Reporter, *, seed: int) -> Probe:
    """The probe of a run's last checkpoint; see above. Raises UsageError, as `survey.live` does.

    Its validation images are held out, or its test images where there are none.
    """
    job = trained_job(run, sources, losses=True)
    task, data = job.task, job.images.dataset
    assert isinstance(task, DistillTask)
    require_one_teacher(task)
    if task.feature_distiller is not None and task.feature_distiller.scope == "memory":
        raise UsageError("--probe: this method's loss depends on a memory of earlier batches")
    held_out = job.images.held_out or data.test
    name: Literal["validation", "test"] = "validation" if job.images.held_out else "test"
    order = torch.randperm(len(job.images.train), generator=seeded_generator(seed, "probe"))[:MOST]
    images = job.images.train.subset(order.to(job.images.train.labels.device))
    task.eval()
    halves = [held_out.subset(torch.arange(start, len(held_out), 2)) for start in (0, 1)]
    with reporting(reporter, f"probing {run.path.name}: {len(images)} training images, {len(held_out)} held out", 1):
        products = [_products(job, task, images, half, reporter) for half in halves]
        here = _answers(job, task, images, reporter, seed)
    records, labels = epoch_records(run), images.labels.cpu()
    spots = [
        _spot(k, (spot.name, spot.kind), [two[k] for two in products], here, labels, settled_epoch(records, k))
        for k, spot in enumerate(task.spots)
    ]
    return Probe(images=len(images), held_out=len(held_out), held_out_split=name, seed=seed, spots=spots)


def _spot(
    k: int, names: tuple[str, str], halves: Sequence[Tensor], here: Answered, labels: Tensor, settled: int | None
) -> ProbedSpot:
    product = torch.stack(list(halves)).mean(dim=0)
    r = _finite(torch.corrcoef(torch.stack([half.double() for half in halves]))[0, 1])
    weight, loss = here.weight[k], here.losses[k]
    chosen = (weight * loss).sum() / weight.sum() / loss.mean()
    features = torch.cat([here.features, loss[:, None]], dim=1)
    return ProbedSpot(
        name=names[0],
        kind=names[1],
        helps=float((product > 0).double().mean()),
        mean=_finite(product.mean() / product.std()),
        reliability=r if r is None or r < 0 else 2 * r / (1 + r),
        explained=explained(features, product),
        chosen_loss=_finite(chosen),
        class_share=class_share(weight, labels),
        settled=settled,
    )


def _batch(images: Tensor, labels: Tensor) -> Batch:
    return Batch(images, labels, torch.arange(len(labels), device=labels.device), images.new_zeros(len(labels), 0))


def _products(job: Job, task: DistillTask, images: Split, held_out: Split, reporter: Reporter) -> Tensor:
    """[S, n] derivative of every image's loss along the held-out gradient."""
    way = held_out_gradient(task.network, eval_batches(job, held_out, reporter, BATCH))

    def losses() -> Tensor:
        batches = eval_batches(job, images, reporter, BATCH)
        return torch.cat([task.sample_losses(_batch(pixels, labels)) for pixels, labels in batches], dim=1)

    return along(task.network, way, losses).cpu()


def _answers(job: Job, task: DistillTask, images: Split, reporter: Reporter, seed: int) -> Answered:
    noise, columns = seeded_generator(seed, "probe/noise"), list[tuple[Tensor, Tensor, Tensor]]()
    for pixels, labels in eval_batches(job, images, reporter, BATCH):
        batch = _batch(pixels, labels)
        losses = task.sample_losses(batch)
        with torch.no_grad(), task.mode.networks(pixels.device):
            teacher, student = (x.map(to_fp32) for x in (task.teacher_features(batch), task.student_features(pixels)))
            decision = task.decision_of(teacher, student, labels, noise)
            weight = decision.weight if decision.probability is None else decision.probability
            ce = [F.cross_entropy(one.logits.float(), labels, reduction="none") for one in (student, teacher)]
        seen = torch.cat([teacher.embedding, student.embedding, torch.stack(ce, dim=1)], dim=1)
        columns.append((losses.cpu().double(), weight.cpu().double(), seen.cpu().double()))
    by_image, weights, given = zip(*columns, strict=True)
    return Answered(torch.cat(by_image, dim=1), torch.cat(weights, dim=1), torch.cat(given))


def explained(features: Tensor, product: Tensor) -> float | None:
    """R² of a ridge regression of the product [n] on features [n, f], fitted on one half of the images, of the other.

    The mean of both ways round; below 0: it predicts worse than the mean does. None where nothing varies.
    """
    x, y = features.double(), product.double()
    x = (x - x.mean(dim=0)) / x.std(dim=0).clamp(min=1e-12)
    halves, found = [torch.arange(start, len(y), 2) for start in (0, 1)], []
    for fit, test in (halves, halves[::-1]):
        a, b, mean = x[fit], y[fit], y[fit].mean()
        gram = a.T @ a + RIDGE * len(fit) / 10 * torch.eye(a.shape[1], dtype=torch.float64)
        predicted = x[test] @ torch.linalg.solve(gram, a.T @ (b - mean)) + mean
        spread = (y[test] - y[test].mean()).square().sum()
        found.append(1 - float((y[test] - predicted).square().sum() / spread) if spread > 0 else None)
    known = [value for value in found if value is not None]
    return sum(known) / len(known) if known else None


def class_share(weight: Tensor, labels: Tensor) -> float | None:
    """Share of the variance of weights [n] that lies between the classes; None where they are all alike."""
    total = (weight - weight.mean()).square().sum()
    if total <= 0:
        return None
    count = torch.bincount(labels)[labels].double()
    sums = torch.zeros(int(labels.max()) + 1, dtype=torch.float64).index_add_(0, labels, weight.double())
    means = sums[labels] / count
    return float((means - weight.mean()).square().sum() / total)


def _finite(value: Tensor) -> float | None:
    return float(value) if value.isfinite() else None
