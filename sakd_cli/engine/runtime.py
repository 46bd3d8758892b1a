"""The device a run works on, and what is worth knowing about the machine."""

import platform
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torchvision

from sakd_cli import __version__
from sakd_cli.errors import UsageError


def pick_device(name: str) -> torch.device:
    """`auto` (a GPU if there is one), `cpu`, `cuda`, `cuda:1`, `mps`. Raises UsageError where it is not to be had."""
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if name == "auto":
        return torch.device("cuda" if cuda else "mps" if mps else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"device: unknown device {name!r}", hint="auto, cpu, cuda, cuda:1 or mps") from None
    count = {"cpu": 1, "cuda": torch.cuda.device_count() if cuda else 0, "mps": int(mps)}.get(device.type, 0)
    if (device.index or 0) >= count:
        raise UsageError(f"device: {name!r} is not available here ({count} of that kind)", hint="--device auto")
    return device


def environment(device: torch.device) -> dict[str, Any]:
    """What `env.json` holds."""
    chip = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "sakd": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "platform": platform.platform(),
        "device": str(device),
        "chip": chip,
        "threads": torch.get_num_threads(),
        "command": shlex.join(["sakd", *sys.argv[1:]]),
        "commit": _commit(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _commit() -> str | None:
    """Commit of the checkout that sakd runs from; None where it was installed."""
    here = Path(__file__).parents[2]
    if not (here / ".git").exists():
        return None
    asked = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=False)
    return asked.stdout.strip() or None
