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
from typing import TYPE_CHECKING, Any, NamedTuple

from sakd_cli.documents.base import Part
from sakd_cli.report.render.charts import PALETTE, Chart, coded, drawn, kept, text
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


STYLE = """
:root{color-scheme:light;--bg:#fff;--ink:#1b1f24;--soft:#57606a;--line:#d5dbe1;--head:#eef1f4;--card:#f7f9fb;
--link:#0b5cad;PALETTE}
@media screen and (prefers-color-scheme:dark){:root{color-scheme:dark;--bg:#11151a;--ink:#e6edf3;--soft:#a3afbb;
--line:#343c45;--head:#1f2730;--card:#181e25;--link:#7cb8ff;--0:#56b4e9;--1:#ff8f3f;--2:#2cc79b;--3:#e69ac6;
--4:#8f70ff;--5:#ffee44}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:74rem;padding:1rem;font:16px/1.5 system-ui,sans-serif}
body{color:var(--ink);background:var(--bg)}
h1{font-size:1.5rem;line-height:1.25;margin:.3rem 0;overflow-wrap:anywhere}
h2{font-size:1.2rem;margin:2rem 0 0;border-top:1px solid var(--line);padding-top:1rem}
h3,figcaption{font-size:1rem;font-weight:600;margin:1rem 0 .3rem;overflow-wrap:anywhere}
figcaption{margin:0 0 .2rem}
a{color:var(--link)}
nav ul{display:flex;flex-wrap:wrap;gap:.3rem 1rem;list-style:none;padding:0}
dl.facts{display:flex;flex-wrap:wrap;gap:0 1.2rem;margin:.3rem 0;font-size:.85rem}
dl.facts div{display:flex;gap:.4rem;min-width:0}
dt{color:var(--soft)}
dd{margin:0;overflow-wrap:anywhere;min-width:0}
.opening{display:grid;grid-template-rows:auto 1fr;
grid-template-columns:repeat(auto-fit,minmax(min(100%,28rem),1fr));gap:0 2rem;margin:.8rem 0;
padding:.8rem 1rem;background:var(--card);border:1px solid var(--line);border-radius:8px}
.opening dt{font-weight:600;color:var(--ink)}
.opening dd{margin:0 0 .3rem}
.opening dd+dt{margin-top:.5rem}
.opening dl{margin:0}
.opening>div{min-width:0}
.opening>div:nth-child(2){grid-row:span 2}
.opening>div>:first-child>h3{margin-top:0}
.facts dd,code{font-family:ui-monospace,monospace;font-size:.95em}
tr.own{font-weight:700}
.question,.answer{overflow-wrap:anywhere}
.question{font-size:1.05rem;font-style:italic;margin:.2rem 0}
.answer{margin:.2rem 0 .8rem;font-weight:600}
summary{cursor:pointer;font-weight:600;margin:.6rem 0;color:var(--link)}
figure{display:inline-block;vertical-align:top;width:min(100%,21.5rem);margin:.6rem 0 1rem;break-inside:avoid}
section{display:flex;flex-wrap:wrap;align-items:flex-start;gap:0 1.5rem}
section>*{flex:1 0 100%;min-width:0;max-width:100%}
section>figure{flex:1 1 21rem;max-width:27rem}
section>figure:nth-last-of-type(4):first-of-type,section>figure:nth-last-of-type(4):first-of-type~figure{
flex-basis:27rem}
section:has(>div)>figure{flex:0 1 auto}
section>figure~:not(figure){flex:1 1 30rem}
section>figure.broad{flex:1 1 100%;max-width:50rem}
.opening figure{width:min(100%,27rem)}
figure.broad{width:min(100%,50rem)}
figure.broad .wide{border:0}
figure.small{width:100%;margin:0}
figure.small figcaption{font-size:.8rem}
figure svg{display:block;width:100%;height:auto;font:11px system-ui,sans-serif;font-variant-numeric:tabular-nums}
svg text{fill:var(--ink)}
svg .soft{fill:var(--soft)}
svg .mid{text-anchor:middle}
svg .end{text-anchor:end}
.g{stroke:var(--line);stroke-width:1;fill:none}
.l{stroke:var(--c);fill:none;stroke-linejoin:round;stroke-linecap:round}
.f rect,.legend rect{fill:var(--c)}
.m{fill:none;stroke:var(--c);stroke-width:1.4}
.b{fill:var(--c);opacity:.18}
.h{fill:transparent}
.w{stroke:var(--ink);stroke-width:1.5;fill:none}
g:hover>.h{stroke:var(--ink)}
.c0{--c:var(--0)}.c1{--c:var(--1)}.c2{--c:var(--2)}.c3{--c:var(--3)}.c4{--c:var(--4)}.c5{--c:var(--5)}
.legend{display:flex;flex-wrap:wrap;gap:.1rem 1rem;list-style:none;margin:0 0 .3rem;padding:0;font-size:.85rem}
.legend li{display:flex;align-items:center;gap:.3rem;overflow-wrap:anywhere}
.legend svg{width:26px;height:12px;flex:none}
.legend .l{stroke-width:2}
.wide{overflow:auto;border:1px solid var(--line);border-radius:4px}
table{border-collapse:separate;border-spacing:0;font-variant-numeric:tabular-nums;font-size:.9rem;min-width:100%}
th,td{padding:.25rem .45rem;text-align:right;white-space:nowrap;border-bottom:1px solid var(--line)}
th.t,td.t{text-align:left}
td.t{white-space:normal;overflow-wrap:anywhere;min-width:5rem}
@media screen{td.t:not(:first-child){overflow-wrap:break-word}}
thead th{white-space:normal;overflow-wrap:normal;position:sticky;top:0;background:var(--head);padding:0;z-index:2}
th:first-child,td:first-child{position:sticky;left:0;z-index:1}
.t:first-child{white-space:normal;min-width:min(7rem,30vw)}
td:first-child{background:var(--bg)}
.opening td:first-child{background:var(--card)}
.opening td.t,.opening th.t{min-width:0}
.opening td.t:not(:first-child){overflow-wrap:anywhere}
.opening th,.opening td{padding:.15rem .5rem;overflow-wrap:break-word}
.opening th{white-space:normal}
.opening thead th{padding:0}
.opening th button{padding:.2rem .5rem}
td.bar{white-space:nowrap;color:var(--0);letter-spacing:-.5px}
thead th:first-child{z-index:3}
th button{all:unset;box-sizing:border-box;display:block;width:100%;padding:.35rem .45rem;cursor:pointer;font-weight:600}
th button:focus-visible,.wide:focus-visible{outline:2px solid var(--link);outline-offset:-2px}
th[aria-sort=ascending] button::after{content:" \\2191"}
th[aria-sort=descending] button::after{content:" \\2193"}
.note{color:var(--soft);font-size:.85rem;margin:.25rem 0;overflow-wrap:anywhere}
.tiles{display:flex;flex-wrap:wrap;gap:.5rem;padding:0;margin:.3rem 0;list-style:none}
.tiles li{width:5.5rem;font-size:.8rem;line-height:1.3;overflow-wrap:anywhere;hyphens:none;break-inside:avoid}
.tiles img{width:100%;image-rendering:pixelated;display:block;border:1px solid var(--line)}
.opening .tiles li{width:4.4rem}
.tiles li.plotted{width:min(100%,20rem);display:grid;grid-template-columns:4.5rem 1fr;gap:.2rem .6rem;padding:.4rem 0}
.plotted figure{grid-column:2;grid-row:1/3}
text.k{fill:var(--a)}
@media screen and (prefers-color-scheme:dark){rect.k,text.k{fill:var(--z)}}
@media screen and (max-width:30rem){.opening{padding:.5rem .7rem}.opening table{font-size:.82rem}
.opening th,.opening td,.opening th button{padding-left:.3rem;padding-right:.3rem}.opening thead th{padding:0}}
@media print{section{display:block}body{max-width:none;padding:0;font-size:11pt}nav{display:none}
.wide{overflow:visible;max-height:none!important;border:0}
table{font-size:7.5pt;min-width:0;width:100%}th,td{white-space:normal;padding:1pt 3pt;overflow-wrap:anywhere}
thead th,th:first-child,td:first-child{position:static}th button{padding:1pt 3pt}tr{break-inside:avoid}
h2,h3,.question{break-after:avoid}
.opening,rect,.m,thead th{print-color-adjust:exact;-webkit-print-color-adjust:exact}
figure{width:48%;margin-right:1%}.opening{grid-template-columns:1fr 1fr}.opening figure{width:100%}
.tiles{break-inside:avoid}}
""".replace("PALETTE", ";".join(f"--{k}:{colour}" for k, colour in enumerate(PALETTE)))

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
// A long table scrolls in a box of whole rows; on paper everything is open.
const fit = () => document.querySelectorAll(".wide").forEach(box => {
  const row = Array.from(box.querySelectorAll("tbody tr")).find(one => one.offsetTop > 560);
  if (row) box.style.maxHeight = row.offsetTop + box.offsetHeight - box.clientHeight + "px";
});
fit();
addEventListener("resize", fit);
addEventListener("toggle", fit, true);
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach(one => one.open = true));
"""


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
        + (f'<p class="answer">{kept(section.answer)}</p>' if section.answer else "")
        + f"{''.join(map(_block, _untitled(section)))}</section>\n"
        for number, section in enumerate(sections)
    )
    first = ""
    if opening and opening.answers:
        answers = "".join(
            f"<dt>{text(one.question)}</dt>{''.join(f'<dd>{kept(said)}</dd>' for said in one.answer)}"
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

    def short(sheet: Sheet) -> Sheet:
        rest = sheet.title.removeprefix(section.title).strip(" ()")
        return replace(sheet, title=rest[:1].upper() + rest[1:])

    same = (isinstance(block, Sheet) and block.title.startswith(section.title) for block in section.blocks)
    return [
        short(one) if own and isinstance(one, Sheet) else one for one, own in zip(section.blocks, same, strict=True)
    ]


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
            f"<td{kind}>{re.sub(r'(?<!<)/', '/<wbr>', coded(cell))}</td>" for cell, kind in zip(row, kinds, strict=True)
        )
        + "</tr>"
        for n, row in enumerate(sheet.rows)
        if row != MORE
    )
    notes = "".join(f'<p class="note">{kept(note)}</p>' for note in sheet.notes)
    table = f'<div class="wide" tabindex="0"><table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>'
    heading = f"<h3>{text(sheet.title)}</h3>" if sheet.title else ""
    return f"<div>{heading}{table if sheet.headers else ''}{notes}</div>"
