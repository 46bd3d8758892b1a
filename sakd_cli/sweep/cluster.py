"""Runs of a sweep on a cluster: tasks of Ray (the extra `ray`), or arrays of Slurm through submitit (`slurm`)."""

import logging
import sys
import time
from abc import ABC
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, final

from sakd_cli.errors import UsageError, first_line, one_line
from sakd_cli.sweep.executor import Ended, Executor, Job, library, run_job
from sakd_cli.torchrun import cpu_count

RETRIES = 3  # of a Ray task whose worker or machine is lost; it resumes from the run's last checkpoint
MINUTES = 24 * 60  # of a run under Slurm, where nothing else is said; one that is cut off is queued again and resumes
HINT = "--resource takes submitit's parameters"
TASKS = ("nodes", "tasks_per_node", "slurm_nodes", "slurm_ntasks_per_node")
ALL = 10**6
PATIENCE = 15.0  # seconds until a result that is not there when Slurm says that a job is over is given up
LOST = 143  # exit code of a run that was lost for good, or cancelled: that of SIGTERM


class ClusterExecutor(Executor, ABC):
    """Hands over all that is ready; the cluster decides when and where it runs, on storage that all machines share."""

    def room(self) -> int:
        return ALL


@final
class RayExecutor(ClusterExecutor):
    """One task per run. A worker that dies takes its run's process with it, which saves its state first where it can;
    the task is then retried and resumes from there.

    jobs       at a time, as a share of this machine's cores for each; None: one core each
    per_gpu    runs that share a GPU, where the cluster has any
    resources  address of the cluster, and what `ray.remote` takes for a task: num_cpus, num_gpus, max_retries ...

    Raises UsageError where Ray is not installed or the cluster does not answer.
    """

    def __init__(self, jobs: int | None, per_gpu: int, resources: Mapping[str, Any]) -> None:
        ray = library("ray", "--executor ray", "Ray")
        options = dict(resources)
        address = options.pop("address", None)
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise UsageError(f"--executor ray: {first_line(error)}", "start a cluster with ray start --head") from None
        self.ray, self.tasks, self.stopping = ray, dict[Any, str](), False
        options.setdefault("num_cpus", max(1, cpu_count() // jobs) if jobs else 1)
        options.setdefault("num_gpus", 1 / per_gpu if ray.cluster_resources().get("GPU") else 0)
        options.setdefault("max_retries", RETRIES)
        try:
            self.remote = ray.remote(run_job).options(**options)
        except (TypeError, ValueError) as error:
            raise UsageError(f"--resource: {first_line(error)}", "as ray.remote takes them") from None

    def about(self) -> str:
        return f"a Ray cluster of {len(self.ray.nodes())} machine(s)"

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
        try:
            return int(self.ray.get(task))
        except self.ray.exceptions.RayError as error:
            print(f"{type(error).__name__}: {error}".partition("\n")[0], file=sys.stderr)
            return LOST


def _once() -> Callable[[logging.LogRecord], bool]:
    """Whether this line of a library's code has logged nothing yet."""
    said = set[tuple[str, int]]()

    def new(record: logging.LogRecord) -> bool:
        place = record.pathname, record.lineno
        known = place in said
        said.add(place)
        return not known

    return new


class Work:
    """What submitit carries out: one run; where Slurm takes the machine away it queues the same again."""

    def __init__(self, job: Job) -> None:
        self.job = job

    def __call__(self) -> int:
        return run_job(self.job)

    def checkpoint(self) -> Any:
        """Asked by submitit at the end of the time or at a preemption."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(Work(self.job))


@final
class SlurmExecutor(ClusterExecutor):
    """All that is ready at a time is one array.

    jobs       of an array at a time; None: as many as Slurm likes
    resources  parameters of submitit: slurm_partition, gpus_per_node, timeout_min ...; cluster: slurm, or local for
               processes on this machine
    folder     of submitit's own files

    Raises UsageError where submitit or Slurm is not there, or does not know a parameter.
    """

    def __init__(self, jobs: int | None, resources: Mapping[str, Any], folder: Path) -> None:
        submitit = library("submitit", "--executor slurm", extra="slurm")
        # It has two handlers, and warns at every look where Slurm keeps no accounts.
        log = logging.getLogger("submitit")
        log.handlers, log.filters = log.handlers[:1], [_once()]
        options = dict(resources)
        cluster = options.pop("cluster", "slurm")
        try:
            if any(options.get(name, 1) != 1 for name in TASKS):
                raise ValueError(f"a run is one task: {', '.join(TASKS)} are 1")
            self.executor = submitit.AutoExecutor(folder=folder.absolute() / "slurm", cluster=cluster)
            limit = {"slurm_array_parallelism": jobs} if jobs else {}
            self.executor.update_parameters(**({"timeout_min": MINUTES, "name": "sakd"} | limit | options))
        except (RuntimeError, ValueError, NameError, TypeError, AssertionError) as error:
            raise UsageError(f"--executor slurm: {first_line(error)}", HINT) from None
        self.cluster, self.tasks, self.stops = cluster, dict[str, tuple[Job, Any]](), 0
        self.over = dict[str, float]()  # when it was first seen

    def about(self) -> str:
        return f"the cluster {self.cluster!r}, through submitit"

    def submit(self, jobs: Sequence[Job]) -> None:
        try:
            with self.executor.batch():
                tasks = [self.executor.submit(Work(job)) for job in jobs]
        except RuntimeError as error:  # what sbatch has said
            raise UsageError(f"--executor slurm: {one_line(error, 160)}", HINT) from None
        self.tasks |= {job.key: (job, task) for job, task in zip(jobs, tasks, strict=True)}

    def ended(self) -> list[Ended]:
        now, tasks = time.monotonic(), {key: task for key, (_, task) in self.tasks.items()}
        done = [key for key, task in tasks.items() if self.stops > 1 or task.done()]
        self.over = {key: self.over.get(key, now) for key in done}
        # submitit would wait for the result of each lost one in turn.
        here = [key for key in done if self.stops or tasks[key].paths.result_pickle.exists()]
        given_up = [key for key in done if key not in here and now - self.over[key] >= PATIENCE]
        return [Ended(key, self._code(*self.tasks.pop(key))) for key in here + given_up]

    def stop(self, signum: int) -> None:
        self.stops += 1
        for _, task in self.tasks.values():
            task.cancel(check=False)  # scancel itself says what is wrong
            task.watcher.clear()  # which asks the more seldom the longer the sweep has gone on

    def close(self) -> None:
        self.stop(0)

    def _code(self, job: Job, task: Any) -> int:
        if self.stops:  # submitit would wait for the answer of each that never began
            return LOST
        task._results_timeout_s = 0
        if task.exception() is None:
            return int(task.result())
        with job.log.open("a") as log:  # where the error of a run is looked for
            log.write(f"error: {self.cluster} job {task.job_id} gave no exit code, its state is {task.state}\n")
        return LOST
