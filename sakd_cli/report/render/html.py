"""Reports as one web page: no server, no network, no framework; everything it shows is inside the file.

A section is a title and blocks: tables (the same `Sheet`s that the terminal shows, sortable), charts, galleries.
Every name is escaped, and the page's own policy forbids whatever could load or send anything. Light and dark, on a
phone and on paper.
"""

import base64
import hashlib
import io
import re
from collections.abc import Sequence
from dataclasses import replace
from importlib.resources import files
from typing import TYPE_CHECKING, Any, NamedTuple

from sakd_cli.documents.base import Part
from sakd_cli.report.render.charts import PALETTE, Chart, drawn, text, unbroken, with_code
from sakd_cli.report.render.format import named
from sakd_cli.report.render.sheet import MORE, Sheet

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Tile(NamedTuple):
    """A small image of a gallery (a PNG file's bytes) with text below it, perhaps a chart beside it, a title on hover.

    alt: the image's alternative text
    """

    picture: bytes | None
    alt: str
    lines: Sequence[str]
    chart: Chart | None = None
    title: str = ""


class Gallery(NamedTuple):
    """Small images side by side under a heading."""

    title: str
    tiles: Sequence[Tile]


class Folded(NamedTuple):
    """Blocks that open with a click; on paper they are open."""

    title: str
    blocks: "Sequence[Block]"


Block = Sheet | Gallery | Chart | Folded


class Section(NamedTuple):
    """A part of the page with a link in the contents, the question that it answers, and the answer."""

    title: str
    blocks: Sequence[Block]
    question: str = ""
    answer: str = ""


class Answer(NamedTuple):
    """A question that whoever opens the page has, and the answer in sentences."""

    question: str
    answer: Sequence[str]


class Opening(NamedTuple):
    """What a page begins with: the answers, and groups of blocks beside and below them."""

    answers: Sequence[Answer]
    groups: Sequence[Sequence[Block]]


HERE = files("sakd_cli.report.render")
COLOURS = ";".join(f"--{k}:{colour}" for k, colour in enumerate(PALETTE))
STYLE = (HERE / "page.css").read_text(encoding="utf-8").replace("/*palette*/", COLOURS)
SCRIPT = (HERE / "page.js").read_text(encoding="utf-8")


def facts_of(document: Part, keys: Sequence[str]) -> list[tuple[str, str]]:
    """(name, value) of those fields of a document that have a value."""
    return [(key.capitalize(), named(value)) for key in keys if (value := getattr(document, key)) is not None]


def page(
    title: str, facts: Sequence[tuple[str, str]], sections: Sequence[Section], opening: Opening | None = None
) -> str:
    """The whole page: title, a list of (name, value) facts, the answer, contents, sections."""
    said = "".join(f"<div><dt>{text(name)}</dt><dd>{text(value)}</dd></div>" for name, value in facts)
    links = "".join(f'<li><a href="#s{n}">{text(s.title)}</a></li>' for n, s in enumerate(sections))
    body = "".join(
        f'<section id="s{number}"><h2>{text(section.title)}</h2>'
        + (f'<p class="question">{text(section.question)}</p>' if section.question else "")
        + (f'<p class="answer">{unbroken(section.answer)}</p>' if section.answer else "")
        + f"{''.join(map(_block, _untitled(section)))}</section>\n"
        for number, section in enumerate(sections)
    )
    first = ""
    if opening and opening.answers:
        answers = "".join(
            f"<dt>{text(one.question)}</dt>{''.join(f'<dd>{unbroken(said)}</dd>' for said in one.answer)}"
            for one in opening.answers
        )
        groups = "".join(f"<div>{''.join(map(_block, group))}</div>" for group in opening.groups if group)
        first = f'<div class="opening"><dl>{answers}</dl>{groups}</div>'
    # Only this very script may run, and nothing may be fetched but what is written into the page.
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        f'<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{text(title)}</title><style>{STYLE}</style></head><body>\n"
        f'<h1>{text(title)}</h1><dl class="facts">{said}</dl>{first}<nav><ul>{links}</ul></nav>\n{body}'
        f"<script>{SCRIPT}</script></body></html>\n"
    )


def png(pixels: "NDArray[Any]") -> bytes:
    """An image [3, H, W] or [1, H, W] of bytes as a PNG file."""
    from PIL import Image

    buffer = io.BytesIO()
    channels = pixels if len(pixels) == 3 else pixels[:1].repeat(3, axis=0)
    Image.fromarray(channels.transpose(1, 2, 0).copy()).save(buffer, format="PNG")
    return buffer.getvalue()


def _untitled(section: Section) -> list[Block]:
    """The blocks; a table with the title of the section has only what that adds."""
    blocks = list(section.blocks)
    for k, block in enumerate(blocks):
        if isinstance(block, Sheet) and block.title.startswith(section.title):
            rest = block.title.removeprefix(section.title).strip(" ()")
            blocks[k] = replace(block, title="In percent" if rest == "%" else rest[:1].upper() + rest[1:])
    return blocks


def _block(block: Block) -> str:
    if isinstance(block, Sheet):
        return _table(block)
    if isinstance(block, Folded):
        within = "".join(map(_block, block.blocks))
        return f"<details><summary>{text(block.title)}</summary>{within}</details>"
    if not isinstance(block, Gallery):
        return drawn(block)
    return f'<div><h3>{text(block.title)}</h3><ul class="tiles">{"".join(map(_tile, block.tiles))}</ul></div>'


def _tile(tile: Tile) -> str:
    lines, image = "<br>".join(map(text, tile.lines)), ""
    if tile.picture:
        data = base64.b64encode(tile.picture).decode()
        image = f'<img alt="{text(tile.alt)}" src="data:image/png;base64,{data}">'
    if tile.chart is None:
        return f'<li title="{text(tile.title)}">{image}{lines}</li>'
    return f'<li class="plotted"><div>{image}{lines}</div>{drawn(tile.chart)}</li>'


def _table(sheet: Sheet) -> str:
    kinds = [
        ' class="t bar"' if number and not header else ' class="t"' if left else ""
        for number, (header, left) in enumerate(zip(sheet.headers, sheet.are_text, strict=True))
    ]
    heads = "".join(
        f'<th scope="col"{kind}><button type="button">{text(header) or "&nbsp;"}</button></th>'
        for header, kind in zip(sheet.headers, kinds, strict=True)
    )
    rows = "".join(
        f"<tr{' class=own' if n == sheet.own else ''}>"
        + "".join(
            f"<td{kind}>{re.sub(r'(?<!<)/', '/<wbr>', with_code(cell))}</td>"
            for cell, kind in zip(row, kinds, strict=True)
        )
        + "</tr>"
        for n, row in enumerate(sheet.rows)
        if row != MORE
    )
    notes = "".join(f'<p class="note">{unbroken(note)}</p>' for note in sheet.notes)
    table = f'<div class="wide" tabindex="0"><table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>'
    heading = f"<h3>{text(sheet.title)}</h3>" if sheet.title else ""
    return f"<div>{heading}{table if sheet.headers else ''}{notes}</div>"
