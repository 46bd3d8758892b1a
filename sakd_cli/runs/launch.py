"""Carry out a job: run directory, loaders, trainer, summary."""

import re
import shlex
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from sakd_cli import distributed, torchrun
from sakd_cli.config.training import DistillConfig, PretrainConfig
from sakd_cli.data.loader import EvalLoader
from sakd_cli.data.sources import describe_reading
from sakd_cli.engine import checkpoint, tensorboard
from sakd_cli.engine.evaluate import evaluate
from sakd_cli.engine.reporter import InterruptibleBatches, Reporter
from sakd_cli.engine.runtime import (
    check_compiler,
    compile_task,
    environment,
    keep_freed_memory,
    set_deterministic,
    translate_oom,
)
from sakd_cli.engine.trainer import MAIN, EvaluationData, Trainer, TrainingOutput
from sakd_cli.errors import CheckpointError, Stopped
from sakd_cli.files import write_aside, write_json
from sakd_cli.models import artifact
from sakd_cli.rundir import ResumePlan, RunDir
from sakd_cli.runs import build
from sakd_cli.runs.extension import RunExtension, TrainerFactory, loader_of
from sakd_cli.runs.extensions import run_extensions
from sakd_cli.runs.job import Job, plan
from sakd_cli.runs.locate import Claim, compare_with_card, is_missing
from sakd_cli.runs.phases import training
from sakd_cli.runs.resume import find_matching_run


class FolderWriter:
    """Writes the delivered network as a weights file and as the deployable folder `student/` or `teacher/`.

    companions   have what belongs to it written beside it
    """

    def __init__(self, job: Job, facts: dict[str, Any], companions: Sequence[RunExtension]) -> None:
        self.network, self.card, self.facts, self.companions = job.network, job.card, facts, companions
        self.folder = "student" if job.teacher else "teacher"

    def save_weights(self, path: Path) -> None:
        artifact.save_weights(path, self.network, self.card)

    def publish(self, run: RunDir, facts: dict[str, Any]) -> None:
        artifact.save_folder(run.path / self.folder, self.network, self.card, self.facts | facts)
        for companion in self.companions:
            companion.publish(run.path, run.path / self.folder / "model.safetensors")


def try_one_batch(job: Job) -> dict[str, Any]:
    """One real batch forward and backward, nothing written; the plan and the batch's loss."""
    for companion in (companions := run_extensions(job)):
        companion.rehearse()
    loader = loader_of(job)
    job.task.train()
    job.task.begin_epoch(1)
    output = job.task(next(loader.epoch(1)))
    output.loss.backward()
    parts = {name: float(part) for name, part in output.parts.items()}
    shown = {"schema": "sakd.plan/1"} | plan(job)
    for companion in companions:
        shown |= companion.plan()
        shown["networks"] += companion.networks()
    return shown | {"batch": parts, "steps_per_epoch": len(loader), "device": str(job.device)}


@distributed.translate_dist_errors()  # another process may end at any exchange, the first ones and the last ones too
def carry_out(
    job: Job, intent: ResumePlan, reporter: Reporter, again: str | None = None
) -> tuple[RunDir, dict[str, Any]]:
    """Train to the end, from the start or from where an earlier process stopped; the run directory and its summary.

    again  the command that goes on after a stop; None: that of this very run
    Raises Stopped, with the state saved, where the reporter asks for it; RunInUseError where another process is in.
    """
    tensorboard.check(job.config.log)
    distributed.init_process_group(job.device)
    job.images.preload()
    companions = run_extensions(job)
    _made_ready(job)
    evaluation = evaluation_data(job, reporter)
    facts = _teacher_facts(job, evaluation, reporter)
    run, intent = _opened(job, companions, intent)
    with run.locked(), tensorboard.log_to_tensorboard(run, job.config.log):
        if distributed.is_main_process():
            _begin(job, run, intent)
        distributed.barrier()
        try:
            shop = TrainerFactory(run, evaluation, reporter)
            for companion in companions:
                facts |= companion.facts()
            phases = _resumed(_trainings(job, companions, shop, facts), run, intent, reporter)
            with translate_oom(job.config.train.batch_size):
                figures = {trainer.phase: trainer.fit() for trainer in phases}
            if distributed.is_main_process():
                _close(job, companions, shop, figures, facts)
            distributed.barrier()
        except Stopped as stopped:
            command = "distill" if job.teacher else "pretrain-teacher"
            hint = again or shlex.join(["sakd", command, "--resume", str(run.path)])
            raise Stopped(stopped.signal, stopped.saved, f"go on with {hint}") from None
        return run, run.read_json("summary.json")


def _opened(job: Job, companions: Sequence[RunExtension], intent: ResumePlan) -> tuple[RunDir, ResumePlan]:
    """The run directory and what is to become of it: the first process says it, the others read and are silent."""
    if distributed.is_main_process():
        run = intent.open(job.config.runs_dir, _label(job, companions))
        distributed.broadcast_object((str(run.path), intent.resume is not None))
        return run, intent
    path, resume_config = distributed.broadcast_object(("", False))
    run = RunDir(Path(path), silent=True)
    return run, intent._replace(resume=run if resume_config else None)


def _begin(job: Job, run: RunDir, intent: ResumePlan) -> None:
    """Make room for a new run, and write down what it is."""
    if intent.overwrite:
        run.clear()
    if intent.resume is None:
        write_json(run.path / "env.json", {"id": uuid.uuid4().hex} | environment(job.device, job.mode))
        write_aside(run.path / "config.yaml", _yaml(job.config.model_dump(mode="json")))


def _close(
    job: Job, companions: Sequence[RunExtension], shop: TrainerFactory, figures: dict[str, Any], facts: dict[str, Any]
) -> None:
    """Everything is trained: what is left to the companions, and the summary."""
    summary = _about(job) | figures[MAIN] | facts
    for companion in companions:
        summary |= companion.close(shop, figures)
    write_json(shop.run.path / "summary.json", summary)


def _made_ready(job: Job) -> None:
    """The process and the task, for the way in which the run computes."""
    if job.device.type == "cpu":
        keep_freed_memory()
    if job.config.runtime.deterministic:
        set_deterministic()
    if job.mode.compiled:
        torchrun.require_single_process("--compile")
        check_compiler(job.device)
        compile_task(job.task, job.device, graphed=job.mode.graphed)


def _trainings(
    job: Job, companions: Sequence[RunExtension], shop: TrainerFactory, facts: dict[str, Any]
) -> Iterator[Trainer]:
    """The trainings of a run, one after another; each is built when the one before is done."""
    yield from training(job, MAIN, TrainingOutput(shop.evaluation, FolderWriter(job, facts, companions)), shop)
    for companion in companions:
        yield from companion.trainings(shop)


def _resumed(phases: Iterator[Trainer], run: RunDir, intent: ResumePlan, reporter: Reporter) -> Iterator[Trainer]:
    """The same trainers, each taken to its own last checkpoint as long as all before it are complete.

    Lines that were logged after that checkpoint are taken back: they will be written again.
    """
    resume_config, logs = intent.resume is not None, dict[str, int]()
    for trainer in phases:
        complain = reporter.warn if intent.lenient else None
        point = checkpoint.find(trainer.folder, complain, run.identity) if resume_config else None
        if point is not None:
            trainer.resume(point)
            logs = _sizes(point)
        elif intent.resume is not None and distributed.is_main_process():
            checkpoint.discard(trainer.folder)  # made with another past than the one to come
        if resume_config and not trainer.done:
            resume_config = False
            run.cut_logs(logs)
        yield trainer
    if resume_config:
        run.cut_logs(logs)


def _sizes(point: checkpoint.Loaded) -> dict[str, int]:
    """How long the logs were when the checkpoint was written."""
    sizes = point.state.get("logs")
    if not isinstance(sizes, dict) or not all(isinstance(size, int) and size >= 0 for size in sizes.values()):
        raise CheckpointError(f"{point.folder}: does not say how long the logs were")
    return sizes


def evaluation_data(job: Job, reporter: Reporter) -> EvaluationData:
    dataset = job.images.dataset
    test = InterruptibleBatches(EvalLoader(dataset.test, dataset, device=job.device), reporter)
    held_out = job.images.held_out
    selection = InterruptibleBatches(EvalLoader(held_out, dataset, device=job.device), reporter) if held_out else test
    return EvaluationData("validation" if held_out else "test", selection, test, len(dataset.classes))


def _label(job: Job, companions: Sequence[RunExtension]) -> str:
    words = job.config.model_dump()
    parts = [words["task"], job.network.name, job.images.dataset.name]
    if job.teacher:
        parts[1:1] = [job.teacher.model.name]
        parts += [words["method"]["name"], words["router"]["name"]]
    parts += filter(None, (companion.label for companion in companions))
    parts += [f"seed{job.config.seed}"] if job.config.seed else []
    return re.sub(r"[/:]", ".", "-".join(parts))  # torchvision/resnet18, my.nets:small


def _about(job: Job) -> dict[str, Any]:
    share = 100 * job.config.data.validation
    chosen = (
        f"best epoch chosen on {share:g} % of the training images, held out"
        if job.images.held_out
        else "best epoch chosen on the test set (the literature's habit: optimistic)"
    )
    return {
        "schema": "sakd.summary/1",
        "task": job.config.task,
        "network": job.network.name,
        "dataset": job.images.dataset.name,
        "epochs": job.config.train.epochs,
        "images": len(job.images.train),
        **({"skipped_images": skipped} if (skipped := job.images.dataset.skipped) else {}),
        "protocol": f"headline is the last epoch on the test set; {chosen}",
        "parameters": job.cost.parameters,
        "macs": job.cost.macs,
        "device": str(job.device),
        "torch": torch.__version__,
    }


def _teacher_facts(job: Job, evaluation: EvaluationData, reporter: Reporter) -> dict[str, Any]:
    """The teacher's figures, measured anew on the test images; nothing where there is no teacher.

    Raises UsageError where its card says otherwise.
    """
    if job.teacher is None or job.teacher_cost is None:
        return {}
    scores = evaluate(job.teacher.model, evaluation.test, evaluation.classes)
    if isinstance(job.config, DistillConfig) and job.teacher_path is not None:
        measured = Claim(job.images.dataset.name, scores.images, scores.top1)
        allowed = job.config.teacher.allow_mismatch
        told = compare_with_card(job.teacher_path, job.teacher_claim, measured, allowed=allowed)
        if told is not None:
            reporter.say(told)
    facts = {"network": job.teacher.model.name, "path": str(job.teacher_path), "sha256": job.teacher.sha256}
    return {"teacher": facts | scores.headline() | job.teacher_cost._asdict()}


def _yaml(words: dict[str, Any]) -> bytes:
    return yaml.safe_dump(words, sort_keys=False, allow_unicode=True).encode()


Trained = tuple[RunDir, dict[str, Any]]


@dataclass(frozen=True)
class Session:
    """Who follows, and how to go on after a stop.

    resume  the teacher's training goes on where an earlier one of the same words stopped
    again   the command that goes on with all of it, said where the teacher's training is stopped
    guard   what surrounds a training, such as the heeding of signals
    """

    reporter: Reporter
    resume: bool = False
    again: str | None = None
    guard: Callable[[], AbstractContextManager[None]] = nullcontext

    def pretrained(self, words: PretrainConfig, intent: ResumePlan) -> Trained:
        """One network, trained with cross-entropy: its run and the summary."""
        return self._trained(build.pretraining(words), intent, None)

    def distilled(self, words: DistillConfig, intent: ResumePlan, again: str | None = None) -> Trained:
        """One distillation, after its teacher's training where that is still to be done.

        again   the command that goes on after a stop, where it is not that of the run itself
        """
        self.with_teacher(words)
        return self._trained(build.distillation(words), intent, again)

    def with_teacher(self, words: DistillConfig) -> None:
        """Train the teacher first where that is asked for."""
        if not is_missing(words):
            return
        # Whatever is wrong with the student's side is said before hours go into a teacher.
        for companion in run_extensions(build.distillation(words, build.untrained_teacher(words))):
            companion.rehearse()
        self.reporter.say(f"no finished {words.teacher.source} yet: training it first")
        first = build.teacher_config(words)
        self._trained(build.pretraining(first), find_matching_run(first) if self.resume else ResumePlan(), self.again)

    def _trained(self, job: Job, intent: ResumePlan, again: str | None) -> Trained:
        companions = run_extensions(job)
        for companion in companions:
            companion.rehearse()
        config, say = job.config, self.reporter.say
        say(
            f"{job.network.name} on {config.data.name}: {len(job.images.train)} images, {config.train.epochs} "
            f"epoch{'s' * (config.train.epochs > 1)} of batches of {config.train.batch_size}, "
            f"lr {job.task.groups()[0].lr:g}, seed {config.seed}, {job.device} ({job.mode})"
        )
        for notice in filter(
            None, (describe_reading(job.images.train), *(companion.notice for companion in companions))
        ):
            say(notice)
        if skipped := job.images.dataset.skipped:
            self.reporter.warn(f"{skipped} files could not be read and are left out (sakd data check names them)")
        if job.teacher is not None:
            say(f"teacher: {job.teacher.model.name} from {job.teacher_path}")
        with self.guard():
            return carry_out(job, intent, self.reporter, again)


def tried(words: DistillConfig | PretrainConfig) -> dict[str, Any]:
    """The plan of a training and one batch of it, with an untrained teacher where it is yet to be trained."""
    if isinstance(words, PretrainConfig):
        return try_one_batch(build.pretraining(words))
    return try_one_batch(build.distillation(words, build.untrained_teacher(words) if is_missing(words) else None))
