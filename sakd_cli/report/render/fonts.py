"""Names in any script in plots: by fonts of this machine that have their characters, and told where there is none."""

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING

from sakd_cli.report.render.charts import without_middle

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from matplotlib.text import Text

LONGEST = 30  # columns of a row's name


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
