"""A table that fits: rows and columns where the terminal is wide enough, one short list per row where it is not.

rich would cut numbers (`6…`) or drop columns on a narrow terminal; here a figure is always whole. All text is plain:
nothing in it is read as markup, and control characters are gone, so names from files can be shown as they are.
"""

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from sakd_cli.report.render.format import DASH, large, named, plain

Row = TypeVar("Row")
Columns = dict[str, Callable[[Any], str]]  # by header, how the cell of a row is written
GAP = 2  # columns between two columns
TEXT_LEAST = 12  # narrower than this, running text in a column is no pleasure to read
MORE = ("⋮",)  # a row that stands for rows left out

# What a terminal without UTF-8 gets instead; anything else it cannot show becomes a question mark.
_ASCII = str.maketrans(
    {"–": "-", "−": "-", "→": "->", "×": "x", "÷": "/", "γ": "gamma", "⋮": ":", "·": "-", "█": "#"}
    | dict.fromkeys("▏▎▍▌", "") | dict.fromkeys("▋▊▉", "#")
)  # fmt: skip


@dataclass(frozen=True)
class Sheet:
    """Title, headers, rows and notes below; a rich renderable that ends with an empty line.

    text    columns of text, which stand to the left and may be broken: the first so many, or those of these headers.
            The others hold figures, which stand to the right and are never broken
    own     number of the row that a page emphasises
    A column without a header only decorates: a bar, or the names of the rows.
    """

    title: str
    headers: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()
    text: int | Collection[str] = 1
    own: int | None = None

    @property
    def are_text(self) -> list[bool]:
        """For each column, whether it holds text."""
        known = self.text if not isinstance(self.text, int) else self.headers[: self.text]
        return [not header or header in known for header in self.headers]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        def say(text: str) -> str:
            clean = plain(text)
            return clean.translate(_ASCII).encode("ascii", "replace").decode() if options.ascii_only else clean

        headers = [say(header) for header in self.headers]
        rows = [[say(cell) for cell in row] for row in self.rows]
        widths = self._widths(headers, rows, options.max_width)
        if self.title:
            yield Text(say(self.title), style="bold", overflow="fold")
        if widths is None:
            yield from self._stacked(headers, rows)
        elif headers:
            yield self._table(headers, rows, widths)
        for note in self.notes:
            yield Text(say(note), style="dim", overflow="fold")
        yield Text("")

    def _widths(self, headers: list[str], rows: list[list[str]], available: int) -> list[int] | None:
        """Width of every column, or None if not even the least ones fit."""
        widths, least = [], []
        for index, (text, header) in enumerate(zip(self.are_text, headers, strict=True)):
            cells = max((cell_len(row[index]) for row in rows if index < len(row)), default=0)
            widths.append(max(cell_len(header), cells, 1))
            words = header.split()
            words += [part for row in rows if text and index < len(row) for part in parts(row[index])]
            longest = max((cell_len(word.strip()) for word in words), default=1)
            least.append(max(longest, min(cells, TEXT_LEAST) if text else cells))
        room = available - GAP * (len(widths) - 1)
        if sum(least) > room:
            return None
        while sum(widths) > room:
            slack = [width - floor for width, floor in zip(widths, least, strict=True)]
            widths[slack.index(max(slack))] -= 1
        return widths

    def _table(self, headers: list[str], rows: list[list[str]], widths: list[int]) -> Table:
        # The divider of this box is one space; with one of padding that makes the gap.
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, GAP - 1, 0, 0))
        for k, (text, header, width) in enumerate(zip(self.are_text, headers, widths, strict=True)):
            style = "cyan" if k and not header else ""
            justify: Literal["left", "right"] = "left" if text else "right"
            table.add_column(Text(header), justify=justify, style=style, width=width, overflow="fold")
        for row in rows:
            cells = zip(row, self.are_text, widths, strict=False)
            table.add_row(*(Text("\n".join(wrapped(cell, width)) if text else cell) for cell, text, width in cells))
        return table

    def _stacked(self, headers: list[str], rows: list[list[str]]) -> Iterator[Text]:
        """`stage2`, then `  Share: 61.3` and so on; a column without a header only decorates, and is left out."""
        for row in rows:
            # A name speaks for itself; a bare number does not.
            bare = self.are_text[0] or len(row) == 1
            yield Text(row[0] if bare else f"{headers[0]} {row[0]}", overflow="fold")
            for header, cell in list(zip(headers, row, strict=False))[1:]:
                if header:
                    yield Text(f"  {header}: {cell}", overflow="fold")


def parts(text: str) -> list[str]:
    """Where a line may end: behind a blank, a hyphen, a slash or an underscore."""
    return re.findall(r"[^\s/_-]*[\s/_-]+|[^\s/_-]+", text)


def wrapped(text: str, width: int) -> list[str]:
    """Lines of at most so many columns, as far as no part of a word is longer."""
    lines = [""]
    for part in parts(text):
        fits = cell_len(lines[-1] + part.rstrip()) <= width or not lines[-1]
        lines = [*lines[:-1], lines[-1] + part] if fits else [*lines, part]
    return [line.rstrip() for line in lines]


def table(
    title: str, rows: Iterable[Any], columns: Columns, notes: Sequence[str] = (), text: int | Collection[str] = 1
) -> Sheet:
    """A table of one line per row; `columns` gives by header how a row's cell is written; `text` as in `Sheet`.

    A column of figures of which none is known is left out.
    """
    cells = {header: [cell(row) for row in rows] for rows in [list(rows)] for header, cell in columns.items()}
    named_text = {*list(columns)[:text]} if isinstance(text, int) else {*text}
    known = {header: own for header, own in cells.items() if header in named_text or {*own} != {DASH}}
    return Sheet(title, list(known), [list(row) for row in zip(*known.values(), strict=True)], notes, named_text)


def varying(rows: Sequence[Any], columns: Columns) -> tuple[Columns, list[str]]:
    """The columns that differ between rows, and the first; a note of what all rows share."""
    cells = {header: {cell(row) for row in rows} for header, cell in list(columns.items())[1:]}
    same = {header: own.pop() for header, own in cells.items() if len(rows) > 1 and len(own) == 1}
    note = ", ".join(f"{header.lower()} {cell}" for header, cell in same.items() if cell != DASH)
    return {header: cell for header, cell in columns.items() if header not in same}, [f"All: {note}."] * bool(note)


def columns_of(show: Callable[[Any], str], attributes: Mapping[str, str]) -> Columns:
    """Columns of `table` by header: which attribute of a row stands there, all written by `show`."""

    def cell(attribute: str) -> Callable[[Any], str]:
        return lambda row: show(getattr(row, attribute))

    return {header: cell(attribute) for header, attribute in attributes.items()}


def thinned(rows: Sequence[Row], most: int) -> list[Row]:
    """At most `most` rows, evenly spaced, the first and the last among them."""
    if len(rows) <= most:
        return list(rows)
    return [rows[round(step * (len(rows) - 1) / (most - 1))] for step in range(most)]


def both_ends(rows: list[list[str]], top: int | None) -> tuple[list[Sequence[str]], bool]:
    """The first and the last `top` rows (None: all), with a mark between them where rows are left out."""
    if top is None or len(rows) <= 2 * top:
        return list(rows), False
    return [*rows[:top], MORE, *rows[-top:]], True


def left_out(shown: int, total: int, things: str) -> list[str]:
    """The note below a table that leaves rows out."""
    return [f"{shown} of {total} {things} are shown; all of them: --json"] if shown < total else []


def listing_table(title: str, rows: list[dict[str, Any]]) -> Sheet:
    """Rows with whatever keys they have, a column each, in the order in which the keys come."""
    if not (keys := list(dict.fromkeys(key for row in rows for key in row))):
        return Sheet(title, [], [], ["none"])
    titles = {key: {"macs": "MACs"}.get(key, key.replace("_", " ").capitalize()) for key in keys}
    texts = [key for key in keys if any(isinstance(row.get(key), str | bool | list | tuple) for row in rows)]
    cells = [[_cell(key, row.get(key)) for key in keys] for row in rows]
    return Sheet(title, list(titles.values()), cells, text=[titles[key] for key in texts])


def _cell(key: str, value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(named(part) for part in value) or DASH
    if isinstance(value, int):
        return large(value) if key in ("parameters", "macs") else str(value)
    if isinstance(value, float):
        return f"{value:g}"  # settings among them: 0.0005 must not become 0.00
    return named(value)
