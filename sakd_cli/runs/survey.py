"""What the router makes of every image once training is over: one pass of inference, kept in the run.

`survey.safetensors` of N images, S spots (the last one the logits):

    probability             [N, S] float32  chance of the teacher; absent for routers without a policy
    student_loss            [N] float32     cross-entropy of the student alone, in nats
    teacher_confidence      [N] float32     the teacher's largest class probability
    student_prediction, teacher_prediction, label, index   [N] int64; index: place in the data set's own split
    extreme                 [M] int64       rows with the highest and lowest probabilities, per spot
    images                  [M, 3, H, W] uint8   their pictures

and in its header one entry, "sakd", as JSON: the spots with their stages and adapters, the classes, which split, and
the routed network's figures on the test images. Both networks and the adapters are in evaluation mode, images are not
augmented. The bytes depend on the weights and the seed only.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterable
from typing import Any, final

import torch
from safetensors.torch import save
from torch import Tensor
from torch.nn import functional as F

from sakd_cli.config.resolve import ConfigSource, resolve
from sakd_cli.data.dataset import Split
from sakd_cli.data.generators import seeded_generator
from sakd_cli.data.loader import EvalLoader
from sakd_cli.engine import checkpoint
from sakd_cli.engine.reporter import InterruptibleBatches, Reporter
from sakd_cli.errors import CheckpointError, Stopped, UsageError
from sakd_cli.files import write_aside
from sakd_cli.models.staged import Features
from sakd_cli.rundir import RunDir
from sakd_cli.runs import build
from sakd_cli.runs.extension import RunExtension, TrainerFactory
from sakd_cli.runs.job import Job, planned_spots
from sakd_cli.tasks.distill import DistillTask

FORMAT = "sakd.survey/1"
FILE = "survey.safetensors"
BATCH = 256  # the features of all stages of both networks are held at once: no more memory than a training step
DRAWS = 3  # of all gates, for the routed network's accuracy
LEAST = 500  # test images to route at the end of a run, as far as there are so many
KEPT = 12  # pictures at each end of each spot
MADE_OF = ("network", "router", "graft")  # what of a task decides, beside the teacher


@final
class Surveyed(RunExtension):
    """The survey of the training images, kept in the run of a router with a policy."""

    def __init__(self, job: Job) -> None:
        self.job = job

    def finalize(self, factory: TrainerFactory, figures: dict[str, dict[str, Any]]) -> dict[str, Any]:
        """Write it; its time in seconds."""
        job, start = self.job, time.perf_counter()
        try:
            # All test images would cost a short run more than an epoch; a long one has shown so many that it has all.
            most = max(LEAST, len(job.images.train) * job.config.train.epochs // 50)
            write_aside(
                factory.run.path / FILE, survey(job, "train", factory.reporter, seed=job.config.seed, most=most)
            )
        except Stopped as stopped:
            raise Stopped(stopped.signal, "all of the training is saved") from None
        return {"survey_seconds": time.perf_counter() - start}


def live(run: RunDir, layers: Iterable[ConfigSource], part: str, reporter: Reporter, *, seed: int, kept: int) -> bytes:
    """The survey of a run's last checkpoint on any images, as bytes of the same format.

    layers  words about data and device, laid over the run's own
    Raises UsageError on other classes or where there is no such split, CheckpointError where none can be used.
    """
    own = ConfigSource(str(run.path), run.config)
    words = resolve("distill", [own]).config
    asked = resolve("eval", [ConfigSource(own.origin, {"data": words.data.model_dump(mode="json")}), *layers]).config
    words = words.model_copy(update={"data": asked.data, "device": asked.device, "init_from_branches": False})
    job = build.distillation(words)
    _restore(job, checkpoint.read(run.path / "checkpoints" / "last"))
    reporter.begin(f"looking at {run.path.name} on {job.images.dataset.name}, {part} images", 1)
    try:
        return survey(job, part, reporter, seed=seed, kept=kept)
    finally:
        reporter.end()


def _restore(job: Job, saved: checkpoint.Checkpoint) -> None:
    """The trained student, router and adapters; what only the losses need stays as it was built."""
    tensors = {name.removeprefix("task/"): tensor for name, tensor in saved.training.items()}
    tensors |= {f"network.{name}": tensor for name, tensor in (saved.model or {}).items()}
    decisive = {name: tensor for name, tensor in tensors.items() if name.partition(".")[0] in MADE_OF}
    try:
        absent = job.task.load_state_dict(decisive, strict=False).missing_keys
    except RuntimeError as error:
        raise CheckpointError(f"{saved.folder}: does not fit ({' '.join(str(error).split())[:120]})") from None
    if any(name.partition(".")[0] in MADE_OF for name in absent):
        raise CheckpointError(f"{saved.folder}: is not of this run ({absent[0]} is missing)")


@torch.inference_mode()
def survey(job: Job, part: str, reporter: Reporter, *, seed: int, kept: int = KEPT, most: int | None = None) -> bytes:
    """One pass over a split (train, validation, test) and, for the routed network, over the test images.

    most  route the first so many test images only; None: all
    """
    task = job.task
    assert isinstance(task, DistillTask)
    split = {"train": job.images.train, "validation": job.images.held_out, "test": job.images.dataset.test}[part]
    if split is None:
        raise UsageError("this run has no validation set (data.validation is 0)", hint="--split train, or --split test")
    mode = task.training
    task.eval()
    try:
        columns, complement = _answers(job, task, split, reporter, seed)
        test = job.images.dataset.test
        routed = _paths(job, task, test.subset(torch.arange(len(test))[:most]), reporter, seed)
    finally:
        task.train(mode)
    columns |= {"label": split.labels.cpu(), "index": split.origins()}
    if "probability" in columns:
        columns["extreme"] = _extremes(columns["probability"], kept)
        columns["images"] = split.subset(columns["extreme"].to(split.images.device)).pixels.cpu()
    columns = {name: column.contiguous() for name, column in columns.items()}
    about = {
        "format": FORMAT,
        "split": part,
        "dataset": job.images.dataset.name,
        "classes": job.images.dataset.classes,
        "spots": _spots(job),
        "complement": complement,
        "routed": routed,
        "digest": _digest(columns),
    }
    return bytes(save(columns, {"sakd": json.dumps(about)}))


def _batches(job: Job, split: Split, reporter: Reporter) -> InterruptibleBatches:
    return InterruptibleBatches(EvalLoader(split, job.images.dataset, device=job.device, batch_size=BATCH), reporter)


def _answers(
    job: Job, task: DistillTask, split: Split, reporter: Reporter, seed: int
) -> tuple[dict[str, Tensor], bool]:
    """What both networks and the policy say of every image, on the CPU; whether the losses took the complement."""
    plain, noise = _plain_teacher(job), seeded_generator(seed, "survey")
    complement = torch.zeros((), dtype=torch.bool, device=job.device)
    columns: dict[str, list[Tensor]] = {}
    for images, labels in _batches(job, split, reporter):
        teacher, student = plain(images), task.student_features(images)
        uniform = torch.rand(len(labels), task.noise_width, generator=noise).to(images)
        decision = task.router(teacher.embedding, student.embedding, uniform)
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


def _plain_teacher(job: Job) -> Callable[[Tensor], Features]:
    """The teacher itself: a bank knows the training images' views only."""
    assert job.teacher is not None
    return job.teacher.model.features


def _paths(job: Job, task: DistillTask, test: Split, reporter: Reporter, seed: int) -> dict[str, Any]:
    """Top-1 (percent) and loss on test images: student, teacher, and the routed network along three kinds of path.

    sampled  gates drawn from the policy, mean over `DRAWS` draws and, for top-1, their standard deviation
    """
    draws = [seeded_generator(seed, "survey/draw", number) for number in range(DRAWS if task.graft else 0)]
    plain, sums = _plain_teacher(job), torch.zeros((), device=job.device)
    for images, labels in _batches(job, test, reporter):
        teacher, student = plain(images), task.student_features(images)
        outputs = [student.logits, teacher.logits]
        if task.graft is not None:
            gates = [images.new_full((len(labels), len(task.spots)), owner) for owner in (0.0, 1.0)]
            for draw in draws:
                uniform = torch.rand(len(labels), task.noise_width, generator=draw).to(images)
                gate = task.router(teacher.embedding, student.embedding, uniform).gate
                gates += [] if gate is None else [gate]
            outputs += [task.graft(images, teacher, gate) for gate in gates]
        right = [(output.argmax(dim=1) == labels).sum() for output in outputs]
        loss = [F.cross_entropy(output.float(), labels, reduction="sum") for output in outputs]
        sums = sums + torch.stack([torch.stack(right).float(), torch.stack(loss)])
    hits, losses = (sums.double().cpu() / len(test)).tolist()
    rows = [{"top1": 100 * hit, "loss": loss} for hit, loss in zip(hits, losses, strict=True)]
    student_row, teacher_row, *ways = rows
    result: dict[str, Any] = {"images": len(test), "student": student_row, "teacher": teacher_row}
    if not ways:
        return result | dict.fromkeys(("sampled", "all_student", "all_teacher"))
    all_student, all_teacher, *sampled = ways
    top1, loss_of = (torch.tensor([row[key] for row in sampled], dtype=torch.float64) for key in ("top1", "loss"))
    drawn = {"top1": float(top1.mean()), "loss": float(loss_of.mean()), "draws": DRAWS, "spread": float(top1.std())}
    return result | {"sampled": drawn, "all_student": all_student, "all_teacher": all_teacher}


def _extremes(probability: Tensor, kept: int) -> Tensor:
    """Rows of the `kept` lowest and highest of each spot, rising, each once; ties in the order of the images."""
    ends = [probability.sort(dim=0, descending=down, stable=True).indices[:kept] for down in (False, True)]
    return torch.cat(ends).flatten().unique()


def _spots(job: Job) -> list[dict[str, Any]]:
    """The spots as `--dry-run` shows them, with the names of the stages."""
    teacher = job.teacher.model if job.teacher else job.network
    rows = []
    for row, spot in zip(planned_spots(job), job.spots, strict=True):
        rows.append(row.plain())
        for side, network, place in (("student", job.network, spot.student), ("teacher", teacher, spot.teacher)):
            rows[-1][f"{side}_stage"] = network.infos[place].name if place < len(network.infos) else "head"
    return rows


def _digest(columns: dict[str, Tensor]) -> str:
    """SHA-256 over the columns' names and bytes in order of name: safetensors has no checksum of its own."""
    summed = hashlib.sha256()
    for name in sorted(columns):
        summed.update(name.encode() + columns[name].numpy().tobytes())
    return summed.hexdigest()
