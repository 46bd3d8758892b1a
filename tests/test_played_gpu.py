"""Commands of which some step, figure or file would meet tensors of two devices on a GPU: tried on a played one."""

import subprocess
import sys
from pathlib import Path

import torch

SOME = "two_devices or probed or see_none"


def test_others_than_tests_of_a_gpu_see_none() -> None:
    assert not torch.cuda.is_available()


def test_whole_commands_run_on_a_played_gpu() -> None:
    command = [sys.executable, "-m", "pytest", "-p", "played_gpu", "-p", "no:cacheprovider", "-k", SOME]
    ended = subprocess.run(
        [*command, "tests/test_gpu.py", __file__], cwd=Path(__file__).parents[1], capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stdout[-4000:] + ended.stderr[-1000:]
    assert "." * 3 in ended.stdout, "all of them ran"
