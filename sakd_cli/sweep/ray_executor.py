"""Runs of a sweep as tasks of a Ray cluster (the extra `ray`): its scheduling, its parts of a GPU, its retries"""

import logging
import sys
from collections.abc import Mapping, Sequence
from typing import Any, final

from sakd_cli.errors import UsageError
from sakd_cli.sweep.executor import Ended, Executor, Job, carried_out, cores

RETRIES = 3  # of a task whose worker or machine is lost; it goes on from the run's last checkpoint
ALL = 10**6


@final
class RayExecutor(Executor):
    """One task per run. All that is ready is handed over; Ray decides when and where it runs.

    A worker that dies takes its run's process with it, which saves its state first where it can; the task is then
    retried and goes on from there. Runs and data must lie where every machine of the cluster sees them.

    jobs       at a time, as a share of this machine's cores for each; None: one core each
    per_gpu    runs that share a GPU, where the cluster has any
    resources  address of the cluster, and what `ray.remote` takes for a task: num_cpus, num_gpus, max_retries ...

    Raises UsageError where Ray is not installed or the cluster does not answer.
    """

    def __init__(self, jobs: int | None, per_gpu: int, resources: Mapping[str, Any]) -> None:
        try:
            import ray
        except ImportError:
            raise UsageError("--executor ray: Ray is not installed", "pip install 'sakd[ray]'") from None
        options = dict(resources)
        address = options.pop("address", None)
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)
        except (ConnectionError, ValueError, RuntimeError) as error:
            reason = str(error).partition("\n")[0]
            raise UsageError(f"--executor ray: {reason}", "start a cluster with ray start --head") from None
        self.ray, self.tasks, self.stopping = ray, dict[Any, str](), False
        options.setdefault("num_cpus", max(1, cores() // jobs) if jobs else 1)
        options.setdefault("num_gpus", 1 / per_gpu if ray.cluster_resources().get("GPU") else 0)
        options.setdefault("max_retries", RETRIES)
        try:
            self.remote = ray.remote(carried_out).options(**options)
        except (TypeError, ValueError) as error:
            raise UsageError(f"--resource: {str(error).partition(chr(10))[0]}", "as ray.remote takes them") from None

    def about(self) -> str:
        return f"a Ray cluster of {len(self.ray.nodes())} machine(s)"

    def room(self) -> int:
        return ALL

    def submit(self, jobs: Sequence[Job]) -> None:
        self.tasks |= {self.remote.remote(job): job.key for job in jobs}

    def ended(self) -> list[Ended]:
        if not self.tasks:
            return []
        ready, _ = self.ray.wait(list(self.tasks), num_returns=len(self.tasks), timeout=0)
        return [Ended(self.tasks.pop(task), self._code(task)) for task in ready]

    def stop(self, signum: int) -> None:
        for task in self.tasks:
            self.ray.cancel(task, force=self.stopping)
        self.stopping = True

    def close(self) -> None:
        self.ray.shutdown()

    def _code(self, task: Any) -> int:
        """Exit code of a run; that of SIGTERM where the task was lost for good, or cancelled."""
        try:
            return int(self.ray.get(task))
        except self.ray.exceptions.RayError as error:
            print(f"{type(error).__name__}: {error}".partition("\n")[0], file=sys.stderr)
            return 143
