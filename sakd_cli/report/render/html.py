"""Reports as one web page: no server, no network, no framework; everything it shows is inside the file.

A section is a title and blocks: tables (the same `Sheet`s that the terminal shows, sortable), pictures, galleries.
Every name is escaped, and the page's own policy forbids whatever could load or send anything. Readable at phone width.
"""

import base64
import hashlib
import io
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Any, NamedTuple

from sakd_cli.documents.base import Part
from sakd_cli.report.render.format import named, plain
from sakd_cli.report.render.sheet import MORE, Sheet

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Picture(NamedTuple):
    """An image file's bytes and type (`svg+xml`, `png`), and its alternative text."""

    content: bytes
    kind: str
    alt: str


class Tile(NamedTuple):
    """One small image of a gallery with lines of text below it."""

    picture: Picture
    lines: Sequence[str]


class Gallery(NamedTuple):
    """Small images side by side under a heading."""

    title: str
    tiles: Sequence[Tile]


Block = Sheet | Picture | Gallery


class Section(NamedTuple):
    """A part of the page with a link in the contents."""

    title: str
    blocks: Sequence[Block]


STYLE = """
:root{color-scheme:light;--ink:#1b1f24;--soft:#57606a;--line:#d8dee4;--link:#0b5cad}
*{box-sizing:border-box}
body{margin:0 auto;max-width:72rem;padding:1rem;font:16px/1.5 system-ui,sans-serif;color:var(--ink);background:#fff}
h1{font-size:1.5rem;margin:.5rem 0;overflow-wrap:anywhere}
h2{font-size:1.2rem;margin:2rem 0 .5rem;border-top:1px solid var(--line);padding-top:1rem}
h3{font-size:1rem;margin:1.2rem 0 .3rem;overflow-wrap:anywhere}
a{color:var(--link)}
nav ul{display:flex;flex-wrap:wrap;gap:.3rem 1rem;list-style:none;padding:0}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.1rem 1rem;margin:.5rem 0}
dt{color:var(--soft)}
dd{margin:0;overflow-wrap:anywhere}
.wide{overflow:auto;max-height:34rem;border:1px solid var(--line);border-radius:4px}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:.9rem;min-width:100%}
th,td{padding:.25rem .6rem;text-align:right;white-space:nowrap;border-bottom:1px solid var(--line)}
th.t,td.t{text-align:left}
thead th{position:sticky;top:0;background:#f3f5f7;padding:0}
th button{all:unset;box-sizing:border-box;display:block;width:100%;padding:.35rem .6rem;cursor:pointer;font-weight:600}
th button:focus-visible{outline:2px solid var(--link);outline-offset:-2px}
th[aria-sort=ascending] button::after{content:" \\2191"}
th[aria-sort=descending] button::after{content:" \\2193"}
.note{color:var(--soft);font-size:.85rem;margin:.25rem 0;overflow-wrap:anywhere}
section>img{width:min(100%,44rem);height:auto;display:block}
.tiles{display:flex;flex-wrap:wrap;gap:.6rem;padding:0;margin:.3rem 0;list-style:none}
.tiles li{width:6.5rem;font-size:.75rem;line-height:1.3;overflow-wrap:anywhere}
.tiles img{width:100%;image-rendering:pixelated;display:block;border:1px solid var(--line)}
"""

# Sorts by number where both cells begin with one (as figures.py writes it), else by name; ties keep their order.
SCRIPT = """
"use strict";
const figure = text => parseFloat(text.replace(/\\u2212/g, "-").replace(/(\\d) (?=\\d{3}(?!\\d))/g, "$1"));
document.querySelectorAll("table").forEach(table => table.querySelectorAll("th").forEach((head, column) =>
  head.querySelector("button").addEventListener("click", () => {
    const down = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    table.querySelectorAll("th").forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down > 0 ? "ascending" : "descending");
    const body = table.tBodies[0], rows = Array.from(body.rows), text = row => row.cells[column].textContent.trim();
    const compare = (a, b) => {
      const x = figure(text(a)), y = figure(text(b));
      if (isNaN(x) !== isNaN(y)) return isNaN(x) ? 1 : -1;
      return down * (isNaN(x) ? text(a).localeCompare(text(b)) : x - y);
    };
    rows.sort(compare).forEach(row => body.append(row));
  })));
"""


def facts_of(document: Part, keys: Sequence[str]) -> list[tuple[str, str]]:
    """(name, value) of those fields of a document that have a value."""
    return [(key.capitalize(), named(value)) for key in keys if (value := getattr(document, key)) is not None]


def page(title: str, facts: Sequence[tuple[str, str]], sections: Sequence[Section]) -> str:
    """The whole page: title, a list of (name, value) facts, contents, sections."""
    said = "".join(f"<dt>{_text(name)}</dt><dd>{_text(value)}</dd>" for name, value in facts)
    links = "".join(f'<li><a href="#s{n}">{_text(s.title)}</a></li>' for n, s in enumerate(sections))
    body = "".join(
        f'<section id="s{number}"><h2>{_text(section.title)}</h2>{"".join(map(_block, section.blocks))}</section>\n'
        for number, section in enumerate(sections)
    )
    # Only this very script may run, and nothing may be fetched but what is written into the page.
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        f'<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{_text(title)}</title><style>{STYLE}</style></head><body>\n"
        f"<h1>{_text(title)}</h1><dl>{said}</dl><nav><ul>{links}</ul></nav>\n{body}"
        f"<script>{SCRIPT}</script></body></html>\n"
    )


def png(pixels: "NDArray[Any]") -> bytes:
    """An image [3, H, W] or [1, H, W] of bytes as a PNG file."""
    from PIL import Image

    buffer = io.BytesIO()
    channels = pixels if len(pixels) == 3 else pixels[:1].repeat(3, axis=0)
    Image.fromarray(channels.transpose(1, 2, 0).copy()).save(buffer, format="PNG")
    return buffer.getvalue()


def _text(value: str) -> str:
    return escape(plain(value), quote=True)


def _block(block: Block) -> str:
    if isinstance(block, Sheet):
        return _table(block)
    if isinstance(block, Picture):
        return _image(block)
    tiles = "".join(f"<li>{_image(tile.picture)}{'<br>'.join(map(_text, tile.lines))}</li>" for tile in block.tiles)
    return f'<h3>{_text(block.title)}</h3><ul class="tiles">{tiles}</ul>'


def _image(picture: Picture) -> str:
    data = base64.b64encode(picture.content).decode()
    return f'<img alt="{_text(picture.alt)}" src="data:image/{picture.kind};base64,{data}">'


def _table(sheet: Sheet) -> str:
    kinds = [' class="t"' if text else "" for text in sheet.are_text]
    heads = "".join(
        f'<th scope="col"{kind}><button type="button">{_text(header) or "&nbsp;"}</button></th>'
        for header, kind in zip(sheet.headers, kinds, strict=True)
    )
    rows = "".join(
        "<tr>" + "".join(f"<td{kind}>{_text(cell)}</td>" for cell, kind in zip(row, kinds, strict=True)) + "</tr>"
        for row in sheet.rows
        if row != MORE
    )
    notes = "".join(f'<p class="note">{_text(note)}</p>' for note in sheet.notes)
    table = f'<div class="wide" tabindex="0"><table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>'
    return f"<h3>{_text(sheet.title)}</h3>{table if sheet.headers else ''}{notes}"
