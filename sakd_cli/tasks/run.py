"""Carry out a job: run directory, loaders, trainer, summary."""

import re
import shlex
import uuid
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

from sakd_cli.config.run import DistillConfig, Train
from sakd_cli.data.halves import InTurn
from sakd_cli.data.loader import EvalLoader, TrainLoader
from sakd_cli.engine import board, checkpoint
from sakd_cli.engine.evaluate import evaluate
from sakd_cli.engine.optim import Optimizer
from sakd_cli.engine.recorder import SpotRecorder
from sakd_cli.engine.runtime import check_compiler, compiled, environment, keep_freed_memory, memory_told, reproducible
from sakd_cli.engine.task import Task
from sakd_cli.engine.trainer import MAIN, Judge, Outcome, Trainer
from sakd_cli.engine.watch import Heeding, Watcher
from sakd_cli.errors import CheckpointError, Stopped
from sakd_cli.models import artifact
from sakd_cli.models.artifact import NetworkCard
from sakd_cli.models.ensemble import Offset
from sakd_cli.models.staged import StagedModel
from sakd_cli.rundir import Intent, RunDir, write_aside, write_json
from sakd_cli.tasks import mixtures, survey
from sakd_cli.tasks.bank import open_bank
from sakd_cli.tasks.build import Job, plan, search_of, warmup_of
from sakd_cli.tasks.chain import Chain, MemberDelivery, chain_of, rehearse
from sakd_cli.tasks.distill import DistillTask
from sakd_cli.tasks.search import SearchTask, batches
from sakd_cli.tasks.sftn import BranchDelivery


class FolderDelivery:
    """Writes the delivered network as a weights file and as the deployable folder `student/` or `teacher/`.

    beside   student branches that are written whenever the folder is
    """

    def __init__(
        self,
        network: StagedModel,
        card: NetworkCard,
        folder: str,
        facts: dict[str, Any],
        beside: BranchDelivery | None = None,
    ) -> None:
        self.network, self.card, self.folder, self.facts, self.beside = network, card, folder, facts, beside

    def save_weights(self, path: Path) -> None:
        artifact.save_weights(path, self.network, self.card)

    def publish(self, run: RunDir, facts: dict[str, Any]) -> None:
        artifact.save_folder(run.path / self.folder, self.network, self.card, self.facts | facts)
        if self.beside is not None:
            self.beside.save(run.path, run.path / self.folder / "model.safetensors")


def try_one_batch(job: Job) -> dict[str, Any]:
    """One real batch forward and backward, nothing written; the plan and the batch's loss."""
    rehearse(job)
    chain = chain_of(job)
    job.task.train()
    job.task.begin_epoch(1)
    output = job.task(next(_train_loader(job).epoch(1)))
    output.loss.backward()
    parts = {name: float(part) for name, part in output.parts.items()}
    steps = len(_train_loader(job))
    shown = {"schema": "sakd.plan/1"} | plan(job) | ({"mixtures": found} if (found := _mixtures(job)) else {})
    shown["networks"] += chain.networks() if chain else []
    return shown | {"batch": parts, "steps_per_epoch": steps, "device": str(job.device)}


def carry_out(job: Job, intent: Intent, watcher: Watcher, again: str | None = None) -> tuple[RunDir, dict[str, Any]]:
    """Train to the end, from the start or from where an earlier process stopped; the run directory and its summary.

    again  the command that goes on after a stop; None: that of this very run
    Raises Stopped, with the state saved, where the watcher asks for it; RunInUseError where another process is in.
    """
    board.check(job.config.log)
    chain = chain_of(job)
    if job.device.type == "cpu":
        keep_freed_memory()
    if job.config.runtime.deterministic:
        reproducible()
    if job.mode.compiled:
        check_compiler(job.device)
        compiled(job.task, job.device)
    run = intent.open(job.config.runs_dir, _label(job))
    with run.locked(), board.following(run, job.config.log):
        if intent.overwrite:
            run.clear()
        if intent.resume is None:
            write_json(run.path / "env.json", {"id": uuid.uuid4().hex} | environment(job.device, job.mode))
            write_aside(run.path / "config.yaml", _yaml(job.config.model_dump(mode="json")))
        try:
            judge = _judge(job, watcher)
            facts = _teacher_facts(job, judge) | ({"friendly": job.branches.facts} if job.branches else {})
            phases = _resumed(_phases(job, chain, run, judge, facts, watcher), run, intent, watcher)
            with memory_told(job.config.train.batch_size):
                figures = {trainer.phase: trainer.fit() for trainer in phases}
            extra: dict[str, Any] = {"friendly": job.branches.scored(judge.test)} if job.branches else {}
            extra |= {"ensemble": chain.close(run, judge.test, figures)} if chain else {}
            extra |= survey.keep(job, run, watcher)
        except Stopped as stopped:
            command = "distill" if job.teacher else "pretrain-teacher"
            hint = again or shlex.join(["sakd", command, "--resume", str(run.path)])
            raise Stopped(stopped.signal, stopped.saved, f"go on with {hint}") from None
        if (mixed := _mixtures(job)) is not None:
            extra |= {"mixtures": mixed, "search_seconds": figures.get("search", {}).get("seconds")}
        summary = _about(job) | figures[MAIN] | facts | extra
        write_json(run.path / "summary.json", summary)
        return run, summary


def _phases(
    job: Job, chain: Chain | None, run: RunDir, judge: Judge, facts: dict[str, Any], watcher: Watcher
) -> Iterator[Trainer]:
    """The trainings of a run, one after another; each is built when the one before is done."""
    delivery = FolderDelivery(job.network, job.card, "student" if job.teacher else "teacher", facts, job.branches)
    yield from _training(job, MAIN, Outcome(judge, delivery), run, watcher)
    for phase, stage, base in chain.stages(watcher) if chain else ():
        judged = judge._replace(scored=partial(Offset, base=base))
        outcome = Outcome(judged, MemberDelivery(stage.network, stage.card))
        yield from _training(stage, phase, outcome, run, watcher)


def _training(job: Job, phase: str, outcome: Outcome, run: RunDir, watcher: Watcher) -> Iterator[Trainer]:
    """The training of one network, and what its method does before."""
    words, before = job.config, "" if phase == MAIN else f"{phase}-"
    _take_from_bank(job, watcher)
    shared = partial(Trainer, run=run, watcher=watcher, log_every=words.log_every, save_every=words.save_every)
    if (stage := warmup_of(job)) is not None:
        task, epochs = stage  # at a constant learning rate
        optimizer = _optimizer(task, words.train, ())
        yield shared(task, _train_loader(job), optimizer, epochs=epochs, phase=f"{before}warmup")
        task.warmup.requires_grad_(False)
    if (search := search_of(job)) is not None:
        both, epochs = search.optimizer(words.train.momentum), search.words.search_epochs
        yield shared(search, _search_loader(job, search), both, epochs=epochs, phase=f"{before}search")
        search.settle()
    if (mixed := _mixtures(job, watcher.warn)) is not None:
        write_json(run.path / f"{before}{mixtures.NAME}", mixed)
    recorder = None
    if job.spots:
        names = [(spot.name, spot.kind) for spot in job.spots]
        train = job.images.train
        recorder = SpotRecorder(names, len(job.images.dataset.classes), len(train), job.device, train.origins())
    yield shared(
        job.task,
        _train_loader(job),
        _optimizer(job.task, words.train, words.train.decay_epochs()),
        outcome=outcome,
        epochs=words.train.epochs,
        recorder=recorder,
        phase=phase,
    )


def _take_from_bank(job: Job, watcher: Watcher) -> None:
    """Let the teacher's answers come from its bank, if that was asked for."""
    if isinstance(job.task, DistillTask) and isinstance(job.config, DistillConfig) and job.config.teacher.bank:
        assert job.teacher is not None
        views = _train_loader(job).views
        folder = job.config.runs_dir / "banks"
        job.task.teacher_features = open_bank(folder, job.teacher, views, job.mode, job.device, watcher)


def _resumed(phases: Iterator[Trainer], run: RunDir, intent: Intent, watcher: Watcher) -> Iterator[Trainer]:
    """The same trainers, each taken to its own last checkpoint as long as all before it are complete.

    Lines that were logged after that checkpoint are taken back: they will be written again.
    """
    going_on, logs = intent.resume is not None, dict[str, int]()
    for trainer in phases:
        complain = watcher.warn if intent.lenient else None
        point = checkpoint.find(trainer.folder, complain, run.identity) if going_on else None
        if point is not None:
            trainer.resume(point)
            logs = _sizes(point)
        elif intent.resume is not None:
            checkpoint.discard(trainer.folder)  # made with another past than the one to come
        if going_on and not trainer.done:
            going_on = False
            run.cut_logs(logs)
        yield trainer
    if going_on:
        run.cut_logs(logs)


def _sizes(point: checkpoint.Loaded) -> dict[str, int]:
    """How long the logs were when the checkpoint was written."""
    sizes = point.state.get("logs")
    if not isinstance(sizes, dict) or not all(isinstance(size, int) and size >= 0 for size in sizes.values()):
        raise CheckpointError(f"{point.folder}: does not say how long the logs were")
    return sizes


def _optimizer(task: Task, words: Train, milestones: tuple[int, ...]) -> Optimizer:
    return Optimizer(
        task.groups(), momentum=words.momentum, milestones=milestones, decay=words.lr_decay, nesterov=words.nesterov
    )


def _train_loader(job: Job) -> TrainLoader:
    return TrainLoader(
        job.images.train,
        job.images.dataset,
        batch_size=job.config.train.batch_size,
        seed=job.config.seed,
        noise_width=job.task.noise_width,
        device=job.device,
    )


def _search_loader(job: Job, search: SearchTask) -> InTurn:
    words, images = job.config, job.images
    return batches(
        search.words,
        images.dataset,
        images.train,
        batch_size=words.train.batch_size,
        seed=words.seed,
        device=job.device,
    )


def _mixtures(job: Job, warn: Callable[[str], None] | None = None) -> dict[str, Any] | None:
    """What the run mixes, as its file holds it; None for methods without mixtures."""
    if not (isinstance(job.task, DistillTask) and isinstance(job.config, DistillConfig)):
        return None
    words = job.config
    return mixtures.record(words.method, job.task.feature_distiller, job.images.dataset.name, words.seed, warn)


def _judge(job: Job, watcher: Watcher) -> Judge:
    dataset = job.images.dataset
    test = Heeding(EvalLoader(dataset.test, dataset, device=job.device), watcher)
    held_out = job.images.held_out
    selection = Heeding(EvalLoader(held_out, dataset, device=job.device), watcher) if held_out else test
    return Judge("holdout" if held_out else "test", selection, test, len(dataset.classes))


def _label(job: Job) -> str:
    words = job.config.model_dump()
    parts = [words["task"], job.network.name, job.images.dataset.name]
    if job.branches:
        parts.append(f"friendly-{'-'.join(job.branches.words.students)}")
    if job.teacher:
        parts[1:1] = [job.teacher.model.name]
        parts += [words["method"]["name"], words["router"]["name"]]
        parts += ["residual"] if words["residual"]["students"] else []
    return re.sub(r"[/:]", ".", "-".join(parts))  # torchvision/resnet18, my.nets:small


def _about(job: Job) -> dict[str, Any]:
    share = 100 * job.config.data.holdout
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
