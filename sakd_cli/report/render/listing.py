"""Rows with whatever keys they have, as a table"""

from typing import Any

from rich.console import RenderableType

from sakd_cli.report.render.format import DASH, large, word
from sakd_cli.report.render.sheet import Sheet


def listing_table(title: str, rows: list[dict[str, Any]]) -> RenderableType:
    """Rows with whatever keys they have, a column each, in the order in which the keys come."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    if not keys:
        return Sheet(title, [], [], ["none"])
    titles = {key: {"macs": "MACs"}.get(key, key.replace("_", " ").capitalize()) for key in keys}
    texts = [
        header
        for key, header in titles.items()
        if any(isinstance(row.get(key), str | bool | list | tuple) for row in rows)
    ]
    cells = [[_listed(key, row.get(key)) for key in keys] for row in rows]
    return Sheet(title, list(titles.values()), cells, text=texts)


def _listed(key: str, value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(word(part) for part in value) or DASH
    if isinstance(value, int):
        return large(value) if key in ("parameters", "macs") else str(value)
    if isinstance(value, float):
        return f"{value:g}"  # words of a config among them: 0.0005 must not become 0.00
    return word(value)
