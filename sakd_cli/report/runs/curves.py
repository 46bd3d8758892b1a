"""Curves of runs that are compared: plain data of `compare.py` in, a picture out"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from sakd_cli.report.render.format import plain
from sakd_cli.report.render.plots import COLOURS, INCHES, framed, legend, new_figure, whole_numbers

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FEW = 2  # groups up to which the training images have a curve too


def curve_figure(document: dict[str, Any]) -> "Figure":
    """Top-1 and loss by epoch: of each group the mean over its runs, and the range of them as a band.

    full    on the images that choose the best epoch
    dashed  on the training images as augmented (of few groups only)
    dotted  the teacher on the test images, where all runs have the same one
    """
    figure = new_figure(2 * INCHES[0], INCHES[1])
    left, right = figure.subplots(1, 2)
    groups = document["groups"]
    for axes, key in ((left, "top1"), (right, "loss")):
        for k, group in enumerate(groups):
            colour = COLOURS[k % len(COLOURS)]
            points = _by_epoch(document, k, key)
            epochs = list(points)
            axes.plot(epochs, [_mean(points[e]) for e in epochs], color=colour, label=plain(group["label"]), marker=".")
            axes.fill_between(
                epochs, [min(points[e]) for e in epochs], [max(points[e]) for e in epochs], color=colour, alpha=0.15
            )
            if len(groups) <= FEW:
                trained = _by_epoch(document, k, f"train_{key}")
                axes.plot(list(trained), [_mean(values) for values in trained.values()], "--", color=colour, alpha=0.7)
        whole_numbers(axes)
    taught = {row["teacher_top1"] for row in document["runs"]} - {None}
    if len(taught) == 1:
        left.axhline(taught.pop(), linestyle=":", color="#000000", linewidth=1)
    framed(left, "Accuracy", "epoch", "top-1, %")
    framed(right, "Loss", "epoch", "cross-entropy, nats")
    remarks = ["full: selection", *(["dashed: training"] if len(groups) <= FEW else []), "dotted: teacher, test"]
    legend(figure, right, ", ".join(remarks))
    return figure


def _by_epoch(document: dict[str, Any], group: int, key: str) -> dict[int, list[float]]:
    found: dict[int, list[float]] = {}
    for row in document["runs"]:
        for point in row["curve"]:
            if row["group"] == group and point[key] is not None:
                found.setdefault(point["epoch"], []).append(point[key])
    return dict(sorted(found.items()))


def _mean(values: Iterable[float]) -> float:
    known = list(values)
    return sum(known) / len(known)
