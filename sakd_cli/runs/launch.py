"""Carry out a job: run directory, loaders, trainer, summary."""

import shlex
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from sakd_cli import distributed, torchrun
from sakd_cli.config.base import EFFECTIVE
from sakd_cli.config.identity import EXTENDED, HELD
from sakd_cli.config.preprocessing import size_text
from sakd_cli.config.resolve import flat, relative
from sakd_cli.config.training import PROCEDURES, DistillConfig, RunConfig
from sakd_cli.data.dataset import seeded_generator
from sakd_cli.data.fingerprint import Fingerprint
from sakd_cli.data.sources import as_seen, describe_reading
from sakd_cli.documents.base import rounded
from sakd_cli.documents.training import EpochMetrics, Plan, Summary, TrainingTeacher
from sakd_cli.engine import checkpoint, loggers, runtime
from sakd_cli.engine.evaluate import evaluate
from sakd_cli.engine.reporter import Reporter, raise_if_stopped
from sakd_cli.engine.trainer import MAIN, EvaluationData, Trainer, TrainingOutput
from sakd_cli.errors import CheckpointError, Stopped
from sakd_cli.files import sealed, size_below, yaml_bytes
from sakd_cli.models import artifact
from sakd_cli.rundir import IMAGES, SUMMARY, RunDir
from sakd_cli.runs import build, recipe, teacher_outputs
from sakd_cli.runs.branches import BranchesExtension
from sakd_cli.runs.extension import RunExtension, TrainerFactory, eval_batches, loader_of
from sakd_cli.runs.first_batch import check_own_losses, first_losses
from sakd_cli.runs.images import Images
from sakd_cli.runs.job import Job, balance_of, effective_values, label_of, planned_networks, planned_spots
from sakd_cli.runs.locate import only_trainer
from sakd_cli.runs.mixtures import MixturesExtension, of_job
from sakd_cli.runs.own import note_own
from sakd_cli.runs.phases import training
from sakd_cli.runs.residual_chain import MemberWriter, ResidualExtension
from sakd_cli.runs.resume import ResumePlan, find_matching_run, fingerprint, own_settings, require_fingerprint
from sakd_cli.runs.survey import SurveyExtension
from sakd_cli.runs.teachers import Claim, Teacher, compare_with_card, warn_of_chance
from sakd_cli.tasks.distill import DistillTask
from sakd_cli.tasks.own_code import naming_own_code
from sakd_cli.tasks.pretrain import SftnTask
from sakd_cli.writing import ONWARD, require_room, write_aside, write_json


class FolderWriter(MemberWriter):
    """Writes the delivered network as a weights file and as the deployable folder `student/` or `teacher/`.

    extensions   have what belongs to it written beside it
    """

    def __init__(
        self, job: Job, facts: dict[str, Any], extensions: Sequence[RunExtension], images: Fingerprint | None
    ) -> None:
        super().__init__(job.network, job.card)
        self.extensions = extensions
        several = {name: [one.plain() for one in part] for name, part in facts.items() if isinstance(part, list)}
        self.facts = {name: part.plain() for name, part in facts.items() if name not in several} | several
        self.facts |= {"code": [*job.config.code]} if job.config.code else {}
        if images is not None:
            self.facts["fingerprint"] = {part: images.sum(part) for part in images.parts}
        self.folder = "student" if job.teacher else "teacher"

    def publish(self, run: RunDir, weights: bytes, facts: dict[str, Any]) -> None:
        artifact.write_folder(run.path / self.folder, weights, self.card, self.facts | rounded(facts))
        for extension in self.extensions:
            extension.publish(run.path, weights)


def run_extensions(job: Job) -> list[RunExtension]:
    """What this job has beside its main training, validated. Raises UsageError where something cannot be."""
    config, task = job.config, job.task
    recipe.check(job)
    found: list[RunExtension] = []
    if isinstance(task, SftnTask):
        found.append(BranchesExtension(task))
    if isinstance(config, DistillConfig) and config.residual.students > 0:
        found.append(ResidualExtension(job))
    if isinstance(task, DistillTask) and task.graft is not None and not task.others:
        found.append(SurveyExtension(job))
    if of_job(job):
        found.append(MixturesExtension(job))
    for extension in found:
        extension.validate()
    return found


def try_one_batch(job: Job) -> Plan:
    """One real batch forward and backward, nothing written; the plan and the batch's loss."""
    loggers.check(job.config.log)
    extensions = run_extensions(job)
    loader = loader_of(job)
    parts = first_losses(job, loader)
    frozen = recipe.never_trained(job)
    networks = planned_networks(job) + [network for extension in extensions for network in extension.networks()]
    extra = {key: part for extension in extensions for key, part in extension.plan().items()}
    return Plan(
        networks=networks,
        spots=planned_spots(job),
        trainable={
            group.name: sum(p.numel() for p in group.parameters if p not in frozen) for group in job.task.groups()
        },
        images=len(job.images.train),
        batch=parts,
        steps_per_epoch=loader.steps_per_epoch,
        device=str(job.device),
        effective=effective_values(job),
        warnings=recipe.notes(job),
        **extra,
    )


@distributed.translate_dist_errors()  # another process may end at any exchange, the first ones and the last ones too
def launch(
    job: Job,
    extensions: Sequence[RunExtension],
    plan: ResumePlan,
    reporter: Reporter,
    resume_command: str | None = None,
    images: Fingerprint | None = None,
) -> Summary:
    """Train to the end, from the start or from where an earlier process stopped; the summary names the run.

    resume_command  what to type after a stop; None: the command of this very run
    images          which images these are
    Raises Stopped, with the state saved, where the reporter asks for it; RunInUseError where another process is in.
    """
    loggers.check(job.config.log)
    if plan.extends and plan.resume is not None:
        recipe.require_same_length(job, own_settings(plan.resume, job.config))
    distributed.init_process_group(job.device, reporter.say, partial(raise_if_stopped, reporter))
    place = plan.resume.path if plan.resume else plan.folder or job.config.runs_dir
    # Its checkpoints (last, previous, best), momentum in two of them, and the folder of the network; what a run that
    # goes on has of them is there already, and one checkpoint more while it is written.
    size = sum(p.nbytes for p in job.network.parameters())
    held = size_below(place, "*.safetensors") if plan.resume else 0
    require_room(place, max(6 * size - held, 2 * size), ONWARD)  # also of a series, whose finished runs stay
    job.images.preload()
    check_own_losses(job)
    _prepare(job, reporter)
    evaluation = evaluation_data(job, reporter)
    facts = _teacher_facts(job, evaluation, reporter)
    run, plan = _open_run(job, extensions, plan)
    with run.locked(), loggers.logging_to(run, job.config.log, reporter.warn):
        if distributed.is_main_process():
            _begin(job, run, plan, images, reporter)
            assert run.identity is not None, "from here on nothing is written where another run lies"
            note_own(run)
        distributed.barrier()
        run.fingerprint = fingerprint(job.config, run.path / IMAGES)
        try:
            factory = TrainerFactory(run, evaluation, reporter)
            for extension in extensions:
                facts |= extension.metadata()
            output = TrainingOutput(evaluation, FolderWriter(job, facts, extensions, images))
            trainings = [training(job, MAIN, output, factory), *(one.trainings(factory) for one in extensions)]
            phases = _resumed(chain.from_iterable(trainings), run, plan, reporter)
            with runtime.translate_oom(job.config.train.batch_size), naming_own_code(job.task):
                figures = {trainer.phase: trainer.fit() for trainer in phases}
            if distributed.is_main_process():
                for extension in extensions:
                    facts |= extension.finalize(factory, figures)
                facts["extended"] = [epochs for epochs in run.extended if epochs < job.config.train.epochs]
                facts |= {"logs": run.log_ends(), "files": run.digests()}
                write_json(run.path / SUMMARY, sealed(_summary(job, figures[MAIN], facts).plain()))
            distributed.barrier()
        except Stopped as stopped:
            command = PROCEDURES[job.config.task].command
            hint = resume_command or shlex.join(["sakd", command, "--resume", str(run.path)])
            raise Stopped(stopped.signal, stopped.saved, f"resume with {hint}") from None
        return run.summary


def _open_run(job: Job, extensions: Sequence[RunExtension], plan: ResumePlan) -> tuple[RunDir, ResumePlan]:
    """The run directory and what is to become of it: the first process says it, the others read and are silent."""
    if distributed.is_main_process():
        run = plan.open(job.config.runs_dir, label_of(job, (extension.label for extension in extensions)))
        distributed.broadcast_object((str(run.path), plan.resume is not None))
        return run, plan
    path, resuming = distributed.broadcast_object(("", False))
    run = RunDir(Path(path), silent=True)
    return run, plan._replace(resume=run if resuming else None)


def _begin(job: Job, run: RunDir, plan: ResumePlan, images: Fingerprint | None, reporter: Reporter) -> None:
    """Make room for a new run, and write down what it is and which images it has."""
    if plan.overwrite:
        run.clear()
    if plan.resume is None and images is not None:
        write_aside(run.path / IMAGES, images.text.encode())
    settings = relative(job.config.model_dump(mode="json"), run.path)
    known = {} if plan.resume is None else flat(run.config) | run.read_json("env.json", sealed=True)
    if plan.resume is None:
        write_json(run.path / "env.json", sealed({"id": uuid.uuid4().hex} | runtime.environment(job.device, job.mode)))
    elif plan.extends:
        run.extend(known["train.epochs"])
    if (began := known.get("processes", now := distributed.world_size())) != now:
        reporter.warn(f"{run.path}: in {now} processes, began in {began}: not the numbers of a run that never stopped")
    if any(known.get(key) != value for key, value in flat(settings).items() if key in HELD | EXTENDED | {"task"}):
        write_aside(run.path / "config.yaml", yaml_bytes(settings | {EFFECTIVE: effective_values(job)}))


def _prepare(job: Job, reporter: Reporter) -> None:
    """The process and the task, for the way in which the run computes."""
    # What layers of others' draw in training (dropout, drop path); a resumed run goes on with the state that was saved.
    torch.manual_seed(seeded_generator(job.config.seed, "layers", distributed.rank()).initial_seed())
    if job.device.type == "cpu":
        runtime.keep_freed_memory()
    if job.device.type == "cuda":
        runtime.set_backends(job.config.runtime, compiled=job.mode.compiled)
    if job.mode.compiled:
        torchrun.require_single_process("--compile")
        runtime.check_compiler(job.device)
        runtime.compile_task(job.task, reporter.warn)


def _resumed(phases: Iterator[Trainer], run: RunDir, plan: ResumePlan, reporter: Reporter) -> Iterator[Trainer]:
    """The same trainers, each taken to its own last checkpoint as long as all before it are complete.

    Lines that were logged after that checkpoint are taken back: they will be written again.
    """
    resuming, logs = plan.resume is not None, (dict[str, int](), dict[str, str]())
    for trainer in phases:
        complain = reporter.warn if plan.lenient else None
        point = checkpoint.find(trainer.folder, complain, run.identity) if resuming else None
        if point is not None:
            saved, epoch = point.state.get("fingerprint"), point.state.get("epoch")
            require_fingerprint(point.folder, saved, epoch, run.fingerprint, run.extended)
            trainer.resume(point)
            sizes, digests = point.state.get("logs"), point.state.get("log_sha256", {})
            if not isinstance(sizes, dict) or not all(isinstance(size, int) and size >= 0 for size in sizes.values()):
                raise CheckpointError(f"{point.folder}: does not say how long the logs were")
            logs = sizes, digests if isinstance(digests, dict) else {}
        elif plan.resume is not None and distributed.is_main_process():
            checkpoint.discard(trainer.folder)  # made with another past than the one to come
        if resuming and not trainer.done:
            resuming = False
            run.cut_logs(*logs)
        yield trainer
    if resuming:
        run.cut_logs(*logs)


def evaluation_data(job: Job, reporter: Reporter) -> EvaluationData:
    dataset = job.images.dataset
    test = eval_batches(job, dataset.test, reporter)
    held_out = job.images.held_out
    selection = eval_batches(job, held_out, reporter) if held_out else test
    networks = partial(job.mode.networks, job.device) if job.device.type == "cuda" else nullcontext
    selected_on = "validation" if held_out else "test"
    return EvaluationData(selected_on, selection, test, len(dataset.classes), networks=networks)


def _summary(job: Job, main: dict[str, Any], parts: dict[str, Any]) -> Summary:
    """main: what the main training returned; parts: what the teacher and the extensions add."""
    return Summary(
        task=job.config.task,
        network=job.network.name,
        dataset=job.images.dataset.name,
        epochs=job.config.train.epochs,
        images=len(job.images.train),
        skipped_images=job.images.dataset.skipped,
        protocol="; ".join([job.protocol, *recipe.deviations(job, main["last"]["epoch"])]),
        **job.cost._asdict(),
        device=str(job.device),
        torch=torch.__version__,
        last=EpochMetrics(**main["last"]),
        best=EpochMetrics(**main["best"]),
        trained=EpochMetrics(**main["trained"]) if "trained" in main else None,
        seconds=main["seconds"],
        phases=main["phases"],
        classes=balance_of(job, main["top1_of_class"]),
        **parts,
    )


def _teacher_facts(job: Job, evaluation: EvaluationData, reporter: Reporter) -> dict[str, Any]:
    """The teachers' figures, measured anew on the test images; nothing where there is no teacher.

    Raises UsageError where a card says otherwise.
    """
    if job.teacher is None or job.teacher.model.name == teacher_outputs.NAME:
        return {}
    found = [_measured(job, one, evaluation, reporter) for one in job.teachers]
    return {"teacher": found[0]} | ({"more_teachers": found[1:]} if found[1:] else {})


def _measured(job: Job, one: Teacher, evaluation: EvaluationData, reporter: Reporter) -> TrainingTeacher:
    own = as_seen(job.images.dataset.test, one.network.card.preprocessing)
    test = evaluation.test if own is job.images.dataset.test else eval_batches(job, own, reporter)
    scores = evaluate(one.network.model, test, evaluation.classes)
    warn_of_chance(scores.top1, scores.images, evaluation.classes, reporter.say, "teacher: ")
    if isinstance(job.config, DistillConfig) and one.path is not None:
        measured = Claim(job.images.dataset.name, scores.images, scores.top1)
        allowed = job.config.teacher.allow_mismatch
        if text := compare_with_card(one.path, one.claim, measured, allowed=allowed):
            reporter.say(text)
    network, path, digest = one.network.model.name, str(one.path), one.network.sha256
    return TrainingTeacher(network=network, path=path, sha256=digest, **one.cost._asdict(), **scores.metrics())


@dataclass(frozen=True)
class Launcher:
    """Trains what configs say, one after another.

    resume          a teacher's training continues where an earlier one of the same config was stopped
    resume_command  what to type after a stop of all of it; None: the command of the run that was stopped
    guard           a context around each training, such as that of the signal handlers
    """

    reporter: Reporter
    resume: bool = False
    resume_command: str | None = None
    guard: Callable[[], AbstractContextManager[None]] = nullcontext

    def train(self, config: RunConfig, plan: ResumePlan, resume_command: str | None = None) -> Summary:
        """Train a config whose inputs are located, after its teacher where that is missing; its summary."""
        torchrun.require_launcher()
        if isinstance(config, DistillConfig) and config.teacher.weights is None:
            with_teacher, images = self.pretrain(config)
            return self._launch(build.distillation(with_teacher, images=images), plan, resume_command)
        return self._launch(build.build(config), plan, resume_command)

    def pretrain(self, config: DistillConfig) -> tuple[DistillConfig, Images]:
        """Train the teacher of a distillation; the config with its weights, and the images of the distillation."""
        first, trial = build.untrained(config)
        try_one_batch(trial)  # whatever is wrong with the student's side is reported before hours go into a teacher
        with only_trainer(config, self.reporter.say) as weights:
            if weights is None:
                self.reporter.say(f"no finished {config.teacher.source} yet: training it first")
                plan = find_matching_run(first.config) if self.resume else ResumePlan()
                weights = RunDir(self._launch(first, plan, self.resume_command).folder).deliverable
        teacher = config.teacher.model_copy(update={"weights": weights})
        return config.model_copy(update={"teacher": teacher}), trial.images

    def _launch(self, job: Job, plan: ResumePlan, resume_command: str | None) -> Summary:
        extensions = run_extensions(job)
        begun = None if plan.resume is None else plan.resume.path
        images = job.images.fingerprint(job.config.data, begun)
        config, say = job.config, self.reporter.say
        say(
            f"{job.network.name} on {config.data.name}: {len(job.images.train)} images, {config.train.epochs} "
            f"epoch{'s' * (config.train.epochs > 1)} of batches of {config.train.batch_size}, "
            f"lr {job.task.groups()[0].lr:g}, seed {config.seed}, {job.device} ({job.mode})"
        )
        if job.images.unlabeled is not None:
            say(f"and {len(job.images.unlabeled)} images without labels, for which the teacher alone counts")
        notices = [describe_reading(job.images.train), *(extension.notice for extension in extensions)]
        for notice in filter(None, [f"protocol: {job.protocol}", *notices]):
            say(notice)
        for note in recipe.notes(job):
            self.reporter.warn(note)
        for place, one in enumerate(job.teachers):
            say(f"{'and' if place else 'teacher:'} {one.network.model.name} from {one.path}")
        if job.images.teacher_sees is not None:
            say(f"the teacher sees the same crops with {size_text(job.images.teacher_side)} pixels")
        with self.guard():
            return launch(job, extensions, plan, self.reporter, resume_command, images)


def dry_run(config: RunConfig) -> Plan:
    """The plan of a training and one batch of it, with an untrained teacher where it is yet to be trained."""
    if isinstance(config, DistillConfig) and config.teacher.weights is None:
        return try_one_batch(build.untrained(config)[1])
    return try_one_batch(build.build(config))
