"""The training of one network, and what its method does in front of it."""

from collections.abc import Callable, Iterator
from functools import partial

from torch import Tensor

from sakd_cli import distributed
from sakd_cli.batch import Loader, Precomputed
from sakd_cli.config.train import Train
from sakd_cli.config.training import DistillConfig
from sakd_cli.data.sources import views
from sakd_cli.engine.look_ahead import LookAhead
from sakd_cli.engine.optim import Optimizer
from sakd_cli.engine.recorder import SpotRecorder
from sakd_cli.engine.reporter import Reporter
from sakd_cli.engine.runtime import compiled
from sakd_cli.engine.task import Task
from sakd_cli.engine.trainer import MAIN, Trainer, TrainingOutput
from sakd_cli.runs import mixtures
from sakd_cli.runs.build import search_of, warmup_of
from sakd_cli.runs.extension import TrainerFactory, loader_of
from sakd_cli.runs.job import Job
from sakd_cli.runs.teacher_outputs import open_teacher_cache
from sakd_cli.tasks.distill import DistillTask, PlainPass
from sakd_cli.tasks.pretrain import WarmupTask
from sakd_cli.tasks.residual import ResidualTask
from sakd_cli.tasks.search import SearchTask, batches
from sakd_cli.writing import write_json


def training(job: Job, phase: str, output: TrainingOutput, factory: TrainerFactory) -> Iterator[Trainer]:
    """The preparations of a job, then its own training as `phase`; each is built when the one before is done."""
    before = "" if phase == MAIN else f"{phase}-"
    if isinstance(job.task, DistillTask) and isinstance(job.config, DistillConfig) and job.config.teacher.cache:
        assert job.teacher is not None
        folder, images = job.config.runs_dir / "teacher-cache", views(job.images.train, job.images.dataset, job.device)
        cache = open_teacher_cache(folder, job.teacher, images, job.mode, job.device, factory.reporter)
        job.task.teacher_features = cache
    yield from _warm_up(job, before, factory)
    yield from _search(job, before, factory)
    recorder, train = None, job.images.train
    if job.spots:
        names = [(spot.name, spot.kind) for spot in job.spots]
        recorder = SpotRecorder(names, len(job.images.dataset.classes), len(train), job.device, train.origins())
    epochs, loader = job.config.train.epochs, _looking_ahead(job, job.task, loader_of(job), factory.reporter)
    yield factory.trainer(job, job.task, phase, epochs, loader=loader, output=output, recorder=recorder)


def _looking_ahead(job: Job, task: Task, loader: Loader, reporter: Reporter) -> Loader:
    """The batches, with what frozen networks make of them where these look ahead; otherwise each step asks them."""
    steps = job.mode.ahead
    from_bank = isinstance(task, DistillTask) and not isinstance(task.teacher_features, PlainPass)
    if steps == 1 or from_bank or not isinstance(task, DistillTask | ResidualTask | WarmupTask | SearchTask):
        return loader
    look: Callable[[Tensor], Precomputed] = task.precompute
    if job.mode.compiled and task is job.task:
        look = compiled(look, reporter.warn)
    return LookAhead(loader, look, steps=steps, device=job.device)


def _warm_up(job: Job, before: str, factory: TrainerFactory) -> Iterator[Trainer]:
    """A method's own warm-up, by SGD at a constant learning rate."""
    if (stage := warmup_of(job)) is not None:
        task, epochs = stage
        train = job.config.train
        plain = Train(momentum=train.momentum, nesterov=train.nesterov, schedule="constant")
        optimizer = Optimizer(task.groups(), plain)
        loader = _looking_ahead(job, task, loader_of(job), factory.reporter)
        yield factory.trainer(job, task, f"{before}warmup", epochs, loader=loader, optimizer=optimizer)
        task.warmup.requires_grad_(False)


def _search(job: Job, before: str, factory: TrainerFactory) -> Iterator[Trainer]:
    """The search for a method's mixtures, where they are not known, and their file."""
    if (search := search_of(job)) is not None:
        config, settings, images = job.config, search.settings, job.images
        wrap = partial(_looking_ahead, job, search, reporter=factory.reporter)
        size, seed = config.train.batch_size, config.seed
        loader = batches(
            settings, images.dataset, images.train, batch_size=size, seed=seed, device=job.device, wrap=wrap
        )
        both = search.optimizer(config.train.momentum)
        yield factory.trainer(job, search, f"{before}search", settings.search_epochs, loader=loader, optimizer=both)
        search.settle()
    if (mixed := mixtures.record(job, factory.reporter.warn)) is not None and distributed.is_main_process():
        write_json(factory.run.path / f"{before}{mixtures.NAME}", mixed.plain())
