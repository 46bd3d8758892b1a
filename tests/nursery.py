"""A warm process that forks one child per command, so that real processes can be killed without paying torch's import.

{"words": [...], "cwd": PATH, "crash": N}  ->  pid of a child that runs `sakd WORDS`; with its stdout and stderr in
                                               the files `out` and `err`; `crash`: it dies at the N-th touch of the disk
{"wait": PID}                              ->  its exit code, -N where signal N ended it
"""

import importlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
TOUCHES = ((os, "fsync"), (Path, "replace"), (Path, "mkdir"), (shutil, "rmtree"), (os, "truncate"))


class Nursery:
    """The test's end of it."""

    def __init__(self, cwd: Path) -> None:
        self.cwd = cwd
        clean = {name: value for name, value in os.environ.items() if not name.startswith("SAKD_")}
        environment = clean | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.count = 0

    def start(self, *words: str, crash: int = 0) -> "Child":
        self.count += 1
        name = str(self.cwd / f"child{self.count}")
        pid = self._ask({"words": words, "cwd": str(self.cwd), "crash": crash, "name": name})
        return Child(self, pid, Path(name + ".out"), Path(name + ".err"))

    def sakd(self, *words: str, crash: int = 0) -> "Child":
        child = self.start(*words, crash=crash)
        child.wait()
        return child

    def _ask(self, question: dict[str, Any]) -> int:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def close(self) -> None:
        self.process.communicate()


class Child:
    """One command."""

    def __init__(self, nursery: Nursery, pid: int, out: Path, err: Path) -> None:
        self.nursery, self.pid, self._out, self._err = nursery, pid, out, err
        self.code: int | None = None

    @property
    def out(self) -> str:
        return self._out.read_text(encoding="utf-8")

    @property
    def err(self) -> str:
        return self._err.read_text(encoding="utf-8")

    def wait(self) -> int:
        self.code = self.nursery._ask({"wait": self.pid})
        return self.code

    def signal_when(self, text: str, number: int) -> None:
        """Send the signal as soon as `text` stands on its stderr."""
        deadline = time.monotonic() + 60
        while text not in self.err:
            assert time.monotonic() < deadline, self.err
            time.sleep(0.005)
        os.kill(self.pid, number)


def _crashing(place: Any, name: str, countdown: list[int]) -> None:
    """Let the process die instead of the N-th touch; bytes that were not flushed by then are lost with it."""
    original: Callable[..., Any] = getattr(place, name)

    def touched(*arguments: Any, **settings: Any) -> Any:
        countdown[0] -= 1
        if countdown[0] == 0:
            if name == "fsync" and os.readlink(f"/proc/self/fd/{arguments[0]}").endswith(".tmp"):
                os.ftruncate(arguments[0], os.fstat(arguments[0]).st_size // 2)
            os._exit(9)
        return original(*arguments, **settings)

    setattr(place, name, touched)


def _run(order: dict[str, Any]) -> None:
    from sakd_cli.cli import app

    os.chdir(order["cwd"])
    for number, end in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{order['name']}.{end}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    if order["crash"]:
        countdown = [order["crash"]]
        for place, name in TOUCHES:
            _crashing(place, name, countdown)
    sys.argv = ["sakd", *order["words"]]
    try:
        app.main()
    except SystemExit as left:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(int(left.code or 0))


def _serve() -> None:
    import torch

    for module in ("sakd_cli.cli.app", "sakd_cli.tasks.run", "sakd_cli.report.spots", "sakd_cli.report.tables"):
        importlib.import_module(module)
    assert torch.get_num_threads() == 1, "a process with threads must not be forked"
    for line in sys.stdin:
        order = json.loads(line)
        if "wait" in order:
            _, status = os.waitpid(order["wait"], 0)
            answer = os.waitstatus_to_exitcode(status)
        else:
            for end in ("out", "err"):
                Path(f"{order['name']}.{end}").touch()
            answer = os.fork()
            if answer == 0:
                _run(order)
        print(answer, flush=True)


if __name__ == "__main__":
    _serve()
