"""Carry out a sweep: what is finished already, what is to come, what goes on at the moment, what went wrong

All of it is read from the run directories. The sweep's own folder holds the configs of its runs, what they said, and
for each that failed its error; it may be deleted at any time.
"""

import re
import time
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from sakd_cli.config.grid import Member
from sakd_cli.config.resolve import ConfigSource, flat, nested, resolve
from sakd_cli.config.routers import RandomMatchedConfig
from sakd_cli.config.training import FREE, PROCEDURES, DistillConfig, RunConfig
from sakd_cli.errors import DiskError, RunInUseError, Stopped
from sakd_cli.files import sha256, write_aside, write_json
from sakd_cli.report.render.format import number, plain
from sakd_cli.rundir import RunDir
from sakd_cli.sweep.executor import Executor, Job
from sakd_cli.sweep.run_index import RunIndex, identity

ATTEMPTS = 3  # of one call to get a run to its end that a signal keeps ending
IN_USE_PAUSE = 20.0  # seconds before a run is tried again that another process works on
IN_USE = RunInUseError.exit_code


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
    """Knows every run of a sweep; `refresh` reads how things stand, `run` brings them to an end.

    folder   the sweep's own
    changed  is told every entry whose state has changed; may be set to listen
    """

    def __init__(self, members: Sequence[Member], runs_dir: Path, folder: Path) -> None:
        self.entries = {member.key: ScheduledRun(member) for member in members}
        self.folder, self.index = folder, RunIndex(runs_dir)
        self._running = dict[str, ScheduledRun]()
        self.changed: Callable[[ScheduledRun], None] = lambda entry: None
        self.refresh()
        for entry in self.entries.values():
            entry.already_done = entry.state is State.done

    def refresh(self, *, forgive: bool = False) -> None:
        """Read from the disk how each run stands; with `forgive` those that failed are to be tried again."""
        self.index.refresh()
        for entry in self.entries.values():
            if forgive and entry.state in (State.failed, State.blocked):
                entry.state, entry.error, entry.attempts = State.waiting, None, 0
            if entry.state is State.waiting:
                self._settle(entry)
                if entry.state is State.waiting and not forgive:
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

    def run(self, executor: Executor, stopping: Callable[[], int], refresh: Callable[[], None], pause: float) -> None:
        """Carry out what is not finished. `refresh` is called after every round.

        Raises Stopped where `stopping` gives a signal, when all that runs has saved its state.
        """
        self._prepare()
        while self.unfinished():
            if signum := stopping():
                executor.stop(signum)
                self._collect(executor, interrupted=True)
                raise Stopped(signum, "every run has saved its state")
            self._start(executor)
            self._collect(executor)
            refresh()
            time.sleep(pause)

    def config_of(self, entry: ScheduledRun) -> RunConfig | None:
        """The settings of the run with the names of those that it waits for; None while they are not finished."""
        member, config = entry.member, entry.member.config
        if any(self.entries[key].state is not State.done for key in member.needs):
            return None
        if not isinstance(config, DistillConfig):
            return config
        if member.teacher is not None:
            config = _pinned(config, self.entries[member.teacher].run)
        elif (weights := weights_of(config)) is not None:
            config = _with_weights(config, weights)
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
            self._settle(entry)
            # Two of the same settings (a teacher and a student alone) are one run.
            same = identity(config)
            if entry.state is State.done or same in self._running or len(jobs) == executor.room():
                continue
            self._running[same] = entry
            jobs.append(self._job(entry, config))
            entry.resumed, entry.attempts = entry.run is not None, entry.attempts + 1
            self._into(entry, State.running)
        if jobs:
            executor.submit(jobs)

    def _job(self, entry: ScheduledRun, config: RunConfig) -> Job:
        settings = config.model_dump(mode="json")
        if entry.run is not None:  # its own settings, with its own teacher; where it works is ours to say
            now = {key: value for key, value in flat(settings).items() if key in FREE}
            layers = [ConfigSource(f"{entry.run.path}", entry.run.config), ConfigSource("now", nested(now))]
            settings = resolve(config.task, layers).config.model_dump(mode="json")
        file, log = (self.folder / "jobs" / f"{_slug(entry.member.key)}.{end}" for end in ("yaml", "log"))
        write_aside(file, yaml.safe_dump(settings, sort_keys=False, allow_unicode=True).encode())
        log.unlink(missing_ok=True)
        command = (
            PROCEDURES[config.task].command,
            "--config",
            str(file.resolve()),
            "--resume",
            "auto",
            "--json",
            "--quiet",
        )
        return Job(entry.member.key, command, log.resolve(), Path.cwd())

    def _collect(self, executor: Executor, *, interrupted: bool = False) -> int:
        """Take note of what has ended."""
        ended = executor.ended()
        if ended:
            self.index.refresh()
        for one in ended:
            entry = self.entries[one.key]
            self._settle(entry)
            if entry.state is State.done:
                continue
            again = one.code < 0 or one.code > 128
            if one.code == IN_USE:
                entry.not_before, entry.attempts = time.monotonic() + IN_USE_PAUSE, entry.attempts - 1
            if interrupted or one.code == IN_USE or (again and entry.attempts < ATTEMPTS):
                self._into(entry, State.waiting)
                continue
            entry.error, entry.code = self._said(entry, one.code), one.code if one.code >= 0 else 128 - one.code
            if not again:  # what a signal has ended goes on by itself at the next call
                write_json(self._note(entry), {"error": entry.error, "code": entry.code})
            self._into(entry, State.failed)
        self._block()
        return len(ended)

    def _block(self) -> None:
        for entry in self.entries.values():
            if entry.state is State.waiting:
                lost = [key for key in entry.member.needs if self.entries[key].state in (State.failed, State.blocked)]
                if lost:
                    entry.error = f"waits for {lost[0]}, which failed"
                    self._into(entry, State.blocked)

    def _into(self, entry: ScheduledRun, state: State) -> None:
        if state is not State.running:
            self._running = {same: other for same, other in self._running.items() if other is not entry}
        if entry.state is not state:
            entry.state = state
            self.changed(entry)

    def _prepare(self) -> None:
        try:
            for folder in ("jobs", "failed"):
                (self.folder / folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DiskError(f"{self.folder}: cannot be made: {error.strerror}") from None

    def _note(self, entry: ScheduledRun) -> Path:
        return self.folder / "failed" / f"{_slug(entry.member.key)}.json"

    def _remember(self, entry: ScheduledRun) -> None:
        """The failure of an earlier call."""
        note = self._note(entry)
        if note.is_file():
            failure: dict[str, Any] = RunDir(note.parent).read_json(note.name)
            entry.error, entry.code = plain(failure.get("error")), int(number(failure.get("code")) or 1)
            self._into(entry, State.failed)

    def _said(self, entry: ScheduledRun, code: int) -> str:
        """The error of a job in one line."""
        if code < 0:
            return f"killed by signal {-code}, {entry.attempts} times"
        log = self.folder / "jobs" / f"{_slug(entry.member.key)}.log"
        try:
            lines = [plain(line) for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
        except OSError:
            lines = []
        errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        message = errors[-1] if errors else next((line for line in reversed(lines) if line), "no message")
        return f"{message[:200]} (exit code {code})" if code else "ended well, but left no finished run"


def _slug(key: str) -> str:
    return re.sub(r"[^A-Za-z0-9_]+", "-", key)


def _pinned(config: DistillConfig, teacher: RunDir | None) -> DistillConfig:
    assert teacher is not None
    folder = teacher.deliverable
    return config if folder is None else _with_weights(config, folder)


def _with_weights(config: DistillConfig, weights: Path) -> DistillConfig:
    """The same with its teacher's weights named, in place and content."""
    file = weights / "model.safetensors" if weights.is_dir() else weights
    settings = {"weights": weights.resolve(), "sha256": _digest(file, file.stat().st_mtime_ns)}
    return config.model_copy(update={"teacher": config.teacher.model_copy(update=settings)})


@cache
def _digest(file: Path, changed: int) -> str:
    return sha256(file)


def weights_of(config: DistillConfig) -> Path | None:
    """The weights of a teacher that is not the sweep's to train, if they are there."""
    path = Path(config.teacher.weights or config.teacher.source).expanduser()
    if (path / "config.yaml").is_file():
        return RunDir(path).deliverable
    return path if path.exists() else None
