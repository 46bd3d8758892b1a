"""Plots of reports as files: charts in, a matplotlib Figure out, without a display. matplotlib is the extra `plots`."""

import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

from sakd_cli.documents.base import Number
from sakd_cli.errors import UsageError
from sakd_cli.report.render import charts
from sakd_cli.report.render.charts import PALETTE, Bars, Chart, Heat, Lines, without_middle
from sakd_cli.report.render.format import plain
from sakd_cli.writing import write_aside

if TYPE_CHECKING:
    from matplotlib.figure import Figure, FigureBase
    from matplotlib.text import Text

MARKS = "os^Dv<>p"
FORMATS = (".png", ".svg")
KINDS = {"solid": "-", "dashed": "--", "dotted": ":", "marks": "", "faint": "-"}
INCHES = (5.2, 3.9)
LONGEST = 30  # columns of a row's name


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


def require_plot(path: Path, option: str = "--plot", others: str = "") -> Path:
    """A file that a plot can be written to. UsageError for other formats, without its folder or matplotlib."""
    if path.suffix.lower() not in FORMATS:
        raise UsageError(f"{option} {path}: the name ends in {others}{' or '.join(FORMATS)}")
    if not path.absolute().parent.is_dir():
        raise UsageError(f"{option} {path}: no such folder")
    new_figure()
    return path


def write(figure: "Figure", path: Path) -> None:
    """Save by the ending of the name."""
    write_aside(path, rendered(figure, path.suffix.lower()[1:]))


def figure_of(given: Sequence[Chart]) -> "Figure":
    """Charts in two columns; one alone is as tall as its rows need."""
    across, tall = min(len(given), 2), INCHES[1] + 0.4 * (len(given) > 1)
    for chart in given:
        if not isinstance(chart, Lines):
            tall = max(tall, 1.8 + 0.17 * len(chart.rows))
    lines = -(-len(given) // 2)
    whole = new_figure(across * INCHES[0], tall * lines)
    parts = whole.subfigures(lines, across, squeeze=False).flatten()
    shown = (charts.smoothed(chart) if isinstance(chart, Lines) else chart for chart in given)
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
    for series, dash in zip(chart.series, charts.dashes(chart), strict=True):
        colour, label = PALETTE[series.colour % len(PALETTE)], plain(series.name) if series.name else "_further"
        style: dict[str, Any] = {"color": colour, "linestyle": KINDS[series.kind], "linewidth": 1.5, "label": label}
        style |= {"markersize": 4, "alpha": 0.3 if series.kind == "faint" else None}
        style |= {"dashes": [*map(float, dash.split())]} if dash and series.kind == "solid" else {}
        style |= {"marker": MARKS[series.colour % len(MARKS)]} if charts.marked(series) else {}
        axes.plot(series.x, _known(series.y), **style)
        if series.band:
            axes.fill_between(series.x, *zip(*series.band, strict=True), color=colour, alpha=0.15)
    axes.set_ylim(*charts.frame(chart)[2:])
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
    colours = LinearSegmentedColormap.from_list("cells", [charts.shades(chart, stop)[0] for stop in stops])
    image = axes.imshow(cells, aspect="auto", cmap=colours, vmin=least, vmax=chart.most, interpolation="nearest")
    for y, row in enumerate(chart.cells if chart.numbers else ()):
        for x, value in enumerate(row):
            ink = charts.shades(chart, value or 0.0)[1]
            axes.text(x, y, charts.cell_text(chart, value), ha="center", va="center", fontsize=7, color=ink)
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


@contextmanager
def all_scripts(figure: "Figure", kind: str) -> Iterator[None]:
    """Inside, the figure can be saved as `png` or `svg` with all of its texts legible.

    A character that no font of this machine has stands as text in an SVG, for the fonts of whoever looks at it; in a
    PNG as its code point: U+732B.
    """
    import matplotlib
    from matplotlib.font_manager import FontProperties, findfont
    from matplotlib.text import Text

    texts = [text for text in figure.findobj(Text) if isinstance(text, Text)]
    for text in texts:
        text.set_parse_math(False)  # a name with two $ is no formula
    odd = {text: text.get_text() for text in texts if not text.get_text().isascii()}
    wanted = frozenset("".join(odd.values())) - characters(str(findfont(FontProperties())))
    fonts, missing = _fonts_with(wanted) if wanted else ([], frozenset())
    for text in odd if fonts else ():
        text.set_fontfamily(["sans-serif", *fonts])
    fonttype = "none" if missing else matplotlib.rcParams["svg.fonttype"]
    with matplotlib.rc_context({"svg.fonttype": fonttype}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Glyph \d+ .* missing from (current )?font")
        with _spelled(figure, odd, missing if kind == "png" else frozenset()), _quiet_search():
            yield


@contextmanager
def _quiet_search() -> Iterator[None]:
    """Inside, matplotlib does not log that a font has no regular weight and it takes the nearest."""
    log = logging.getLogger("matplotlib.font_manager")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)


@contextmanager
def _spelled(figure: "Figure", texts: "Mapping[Text, str]", missing: frozenset[str]) -> Iterator[None]:
    """Inside, code points stand for these characters, also in the labels of axes, which are made anew when drawn."""
    from matplotlib.ticker import FuncFormatter, ScalarFormatter

    def spelled(words: str) -> str:
        return "".join(f"U+{ord(c):04X} " if c in missing else c for c in words)

    axes = [axis for one in figure.axes for axis in (one.xaxis, one.yaxis)] if missing else []
    axes = [axis for axis in axes if not isinstance(axis.get_major_formatter(), ScalarFormatter)]  # numbers
    formatters = [axis.get_major_formatter() for axis in axes]
    for axis, formatter in zip(axes, formatters, strict=True):
        axis.set_major_formatter(
            FuncFormatter(lambda x, place, old=formatter: without_middle(spelled(old(x, place)), LONGEST))
        )
    for text, words in texts.items():
        text.set_text(spelled(words))
    try:
        yield
    finally:
        for axis, formatter in zip(axes, formatters, strict=True):
            axis.set_major_formatter(formatter)
        for text, words in texts.items():
            text.set_text(words)


@cache
def characters(path: str) -> frozenset[str]:
    """Those that a font file has; none where it cannot be read."""
    from matplotlib.ft2font import FT2Font

    try:
        return frozenset(map(chr, FT2Font(path).get_charmap()))
    except (OSError, RuntimeError):
        return frozenset()


@cache
def _fonts_with(wanted: frozenset[str]) -> tuple[list[str], frozenset[str]]:
    """Names of fonts of this machine that have these characters, the one with most of them first; those none has."""
    from matplotlib.font_manager import fontManager

    missing, fonts = set(wanted), []
    fonts_here = (font for font in fontManager.ttflist if font.style == "normal")
    known = {font.name: font.fname for font in fonts_here if "Last Resort" not in font.name}  # it has boxes only
    for name, path in sorted(known.items(), key=lambda font: (-len(wanted & characters(font[1])), font[0])):
        if found := missing & characters(path):
            fonts.append(name)
            missing -= found
    return fonts, frozenset(missing)
