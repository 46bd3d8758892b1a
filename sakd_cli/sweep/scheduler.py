"""The one scheduler of a series and of a sweep: which runs are finished, start now, wait, have failed.

All of it is read from the run directories. The scheduler's own folder holds the configs of the runs, their stderr and
the error of each that failed; it may be deleted at any time.
"""

import hashlib
import re
import time
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import Any

from filelock import FileLock

from sakd_cli.config import code
from sakd_cli.config.grid import Member
from sakd_cli.config.resolve import flat
from sakd_cli.config.routers import RandomMatchedConfig
from sakd_cli.config.training import PROCEDURES, DistillConfig, RunConfig
from sakd_cli.engine.reporter import Reporter, stop_signals_to
from sakd_cli.errors import RunInUseError, SeriesError, Stopped
from sakd_cli.files import MOST_LOG, read_bytes, sha256, weights_file, yaml_bytes
from sakd_cli.report.render.format import number, plain
from sakd_cli.rundir import RunDir
from sakd_cli.runs.locate import find_teacher, weights_at
from sakd_cli.runs.resume import AUTO, own_settings
from sakd_cli.sweep.executor import Executor, Job
from sakd_cli.sweep.reuse import RunIndex, config_identity
from sakd_cli.writing import acquire_lock, make_folder, write_aside, write_json

ATTEMPTS = 3  # of one call to get a run to its end that a signal keeps ending
IN_USE_PAUSE = 20.0  # seconds before a run is tried again that another process works on
IN_USE = RunInUseError.exit_code
CLAIMED_PAUSE = 2.0  # seconds before it is looked again at a run that another sweep trains
CLAIMED = "another command of this sweep trains it"
LONGEST = 150  # characters of the name of a run's files
BUG = 1  # exit code that is worse than any mistake's


class State(StrEnum):
    """What has become of a run of a sweep; blocked: a run that it waits for has failed."""

    waiting = "waiting"
    running = "running"
    done = "done"
    failed = "failed"
    blocked = "blocked"


@dataclass
class ScheduledRun:
    """A run of the sweep and what has become of it; `error` of a failed one is one line, `code` its exit code."""

    member: Member
    state: State = State.waiting
    run: RunDir | None = None
    error: str | None = None
    code: int = 0
    attempts: int = 0
    resumed: bool = False
    already_done: bool = False  # whether it was finished when the sweep began
    not_before: float = 0.0


class Scheduler:
    """Knows every run of a series or sweep; `refresh` reads their states from the disk, `run` trains what is left.

    folder   the scheduler's own
    fresh    every run is made anew, even where an earlier one has the same settings
    changed  called with every entry whose state has changed; may be replaced
    """

    def __init__(self, members: Sequence[Member], runs_dir: Path, folder: Path, *, fresh: bool = False) -> None:
        self.entries = {member.key: ScheduledRun(member) for member in members}
        self.folder, self.fresh, self.index = folder, fresh, RunIndex(runs_dir, fresh=fresh)
        self._running = dict[str, ScheduledRun]()
        self._claims = dict[str, FileLock]()
        self.changed: Callable[[ScheduledRun], None] = lambda entry: None
        self.refresh()
        for entry in self.entries.values():
            entry.already_done = entry.state is State.done

    def refresh(self, *, forgive: bool = False) -> None:
        """Read from the disk how each run stands; with `forgive` those that failed are to be tried again."""
        self.index.refresh()
        for entry in self.entries.values():
            if forgive and entry.state in (State.failed, State.blocked):
                self._note(entry).unlink(missing_ok=True)
                entry.state, entry.error, entry.attempts = State.waiting, None, 0
            if entry.state is State.waiting:
                self._settle(entry)
                self._remember(entry)
        self._block()

    def leave_out(self, unwanted: Container[str]) -> None:
        """Forget the runs of these keys, and those that wait for them."""
        for key, entry in list(self.entries.items()):
            if key in unwanted or any(need not in self.entries for need in entry.member.needs):
                del self.entries[key]

    def counts(self) -> dict[str, int]:
        """How many there are in each state."""
        states = [entry.state for entry in self.entries.values()]
        return {state.value: states.count(state) for state in State}

    def run(
        self,
        executor: Executor,
        signals: Sequence[int] = (),
        *,
        again: str = "",
        refresh: Callable[[], None] = lambda: None,
        pause: float = 0.0,
    ) -> None:
        """Train what is not finished; what fails stops no other run.

        signals  those that came so far (`received_signals`): each is passed on to all runs, none is started after one
        again    the command that continues
        refresh  called after every round, `pause` seconds apart
        Raises Stopped once all runs that a signal was passed on to have ended.
        """
        for entry in self.entries.values():
            if executor.elsewhere and entry.state is not State.done:
                code.require_files(flat(entry.member.config.model_dump()).values())
        for folder in ("jobs", "failed"):
            make_folder(self.folder / folder)
        passed_on = 0
        while self._running or (self.unfinished() and not signals):
            for signum in signals[passed_on:]:
                executor.stop(signum)
                passed_on += 1
            if not signals:
                self._start(executor)
            self._collect(executor, interrupted=bool(signals))
            refresh()
            time.sleep(pause)
        if signals:
            raise Stopped(signals[0], "every run has saved its state", f"resume with {again}")

    def check(self, hint: str) -> None:
        """Raise SeriesError where a run failed: the first one's message, and the worst exit code."""
        if failed := [entry for entry in self.entries.values() if entry.state is State.failed]:
            blocked = self.counts()[State.blocked]
            waiting = f", {blocked} that wait for them were not made" if blocked else ""
            text = f"{len(failed)} of {len(self.entries)} runs failed{waiting}; {failed[0].member.key}: "
            codes = [entry.code for entry in failed]
            raise SeriesError(text + str(failed[0].error), hint, BUG if BUG in codes else max(codes))

    def config_of(self, entry: ScheduledRun) -> RunConfig | None:
        """The settings of the run with the names of those that it waits for; None while they are not finished."""
        member, config = entry.member, entry.member.config
        if any(self.entries[key].state is not State.done for key in member.needs):
            return None
        if not isinstance(config, DistillConfig):
            return config
        if member.teacher is not None:
            teacher = self.entries[member.teacher].run
            weights = teacher.deliverable if teacher else None
            config = config if weights is None else _with_weights(config, weights)
        elif config.teacher.sha256 is None:
            named = find_teacher(config) if config.teacher.weights == "library" else config.teacher.weights
            config = _with_weights(config, weights_at(named or config.teacher.source, "pairs"))
        if member.matched is not None and isinstance(config.router, RandomMatchedConfig):
            rates = self.entries[member.matched].run
            assert rates is not None
            router = config.router.model_copy(update={"run": str(rates.path.resolve())})
            config = config.model_copy(update={"router": router})
        return config

    def locate(self) -> list[ScheduledRun]:
        """Those that run, each with its run directory as soon as there is one."""
        running = [entry for entry in self.entries.values() if entry.state is State.running]
        if any(entry.run is None for entry in running):
            self.index.refresh()
        for entry in running:
            if entry.run is None and (config := self.config_of(entry)) is not None:
                entry.run = self.index.of(config)
        return running

    def _settle(self, entry: ScheduledRun) -> None:
        """Find its run, finished or begun."""
        if (config := self.config_of(entry)) is None:
            return
        entry.run = self.index.of(config)
        if entry.run is not None and entry.run.finished:
            entry.error = None
            self._into(entry, State.done)
            self._note(entry).unlink(missing_ok=True)

    def unfinished(self) -> bool:
        """Whether something is left to be done."""
        return any(entry.state in (State.waiting, State.running) for entry in self.entries.values())

    def _start(self, executor: Executor) -> None:
        ready = [
            (entry, config)
            for entry in self.entries.values()
            if entry.state is State.waiting and time.monotonic() >= entry.not_before
            if (config := self.config_of(entry)) is not None
        ]
        jobs = list[Job]()
        for entry, config in ready:
            # Two of the same settings (a teacher and a student alone) are one run.
            same = config_identity(config)
            if same in self._running or len(jobs) == executor.room() or not self._claim(entry):
                continue
            self._settle(entry)
            self._remember(entry)
            if entry.state is not State.waiting:
                self._unclaim(entry)
                continue
            self._running[same] = entry
            jobs.append(self._job(entry, config))
            entry.resumed, entry.attempts, entry.error = entry.run is not None, entry.attempts + 1, None
            self._into(entry, State.running)
        if jobs:
            executor.submit(jobs)

    def _claim(self, entry: ScheduledRun) -> bool:
        """Whether this sweep may train the run now, and no other of the same name does; what those did is read."""
        if (lock := acquire_lock(self.log_of(entry).with_suffix(".lock"))) is None:
            entry.not_before = time.monotonic() + CLAIMED_PAUSE
            if entry.error != CLAIMED:
                entry.error = CLAIMED
                self.changed(entry)
            return False
        self._claims[entry.member.key] = lock
        self.index.refresh()
        return True

    def _unclaim(self, entry: ScheduledRun) -> None:
        if (lock := self._claims.pop(entry.member.key, None)) is not None:
            lock.release()

    def _job(self, entry: ScheduledRun, config: RunConfig) -> Job:
        if entry.run is not None:
            config = own_settings(entry.run, config)
        log = self.log_of(entry)
        file = log.with_suffix(".yaml")
        write_aside(file, yaml_bytes(config.model_dump(mode="json")))
        log.unlink(missing_ok=True)
        arguments = [PROCEDURES[config.task].command, "--config", str(file.resolve()), "--json"]
        if entry.run is not None or not self.fresh:
            arguments += ["--resume", AUTO]
        return Job(entry.member.key, tuple(arguments), log.resolve(), Path.cwd(), config, entry.run)

    def _collect(self, executor: Executor, *, interrupted: bool) -> None:
        """Note what has ended."""
        if ended := executor.ended():
            self.index.refresh()
        for one in ended:
            entry = self.entries[one.key]
            self._settle(entry)
            if entry.state is State.done:
                continue
            again = one.code < 0 or one.code > 128
            if one.code == IN_USE:
                entry.not_before, entry.attempts = time.monotonic() + IN_USE_PAUSE, entry.attempts - 1
            entry.error = None if interrupted else self._said(entry, one.code)
            if interrupted or one.code == IN_USE or (again and entry.attempts < ATTEMPTS):
                self._into(entry, State.waiting)
                continue
            entry.code = one.code if one.code >= 0 else 128 - one.code
            entry.code = entry.code or BUG  # it ended well and has left nothing
            if not again:  # what a signal has ended resumes by itself at the next call
                write_json(self._note(entry), {"error": entry.error, "code": entry.code})
            self._into(entry, State.failed)
        self._block()

    def _block(self) -> None:
        for entry in self.entries.values():
            lost = [key for key in entry.member.needs if self.entries[key].state in (State.failed, State.blocked)]
            if lost and entry.state is State.waiting:
                entry.error = f"waits for {lost[0]}, which failed"
                self._into(entry, State.blocked)

    def _into(self, entry: ScheduledRun, state: State) -> None:
        if state is not State.running:
            self._unclaim(entry)
            self._running = {same: other for same, other in self._running.items() if other is not entry}
        if entry.state is not state:
            entry.state = state
            self.changed(entry)

    def log_of(self, entry: ScheduledRun) -> Path:
        """The stderr of a run."""
        return self.folder / "jobs" / f"{_slug(entry.member.key)}.log"

    def _note(self, entry: ScheduledRun) -> Path:
        return self.folder / "failed" / f"{_slug(entry.member.key)}.json"

    def _remember(self, entry: ScheduledRun) -> None:
        """The failure of an earlier call, or of another sweep of this name."""
        note = self._note(entry)
        if entry.state is State.waiting and note.is_file():
            failure: dict[str, Any] = RunDir(note.parent).read_json(note.name)
            entry.error, entry.code = plain(failure.get("error")), int(number(failure.get("code")) or 1)
            self._into(entry, State.failed)

    def _said(self, entry: ScheduledRun, code: int) -> str:
        """The error of a job in one line."""
        if code < 0:
            return f"killed by signal {-code} (attempt {entry.attempts} of {ATTEMPTS})"
        lines = list[str]()
        with suppress(OSError, ValueError):
            log = read_bytes(self.log_of(entry), MOST_LOG).decode(errors="replace")
            lines = [plain(line) for line in log.splitlines()]
        errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        message = errors[-1] if errors else next((line for line in reversed(lines) if line), "no message")
        return f"{message[:200]} (exit code {code})" if code else "ended well, but left no finished run"


@contextmanager
def received_signals(reporter: Reporter) -> Iterator[list[int]]:
    """The Ctrl-C and SIGTERM that came so far; they do nothing else."""
    received: list[int] = []

    def note(signum: int, frame: object) -> None:
        if not received:
            reporter.say("stopping: every run finishes its step and saves; once more to leave at once")
        received.append(signum)

    with stop_signals_to(note):
        yield received


def _slug(key: str) -> str:
    """A file's name for a run of the sweep: what can be read of its key, and a hash, since two keys may read alike."""
    return f"{re.sub(r'[^A-Za-z0-9_]+', '-', key)[:LONGEST]}-{hashlib.sha256(key.encode()).hexdigest()[:8]}"


def _with_weights(config: DistillConfig, weights: Path) -> DistillConfig:
    """The same with its teacher's weights named, in place and content."""
    file = weights_file(weights)
    settings = {"weights": weights.resolve(), "sha256": _digest(file, file.stat().st_mtime_ns)}
    return config.model_copy(update={"teacher": config.teacher.model_copy(update=settings)})


@cache
def _digest(file: Path, changed: int) -> str:
    return sha256(file)
