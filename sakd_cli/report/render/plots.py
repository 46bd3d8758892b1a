"""Plots of reports: documents in, a matplotlib Figure out, without a display.

matplotlib is the extra `plots`. Every function draws into a figure of its own unless it is given a part of one.
"""

import io
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sakd_cli.documents.base import Number
from sakd_cli.documents.evaluation import ExitCosts, ExitPoint
from sakd_cli.documents.spots import ClassDeviation, SpotsDocument
from sakd_cli.documents.training import Mixtures
from sakd_cli.errors import UsageError
from sakd_cli.files import write_aside
from sakd_cli.report.render.fonts import all_scripts
from sakd_cli.report.render.format import WHAT, fixed, fraction, named, plain

if TYPE_CHECKING:
    from matplotlib.figure import Figure, FigureBase

# Okabe and Ito's colours, which people of all kinds of sight can tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7f7f7f")
MARKS = "os^Dv<>p"
FORMATS = (".png", ".svg")
CLASSES_SHOWN = 12  # at each end of the heat map; all where there are no more than three times as many
PATHS_SHOWN = 12
BLOCKS_NUMBERED = 12  # beside each other that have room for a number in the picture
INCHES = (5.2, 3.9)


def new_figure(width: float = INCHES[0], height: float = INCHES[1]) -> "Figure":
    """An empty figure. Raises UsageError where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UsageError("plots need matplotlib, which is not installed", "pip install 'sakd[plots]'") from None
    return Figure(figsize=(width, height), layout="constrained", dpi=100)


def available(warn: Callable[[str], None]) -> bool:
    """Whether plots can be drawn; if not, `warn` gets what to do."""
    try:
        new_figure()
    except UsageError as error:
        warn(f"{error.message} ({error.hint})")
        return False
    return True


def rendered(figure: "Figure", kind: str) -> bytes:
    """The figure as `png` or `svg`; the same figure gives the same bytes."""
    from matplotlib import rc_context

    buffer = io.BytesIO()
    with rc_context({"svg.hashsalt": "sakd"}), all_scripts(figure, kind):
        figure.savefig(buffer, format=kind, metadata={"Date": None} if kind == "svg" else None)
    return buffer.getvalue()


def checked(path: Path) -> Path:
    """A file that a plot can be written to. UsageError for other formats, without its folder or matplotlib."""
    if path.suffix.lower() not in FORMATS:
        raise UsageError(f"--plot {path}: the name ends in {' or '.join(FORMATS)}")
    if not path.absolute().parent.is_dir():
        raise UsageError(f"--plot {path}: no such folder")
    new_figure()
    return path


def write(figure: "Figure", path: Path) -> None:
    """Save by the ending of the name."""
    write_aside(path, rendered(figure, path.suffix.lower()[1:]))


def mixture_map(record: Mixtures) -> "Figure":
    """Weights of a run's mixtures (`dfa.json`) as a heat map, groups by blocks."""
    rows = [group.alpha for group in record.groups]
    most = max(map(len, rows))
    figure = new_figure(1.8 + 0.55 * max(most, 4), 1.4 + 0.5 * len(rows))
    axes = figure.subplots()
    padded = [[*(100 * value for value in row), *[float("nan")] * (most - len(row))] for row in rows]
    image = axes.imshow(padded, cmap="Blues", vmin=0, vmax=100 * max(map(max, rows)), aspect="auto")
    if most <= BLOCKS_NUMBERED:
        for y, row in enumerate(rows):
            for x, value in enumerate(row):
                colour = "white" if 100 * value > 0.6 * image.get_clim()[1] else "black"
                axes.text(x, y, fraction(value), ha="center", va="center", fontsize=8, color=colour)
    step = -(-most // BLOCKS_NUMBERED)
    axes.set_xticks(range(0, most, step), [str(1 + x) for x in range(0, most, step)])
    axes.set_yticks(range(len(rows)), [named(group.name) for group in record.groups])
    axes.set_xlabel("block")
    axes.set_title(f"{named(record.teacher)} on {named(record.dataset)}", fontsize=9)
    figure.colorbar(image, label="weight (%)")
    return figure


def exit_curve(curve: Sequence[ExitPoint], used: ExitCosts, top1: float, label: str) -> "Figure":
    """Top-1 over mean cost of an ensemble: every shared threshold, the Pareto front, and what is in use (`used`)."""

    def cost(point: ExitCosts) -> float:
        return 100 * point.cost if point.cost is not None else 1e-6 * point.macs

    figure = new_figure()
    axes = figure.subplots()
    best = sorted((cost(point), point.top1) for point in curve if point.pareto)
    axes.plot(list(map(cost, curve)), [point.top1 for point in curve], "o", color=COLOURS[7], label="shared threshold")
    axes.plot([x for x, _ in best], [y for _, y in best], "-", color=COLOURS[0], label="Pareto front")
    axes.plot(cost(used), top1, "*", markersize=14, color=COLOURS[1], label=label)
    unit = "million" if used.cost is None else "% of the teacher"
    framed(axes, "Accuracy and cost", f"mean cost, {unit} MACs", "top-1, %")
    legend(figure, axes, "")
    return figure


def epoch_lines(report: SpotsDocument, figure: "FigureBase") -> None:
    """Fraction distilled at each spot, by epoch; dotted: mean teacher-routing probability, where there is one."""
    axes = figure.subplots()
    epochs = [row.epoch for row in report.by_epoch]
    for k, spot in enumerate(report.overall):
        style: dict[str, Any] = {"color": COLOURS[k % len(COLOURS)], "linewidth": 1.8}
        marker = MARKS[k % len(MARKS)] if len(epochs) <= 40 else None
        distilled, routed = ([getattr(row, key)[k] for row in report.by_epoch] for key in ("fraction", "probability"))
        axes.plot(epochs, _percent(distilled), label=plain(spot.name), marker=marker, markersize=4, **style)
        axes.plot(epochs, _percent(routed), linestyle=":", **style)
    framed(axes, "Spot-selection rate", "epoch", "samples distilled, %")
    axes.locator_params(axis="x", integer=True)  # epochs have no halves
    with_policy = report.overall[0].probability is not None
    legend(figure, axes, "dotted: mean teacher-routing probability" if with_policy else "")


def class_map(report: SpotsDocument, figure: "FigureBase") -> None:
    """Class x spot heat map of the difference from the spot's mean, in points, and that mean below each column.

    Of the trained router where it was measured, else of what was distilled in training.
    """
    shown, classes = _classes_shown(report)
    measured = report.measured if report.measured and report.measured.classes else None
    axes = figure.subplots()
    few = len(shown) == classes
    title = "By class" if few else f"{CLASSES_SHOWN} classes at each end of {classes}"
    axes.set_title(title, fontsize=11, loc="left")
    if not shown:
        return
    cells = [_percent(row.deviation) for row in shown]
    most = max(1.0, *(abs(cell) for row in cells for cell in row))
    image = axes.imshow(cells, aspect="auto", cmap="RdBu_r", vmin=-most, vmax=most, interpolation="nearest")
    axes.set_yticks(range(len(shown)), [plain(row.name) for row in shown], fontsize=7)
    means = [spot.mean for spot in measured.spots] if measured else [spot.fraction for spot in report.overall]
    heads = [f"{plain(s.name)}\n{fixed(100 * (mean or 0), 0)} %" for s, mean in zip(report.overall, means, strict=True)]
    axes.set_xticks(range(len(heads)), heads, fontsize=9)
    what = WHAT[measured.value] if measured else "samples distilled, %"
    figure.colorbar(image, ax=axes).set_label(f"{what}: points from the spot's mean", size=8)
    if not few:
        axes.axhline(CLASSES_SHOWN - 0.5, color="black", linewidth=1)


def _classes_shown(report: SpotsDocument) -> tuple[list[ClassDeviation], int]:
    """The rows of the heat map, the highest deviation first, and how many classes there are."""
    measured = report.measured.classes if report.measured else None
    rows: Sequence[ClassDeviation] = measured.rows if measured else report.by_class
    known = [row for row in rows if None not in row.deviation]
    ranked = sorted(known, key=lambda row: -sum(one or 0 for one in row.deviation))
    few = len(ranked) <= 3 * CLASSES_SHOWN
    return ranked if few else ranked[:CLASSES_SHOWN] + ranked[-CLASSES_SHOWN:], len(ranked)


def difficulty_curves(report: SpotsDocument, figure: "FigureBase") -> None:
    """Mean value by deciles of the images: of the student's loss (solid) and of the teacher's confidence (dashed)."""
    axes = figure.subplots()
    if not ((measured := report.measured) and (by := measured.difficulty)):
        return
    for deciles, line, mark in ((by.by_student_loss, "-", "o"), (by.by_teacher_confidence, "--", "s")):
        for k, spot in enumerate(measured.spots):
            colour, label = COLOURS[k % len(COLOURS)], plain(spot.name) if line == "-" else None
            places, means = range(1, len(deciles) + 1), _percent(row.mean[k] for row in deciles)
            axes.plot(places, means, line, marker=mark, markersize=4, color=colour, label=label)
    framed(axes, "By difficulty", "decile of the images, low to high", WHAT[measured.value])
    axes.set_xticks(range(1, len(by.by_student_loss) + 1))
    legend(figure, axes, "solid: student's loss, dashed: teacher's confidence")


def path_bars(report: SpotsDocument, figure: "FigureBase") -> None:
    """Expected fractions of the most frequent paths."""
    axes = figure.subplots()
    if not ((measured := report.measured) and (paths := measured.paths)):
        return
    shown = paths[:PATHS_SHOWN][::-1]
    bars = axes.barh([row.path for row in shown], _percent(row.fraction for row in shown), color=COLOURS[0])
    axes.bar_label(bars, fmt="%.1f", padding=3, fontsize=8)
    axes.margins(x=0.12)
    for label in axes.get_yticklabels():
        label.set_fontfamily("monospace")
    names = ", ".join(plain(spot.name) for spot in measured.spots)
    of = "" if len(shown) == len(paths) else f"; {len(shown)} of {len(paths)}"
    framed(axes, f"Paths ({names})", f"images, %{of}", "")


PANELS: dict[str, "Callable[[SpotsDocument, FigureBase], None]"] = {
    "epochs": epoch_lines,
    "classes": class_map,
    "difficulty": difficulty_curves,
    "paths": path_bars,
}


def panels_of(report: SpotsDocument) -> list[str]:
    """Names of the panels that a report has the data for."""
    found = report.measured
    there = {
        "classes": bool(report.by_class or (found and found.classes)),
        "difficulty": bool(found and found.difficulty),
        "paths": bool(found and found.paths),
    }
    return [name for name in PANELS if there.get(name, True)]


def spot_figure(report: SpotsDocument, panel: str | None) -> "Figure":
    """One panel, or (None) all that there are in one figure. UsageError where the report lacks the data."""
    there = panels_of(report)
    if panel is not None:
        if panel not in there:
            raise UsageError(f"--panel {panel}: this run has nothing to draw it from", "--live measures it")
        tall = 1.2 + 0.16 * max(len(_classes_shown(report)[0]), 12)
        figure = new_figure(INCHES[0], tall if panel == "classes" else INCHES[1])
        PANELS[panel](report, figure)
        return figure
    whole = new_figure(2 * INCHES[0], (INCHES[1] + 0.4) * -(-len(there) // 2))
    parts = whole.subfigures(-(-len(there) // 2), min(len(there), 2), squeeze=False).flatten()
    for name, part in zip(there, parts, strict=False):
        PANELS[name](report, part)
    return whole


def _percent(fractions: Iterable[Number]) -> list[float]:
    return [float("nan") if value is None else 100.0 * value for value in fractions]


def framed(axes: Any, title: str, x: str, y: str) -> None:
    """Title, names of the axes, and a light grid."""
    axes.set_title(title, fontsize=11, loc="left")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(visible=True, alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def legend(figure: "FigureBase", axes: Any, remark: str) -> None:
    """Names of the lines below the axes, and a remark on what the kinds of line mean."""
    handles, names = axes.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower left", ncols=min(len(names), 4), fontsize=9, frameon=False)
    axes.set_title(remark, fontsize=8, loc="right", color="#57606a")
