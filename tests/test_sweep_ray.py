"""A sweep on a Ray cluster that is started on this machine, with its runs and workers killed under it

Run by hand: python -m pytest -m ray tests/test_sweep_ray.py (the extra `ray`; about three minutes on two cores).
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fork_server import ROOT, fingerprint

pytestmark = pytest.mark.ray
PORT = "26379"
WORDS = """
task: sweep
pairs: ["resnet8:resnet8"]
methods: [kd]
routers: [always, adaptive]
baseline: true
common: {data: {name: shapes, train: 200, test: 100}, train: {epochs: 12}, save_every: 1, device: cpu}
teachers: {train: {epochs: 1}}
"""
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("SAKD_")}
ENVIRONMENT |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "RAY_DISABLE_IMPORT_WARNING": "1"}


@pytest.fixture
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a cluster of two cores."""
    pytest.importorskip("ray", reason="the extra `ray` is not installed")
    ray = shutil.which("ray", path=str(Path(sys.executable).parent)) or "ray"
    start = [ray, "start", "--head", "--num-cpus=2", "--port", PORT, "--include-dashboard=false"]
    subprocess.run(start, check=True, env=ENVIRONMENT, capture_output=True)
    yield f"127.0.0.1:{PORT}"
    subprocess.run([ray, "stop"], check=True, capture_output=True)


def children(of: Path) -> dict[int, int]:
    """Process of every run that goes on in this folder -> its parent, the worker."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            arguments = (process / "cmdline").read_bytes().decode().split("\0")
        except OSError:
            continue
        if "sakd_cli.cli.child" in arguments and any(str(of) in word for word in arguments):
            found[int(process.name)] = int(arguments[arguments.index("sakd_cli.cli.child") + 1])
    return found


def a_run_under_way(folder: Path) -> int:
    """Process of a run of the routers that has saved a checkpoint."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        for process in children(folder):
            arguments = Path(f"/proc/{process}/cmdline")
            kind = "always" if arguments.exists() and b"always" in arguments.read_bytes() else "adaptive"
            begun = folder.glob(f"runs/tiny/*-{kind}/checkpoints/last/manifest.json")
            if arguments.exists() and b"distill" in arguments.read_bytes() and any(begun):
                return process
        time.sleep(0.1)
    raise AssertionError("no run came so far")


def test_runs_that_are_killed_on_a_ray_cluster_are_resumed(cluster: str, tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(WORDS)
    command = [sys.executable, "-m", "sakd_cli", "sweep", "tiny.yaml", "--json"]
    on_ray = ["--executor", "ray", "--resource", f"address={cluster}"]
    with (tmp_path / "out").open("w") as out, (tmp_path / "err").open("w") as err:
        sweep = subprocess.Popen([*command, *on_ray], cwd=tmp_path, env=ENVIRONMENT, stdout=out, stderr=err)
    process = a_run_under_way(tmp_path)
    os.kill(process, signal.SIGKILL)
    while process in children(tmp_path):
        time.sleep(0.1)
    process = a_run_under_way(tmp_path)
    os.kill(children(tmp_path)[process], signal.SIGKILL)  # the worker: its run saves and ends, Ray retries the task
    assert sweep.wait(timeout=400) == 0, (tmp_path / "err").read_text()
    document = json.loads((tmp_path / "out").read_text())
    assert document["counts"] == {"done": 4, "running": 0, "waiting": 0, "failed": 0, "blocked": 0}
    assert all(cell["top1"] is not None for cell in document["cells"])
    assert len(list((tmp_path / "runs").glob("tiny/*/summary.json"))) == 4, "no run was made twice"
    assert "resumed" in (tmp_path / "err").read_text()
    # The same bits as without a kill; but for the state of torch's own generator, which nothing draws from.
    for run in document["runs"]:
        if run["role"] == "student":
            again = tmp_path / f"again-{run['router']}"
            arguments = ["distill", "--config", str(Path(run["run"]) / "config.yaml"), "--run-dir", str(again), "-q"]
            subprocess.run([sys.executable, "-m", "sakd_cli", *arguments], cwd=tmp_path, env=ENVIRONMENT, check=True)
            both = [fingerprint(path) for path in (again, tmp_path / run["run"])]
            kept = [{name: bits for name, bits in one.items() if "/training." not in name} for one in both]
            assert kept[0] == kept[1]
