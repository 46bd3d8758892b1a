"""Plots of reports as files: charts in, a matplotlib Figure out, without a display. matplotlib is the extra `plots`."""

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

from sakd_cli.documents.base import Number
from sakd_cli.errors import UsageError
from sakd_cli.report.render.charts import (
    PALETTE,
    Bars,
    Chart,
    Heat,
    Lines,
    cell_text,
    dashes,
    frame,
    marked,
    shades,
    smoothed,
    without_middle,
)
from sakd_cli.report.render.fonts import LONGEST, all_scripts
from sakd_cli.report.render.format import plain
from sakd_cli.writing import write_aside

if TYPE_CHECKING:
    from matplotlib.figure import Figure, FigureBase

MARKS = "os^Dv<>p"
FORMATS = (".png", ".svg")
KINDS = {"solid": "-", "dashed": "--", "dotted": ":", "marks": "", "faint": "-"}
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


def require_plot(path: Path, option: str = "--plot") -> Path:
    """A file that a plot can be written to. UsageError for other formats, without its folder or matplotlib."""
    if path.suffix.lower() not in FORMATS:
        raise UsageError(f"{option} {path}: the name ends in {' or '.join(FORMATS)}")
    if not path.absolute().parent.is_dir():
        raise UsageError(f"{option} {path}: no such folder")
    new_figure()
    return path


def write(figure: "Figure", path: Path) -> None:
    """Save by the ending of the name."""
    write_aside(path, rendered(figure, path.suffix.lower()[1:]))


def figure_of(charts: Sequence[Chart]) -> "Figure":
    """Charts in two columns; one alone is as tall as its rows need."""
    across, tall = min(len(charts), 2), INCHES[1] + 0.4 * (len(charts) > 1)
    for chart in charts:
        if not isinstance(chart, Lines):
            tall = max(tall, 1.8 + 0.17 * len(chart.rows))
    lines = -(-len(charts) // 2)
    whole = new_figure(across * INCHES[0], tall * lines)
    parts = whole.subfigures(lines, across, squeeze=False).flatten()
    shown = (smoothed(chart) if isinstance(chart, Lines) else chart for chart in charts)
    for chart, part in zip(shown, parts, strict=False):
        axes = part.subplots()
        axes.set_title(plain(chart.title), fontsize=11, loc="left")
        if isinstance(chart, Heat):
            _heat(chart, part, axes)
        else:
            _lines(chart, axes) if isinstance(chart, Lines) else _bars(chart, axes)
            axes.grid(visible=True, alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
            handles, names = axes.get_legend_handles_labels()
            if len(names) > 1:
                columns = 4 if max(map(len, names)) < 12 else 2
                part.legend(handles, names, loc="outside upper left", ncols=columns, fontsize=9, frameon=False)
        if chart.note:
            part.supxlabel(fill(plain(chart.note), 84), fontsize=7, color="#57606a", x=0.01, ha="left")
    return whole


def _known(values: Sequence[Number]) -> list[float]:
    return [float("nan") if value is None else value for value in values]


def _lines(chart: Lines, axes: Any) -> None:
    for series, dash in zip(chart.series, dashes(chart), strict=True):
        colour, label = PALETTE[series.colour % len(PALETTE)], plain(series.name) if series.name else "_further"
        style: dict[str, Any] = {"color": colour, "linestyle": KINDS[series.kind], "linewidth": 1.5, "label": label}
        style |= {"markersize": 4, "alpha": 0.3 if series.kind == "faint" else None}
        style |= {"dashes": [*map(float, dash.split())]} if dash and series.kind == "solid" else {}
        style |= {"marker": MARKS[series.colour % len(MARKS)]} if marked(series) else {}
        axes.plot(series.x, _known(series.y), **style)
        if series.band:
            axes.fill_between(series.x, *zip(*series.band, strict=True), color=colour, alpha=0.15)
    axes.set_ylim(*frame(chart)[2:])
    axes.set_xlabel(chart.x)
    axes.set_ylabel(chart.y)
    if all(float(x).is_integer() for series in chart.series for x in series.x):
        axes.locator_params(axis="x", integer=True)  # epochs have no halves


def _heat(chart: Heat, figure: "FigureBase", axes: Any) -> None:
    from matplotlib.colors import LinearSegmentedColormap

    if not (cells := [_known(row) for row in chart.cells]):
        return
    least = -chart.most if chart.signed else chart.least
    stops = [least, 0.0, chart.most] if chart.signed else [least, chart.most]
    colours = LinearSegmentedColormap.from_list("cells", [shades(chart, stop)[0] for stop in stops])
    image = axes.imshow(cells, aspect="auto", cmap=colours, vmin=least, vmax=chart.most, interpolation="nearest")
    for y, row in enumerate(chart.cells if chart.numbers else ()):
        for x, value in enumerate(row):
            ink = shades(chart, value or 0.0)[1]
            axes.text(x, y, cell_text(chart, value), ha="center", va="center", fontsize=7, color=ink)
    step = -(-len(chart.columns) // 12)
    means = chart.means or [""] * len(chart.columns)
    heads = [f"{plain(name)}\n{mean}".strip() for name, mean in zip(chart.columns, means, strict=True)]
    axes.set_xticks(range(0, len(chart.columns), step), heads[::step], fontsize=8)
    axes.set_yticks(range(len(chart.rows)), [without_middle(plain(row), LONGEST) for row in chart.rows], fontsize=7)
    figure.colorbar(image, ax=axes).set_label(f"{chart.ends[0]}  |  {chart.ends[1]}", size=8)


def _bars(chart: Bars, axes: Any) -> None:
    high = 0.8 / len(chart.series)
    for k, name in enumerate(chart.series):
        places = [r + (k - (len(chart.series) - 1) / 2) * high for r in range(len(chart.rows))]
        values = _known([row[1][k] for row in chart.rows])
        errors = [(row[2][k] or 0.0) if k < len(row[2]) else 0.0 for row in chart.rows]
        colour = PALETTE[k % len(PALETTE)]
        bars = axes.barh(places, values, high, color=colour, label=plain(name), xerr=errors if any(errors) else None)
        axes.bar_label(bars, fmt="%.1f", padding=3, fontsize=8)
    names = [without_middle(plain(name), LONGEST) for name, *_ in chart.rows]
    axes.set_yticks(range(len(chart.rows)), names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 112)
    axes.set_xlabel(chart.x)
