"""The extension contract: what a run does and delivers beside its main training."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sakd_cli import distributed
from sakd_cli.batch import Loader
from sakd_cli.data.dataset import Split
from sakd_cli.data.loader import EvalLoader, HeldOutLoader, TrainLoader
from sakd_cli.documents.training import PlannedNetwork
from sakd_cli.engine.evaluate import InterruptibleBatches
from sakd_cli.engine.graphs import Cuda
from sakd_cli.engine.optim import BilevelOptimizer, Optimizer
from sakd_cli.engine.recorder import SpotRecorder
from sakd_cli.engine.reporter import Reporter
from sakd_cli.engine.task import Task
from sakd_cli.engine.trainer import EvaluationData, Trainer, TrainingOutput
from sakd_cli.rundir import RunDir
from sakd_cli.runs.job import Job
from sakd_cli.runs.recipe import control_of, optimizer_of
from sakd_cli.tasks.distill import DistillTask


def loader_of(job: Job) -> Loader:
    """The training images of a job in batches; each with held-out ones for a router that learns from such."""
    config, task = job.config, job.task
    loader = partial(TrainLoader, dataset=job.images.dataset, seed=config.seed, device=job.device)
    train = loader(job.images.shown, batch_size=config.train.batch_size, noise_width=task.noise_width)
    held_out = job.images.calibration
    if held_out is None or not (isinstance(task, DistillTask) and task.router.meta):
        return train
    size = min(config.train.batch_size, len(held_out))
    whole = held_out.subset(torch.arange(len(held_out) // size * size))  # batches of one size
    plain = replace(job.images.dataset, mixing=None)
    return HeldOutLoader(train, loader(whole, dataset=plain, batch_size=size, noise_width=0))


def eval_batches(
    job: Job, split: Split, reporter: Reporter, batch_size: int = 1000
) -> InterruptibleBatches[tuple[Tensor, Tensor]]:
    """The images of a split as they are evaluated, between two batches of which the reporter may stop it."""
    loader = EvalLoader(split, job.images.dataset, device=job.device, batch_size=batch_size)
    return InterruptibleBatches(loader, reporter)


@dataclass(frozen=True)
class TrainerFactory:
    """What all trainings of one run share, and how one of them is set up."""

    run: RunDir
    evaluation: EvaluationData
    reporter: Reporter

    def trainer(
        self,
        job: Job,
        task: Task,
        phase: str,
        epochs: int,
        *,
        loader: Loader | None = None,
        optimizer: Optimizer | BilevelOptimizer | None = None,
        output: TrainingOutput | None = None,
        recorder: SpotRecorder | None = None,
    ) -> Trainer:
        """A trainer of `task`; what is not given is that of the job's ordinary training."""
        settings = job.config
        if settings.runtime.sync_batchnorm and distributed.world_size() > 1:
            distributed.convert_sync_batchnorm(task)
        return Trainer(
            task,
            loader or loader_of(job),
            optimizer or optimizer_of(job, task),
            self.run,
            self.reporter,
            epochs=epochs,
            log_every=settings.log_every,
            save_every=settings.save_every,
            output=output,
            recorder=recorder,
            phase=phase,
            graphs=Cuda(job.device) if job.mode.graphed else None,
            control=None if output is None else control_of(job, task),
        )


class RunExtension(ABC):
    """One such thing; `launch.run_extensions` lists the kinds. What a kind has no use for it leaves as it is here."""

    label: str = ""
    """What it adds to the run's name."""
    notice: str = ""
    """What is said of it before the run."""

    @abstractmethod
    def finalize(self, factory: TrainerFactory, figures: dict[str, dict[str, Any]]) -> dict[str, Any]:
        """Once all is trained: what it adds to the summary, by field; `figures` of each phase."""

    def validate(self) -> None:
        """Raise UsageError, before anything is trained, where it cannot be."""
        return

    def networks(self) -> list[PlannedNetwork]:
        """Rows of the networks it brings, for `--dry-run`."""
        return []

    def plan(self) -> dict[str, Any]:
        """What else `--dry-run` shows of it."""
        return {}

    def metadata(self) -> dict[str, Any]:
        """What the delivered network's card and the summary say of it."""
        return {}

    def publish(self, run: Path, weights: bytes) -> None:
        """Write what belongs to the delivered network, whose file holds `weights`, whenever that is written."""
        return

    def trainings(self, factory: TrainerFactory) -> Iterator[Trainer]:
        """What is trained after the main training, each when the one before is done."""
        return iter(())
