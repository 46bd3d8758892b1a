"""The cost/accuracy curve of an ensemble as a picture, with matplotlib where it is installed. No torch."""

import importlib.util
from pathlib import Path
from typing import Any

from sakd_cli.errors import DiskError, UsageError

SUFFIXES = (".png", ".pdf", ".svg")


def check(path: Path) -> None:
    """Raise UsageError, before hours of work, where the picture could not be drawn or written."""
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(f"--plot {path}: the name of a picture ends in {', '.join(SUFFIXES)}")
    if not path.absolute().parent.is_dir():
        raise UsageError(f"--plot {path}: no such folder")
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError("--plot needs matplotlib, which is not installed", hint="pip install 'sakd[plots]'")


def draw(path: Path, result: dict[str, Any]) -> None:
    """Top-1 over mean cost: every threshold, the upper hull, and the thresholds that are in use."""
    from matplotlib.figure import Figure

    told = result["ensemble"]
    unit, key = ("% of the teacher's MACs", "cost") if told["cost"] is not None else ("million MACs", "macs")
    scale = 100.0 if told["cost"] is not None else 1e-6
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.add_subplot()
    points = [(scale * point[key], point["top1"], point["hull"]) for point in told["sweep"]]
    axes.plot([x for x, _, _ in points], [y for _, y, _ in points], "o", color="tab:gray", label="shared threshold")
    best = sorted((x, y) for x, y, on_hull in points if on_hull)
    axes.plot([x for x, _ in best], [y for _, y in best], "-", color="tab:blue", label="upper hull")
    used = "thresholds in use" if told["early"] else "all members for every image"
    axes.plot(scale * told[key], result["top1"], "*", markersize=14, color="tab:red", label=used)
    axes.set_xlabel(f"mean cost, {unit}")
    axes.set_ylabel("top-1, %")
    axes.set_title(f"{result['network']} on {result['dataset']} ({result['split']})")
    axes.grid(alpha=0.3)
    axes.legend()
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise DiskError(f"{path}: cannot be written: {error.strerror or error}") from None
