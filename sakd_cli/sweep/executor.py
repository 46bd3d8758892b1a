"""The executor contract: who trains the runs of a series or sweep. Here: this machine; beside it: Ray and Slurm.

Why processes. At batch 64 a step on a GPU is a thousand launches, which the threads of one interpreter make one after
the other; N processes on N cores do not. They share no random state, no signal and no failure, so each run is to the
bit the run it is alone. Each costs about 0.5 GB of the GPU and of main memory, and its own images and networks.
Their kernels take turns on a GPU unless NVIDIA's MPS daemon runs (`nvidia-cuda-mps-control -d`, before the first of
them), which lets them run beside each other (guide `speed`).
"""

import os
import shutil
import signal
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from importlib import import_module
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple, final

import sakd_cli
from sakd_cli.config.code import TRUST
from sakd_cli.errors import UsageError
from sakd_cli.rundir import RunDir
from sakd_cli.torchrun import cpu_count


def library(name: str, needed_by: str, package: str = "", extra: str = "") -> Any:
    """A library of an extra. Raises UsageError where it is not installed; package: as it calls itself."""
    try:
        return import_module(name)
    except ImportError:
        hint = f"pip install 'sakd[{extra or name}]'"
        raise UsageError(f"{needed_by}: {package or name} is not installed", hint) from None


class Job(NamedTuple):
    """A command of sakd to carry out: its name, its arguments, where its stderr goes, and the folder it runs in.

    The command resumes what an earlier attempt left, so it may be carried out more than once, but not twice at a time.
    config, run   what the command trains, and the run that it resumes (None: a new one)
    """

    key: str
    arguments: tuple[str, ...]
    log: Path
    folder: Path
    config: Any = None
    run: RunDir | None = None


class Ended(NamedTuple):
    """How a job ended: its exit code (-N where signal N ended it)."""

    key: str
    code: int


class Executor(ABC):
    """Carries out jobs, as many at a time as it likes."""

    elsewhere = True
    """Whether in other processes than this one."""

    @abstractmethod
    def about(self) -> str:
        """Where it runs, in short."""

    @abstractmethod
    def room(self) -> int:
        """How many more jobs it takes now."""

    @abstractmethod
    def submit(self, jobs: Sequence[Job]) -> None:
        """Take these jobs, at most as many as there is room for."""

    @abstractmethod
    def ended(self) -> list[Ended]:
        """Those that ended since the last call."""

    def stop(self, signum: int) -> None:
        """Ask every job to save its state and to end; a second time: to end at once."""
        return

    def close(self) -> None:
        """Release all resources. Nothing runs any more, or an error has come up and what runs must end."""
        return


def start_job(job: Job, variables: dict[str, str], *, session: bool) -> subprocess.Popen[bytes]:
    """The process of a job; `child` sees to it that it does not outlive this one. `session`: in one of its own."""
    command, null = [sys.executable, "-P", "-m", "sakd_cli.cli.child", str(os.getpid())], subprocess.DEVNULL
    where: dict[str, Any] = {"cwd": job.folder, "env": variables, "start_new_session": session}
    with os.fdopen(os.open(job.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NONBLOCK, 0o666), "ab") as log:
        return subprocess.Popen([*command, *job.arguments], stdin=null, stdout=null, stderr=log, **where)


def environment_of_job(more: dict[str, str] | None = None, *, several: int = 1) -> dict[str, str]:
    """Environment of a job: no SAKD_* variable (its config is complete), this very package, its share of the cores.

    several   as many run at a time; OMP_NUM_THREADS from outside wins
    """
    threads = {"OMP_NUM_THREADS": str(max(1, cpu_count() // several))} if several > 1 else {}
    clean = {name: value for name, value in os.environ.items() if not name.startswith("SAKD_") or name == TRUST}
    here = str(Path(sakd_cli.__file__).parents[1])
    paths = os.pathsep.join(filter(None, [here, clean.get("PYTHONPATH")]))
    return threads | clean | (more or {}) | {"PYTHONPATH": paths}


def gpus() -> list[str]:
    """Names of the GPUs that a process may use, as CUDA_VISIBLE_DEVICES has them up to a -1; without torch."""
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return list(takewhile(lambda name: name.strip() not in ("", "-1"), visible.split(",")))
    if shutil.which("nvidia-smi") is None:
        return []
    asked = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return [str(k) for k in range(sum(line.startswith("GPU ") for line in asked.stdout.splitlines()))]


@final
class LocalExecutor(Executor):
    """Child processes of this one, each on its GPU and with its part of the cores.

    jobs  at a time; None: one, or `per_gpu` for every GPU
    """

    def __init__(self, jobs: int | None, per_gpu: int, device: str) -> None:
        several = gpus() if device in ("auto", "cuda") else []
        self.jobs = jobs or max(1, len(several) * per_gpu)
        if several and self.jobs > len(several) * per_gpu:
            raise UsageError(
                f"--jobs {self.jobs}: there is room for {len(several) * per_gpu} on {len(several)} GPU(s)",
                hint="--jobs-per-gpu N for several on one",
            )
        # Round and round, so that two jobs meet on a GPU only when every GPU has one.
        self.free = [several[k % len(several)] if several else "" for k in range(self.jobs)]
        self.running: dict[str, tuple[subprocess.Popen[bytes], str]] = {}

    def about(self) -> str:
        return f"this machine, {self.jobs} at a time"

    def room(self) -> int:
        return len(self.free)

    def submit(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            gpu = self.free.pop(0)
            variables = environment_of_job({"CUDA_VISIBLE_DEVICES": gpu} if gpu else {}, several=self.jobs)
            # A session of its own: Ctrl-C reaches this process alone, which passes it on.
            self.running[job.key] = (start_job(job, variables, session=True), gpu)

    def ended(self) -> list[Ended]:
        found = [Ended(key, child.returncode) for key, (child, _) in self.running.items() if child.poll() is not None]
        self.free += [self.running.pop(one.key)[1] for one in found]
        return found

    def stop(self, signum: int) -> None:
        for child, _ in self.running.values():
            child.send_signal(signum)

    def close(self) -> None:
        for child, _ in self.running.values():
            child.terminate()


@final
class InProcessExecutor(Executor):
    """Trains one run after another in this process; an error or a stop of one ends all."""

    elsewhere = False

    def __init__(self, train: Callable[[Job], None]) -> None:
        self.train, self.over = train, list[Ended]()

    def about(self) -> str:
        return "this process"

    def room(self) -> int:
        return 1

    def submit(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            self.train(job)
            self.over.append(Ended(job.key, 0))

    def ended(self) -> list[Ended]:
        over, self.over = self.over, []
        return over


def run_job(job: Job) -> int:
    """Carry out one job here and wait for it: what a worker of Ray or Slurm does. Its exit code.

    A worker that is asked to end passes that on, and the job saves its state first.
    """
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with start_job(job, environment_of_job(), session=False) as child:
        try:
            return child.wait()
        except BaseException:  # Ray's KeyboardInterrupt, submitit's SystemExit
            child.send_signal(signal.SIGINT)
            child.wait()
            raise
