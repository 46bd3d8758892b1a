"""Commands of which some step, figure or file would meet tensors of two devices on a GPU: tried on a played one."""

import subprocess
import sys
from pathlib import Path

SOME = "two_devices or probed"


def test_whole_commands_run_on_a_played_gpu() -> None:
    command = [sys.executable, "-m", "pytest", "-p", "played_gpu", "-p", "no:cacheprovider", "tests/test_gpu.py"]
    ended = subprocess.run([*command, "-k", SOME], cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout[-4000:] + ended.stderr[-1000:]
    assert "." * 2 in ended.stdout, "all of them ran"
