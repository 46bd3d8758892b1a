"""One training from its words to its run directory, with its teacher's in front where that is asked for"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from sakd_cli.config.training import DistillConfig, PretrainConfig
from sakd_cli.data.sources import describe_reading
from sakd_cli.engine.reporter import Reporter
from sakd_cli.rundir import ResumePlan, RunDir
from sakd_cli.runs import build, launch
from sakd_cli.runs.extras import run_extensions
from sakd_cli.runs.job import Job
from sakd_cli.runs.locate import is_missing
from sakd_cli.runs.resume import find_matching_run

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
            return launch.carry_out(job, intent, self.reporter, again)


def tried(words: DistillConfig | PretrainConfig) -> dict[str, Any]:
    """The plan of a training and one batch of it, with an untrained teacher where it is yet to be trained."""
    if isinstance(words, PretrainConfig):
        return launch.try_one_batch(build.pretraining(words))
    return launch.try_one_batch(
        build.distillation(words, build.untrained_teacher(words) if is_missing(words) else None)
    )
