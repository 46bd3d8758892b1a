"""Several command lines of ours at once, each a process of its own, on one machine or one GPU.

Why processes. At batch 64 a step on a GPU is a thousand launches, and a Python interpreter makes them one after the
other: N threads of one process launch no more per second than one does. N processes on N cores do; they also share no
random state, no signal and no failure, so each run is to the bit the run it is alone. What they cost: about half a
gigabyte of the GPU each for a context, as much main memory for torch, and images and networks once per process.
Their kernels take turns on a GPU unless NVIDIA's MPS daemon runs (`nvidia-cuda-mps-control -d`, before the first of
them), which lets them run beside each other. Nothing of this was measured on a GPU.
"""

import json
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from sakd_cli.errors import SakdError, SeriesError, Stopped
from sakd_cli.sweep.executor import command, surroundings

if TYPE_CHECKING:
    from sakd_cli.engine.reporter import Reporter

Program = Callable[[Sequence[str]], list[str]]
PAUSE = 0.05  # seconds between two looks at the processes
BUG = 1


class Order(NamedTuple):
    """A command line of `sakd`, without `sakd`, that prints one JSON document; `name` precedes its messages."""

    name: str
    arguments: list[str]


class Done(NamedTuple):
    """How one ended: its exit code, its document (None unless the code is 0) and its line of error."""

    name: str
    code: int
    document: dict[str, Any] | None
    complaint: str


class _Child:
    """One command line at work. Its reporter is passed on line by line as it comes."""

    def __init__(self, order: Order, reporter: "Reporter", environment: dict[str, str], program: Program) -> None:
        self.name, self.reporter, self.complaint, self.hint = order.name, reporter, "", ""
        self._out = tempfile.TemporaryFile()  # noqa: SIM115  as long as the process
        # A process group of its own: Ctrl-C at the terminal comes from us alone, and once.
        self.process = subprocess.Popen(
            program(order.arguments),
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=self._out,
            stderr=subprocess.PIPE,
            text=True,
            errors="backslashreplace",
            process_group=0,
        )
        assert self.process.stderr is not None
        self._reader = threading.Thread(target=self._follow, args=(self.process.stderr,), daemon=True)
        self._reader.start()

    def _follow(self, lines: IO[str]) -> None:
        with lines:
            self._pass_on(lines)

    def _pass_on(self, lines: IO[str]) -> None:
        for line in lines:
            kind, _, text = line.rstrip("\n").partition(": ")
            if kind == "error":
                self.complaint = text
            elif kind == "warning":
                self.reporter.warn(f"{self.name}: {text}")
            elif kind != "hint":
                self.reporter.say(f"{self.name}: {line.rstrip()}")

    def done(self) -> Done | None:
        """How it ended; None while it is at work."""
        code = self.process.poll()
        if code is None:
            return None
        self._reader.join()
        self._out.seek(0)
        document = json.loads(self._out.read()) if code == 0 else None
        self._out.close()
        code = code if code >= 0 else 128 - code
        return Done(self.name, code, document, self.complaint or f"left with exit code {code}")


def run_together(
    orders: Sequence[Order], reporter: "Reporter", *, jobs: int, again: str, program: Program = command
) -> list[dict[str, Any]]:
    """Run them, `jobs` at once, to the end of the last; their documents, in order.

    Ctrl-C and SIGTERM go to every one of them, a second one too; none is started after that.

    again    the command that goes on with what a stop or a failure has left
    program  the process of an order's arguments
    Raises Stopped where a signal came, else SeriesError where one failed: the others are run to their end nevertheless.
    """
    waiting, working, ended = list(orders), list[_Child](), dict[str, Done]()
    environment = surroundings(several=max(1, min(jobs, len(orders))))
    with _signals() as came, _ended_with_us(working):
        told = 0
        while working or (waiting and not came):
            while waiting and len(working) < jobs and not came:
                working.append(_Child(waiting.pop(0), reporter, environment, program))
            for number in came[told:]:
                told += 1
                if told == 1:
                    reporter.say("stopping: every run finishes its step and saves; once more to exit at once")
                for child in working:
                    child.process.send_signal(number)
            time.sleep(PAUSE)
            for child in list(working):
                if (done := child.done()) is not None:
                    working.remove(child)
                    ended[done.name] = done
                    if done.code and not came:
                        reporter.warn(f"{done.name}: {done.complaint}")
    if came:
        raise Stopped(came[0], f"{len(orders)} runs, all that was trained is saved", f"go on with {again}")
    failed = [ended[order.name] for order in orders if ended[order.name].code]
    if failed:
        raise _failure(failed, len(orders), again)
    return [ended[order.name].document or {} for order in orders]


def _failure(failed: list[Done], of: int, again: str) -> SakdError:
    """The error of several runs: what the first says, and the worst exit code."""
    text = f"{len(failed)} of {of} runs failed; {failed[0].name}: {failed[0].complaint}"
    return SeriesError(text, f"what is finished stays: {again}", worst([done.code for done in failed]))


def worst(codes: Sequence[int]) -> int:
    """The exit code of several failures: a bug's, else the highest."""
    return BUG if BUG in codes else max(codes)


@contextmanager
def _ended_with_us(working: list[_Child]) -> Iterator[None]:
    """Whatever goes wrong here, no process is left at work without us."""
    try:
        yield
    finally:
        for child in working:
            child.process.terminate()


@contextmanager
def _signals() -> Iterator[list[int]]:
    """The signals that came so far, instead of what they would do."""
    came: list[int] = []
    before = {
        number: signal.signal(number, lambda signum, frame: came.append(signum))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
