"""The kinds of run extensions. To add one: a class of `extension.py`'s contract, one line below."""

from sakd_cli.config.training import DistillConfig
from sakd_cli.runs.branches import StudentBranches
from sakd_cli.runs.extension import RunExtension
from sakd_cli.runs.job import Job
from sakd_cli.runs.mixtures import Mixed, of_job
from sakd_cli.runs.residual_chain import Chain
from sakd_cli.runs.survey import Surveyed
from sakd_cli.tasks.distill import DistillTask
from sakd_cli.tasks.sftn import SftnTask


def run_extensions(job: Job) -> list[RunExtension]:
    """What this job has beside its main training, validated. Raises UsageError where something cannot be."""
    config, task = job.config, job.task
    found: list[RunExtension] = []
    if isinstance(task, SftnTask):
        found.append(StudentBranches(task))
    if isinstance(config, DistillConfig) and config.residual.students > 0:
        found.append(Chain(job))
    if isinstance(task, DistillTask) and task.graft is not None:
        found.append(Surveyed(job))
    if of_job(job):
        found.append(Mixed(job))
    for extension in found:
        extension.validate()
    return found
