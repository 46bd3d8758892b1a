"""Runs of a sweep as Slurm arrays, through submitit (the extra `slurm`)"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, final

from sakd_cli.errors import UsageError
from sakd_cli.sweep.executor import Ended, Executor, Job, carried_out

MINUTES = 24 * 60  # of a run, where nothing else is said; one that is cut off is queued again and goes on
ALL = 10**6
LOST = 143


class Work:
    """What submitit carries out: one run; where Slurm takes the machine away it queues the same again."""

    def __init__(self, job: Job) -> None:
        self.job = job

    def __call__(self) -> int:
        return carried_out(self.job)

    def checkpoint(self) -> Any:
        """Asked by submitit at the end of the time or at a preemption."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(Work(self.job))


@final
class SlurmExecutor(Executor):
    """All that is ready at a time is one array. Runs, data and this installation must lie on shared storage.

    jobs       of an array at a time; None: as many as Slurm likes
    resources  parameters of submitit: slurm_partition, gpus_per_node, timeout_min ...; cluster: slurm, or local for
               processes on this machine
    folder     of submitit's own files

    Raises UsageError where submitit or Slurm is not there, or does not know a parameter.
    """

    def __init__(self, jobs: int | None, resources: Mapping[str, Any], folder: Path) -> None:
        try:
            import submitit
        except ImportError:
            raise UsageError("--executor slurm: submitit is not installed", "pip install 'sakd[slurm]'") from None
        options = dict(resources)
        cluster = options.pop("cluster", "slurm")
        try:
            self.executor = submitit.AutoExecutor(folder=folder.absolute() / "slurm", cluster=cluster)
            limit = {"slurm_array_parallelism": jobs} if jobs else {}
            self.executor.update_parameters(**({"timeout_min": MINUTES, "name": "sakd"} | limit | options))
        except (RuntimeError, ValueError, NameError, TypeError) as error:
            reason = str(error).partition("\n")[0]
            raise UsageError(f"--executor slurm: {reason}", "--resource takes submitit's parameters") from None
        self.cluster, self.tasks = cluster, dict[str, Any]()

    def about(self) -> str:
        return f"the cluster {self.cluster!r}, through submitit"

    def room(self) -> int:
        return ALL

    def submit(self, jobs: Sequence[Job]) -> None:
        with self.executor.batch():
            tasks = [self.executor.submit(Work(job)) for job in jobs]
        self.tasks |= {job.key: task for job, task in zip(jobs, tasks, strict=True)}

    def ended(self) -> list[Ended]:
        over = [key for key, task in self.tasks.items() if task.done()]
        return [Ended(key, _code(self.tasks.pop(key))) for key in over]

    def stop(self, signum: int) -> None:
        for task in self.tasks.values():
            task.cancel()

    def close(self) -> None:
        for task in self.tasks.values():
            task.cancel()


def _code(task: Any) -> int:
    """Exit code of a run; that of SIGTERM where the job was lost or cancelled."""
    return LOST if task.exception() is not None else int(task.result())
