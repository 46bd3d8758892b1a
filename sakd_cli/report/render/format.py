"""How figures and names are written in reports: short, with units, a dash for what is not known. No rich, no torch."""

import csv
import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sakd_cli.documents.base import SeedStatistics

DASH = "–"
MINUS = "−"
EIGHTHS = " ▏▎▍▌▋▊▉"
WHAT = {
    "probability": "teacher-routing probability, %",
    "draw": "one sample of the routing, %",
    "rate": "rate distilled in training, %",
    None: "no value is known",
}

SPLITS = {"train": "training images", "validation": "validation images", "test": "test images"}
SURE = 1.96  # standard errors of a 95 % interval

# Whole terminal sequences go, not only their first byte: "\x1b[31mred" must not leave "[31mred" behind.
# OSC (title, hyperlink) up to BEL or ST, CSI (colour, cursor), then any two-character escape.
_ESCAPES = re.compile(
    r"(?:\x1b\]|\x9d)[^\x07\x1b\x9c]*(?:\x07|\x1b\\|\x9c)?"
    r"|(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]"
    r"|\x1b[ -/]*[0-~]"
)


def printable(text: object) -> str:
    """One line that does nothing to a terminal: no sequence, control, direction override or lone surrogate."""
    return "".join(c if c.isprintable() else " " if c.isspace() else "" for c in _ESCAPES.sub("", str(text)))


def plain(text: object) -> str:
    """The same without spaces at its ends."""
    return printable(text).strip()


def number(value: Any) -> float | None:
    """A finite number, or None for everything else a file may hold in its place."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # an integer of more than 308 digits
        return None


def named(value: Any) -> str:
    """A name, or a dash."""
    return DASH if value is None else plain(value) or DASH


def fixed(value: Any, digits: int, unit: str = "") -> str:
    """`2.21`, `61.3 %`; what has more than nine digits as `1.25e+12`."""
    known = number(value)
    how = f".{digits}f" if known is None or abs(known) < 1e9 else ".3g"
    return DASH if known is None else f"{known:{how}}{unit}".replace("-", MINUS)


def fraction(value: Any) -> str:
    """A fraction in [0, 1] as a percentage without its sign, for columns that say so in their title: `61.3`."""
    known = number(value)
    return DASH if known is None else fixed(100 * known, 1)


def above(value: Any, share: Any) -> float | None:
    """What a share in [0, 1] is above another, in percentage points: the difference of both as they are shown."""
    known, mine = number(value), number(share)
    return None if known is None or mine is None else round(100 * mine, 1) - round(100 * (mine - known), 1)


def deviation(value: Any, share: Any) -> str:
    """The same, always signed: `+4.2`."""
    known = above(value, share)
    return DASH if known is None else points(known, 1)


def points(value: float, digits: int) -> str:
    """Signed percentage points; what rounds to nothing has no sign."""
    text = f"{value:+.{digits}f}"
    return text[1:] if float(text) == 0 else text.replace("-", MINUS)


def p_value(p: Any) -> str:
    """`0.043`, `< 0.001`."""
    known = number(p)
    return "< 0.001" if known is not None and known < 0.0005 else fixed(known, 3)


def difference(value: float, ours: float | None, theirs: float | None) -> str:
    """In points, to two digits as those have that it is of; to three where these two would not agree."""
    shown = None if ours is None or theirs is None else points(round(ours, 2) - round(theirs, 2), 2)
    return points(value, 2 if shown in (None, points(value, 2)) else 3)


def mean_std(found: SeedStatistics | None, digits: int = 2) -> str:
    """`71.05 ± 0.24` over seeds; the value alone of one seed."""
    if found is None:
        return DASH
    return fixed(found.mean, digits) + ("" if found.std is None else f" ± {fixed(found.std, digits)}")


def whole(value: Any) -> str:
    """A count in full, in groups of three: `10 000`."""
    known = number(value)
    return DASH if known is None else f"{round(known):,}".replace(",", " ").replace("-", MINUS)


def large(value: Any) -> str:
    """A large count to two or three figures: `512`, `8.45 k`, `0.084 M`, `0.28 M`, `40.8 M`, `1.25 G`."""
    known = number(value)
    if known is None:
        return DASH
    scales = ((1e3, 1.0, ""), (1e4, 1e3, " k"), (1e9, 1e6, " M"), (1e12, 1e9, " G"), (math.inf, 1e12, " T"))
    scale, unit = next((scale, unit) for limit, scale, unit in scales if abs(known) < limit)
    scaled = known / scale
    digits = 0 if not unit else next((n for n, least in enumerate((100, 10, 0.1)) if abs(scaled) >= least), 3)
    return fixed(scaled, digits, unit)


def duration(value: Any) -> str:
    """`12.3 s`, `1 min 23 s`, `2 h 05 min`."""
    known = number(value)
    if known is None or known < 0:
        return DASH
    seconds = round(known)
    if seconds < 60:
        return f"{known:.1f} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    minutes = round(known / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def shape(value: Any) -> str:
    """`16×32×32`."""
    return "×".join(named(part) for part in value) if isinstance(value, list | tuple) and value else DASH


def bar(value: Any) -> str:
    """A share in [0, 1] as ten characters of blocks, to an eighth of a character."""
    known = number(value)
    eighths = 0 if known is None else round(min(max(known, 0.0), 1.0) * 80)
    return ("█" * (eighths // 8) + EIGHTHS[eighths % 8]).strip()


def csv_text(fields: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> str:
    """Rows as CSV under a header; what a row does not have stays empty. No cell is a formula to a spreadsheet."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fields, lineterminator="\n")
    writer.writeheader()
    writer.writerows({field: _no_formula(value) for field, value in row.items()} for row in rows)
    return text.getvalue()


def _no_formula(value: object) -> object:
    """A text that a spreadsheet would compute, behind an apostrophe, which it takes for the sign of a text."""
    if not isinstance(value, str):
        return value
    value = value.replace("\r", "\\r")  # Python's csv does not quote it
    return f"'{value}" if value.startswith(("=", "+", "-", "@", "\t", "\\r")) else value
