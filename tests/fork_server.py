"""A process with torch loaded forks one child per command, so that real processes can be killed and still start fast.

{"sakd": [...], "cwd": PATH, ...}   ->  pid of a child that runs `sakd WORDS`; with its stdout and stderr in the files
                                        `NAME.out` and `NAME.err`; `Faults` says what else happens to it
{"wait": PID}                       ->  its exit code (-N where signal N ended it), peak memory in kB, seconds of a core
"""

import hashlib
import importlib
import io
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sakd_cli.config.options import FLAG, OPTIONS, SWITCH, TEXTS

ROOT = Path(__file__).parents[1]
LOGS = ("metrics.jsonl", "spots.jsonl")
TOUCHES = ((os, "fsync"), (Path, "replace"), (Path, "mkdir"), (shutil, "rmtree"), (os, "truncate"))


@dataclass(frozen=True)
class Faults:
    """Faults that are injected into a command.

    crash        it dies at the N-th touch of the disk
    fail         (N, errno): the N-th touch that needs room, and every one after it, fails with this error
    file_size    no file may grow larger than this (RLIMIT_FSIZE)
    memory       it may not reserve more than this (RLIMIT_AS)
    stdout       "closed": nobody reads it any more; "file": it goes to a file
    stderr       "closed": there is none; "full": the disk on which it lies is full; "file"
    nowhere      its current folder has been removed
    environment  environment variables; None removes one
    """

    crash: int = 0
    fail: tuple[int, int] | None = None
    file_size: int | None = None
    memory: int | None = None
    stdout: str = "file"
    stderr: str = "file"
    nowhere: bool = False
    environment: dict[str, str | None] = field(default_factory=dict)


def words_of(tokens: Sequence[str]) -> list[str]:
    """The words of a test's command, so that tests can share some and vary them.

    Of each option that takes one value the last stays; one that is written with its value as one word (`--epochs=3`)
    stays as well, such as further teachers. Networks are not timed unless a test asks for it.
    """
    rows = [row for row in OPTIONS.values() if row.type not in (FLAG, SWITCH, TEXTS) or row.name == "teacher"]
    single = {flag for row in rows for flag in (row.flags or row.flag).split()}
    found, taken = list[list[str]](), set[str]()
    words = list(tokens)
    while words:
        pair = len(words) > 1 and words[-2] in single
        group, words = (words[-2:], words[:-2]) if pair else (words[-1:], words[:-1])
        if not (pair and group[0] in taken):
            found.append(group)
            taken |= {group[0]} if pair else set()
    kept = [word for group in reversed(found) for word in group]
    return [kept[0], "--set", "timing_seconds=0", *kept[1:]] if kept[:1] in (["eval"], ["export"]) else kept


class ForkServer:
    """The test's end of it; `at` another folder it is the same process."""

    def __init__(self, cwd: Path, shared: "ForkServer | None" = None) -> None:
        self.cwd = cwd
        if shared is not None:
            self.process, self.logs = shared.process, shared.logs
            return
        clean = {name: value for name, value in os.environ.items() if not name.startswith("SAKD_")}
        environment = clean | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]), "OMP_NUM_THREADS": "1"}
        environment["CUDA_VISIBLE_DEVICES"] = ""  # its processes are forked, and a GPU takes no such
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.logs = Path(tempfile.mkdtemp())

    def at(self, cwd: Path) -> "ForkServer":
        return ForkServer(cwd, self)

    def start(self, *tokens: str, faults: Faults | None = None) -> "Child":
        name = str(self.logs / f"{time.monotonic_ns()}")
        order = {"sakd": words_of(tokens), "cwd": str(self.cwd), "name": name} | asdict(faults or Faults())
        return Child(self, int(self.ask(order)), name)

    def sakd(self, *tokens: str, faults: Faults | None = None) -> "Child":
        child = self.start(*tokens, faults=faults)
        child.wait()
        return child

    def ask(self, question: dict[str, Any]) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        self.process.communicate()
        shutil.rmtree(self.logs)

    def tree(self) -> dict[str, tuple[int, int] | None]:
        """Size and time of every file in the folder, and what folders there are; links are not followed."""
        return {
            path.relative_to(self.cwd).as_posix(): None if path.is_dir() else (of.st_size, of.st_mtime_ns)
            for path in self.cwd.rglob("*")
            if path.name != ".lock"  # as in conftest
            for of in [path.lstat()]
        }

    def assert_rejects(self, tokens: list[str], code: int, text: str, faults: Faults | None = None) -> "Child":
        """One line of error, at most one of hint, the exit code, and nothing written."""
        before = self.tree()
        child = self.sakd(*tokens, faults=faults)
        lines = child.err.splitlines()
        assert (child.code, child.out) == (code, ""), child.err
        assert [line.partition(":")[0] for line in lines] in (["error"], ["error", "hint"]), child.err
        assert len(lines[0]) <= 200
        assert text in lines[0]
        assert self.tree() == before
        return child


class Child:
    """One command."""

    def __init__(self, fork_server: ForkServer, pid: int, name: str) -> None:
        self.fork_server, self.pid, self._name = fork_server, pid, name
        self.code: int | None = None
        self.peak, self.cpu_seconds = 0, 0.0  # bytes; seconds of a core

    @property
    def out(self) -> str:
        return Path(self._name + ".out").read_text(encoding="utf-8")

    @property
    def err(self) -> str:
        return Path(self._name + ".err").read_text(encoding="utf-8")

    @property
    def loaded(self) -> list[str]:
        """Modules that it had to load itself."""
        return Path(self._name + ".loaded").read_text(encoding="utf-8").splitlines()

    def wait(self) -> int:
        self.code, kilobytes, self.cpu_seconds = self.fork_server.ask({"wait": self.pid})
        self.peak = 1024 * kilobytes
        return int(self.code)

    def signal_when(self, text: str, number: int) -> None:
        """Send the signal as soon as `text` stands on its stderr."""
        deadline = time.monotonic() + 60
        while text not in self.err:
            assert time.monotonic() < deadline, self.err
            time.sleep(0.005)
        os.kill(self.pid, number)


def fingerprint(run: Path) -> dict[str, str]:
    """SHA-256 of every weight file and log of a finished run."""
    assert (run / "summary.json").is_file()
    files = [*run.rglob("*.safetensors"), *run.glob("*.jsonl"), *run.glob("ensemble/*.json")]
    assert {run / name for name in LOGS} <= set(files)
    kept = [path for path in files if "previous" not in path.parts]
    return {path.relative_to(run).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(kept)}


def _inject_at(place: Any, name: str, countdown: list[int], fail: int | None) -> None:
    """Let the N-th touch fail, or let the process die instead of it; bytes not flushed by then are lost with it."""
    original: Callable[..., Any] = getattr(place, name)

    def touched(*arguments: Any, **settings: Any) -> Any:
        countdown[0] -= 1
        if fail is not None and countdown[0] <= 0:
            raise OSError(fail, os.strerror(fail))
        if fail is None and countdown[0] == 0:
            if name == "fsync" and os.readlink(f"/proc/self/fd/{arguments[0]}").endswith(".tmp"):
                os.ftruncate(arguments[0], os.fstat(arguments[0]).st_size // 2)
            os._exit(9)
        return original(*arguments, **settings)

    setattr(place, name, touched)


def _inject(order: dict[str, Any]) -> None:
    """Inject the faults of an order."""
    fail = order["fail"]
    if order["crash"] or fail:
        countdown = [fail[0] if fail else order["crash"]]
        for place, name in TOUCHES:
            if not fail or name not in ("rmtree", "truncate"):  # a full disk lets one delete
                _inject_at(place, name, countdown, fail[1] if fail else None)
    for kind, most in ((resource.RLIMIT_FSIZE, order["file_size"]), (resource.RLIMIT_AS, order["memory"])):
        if most is not None:
            resource.setrlimit(kind, (most, most))
    for name, value in order["environment"].items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value


def _run(order: dict[str, Any]) -> None:
    from sakd_cli.cli import app

    os.chdir(order["cwd"])
    for number, end in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{order['name']}.{end}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    if order["stdout"] == "closed":
        nobody, ours = os.pipe()
        os.close(nobody)
        os.dup2(ours, 1)
    if order["stderr"] == "full":
        os.dup2(os.open("/dev/full", os.O_WRONLY), 2)
    if order["stderr"] == "closed":  # Python starts like this then
        os.close(2)
        sys.stderr = None  # type: ignore[assignment]
    if order["nowhere"]:
        os.chdir(gone := tempfile.mkdtemp())
        os.rmdir(gone)
    _inject(order)
    sys.argv, known = ["sakd", *order["sakd"]], set(sys.modules)
    try:
        app.main()
    except SystemExit as left:
        sys.stdout.flush()
        sys.stderr.flush()
        with suppress(OSError):  # of which there may be many by order
            Path(f"{order['name']}.loaded").write_text("\n".join(sys.modules.keys() - known))
        os._exit(int(left.code or 0))


def _serve() -> None:
    import torch

    ours = ("cli.app", "runs.launch", "runs.evaluate", "runs.predict", "report.spots.log", "report.runs.page")
    ours += ("export.export", "export.import_weights")
    # And what torch loads with the first optimizer, we with the first score: longer than most of these commands take.
    for module in ("torch._dynamo", "torchmetrics", *(f"sakd_cli.{name}" for name in ours)):
        importlib.import_module(module)
    with redirect_stdout(io.StringIO()):  # what is made once in a process is made here
        app = importlib.import_module("sakd_cli.cli.app")
        app.run(["config", "show", "--teacher", "resnet8", "--student", "resnet8"])
    assert torch.get_num_threads() == 1, "a process with threads must not be forked"
    for line in sys.stdin:
        order = json.loads(line)
        if "wait" in order:
            _, status, used = os.wait4(order["wait"], 0)
            answer: Any = [os.waitstatus_to_exitcode(status), used.ru_maxrss, used.ru_utime + used.ru_stime]
        else:
            for end in ("out", "err"):
                Path(f"{order['name']}.{end}").touch()
            answer = os.fork()
            if answer == 0:
                _run(order)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    _serve()
