"""Carry out a job: run directory, loaders, trainer, summary."""

from pathlib import Path
from typing import Any

import torch
import yaml

from sakd_cli.config.run import Train
from sakd_cli.data.loader import EvalLoader, TrainLoader
from sakd_cli.engine.evaluate import evaluate
from sakd_cli.engine.optim import Optimizer
from sakd_cli.engine.recorder import SpotRecorder
from sakd_cli.engine.runtime import compiled, environment, keep_freed_memory
from sakd_cli.engine.task import Task
from sakd_cli.engine.trainer import Judge, Outcome, Trainer
from sakd_cli.engine.watch import Watcher
from sakd_cli.models import artifact
from sakd_cli.models.artifact import NetworkCard
from sakd_cli.models.staged import StagedModel
from sakd_cli.rundir import RunDir, write_aside, write_json
from sakd_cli.tasks.build import Job, plan, warmup_of


class FolderDelivery:
    """Writes the delivered network as a weights file and as the deployable folder `student/` or `teacher/`."""

    def __init__(self, network: StagedModel, card: NetworkCard, folder: str, facts: dict[str, Any]) -> None:
        self.network, self.card, self.folder, self.facts = network, card, folder, facts

    def save_weights(self, path: Path) -> None:
        artifact.save_weights(path, self.network, self.card)

    def publish(self, run: RunDir, facts: dict[str, Any]) -> None:
        artifact.save_folder(run.path / self.folder, self.network, self.card, self.facts | facts)


def try_one_batch(job: Job) -> dict[str, Any]:
    """One real batch forward and backward, nothing written; the plan and the batch's loss."""
    job.task.train()
    job.task.begin_epoch(1)
    output = job.task(next(_train_loader(job).epoch(1)))
    output.loss.backward()
    parts = {name: float(part) for name, part in output.parts.items()}
    steps = len(_train_loader(job))
    return {"schema": "sakd.plan/1"} | plan(job) | {"batch": parts, "steps_per_epoch": steps, "device": str(job.device)}


def carry_out(job: Job, watcher: Watcher) -> tuple[RunDir, dict[str, Any]]:
    """Train to the end; the run directory and its summary."""
    run = RunDir.create(job.config.runs_dir, _label(job))
    write_aside(run.path / "config.yaml", _yaml(job.config.model_dump(mode="json")))
    if job.device.type == "cpu":
        keep_freed_memory()
    if job.mode.compiled:
        compiled(job.task, job.device)
    write_json(run.path / "env.json", environment(job.device, job.mode))
    recorder = None
    if job.spots:
        names = [(spot.name, spot.kind) for spot in job.spots]
        train = job.images.train
        recorder = SpotRecorder(names, len(job.images.dataset.classes), len(train), job.device, train.origins())
    judge = _judge(job)
    facts = _teacher_facts(job, judge)
    delivery = FolderDelivery(job.network, job.card, "student" if job.teacher else "teacher", facts)
    _warm_up(job, run, watcher)
    trainer = Trainer(
        job.task,
        _train_loader(job),
        _optimizer(job.task, job.config.train, job.config.train.decay_epochs()),
        run,
        watcher,
        outcome=Outcome(judge, delivery),
        epochs=job.config.train.epochs,
        log_every=job.config.log_every,
        recorder=recorder,
    )
    figures = trainer.fit()
    summary = _about(job) | figures | facts
    write_json(run.path / "summary.json", summary)
    return run, summary


def _warm_up(job: Job, run: RunDir, watcher: Watcher) -> None:
    """Carry out the method's own stage in front of the distillation, if it has one, at a constant learning rate."""
    if (stage := warmup_of(job)) is None:
        return
    task, epochs = stage
    loader, optimizer = _train_loader(job), _optimizer(task, job.config.train, ())
    Trainer(task, loader, optimizer, run, watcher, epochs=epochs, log_every=job.config.log_every, phase="warmup").fit()
    task.warmup.requires_grad_(False)


def _optimizer(task: Task, words: Train, milestones: tuple[int, ...]) -> Optimizer:
    return Optimizer(task.groups(), momentum=words.momentum, milestones=milestones, decay=words.lr_decay)


def _train_loader(job: Job) -> TrainLoader:
    return TrainLoader(
        job.images.train,
        job.images.dataset,
        batch_size=job.config.train.batch_size,
        seed=job.config.seed,
        noise_width=job.task.noise_width,
        device=job.device,
    )


def _judge(job: Job) -> Judge:
    dataset = job.images.dataset
    test = EvalLoader(dataset.test, dataset, device=job.device)
    held_out = job.images.held_out
    selection = EvalLoader(held_out, dataset, device=job.device) if held_out else test
    return Judge("holdout" if held_out else "test", selection, test, len(dataset.classes))


def _label(job: Job) -> str:
    words = job.config.model_dump()
    parts = [words["task"], job.network.name, job.images.dataset.name]
    if job.teacher:
        parts[1:1] = [job.teacher.model.name]
        parts += [words["method"]["name"], words["router"]["name"]]
    return "-".join(parts)


def _about(job: Job) -> dict[str, Any]:
    share = 100 * job.config.data.holdout
    chosen = (
        f"best epoch chosen on {share:g} % of the training images, held out"
        if job.images.held_out
        else "best epoch chosen on the test set (the literature's habit: optimistic)"
    )
    return {
        "schema": "sakd.summary/1",
        "task": job.config.model_dump()["task"],
        "network": job.network.name,
        "dataset": job.images.dataset.name,
        "epochs": job.config.train.epochs,
        "images": len(job.images.train),
        "protocol": f"headline is the last epoch on the test set; {chosen}",
        "parameters": job.cost.parameters,
        "macs": job.cost.macs,
        "device": str(job.device),
        "torch": torch.__version__,
    }


def _teacher_facts(job: Job, judge: Judge) -> dict[str, Any]:
    """The teacher's figures, measured anew on the test images; nothing where there is no teacher."""
    if job.teacher is None or job.teacher_cost is None:
        return {}
    scores = evaluate(job.teacher.model, judge.test, judge.classes)
    facts = {"network": job.teacher.model.name, "path": str(job.teacher_path), "sha256": job.teacher.sha256}
    return {"teacher": facts | scores.headline() | job.teacher_cost._asdict()}


def _yaml(words: dict[str, Any]) -> bytes:
    return yaml.safe_dump(words, sort_keys=False, allow_unicode=True).encode()
