"""Charts as data, and as inline SVG: sharp at every size, in the colours of the page, with a value under every pointer.

`plots.py` draws the same charts with matplotlib, for files. Shares stand on a whole axis from 0 to 100.
"""

import re
from collections.abc import Callable, Sequence
from html import escape
from math import floor, log10
from statistics import fmean, median
from typing import Literal, NamedTuple

from rich.cells import cell_len, chop_cells

from sakd_cli.documents.base import Number
from sakd_cli.report.render.format import DASH, fixed, plain, points

SHARE = (0.0, 100.0)
WIDTH, HEIGHT, LINE, CHARACTER = 320, 200, 16, 6.3  # of a drawing, of a row and of a character, in its own units
MARKS = ("M-3 0a3 3 0 1 0 6 0a3 3 0 1 0-6 0", "M-2.7-2.7h5.4v5.4h-5.4z", "M0-3.6L3.4 2.6h-6.8z", "M0-4L4 0L0 4L-4 0z")
KINDS = {"solid": "", "dashed": "7 4", "dotted": "1.5 3.5", "marks": "", "faint": ""}
# Of curves and bars, on a page and in files: after Okabe and Ito, told apart by people of every kind of sight.
PALETTE = ("#0072b2", "#d55e00", "#008f68", "#b3548c", "#7722dd", "#2b2b2b")
# Of cells, in light and in dark: in the middle or at the least, and at both ends.
PALE, MORE, LESS = (246, 247, 248), (0, 84, 148), (178, 71, 0)
NIGHT = (30, 37, 45), (124, 190, 255), (255, 160, 90)
MOST_MARKED = 40  # points of a curve that have marks; a longer one is drawn smoothed
SMOOTH = 16  # parts of the axis, over each of which a smoothed curve is a running mean
SAME = 0.015  # of the upright axis, within which curves lie on each other
CLOSE = 15.0  # points within which curves are shown once more on a part of the axis


class Series(NamedTuple):
    """A curve: y over x, None where it is not known, and perhaps a band (low, high) around it.

    name    in the legend; None: a further curve of the one before, as the chart's note says
    colour  its number, and that of its mark
    """

    name: str | None
    x: Sequence[float]
    y: Sequence[Number]
    colour: int
    kind: Literal["solid", "dashed", "dotted", "marks", "faint"] = "solid"
    band: Sequence[tuple[float, float]] = ()


class Lines(NamedTuple):
    """Curves in one frame; x and y name the axes with their units. limits: of y; None: as the values are."""

    title: str
    x: str
    y: str
    series: Sequence[Series]
    limits: tuple[float, float] | None = SHARE
    note: str = ""


class Heat(NamedTuple):
    """Rows by columns of numbers, None where one is not known.

    most     the value with the strongest colour; of signed values also its negative
    least    the value with the weakest colour
    ends     what the weakest (or most negative) and the strongest colour mean, with units
    numbers  whether they stand in the cells, where these are wide enough
    means    what stands below the names of the columns
    width    of the drawing; a narrow one has no colour bar of its own, a broad one scrolls in its own box
    """

    title: str
    rows: Sequence[str]
    columns: Sequence[str]
    cells: Sequence[Sequence[Number]]
    most: float
    ends: tuple[str, str]
    signed: bool = False
    numbers: bool = True
    note: str = ""
    width: int = WIDTH
    means: Sequence[str] = ()
    least: float = 0.0


Row = tuple[str, Sequence[Number], Sequence[Number]]  # name, value of each series, half length of its interval


class Bars(NamedTuple):
    """Bars from 0 to 100; remarks: what stands below the bars of each row, empty where nothing is to be said."""

    title: str
    x: str
    series: Sequence[str]
    rows: Sequence[Row]
    note: str = ""
    remarks: Sequence[str] = ()


Chart = Lines | Heat | Bars


def zoom(chart: Lines) -> list[Chart]:
    """The chart, and the same with a part of its axis where all curves, or their second halves, lie within `CLOSE`."""
    ends = [x for series in chart.series for x in series.x]
    for start in (min(ends), (min(ends) + max(ends)) / 2) if ends else ():
        cut = [(one, [k for k, x in enumerate(one.x) if x >= start]) for one in chart.series]
        part = [
            one._replace(x=[one.x[k] for k in at], y=[one.y[k] for k in at], band=[one.band[k] for k in at if one.band])
            for one, at in cut
            if len(at) > 1 or len(at) == len(one.x)
        ]
        known = [y for series in part for y in series.y if y is not None]
        if known and max(known) - min(known) <= CLOSE:
            low, high = max(SHARE[0], floor(min(known)) - 1.0), min(SHARE[1], floor(max(known)) + 2.0)
            note = f"Zoom: the upright axis shows {low:g} to {high:g} only. {chart.note}"
            return [chart, chart._replace(title=f"{chart.title} (zoom)", series=part, limits=(low, high), note=note)]
    return [chart]


def smoothed(chart: Lines) -> Lines:
    """The chart with a running mean for every line of many points, whose own values stay behind all, faint."""
    if not (long := [one for one in chart.series if one.kind != "marks" and len(one.x) > MOST_MARKED]):
        return chart
    reach = max(len(one.x) for one in long) // SMOOTH // 2
    unit = chart.x.partition(",")[0].partition(" (")[0]
    faint = [one._replace(name=None, kind="faint", band=()) for one in long if one.kind != "dotted"]
    lines = [one._replace(y=_running_mean(one.y, reach)) if one in long else one for one in chart.series]
    note = f"{chart.note} Lines: running means of {2 * reach + 1} values ({unit}); faint: each value."
    return chart._replace(series=[*faint, *lines], note=note.strip())


def _running_mean(values: Sequence[Number], reach: int) -> list[Number]:
    """Of what is known among `reach` values to both sides, of fewer at the ends; None where the value itself is."""
    found = list[Number]()
    for k, value in enumerate(values):
        known = [one for one in values[max(0, k - reach) : k + reach + 1] if one is not None]
        found.append(None if value is None else fmean(known))
    return found


def extent(words: str) -> float:
    """How wide a text is, about, in the font of the reader's machine."""
    words = plain(words)
    return CHARACTER * cell_len(words) + 1.8 * sum(c.isupper() or c in "mw%@" for c in words)


def text(value: str) -> str:
    """As HTML."""
    return escape(plain(value), quote=True)


def unbroken(sentence: str) -> str:
    """A sentence in which no figure is parted at the end of a line, from its percent sign or by thousands."""
    return re.sub(r"(?<=\d) (?=%|\d{3}\b)", "&nbsp;", with_code(sentence))


def with_code(words: str) -> str:
    """As HTML, with names between backticks (methods and routers are called at, never, always) as code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", text(words))


def drawn(chart: Chart) -> str:
    """The chart as a figure: title, legend, drawing, note."""
    names: list[tuple[str, int, str]] = []
    if isinstance(chart, Lines):
        chart = smoothed(chart)
        names = [(s.name, s.colour, s.kind) for s in chart.series if s.name is not None]
        drawing = _lines(chart)
    elif isinstance(chart, Bars):
        names = [(name, k, "") for k, name in enumerate(chart.series)] if len(chart.series) > 1 else []
        drawing = _bars(chart)
    else:
        drawing = _heat(chart)
    keys = "".join(f"<li>{_swatch(colour, kind)}{text(name)}</li>" for name, colour, kind in names)
    legend = f'<ul class="legend">{keys}</ul>' if names else ""
    note = f'<p class="note">{unbroken(chart.note)}</p>' if chart.note else ""
    kind = ""
    if isinstance(chart, Heat) and chart.width != WIDTH:
        kind = ' class="small"' if chart.width < WIDTH else ' class="broad"'
        if chart.width > WIDTH:
            drawing = f'<div class="wide" tabindex="0"><div style="min-width:{chart.width}px">{drawing}</div></div>'
    return f"<figure{kind}><figcaption>{text(chart.title)}</figcaption>{legend}{drawing}{note}</figure>"


def marked(series: Series) -> bool:
    """Whether every point has a mark: where there is no line, or a line of few points."""
    return series.kind == "marks" or (series.kind not in ("dotted", "faint") and len(series.x) <= MOST_MARKED)


def dashes(chart: Lines) -> list[str]:
    """Of every curve: as its kind is; one that lies mostly on earlier ones lets them be seen, in turn."""
    low, high = frame(chart)[2:]
    found = list[str]()
    for k, one in enumerate(chart.series):
        below = [
            other for other in chart.series[:k] if other.kind == one.kind == "solid" and len(other.y) == len(one.y)
        ]
        gaps = [median([0.0, *(abs((a or 0) - (b or 0)) for a, b in zip(one.y, o.y, strict=True))]) for o in below]
        under = sum(gap <= (high - low) * SAME for gap in gaps)
        found.append(f"8 {8 * under}" if under else KINDS[one.kind])
    return found


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers between two ends."""
    rough = max(high - low, 1e-9) / (most - 1)
    power = 10.0 ** floor(log10(rough))
    step = next(power * n for n in (1, 2, 5, 10) if power * n >= rough * 0.999)
    return [n * step for n in range(-floor(-low / step + 1e-9), floor(high / step + 1e-9) + 1)]


def frame(chart: Lines) -> tuple[float, float, float, float]:
    """The least and the largest x, and y: the limits, or round numbers around all curves and bands."""
    xs = [x for series in chart.series for x in series.x] or [0.0]
    left, right = min(xs), max(xs)
    if right - left <= 1e-6 * abs(right):  # one place, but for its rounding
        left, right = left - 0.5, right + 0.5
    if chart.limits:
        return left, right, *chart.limits
    known = [y for series in chart.series for y in series.y if y is not None]
    known += [end for series in chart.series for band in series.band for end in band]
    low = min([0.0, *known])
    first, second, *_ = steps = ticks(low, max([1e-6, *known]))
    return left, right, low, steps[-1] + second - first


def shades(chart: Heat, value: float, *, dark: bool = False) -> tuple[str, str]:
    """The colour of a cell, and that of the number in it, which is the one of black and white with more contrast."""
    share = max(-1.0, min(1.0, (value - chart.least) / ((chart.most - chart.least) or 1.0)))
    pale, more, less = NIGHT if dark else (PALE, MORE, LESS)
    rgb = [round(a + abs(share) * (b - a)) for a, b in zip(pale, less if share < 0 else more, strict=True)]
    linear = [c / 3294.6 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in rgb]
    light = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#{:02x}{:02x}{:02x}".format(*rgb), "#000" if light > 0.179 else "#fff"


def cell_text(chart: Heat, value: Number) -> str:
    """A cell's number as it is written."""
    return DASH if value is None else points(value, 1) if chart.signed else fixed(value, 0)


def _svg(width: float, height: float, title: str, parts: Sequence[str]) -> str:
    return f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{text(title)}">{"".join(parts)}</svg>'


def without_middle(words: str, columns: int) -> str:
    """A name of at most so many columns: both of its ends, by which names differ."""
    if cell_len(words) <= columns:
        return words
    ends = chop_cells(words, max(2, columns // 2)), chop_cells(words[::-1], max(2, (columns - 1) // 2))
    return f"{ends[0][0]}…{ends[1][0][::-1]}"


def _label(x: float, y: float, words: str, kind: str = "", room: float = 1e4) -> str:
    """Text; what does not fit into `room` loses its middle (names differ at their ends), and is whole on hover."""
    short = words = plain(words)
    if extent(words) > room:
        short = without_middle(words, max(2, int(room / extent(words) * cell_len(words))))
    whole = f"<title>{text(words)}</title>" if short != words else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}">{whole}{text(short)}</text>'


def _swatch(colour: int, kind: str) -> str:
    mark = f'<path class="m" transform="translate(13 6)" d="{MARKS[colour % len(MARKS)]}"/>'
    if kind in ("", "dotted"):
        mark = "" if kind else '<rect x="3" y="1" width="20" height="10"/>'
    line = f'<path class="l" stroke-dasharray="{KINDS[kind]}" d="M1 6H25"/>' if kind and kind != "marks" else ""
    return f'<svg class="c{colour % len(PALETTE)}" viewBox="0 0 26 12" aria-hidden="true">{line}{mark}</svg>'


def _lines(chart: Lines) -> str:
    left, right, low, high = frame(chart)
    upright = ticks(low, high)
    x0, x1, y0, y1 = max([38.0, *(extent(f"{y:g}") + 8 for y in upright)]), WIDTH - 12.0, HEIGHT - 34.0, 22.0

    def at(x: float, y: float) -> tuple[float, float]:
        across, up = (x - left) / (right - left), (min(max(y, low), high) - low) / (high - low)
        return x0 + across * (x1 - x0), y0 + up * (y1 - y0)

    parts = [_label(0, 11, chart.y, "soft"), _label((x0 + x1) / 2, HEIGHT - 4, chart.x, "soft mid")]
    for y in upright:
        height = at(left, y)[1]
        parts += [f'<path class="g" d="M{x0} {height:.1f}H{x1}"/>', _label(x0 - 5, height + 4, f"{y:g}", "soft end")]
    across = ticks(left, right, 13 if right - left <= 12 else 9)
    wholes = all(x == round(x) for series in chart.series for x in series.x)  # epochs have no halves
    across = [x for x in across if x == round(x) or (right - left < 3 and not wholes)]
    parts += [_label(at(x, low)[0], y0 + 15, f"{x:g}", "soft mid") for x in across]
    for series, dash in zip(chart.series, dashes(chart), strict=True):
        faint = ' opacity=".3"' if series.kind == "faint" else ""
        parts.append(f'<g class="c{series.colour % len(PALETTE)}"{faint}>{_curve(chart, series, at, dash)}</g>')
    return _svg(WIDTH, HEIGHT, chart.title, parts)


def _curve(chart: Lines, series: Series, at: Callable[[float, float], tuple[float, float]], dashed: str) -> str:
    def path(points: Sequence[tuple[float, float]]) -> str:
        return "L".join("{:.1f} {:.1f}".format(*at(*point)) for point in points)

    parts, run, runs = [], list[tuple[float, float]](), list[list[tuple[float, float]]]()
    if series.band:
        ends = list(zip(series.x, series.band, strict=True))
        outline = [(x, high) for x, (_, high) in ends] + [(x, low) for x, (low, _) in reversed(ends)]
        parts.append(f'<path class="b" d="M{path(outline)}Z"/>')
    for x, y in [*zip(series.x, series.y, strict=True), (0, None)]:
        if y is not None:
            run.append((x, y))
        elif run:
            runs.append(run)
            run = []
    if series.kind != "marks":
        dash = f' stroke-dasharray="{dashed}"' if dashed else ""
        parts += [f'<path class="l" stroke-width="1.5"{dash} d="M{path(run)}"/>' for run in runs]
    mark = MARKS[series.colour % len(MARKS)] if marked(series) else ""
    unit = chart.x.partition(",")[0].partition(" (")[0]
    for x, y in (point for run in runs for point in run):
        place = 'transform="translate({:.1f} {:.1f})"'.format(*at(x, y))
        said = f"{series.name or series.kind}, {unit} {x:g}: {fixed(y, 2)} ({chart.y})"
        shape = f'<path class="m" d="{mark}"/>' if mark else ""
        parts.append(f'<g {place}><title>{text(said)}</title>{shape}<circle class="h" r="7"/></g>')
    return "".join(parts)


def _heat(chart: Heat) -> str:
    longest = max(map(extent, chart.rows), default=0.0)
    x0 = min(longest + 8, 0.36 * min(chart.width, WIDTH))
    wide, step = (chart.width - x0) / max(len(chart.columns), 1), 1
    needed = max(map(extent, chart.columns), default=1.0) + 4
    if not chart.numbers:  # a scale such as epochs: only as many names as there is room for
        step = max(1, -(-int(needed) // max(int(wide), 1)))
    heads = [[name] for name in chart.columns]
    if needed > step * wide:  # spots of several teachers, stage2/resnet20, in two lines
        heads = [re.split("(?<=/)", name, maxsplit=1) for name in chart.columns]
    under = 12 * (max(map(len, heads), default=1) - 1)
    high, top = (LINE + 2 if chart.numbers else LINE - 2), under + (32 if chart.means else 18)
    parts = [_label(x0 + (k + 0.5) * wide, under + 26, mean, "soft mid") for k, mean in enumerate(chart.means)]
    for k, lines in list(enumerate(heads))[::step]:
        middle = x0 + (k + 0.5) * wide
        parts += [_label(middle, 12 + 12 * n, line, "soft mid", step * wide - 4) for n, line in enumerate(lines)]
    for r, (name, row) in enumerate(zip(chart.rows, chart.cells, strict=True)):
        y = top + r * high
        parts.append(_label(x0 - 6, y + high / 2 + 4, name, "end", x0 - 8))
        for k, value in enumerate(row):
            (fill, ink), (night, light) = (shades(chart, value or 0.0, dark=dark) for dark in (False, True))
            said = f"{name}, {chart.columns[k]}: {cell_text(chart, value)}"
            box = f'<rect x="{x0 + k * wide:.2f}" y="{y}" width="{wide - 1:.2f}" height="{high - 1}"'
            box += f' fill="{fill}" class="k" style="--z:{night}"/>' if value is not None else ' fill="none"/>'
            inside = ""
            if chart.numbers and value is not None and extent(cell_text(chart, value)) + 4 < wide:
                at = f'x="{x0 + (k + 0.5) * wide:.1f}" y="{y + high / 2 + 4:.1f}"'
                inside = f'<text {at} class="mid k" style="--a:{ink};--z:{light}">{cell_text(chart, value)}</text>'
            parts.append(f"<g><title>{text(said)}</title>{box}{inside}</g>")
    bottom = top + len(chart.rows) * high + 8
    if chart.width < WIDTH:
        return _svg(chart.width, bottom, chart.title, parts)
    return _svg(chart.width, bottom + 36, chart.title, [*parts, *_scale(chart, bottom)])


def _scale(chart: Heat, y: float) -> list[str]:
    """The colour bar, with what its ends mean."""
    steps, least = 20, -chart.most if chart.signed else chart.least
    width = chart.width / 2 / steps
    values = [least + (chart.most - least) * k / (steps - 1) for k in range(steps)]
    x0 = chart.width / 4
    boxes = [
        f'<rect x="{x0 + k * width:.2f}" y="{y}" width="{width + 0.2:.2f}" height="9" '
        f'fill="{shades(chart, value)[0]}" class="k" style="--z:{shades(chart, value, dark=True)[0]}"/>'
        for k, value in enumerate(values)
    ]
    low, high = cell_text(chart, least), cell_text(chart, chart.most)
    boxes += [_label(x0 - 5, y + 9, low, "soft end"), _label(chart.width - x0 + 5, y + 9, high, "soft")]
    return [*boxes, _label(0, y + 24, chart.ends[0], "soft"), _label(chart.width, y + 24, chart.ends[1], "soft end")]


def _bars(chart: Bars) -> str:
    longest = max([extent(name) for name, *_ in chart.rows], default=0.0)
    x0, x1, thick = min(longest + 8, 0.58 * WIDTH), WIDTH - 40.0, 12
    several = max(len(chart.series), 1)
    high = several * thick + (LINE + 4 if any(chart.remarks) else 8)
    bottom = 6 + high * len(chart.rows)
    parts = []
    for x in ticks(*SHARE):
        place = x0 + x / 100 * (x1 - x0)
        parts += [f'<path class="g" d="M{place:.1f} 2V{bottom}"/>', _label(place, bottom + 14, f"{x:g}", "soft mid")]
    for r, (name, values, errors) in enumerate(chart.rows):
        y = 6 + r * high
        parts.append(_label(x0 - 6, y + several * thick / 2 + 4, name, "end", x0 - 8))
        if r < len(chart.remarks):
            parts.append(_label(x0 + 2, y + several * thick + 11, chart.remarks[r], "soft", x1 - x0))
        for k, value in enumerate(values):
            error = errors[k] if k < len(errors) else None
            length = (value or 0.0) / 100 * (x1 - x0)
            said = fixed(value, 1) + ("" if error is None else f" ± {fixed(error, 1)}")
            middle, reach = y + k * thick + thick / 2, (error or 0.0) / 100 * (x1 - x0)
            ends = [x0 + min(max(length + side * reach, 0.0), x1 - x0) for side in (-1, 1)]
            whisker = f'<path class="w" d="M{ends[0]:.1f} {middle}H{ends[1]:.1f}"/>' if reach else ""
            bar = f'<rect x="{x0:.1f}" y="{y + k * thick + 1}" width="{max(length, 0.8):.1f}" height="{thick - 2}"/>'
            about = f"{name}, {chart.series[k] if several > 1 else chart.x}: {said}"
            parts.append(f'<g class="c{k % len(PALETTE)} f"><title>{text(about)}</title>{bar}{whisker}</g>')
            parts.append(_label(ends[1] + 4, middle + 4, fixed(value, 1)))
    parts.append(_label((x0 + x1) / 2, bottom + 28, chart.x, "soft mid"))
    return _svg(WIDTH, bottom + 34, chart.title, parts)
