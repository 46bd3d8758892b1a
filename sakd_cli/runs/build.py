"""From settings to objects: the only reader of all tables."""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from sakd_cli.config.effective import initial_lr, router_gamma, router_start, steps_of_run, steps_per_epoch
from sakd_cli.config.methods import DFAConfig
from sakd_cli.config.networks import of_one_family
from sakd_cli.config.preprocessing import ImageSize
from sakd_cli.config.resolve import ConfigSource, resolve
from sakd_cli.config.routers import LearnedConfig, MetaConfig, RandomMatchedConfig, TrainedConfig
from sakd_cli.config.training import PROCEDURES, DistillConfig, PretrainConfig, RunConfig
from sakd_cli.data.dataset import seeded_generator
from sakd_cli.distillers import table as distillers
from sakd_cli.distillers.dfa import DFA, mixable_blocks
from sakd_cli.engine.runtime import Mode, pick_device, resolve_mode
from sakd_cli.engine.task import Task
from sakd_cli.errors import UsageError
from sakd_cli.files import expanded
from sakd_cli.models.artifact import Artifact
from sakd_cli.models.branches import Branches
from sakd_cli.models.cost import cost
from sakd_cli.models.staged import StagedModel, frozen_view
from sakd_cli.models.table import create
from sakd_cli.report.spots.log import epoch_records
from sakd_cli.routing import table as routers
from sakd_cli.routing.graft import Graft
from sakd_cli.rundir import RunDir
from sakd_cli.runs import mixtures, teacher_outputs, teachers
from sakd_cli.runs.branches import start_from_branches
from sakd_cli.runs.images import Images, load_images, with_unlabeled
from sakd_cli.runs.initial_weights import check_classes, load_initial_weights, load_teacher
from sakd_cli.runs.job import Job
from sakd_cli.runs.locate import pretrain_command
from sakd_cli.runs.refusals import require_combinable, require_one_size, require_possible
from sakd_cli.tasks.criterion import Criterion
from sakd_cli.tasks.distill import DistillTask, Factors, PlainPass, Rates
from sakd_cli.tasks.pretrain import PretrainTask, Recipe, SftnTask, WarmupTask
from sakd_cli.tasks.residual import Logits, ResidualTask
from sakd_cli.tasks.search import SearchTask, Sought


def build(config: RunConfig) -> Job:
    """The job of a config whose inputs are located, by the table of training procedures."""
    module, _, function = PROCEDURES[config.task].builder.partition(":")
    return getattr(importlib.import_module(module), function)(config)


def pretraining(config: PretrainConfig) -> Job:
    """A network trained with cross-entropy, alone or together with branches of its students."""
    device = pick_device(config.device)
    if config.data.unlabeled is not None:
        raise UsageError("data.unlabeled: without a teacher there is nothing to learn from images without labels")
    images = load_images(config.data)
    network = _fresh(config.model, images, config.seed, "network", device, config.train.drop_path)
    notes = load_initial_weights(network, config.init_from, config.head, images.dataset, "init_from")
    mode = resolve_mode(config.runtime, device, steps_of_run(config, len(images.shown)))
    lr, decay, criterion = initial_lr(config, config.model), config.train.weight_decay, _criterion(config, images)
    recipe: Recipe = {"lr": lr, "weight_decay": decay, "mode": mode, "criterion": criterion}
    task: Task
    if (settings := config.friendly) is None:
        task = PretrainTask(network, **recipe)
    else:
        with _initialised(config.seed, "branches"):
            branches = Branches(network, settings.students, images.side, share=settings.share_branches)
        task = SftnTask(network, branches, settings, **recipe)
    task, costs = mode.to_memory_format(task).to(device), cost(network, images.side)
    return Job(config, device, mode, images, task, network, costs, notes=notes)


def _criterion(config: RunConfig, images: Images) -> Criterion:
    return Criterion.of(config.train, images.train.labels, images.dataset.classes)


def untrained(config: DistillConfig) -> tuple[Job, Job]:
    """The jobs of a teacher that is yet to be trained and, with a copy of it, of its student; they share the images."""
    first = pretraining(resolve("pretrain", [ConfigSource("the distillation's config", config.pretraining())]).config)
    images = None if config.aside.set_aside(1000) else first.images  # a part of them does not train the student
    return first, distillation(config, Artifact(deepcopy(first.network), first.card, "untrained"), images)


def distillation(config: DistillConfig, teacher: Artifact | None = None, images: Images | None = None) -> Job:
    """A student, its teacher, the distillers, the router and the graft.

    teacher  None: that in `teacher.weights`, which `locate.locate_inputs` fills in
    images   None: they are loaded
    """
    device = pick_device(config.device)
    path = claim = None
    if teacher is None:
        config, teacher, path, claim = _located_teacher(config)
    require_combinable(config)
    images = with_unlabeled(images or load_images(config.data, config.aside, teacher.card.preprocessing), config.data)
    require_one_size(config, images)
    mode = resolve_mode(config.runtime, device, steps_of_run(config, len(images.shown)))
    train_one = pretrain_command(config, teacher.card.architecture)
    match_normalization(teacher, images, config.teacher.source, train_one, images.teacher_side)
    student = _fresh(config.student, images, config.seed, "network", device, config.train.drop_path)
    notes = load_initial_weights(student, config.student_weights, config.head, images.dataset, "student_weights")
    if config.init_from_branches:
        start_from_branches(student, path, teacher)
    task = _task(config, student, teacher, images, mode)
    first = teachers.Teacher(teacher, path, claim, cost(teacher.model, images.teacher_side))
    config, more = _joined(config, task, images, student, teacher)
    require_possible(config, task.distillers, task.router, teacher.model)
    teacher_outputs.load_logits(config, task, images)
    mixtures.load_mixtures(config.method, task.feature_distiller, teacher.model.name)
    several, notes = (first, *more), (*teacher.notes, *notes)
    spots = teachers.spots_of(task, [one.network.model.name for one in several])
    costs = cost(task.network, images.side)
    return Job(config, device, mode, images, task.to(device), task.network, costs, spots, several, notes)


def _located_teacher(config: DistillConfig) -> tuple[DistillConfig, Artifact, Path, teachers.Claim | None]:
    """The teacher in `teacher.weights`, where it lies and what its card says; and the config, pinned to it."""
    assert isinstance(config.teacher.weights, Path), "the config's inputs are located first"
    path = config.teacher.weights.resolve()
    teacher = load_teacher(config, path)
    claim = None if config.teacher.logits else teachers.read_claim(path, teacher.sha256)
    return pin_inputs(config, path, teacher.sha256), teacher, path, claim


def _task(config: DistillConfig, student: StagedModel, teacher: Artifact, images: Images, mode: Mode) -> DistillTask:
    """The task for these images, on the student's device; the teacher is frozen."""
    frozen = teacher.model.to(next(student.parameters()).device).requires_grad_(False).eval()
    labels, criterion = images.shown.labels, _criterion(config, images)
    return assemble(config, student, frozen, images.side, labels, None, mode, images.teacher_side, criterion)


def _joined(
    config: DistillConfig, task: DistillTask, images: Images, student: StagedModel, first: Artifact
) -> tuple[DistillConfig, tuple[teachers.Teacher, ...]]:
    """Join the further teachers of a config to its task; the config with their digests, and they themselves."""
    if not config.teacher.others:
        return config, ()
    teachers.require_team(config, task)
    found, tasks = list[teachers.Teacher](), list[DistillTask]()
    for number, one in enumerate(config.teacher.each_other, start=2):
        seed = seeded_generator(config.seed, f"teacher-{number}").initial_seed()
        alone = config.model_copy(update={"teacher": one, "seed": seed})
        alone, artifact, path, claim = _located_teacher(alone)
        teachers.require_alike(first, artifact, one.source)
        match_normalization(artifact, images, one.source, None, images.teacher_side)
        tasks.append(_task(alone, student, artifact, images, task.mode))
        found.append(teachers.Teacher(artifact, path, claim, cost(artifact.model, images.teacher_side)))
    teachers.join(task, tasks, config)
    sums = tuple(one.network.sha256 for one in found)
    return config.model_copy(update={"teacher": config.teacher.model_copy(update={"other_sha256": sums})}), tuple(found)


def assemble(
    config: DistillConfig,
    student: StagedModel,
    teacher: StagedModel,
    side: ImageSize,
    labels: Tensor | None = None,
    offset: Logits | None = None,
    mode: Mode | None = None,
    teacher_side: ImageSize | None = None,
    criterion: Criterion | None = None,
) -> DistillTask:
    """The task for two networks that are on their device; `teacher` is frozen and in evaluation mode.

    labels  class of every training image, for methods that remember images
    offset  for a residual student: gives the logits of the students before it, frozen and in evaluation mode
    mode    how it computes; None: as the config says on the student's device. teacher_side: None: as `side`
    criterion  of the classification; None: plain cross-entropy
    """
    mode = mode or resolve_mode(config.runtime, next(student.parameters()).device)
    student, teacher = mode.to_memory_format(student), mode.to_memory_format(teacher)
    with _initialised(config.seed, "distiller"):
        method = distillers.build(
            config.method,
            student,
            teacher,
            side,
            teacher_side=teacher_side,
            stage_map=config.stage_map,
            labels=labels,
            batch_size=(batch_size := config.train.batch_size),
            epochs=config.train.epochs,
        )
    if method.features is not None:
        method.features.dynamic_shapes = mode.dynamic_shapes
    steps = None if labels is None else steps_per_epoch(len(labels), batch_size)
    one_family = teacher.name != teacher_outputs.NAME and of_one_family(config.student, teacher.name)
    start = router_start(config, one_family=one_family, steps=steps)
    pair = _pair(config, method, teacher, start.bias)
    with _initialised(config.seed, "router"):
        router = routers.build(config.router, pair)
        frozen = mode.frozen(teacher)
        runs = frozen_view(mode.to_memory_format(method.network)).run, frozen.run
        graft = (
            Graft(method.spots, *runs, dynamic_shapes=mode.dynamic_shapes and not router.soft)
            if config.learned
            else None
        )
    task = DistillTask(
        method.network,
        PlainPass(frozen, method.want),
        method,
        router,
        graft,
        _factors(config, method),
        _rates(config, start.lr),
        mode,
        offset,
        criterion,
    )
    return mode.to_memory_format(task)


def _pair(
    config: DistillConfig, method: distillers.Distillers, teacher: StagedModel, prior: float | None
) -> routers.Pair:
    """What the router is told. UsageError where it cannot be with this method."""
    if isinstance(config.router, MetaConfig) and method.features is not None and method.features.scope == "memory":
        raise UsageError(
            f"router {config.router.name}: the loss of {config.method.name} depends on a memory of earlier batches",
            "another router, or another method",
        )
    return routers.Pair(
        spots=len(method.spots),
        teacher=teacher.infos[-1].channels,
        student=method.network.infos[-1].channels,
        prior=prior or 0.0,
        epochs=config.train.epochs,
        matched=_matched_rates(config, len(method.spots)),
        classes=method.network.num_classes,
    )


def _rates(config: DistillConfig, learned_lr: float) -> Rates:
    router = config.router if isinstance(config.router, TrainedConfig) else LearnedConfig(name="none")
    lr = initial_lr(config, config.student)
    router_lr = learned_lr if isinstance(router, LearnedConfig) else router.lr or lr / 2
    return Rates(lr, config.train.weight_decay, router_lr, router.weight_decay, router.update_every)


def _factors(config: DistillConfig, method: distillers.Distillers) -> Factors:
    """The numbers of the objective. UsageError where a balanced dose has nothing to be balanced by."""
    own = config.method
    if own.balance and not (own.ce_weight or (own.kl_weight and method.features is not None)):
        reason = f"{own.name} has the cross-entropy with factor 0, and no other gradient to be balanced by"
        raise UsageError(f"method.balance: {reason}", "--set method.ce_weight=1")
    fraction = (config.learned or LearnedConfig(name="none")).min_teacher_fraction
    factors = Factors(own.ce_weight, own.weight, own.kl_weight, router_gamma(config), fraction, own.balance)
    largest = config.train.batch_size + 1  # with a single image that is left over
    selected, schedule = config.router.dose == "selected-mean", own.schedule(config.train.epochs)
    return factors._replace(selected_mean=selected, largest_batch=largest, schedule=schedule)


def residual_stage(job: Job, name: str, number: int, base: Logits) -> Job:
    """The job of residual student `number` (from 1): a network `name` that learns what the logits of `base` lack.

    It has the schedule of the student, and draws (initial weights, order, augmentation, noise) of its own.
    """
    assert isinstance(job.config, DistillConfig)
    assert job.teacher is not None
    seed = seeded_generator(job.config.seed, f"residual-{number}").initial_seed()
    config = job.config.model_copy(update={"student": name, "seed": seed, "train": job.config.train.for_another()})
    settings, side, teacher = config.residual, job.images.side, job.teacher.model
    network = _fresh(name, job.images, seed, "network", job.device)
    if settings.init == "zero":
        nn.init.zeros_(network.head.weight)
        if network.head.bias is not None:
            nn.init.zeros_(network.head.bias)
    task: Task
    mode, criterion = job.mode, _criterion(config, job.images)
    if settings.loss == "inner":
        task = assemble(config, network, teacher, side, job.images.train.labels, base, mode, criterion=criterion)
    else:
        lr, decay = initial_lr(config, name), config.train.weight_decay
        recipe: Recipe = {"lr": lr, "weight_decay": decay, "mode": mode, "criterion": criterion}
        task = ResidualTask(mode.to_memory_format(network), teacher.forward, base, settings, **recipe)
    spots = task.spots if isinstance(task, DistillTask) else ()
    return replace(job, config=config, task=task.to(job.device), network=network, cost=cost(network, side), spots=spots)


def warmup_of(job: Job) -> tuple[WarmupTask, int] | None:
    """The stage in front of a distillation and its number of epochs; None for methods without one."""
    if not (isinstance(job.task, DistillTask) and isinstance(job.config, DistillConfig)):
        return None
    warmup, settings = job.task.distillers.warmup, job.config.method.warmed
    if warmup is None or job.teacher is None or settings is None:
        return None
    own, decay = initial_lr(job.config, job.config.student), job.config.train.weight_decay
    lr = settings.lr_of_warmup(job.teacher.model.name, job.config.student, own)
    task = WarmupTask(job.network, job.teacher.model, warmup, lr=lr, weight_decay=decay, mode=job.mode)
    return task.to(job.device), settings.warmup_epochs


def search_of(job: Job) -> SearchTask | None:
    """The search for a method's mixtures; None for methods without, and where nothing is left to be found."""
    if not (isinstance(job.task, DistillTask) and isinstance(job.config, DistillConfig)) or job.teacher is None:
        return None
    config, settings, mixer = job.config, job.config.method, job.task.feature_distiller
    if not (isinstance(settings, DFAConfig) and isinstance(mixer, DFA) and mixer.to_be_found):
        return None
    teacher = job.teacher.model
    sought = [Sought(k, mixer.spots[k], mixable_blocks(teacher, mixer.spots[k].teacher)) for k in mixer.to_be_found]
    purposes = [f"search/{one.place}" for one in sought][: 1 if settings.joint else None]
    fresh = [_fresh(config.student, job.images, config.seed, purpose, job.device) for purpose in purposes]
    students = [job.mode.to_memory_format(student) for student in fresh]
    blocks = partial(teacher.features, want="blocks")
    with _initialised(config.seed, "search"):
        task = SearchTask(students, blocks, sought, settings, mixer.set_weights, job.mode)
    return job.mode.to_memory_format(task.to(job.device))


def match_normalization(
    network: Artifact, images: Images, source: str, hint: str | None = None, side: ImageSize | None = None
) -> None:
    """Let a trained network see a data set's images as it was trained to.

    side  of its images; None: the data set's
    Raises UsageError where its classes are not those of the data set, or its images of another size.
    """
    side = images.side if side is None else side
    check_classes(network, images.dataset, source, hint)
    if network.card.side != side and any(info.size for info in network.model.infos):
        raise UsageError(f"{source}: was cut for images of {network.card.side} pixels, not of {side}")
    data = images.dataset
    network.model.set_input_normalization(network.card.mean, network.card.std, given=(data.mean, data.std))


def pin_inputs(config: DistillConfig, teacher: Path, sha256: str) -> DistillConfig:
    """The config with the place and the digest of its teacher and of its file of mixtures.

    Raises UsageError where the teacher is not the one that the config was pinned to before.
    """
    if config.teacher.sha256 not in (None, sha256):
        raise UsageError(f"{teacher}: is not the teacher this run began with (its SHA-256 differs)")
    chosen = config.teacher.model_copy(update={"weights": teacher, "sha256": sha256})
    return config.model_copy(update={"teacher": chosen, "method": mixtures.pinned(config.method)})


def _fresh(
    name: str, images: Images, seed: int, purpose: str, device: torch.device, drop_path: float = 0.0
) -> StagedModel:
    with _initialised(seed, purpose):
        return create(name, len(images.dataset.classes), images.side, drop_path=drop_path).to(device)


@contextmanager
def _initialised(seed: int, purpose: str) -> Iterator[None]:
    """Initial weights from a stream of their own, so that a router does not shift the student's."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeded_generator(seed, f"init/{purpose}").initial_seed())
        yield


def _matched_rates(config: DistillConfig, spots: int) -> Tensor | None:
    """The fractions per epoch and spot that an adaptive run logged; None for every other router."""
    if not isinstance(config.router, RandomMatchedConfig):
        return None
    assert config.router.run is not None, "the config's inputs are located first"
    run = RunDir(expanded(config.router.run))
    try:
        rates = torch.tensor([[spot.fraction for spot in epoch.spots] for epoch in epoch_records(run)])
        fits = rates.ndim == 2 and rates.shape[1] == spots and bool(((rates >= 0) & (rates <= 1)).all())
    except (UsageError, TypeError):
        fits = False
    if not fits:
        raise UsageError(f"router random-matched: {run.path} has no usable record of {spots} spots")
    return rates
