"""What the router decides for every image once training is over: one pass of inference, saved in the run.

`survey.safetensors` of N images, S spots (the last one the logits):

    probability             [N, S] float32  teacher-routing probability; absent for routers without a policy
    student_loss            [N] float32     cross-entropy of the student alone, in nats
    teacher_confidence      [N] float32     the teacher's largest class probability
    student_prediction, teacher_prediction, label, index   [N] int64; index: in the data set's own split
    extreme                 [M] int64       rows with pixels: highest and lowest probabilities per spot, the clearest of
                                            the most common paths, and those whose route was recorded
    images                  [M, 3, H, W] uint8   their pixels
    files                   [K] uint8       JSON list of the images' paths below the data set's folder; absent in memory

and in its header one entry, "sakd", a sealed `SurveyHeader`. Both networks and the adapters are in evaluation mode,
images are not augmented. The bytes depend on the weights and the seed only.
"""

import json
import math
import time
from collections.abc import Iterable, Iterator
from typing import Any, final

import torch
from safetensors.torch import save
from torch import Tensor
from torch.nn import functional as F

from sakd_cli.config.resolve import ConfigSource, resolve
from sakd_cli.config.training import DistillConfig
from sakd_cli.data.dataset import Split, seeded_generator
from sakd_cli.data.files import Files
from sakd_cli.data.loader import EvalPairs
from sakd_cli.data.sources import as_seen
from sakd_cli.documents import spots as doc
from sakd_cli.engine import checkpoint
from sakd_cli.engine.evaluate import InterruptibleBatches
from sakd_cli.engine.recorder import LOWER, tracked_places
from sakd_cli.engine.reporter import Reporter, reporting
from sakd_cli.engine.runtime import exact_mode
from sakd_cli.errors import CheckpointError, NonFiniteError, Stopped, UsageError, one_line
from sakd_cli.files import columns_digest, sealed
from sakd_cli.models.staged import StagedModel
from sakd_cli.report.spots.survey import FILE, common_paths
from sakd_cli.rundir import RunDir
from sakd_cli.runs import build
from sakd_cli.runs.extension import RunExtension, TrainerFactory
from sakd_cli.runs.job import Job, planned_spots
from sakd_cli.runs.resume import fingerprint, require_fingerprint
from sakd_cli.runs.teachers import require_one_teacher
from sakd_cli.tasks.distill import DistillTask
from sakd_cli.writing import write_aside

BATCH = 256  # the features of all stages of both networks are in memory at once: no more than in a training step
BINS = 10  # of the reliability diagrams, of equal width
DRAWS = 3  # of all gates, for the routed network's accuracy
LEAST = 500  # test images to route at the end of a run, as far as there are so many
MADE_OF = ("network", "router", "graft")  # what of a task decides, beside the teacher
LOSSES = ("feature_distiller", "logit_distiller")


@final
class SurveyExtension(RunExtension):
    """The survey of the training images, saved in the run of a router with a policy."""

    def __init__(self, job: Job) -> None:
        self.job = job

    def finalize(self, factory: TrainerFactory, figures: dict[str, dict[str, Any]]) -> dict[str, Any]:
        """Write it; its time in seconds."""
        job, start = self.job, time.perf_counter()
        try:
            # All test images would cost a short run more than an epoch; a long one has shown so many that it has all.
            most = max(LEAST, len(job.images.train) * job.config.train.epochs // 50)
            content = survey(job, "train", factory.reporter, seed=job.config.seed, most=most)
            write_aside(factory.run.path / FILE, content)
        except Stopped as stopped:
            raise Stopped(stopped.signal, "all of the training is saved") from None
        return {"survey_seconds": time.perf_counter() - start}


def live(
    run: RunDir, sources: Iterable[ConfigSource], split: doc.Split, reporter: Reporter, *, seed: int, extremes: int
) -> bytes:
    """The survey of a run's last checkpoint on any images, as bytes of the same format.

    sources  settings of data and device, which replace the run's own
    Raises UsageError on other classes or where there is no such split, CheckpointError where none can be used.
    """
    job = trained_job(run, sources)
    with reporting(reporter, f"measuring {run.path.name} on {job.images.dataset.name}, {split} images", 1):
        return survey(job, split, reporter, seed=seed, extremes=extremes)


def trained_job(run: RunDir, sources: Iterable[ConfigSource], *, losses: bool = False) -> Job:
    """The job of a run with what its last checkpoint has, also of what only the losses need; raises as `live`."""
    own = ConfigSource(str(run.path), run.config)
    config: DistillConfig = resolve("distill", [own]).config
    now = fingerprint(config)
    data = ConfigSource(own.origin, {"data": config.data.model_dump(mode="json")})
    given = resolve("eval", [data, *sources]).config
    config = config.model_copy(update={"data": given.data, "device": given.device, "init_from_branches": False})
    saved = checkpoint.read(run.path / "checkpoints" / "last")
    require_fingerprint(saved.folder, saved.state.get("fingerprint"), saved.state.get("epoch"), now, run.extended)
    if losses:  # in whose last bits a finite difference lies
        config = config.model_copy(update={"runtime": config.runtime.model_copy(update={"precision": "fp32"})})
    job = build.distillation(config)
    exact_mode(job.device)
    _restore(job, saved, (*MADE_OF, *(LOSSES if losses else ())))
    if isinstance(job.task, DistillTask) and job.task.router.decides:
        job.task.begin_epoch(max(1, int(saved.state.get("epoch", 1))))
    return job


def _restore(job: Job, saved: checkpoint.Checkpoint, parts: tuple[str, ...]) -> None:
    """These parts of the task as they were trained; the others stay as they were built."""
    tensors = {name.removeprefix("task/"): tensor for name, tensor in saved.training.items()}
    tensors |= {f"network.{name}": tensor for name, tensor in (saved.model or {}).items()}
    decisive = {name: tensor for name, tensor in tensors.items() if name.partition(".")[0] in parts}
    try:
        absent = job.task.load_state_dict(decisive, strict=False).missing_keys
    except RuntimeError as error:
        raise CheckpointError(f"{saved.folder}: does not fit ({one_line(error, 120)})") from None
    if any(name.partition(".")[0] in parts for name in absent):
        raise CheckpointError(f"{saved.folder}: is not of this run ({absent[0]} is missing)")


@torch.inference_mode()
def survey(
    job: Job, split: doc.Split, reporter: Reporter, *, seed: int, extremes: int = doc.EXTREMES, most: int | None = None
) -> bytes:
    """One pass over a split and, for the routed network, over the test images.

    extremes  images at each end of each spot whose pixels are saved
    most      route the first so many test images only; None: all
    """
    task, data = job.task, job.images.dataset
    assert isinstance(task, DistillTask)
    require_one_teacher(task)
    images = {"train": job.images.train, "validation": job.images.held_out, "test": data.test}[split]
    if images is None:
        raise UsageError("this run has no validation set (data.validation is 0)", hint="--split train, or --split test")
    mode = task.training
    task.eval()
    try:
        columns, complement = _answers(job, task, images, reporter, seed)
        routed = _routed(job, task, data.test.subset(torch.arange(len(data.test))[:most]), reporter, seed)
    finally:
        task.train(mode)
    columns |= {"label": images.labels.cpu(), "index": images.origins()}
    if isinstance(images.images, Files):
        names = json.dumps(images.images.names).encode()
        columns["files"] = torch.frombuffer(bytearray(names), dtype=torch.uint8)
    if "probability" in columns:
        columns["extreme"] = _shown(columns["probability"], extremes)
        columns["images"] = images.subset(columns["extreme"].to(images.images.device)).pixels.cpu()
    columns = {name: column.contiguous() for name, column in columns.items()}
    header = doc.SurveyHeader(
        split=split,
        dataset=data.name,
        classes=list(data.classes),
        spots=_spots(job),
        complement=complement,
        routed=routed,
        digest=columns_digest({name: column.numpy() for name, column in columns.items()}),
    )
    return bytes(save(columns, {"sakd": json.dumps(sealed(header.plain()))}))


def _batches(job: Job, split: Split, reporter: Reporter) -> Iterator[tuple[tuple[Tensor, Tensor], Tensor]]:
    """What the student and what the teacher see of the same parts of the pictures, and the labels."""
    also = split.images.spec.also if isinstance(split.images, Files) else None
    pairs = EvalPairs(split, as_seen(split, also), job.images.dataset, device=job.device, batch_size=BATCH)
    yield from InterruptibleBatches(pairs, reporter)


def _answers(
    job: Job, task: DistillTask, split: Split, reporter: Reporter, seed: int
) -> tuple[dict[str, Tensor], bool]:
    """What both networks and the policy say of every image, on the CPU; whether the losses used the complement."""
    assert job.teacher is not None  # it is asked itself: a cache has the training images' views only
    noise = seeded_generator(seed, "survey")
    complement = torch.zeros((), dtype=torch.bool, device=job.device)
    columns: dict[str, list[Tensor]] = {}
    for (images, theirs), labels in _batches(job, split, reporter):
        teacher, student = job.teacher.model.features(theirs), task.student_features(images)
        decision = task.decision_of(teacher, student, labels, noise)
        if decision.gate is not None:
            complement |= (decision.weight != decision.gate.T).any()
        found = {
            "student_loss": F.cross_entropy(student.logits.float(), labels, reduction="none"),
            "student_prediction": student.logits.argmax(dim=1),
            "teacher_confidence": teacher.logits.float().softmax(dim=1).amax(dim=1),
            "teacher_prediction": teacher.logits.argmax(dim=1),
        } | ({} if decision.probability is None else {"probability": decision.probability.T.float()})
        for name, column in found.items():
            columns.setdefault(name, []).append(column)
    return {name: torch.cat(parts).cpu() for name, parts in columns.items()}, bool(complement)


def _routed(job: Job, task: DistillTask, test: Split, reporter: Reporter, seed: int) -> doc.RoutedNetwork:
    """Top-1 (percent) and loss on test images: student, teacher, and the routed network along three kinds of path.

    sampled  gates drawn from the policy, mean over `DRAWS` draws and, for top-1, their standard deviation
    """
    draws = [seeded_generator(seed, "survey/draw", number) for number in range(DRAWS if task.graft else 0)]
    assert job.teacher is not None
    sums = torch.zeros((), device=job.device)
    bins = torch.zeros(2, BINS, 3, dtype=torch.float32, device=job.device)
    for (images, theirs), labels in _batches(job, test, reporter):
        teacher, student = job.teacher.model.features(theirs), task.student_features(images)
        outputs = [student.logits, teacher.logits]
        if task.graft is not None:
            gates = [images.new_full((len(labels), len(task.spots)), owner) for owner in (0.0, 1.0)]
            for draw in draws:
                gate = task.decision_of(teacher, student, labels, draw).gate
                gates += [] if gate is None else [gate]
            with task.mode.networks(images.device):  # whose precision the graft's frozen weights have
                outputs += [task.graft(images, teacher, gate) for gate in gates]
        for network, output in zip(bins, outputs, strict=False):
            sure, answer = output.float().softmax(dim=1).max(dim=1)
            row = torch.stack([sure, (answer == labels).float(), torch.ones_like(sure)], dim=1)
            network.index_add_(0, (sure * BINS).long().clamp(max=BINS - 1), row)
        right = [(output.argmax(dim=1) == labels).sum() for output in outputs]
        loss = [F.cross_entropy(output.float(), labels, reduction="sum") for output in outputs]
        sums = sums + torch.stack([torch.stack(right).float(), torch.stack(loss)])
    hits, losses = (sums.cpu().double() / len(test)).tolist()
    if not all(map(math.isfinite, losses)):
        raise NonFiniteError("the routed network's loss on the test images is not finite", LOWER)
    scores = [doc.Score(top1=100 * hit, loss=loss) for hit, loss in zip(hits, losses, strict=True)]
    fixed: dict[str, Any] = dict(zip(("student", "teacher", "all_student", "all_teacher"), scores, strict=False))
    drawn = torch.tensor([(score.top1, score.loss) for score in scores[len(fixed) :]], dtype=torch.float64)
    sampled = None
    if len(drawn):
        top1, mean_loss = drawn.mean(dim=0).tolist()
        sampled = doc.SampledScore(top1=top1, loss=mean_loss, draws=len(drawn), top1_std=float(drawn[:, 0].std()))
    fixed |= {f"{who}_reliability": _reliability(sums) for who, sums in zip(("student", "teacher"), bins, strict=True)}
    return doc.RoutedNetwork(images=len(test), sampled=sampled, **fixed)


def _reliability(chances: Tensor) -> list[doc.ReliabilityBin]:
    """Of the sums [BINS, 3] of confidences, of right answers and of images."""
    return [
        doc.ReliabilityBin(images=int(n), confidence=sure / n if n else None, correct=right / n if n else None)
        for sure, right, n in chances.cpu().double().tolist()
    ]


def _shown(probability: Tensor, count: int) -> Tensor:
    """Rows of the images that a page shows, rising, each once; ties in the order of the images.

    The `count` lowest and highest of each spot, the clearest of the most common paths, and the tracked ones.
    """
    ends = [probability.sort(dim=0, descending=down, stable=True).indices[:count] for down in (False, True)]
    examples = [row for *_, rows in common_paths(probability.numpy()) for row in rows]
    more = torch.tensor([*examples, *tracked_places(len(probability))])
    return torch.cat([torch.cat(ends).flatten(), more]).unique()


def _spots(job: Job) -> list[doc.SpotPlace]:
    """The spots as `--dry-run` shows them, with the names of the stages."""
    teacher = job.teacher.model if job.teacher else job.network

    def stage(network: StagedModel, place: int) -> str:
        return network.infos[place].name if place < len(network.infos) else "head"

    return [
        doc.SpotPlace(
            **row.plain()
            | {"student_stage": stage(job.network, spot.student), "teacher_stage": stage(teacher, spot.teacher)}
        )
        for row, spot in zip(planned_spots(job), job.spots, strict=True)
    ]
