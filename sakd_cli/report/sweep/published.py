"""The published figures beside which a sweep's stand: `published.yaml`, numbers only, with their source"""

from functools import cache
from pathlib import Path
from typing import Any

import yaml

from sakd_cli.config.routers import CLASSICAL, AdaptiveConfig
from sakd_cli.report.render.format import number

FILE = Path(__file__).with_name("published.yaml")
ABOUT = ("source", "sure", "notes")
EPOCHS = 240  # of every published run
ROUTERS = (CLASSICAL, AdaptiveConfig().name)  # in the order in which the file has them


@cache
def _figures() -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    return content


def about() -> dict[str, Any]:
    """source, sure (how far they are to be trusted) and notes."""
    return {key: _figures()[key] for key in ABOUT}


def pair_figures(dataset: str | None, pair: str) -> dict[str, Any] | None:
    """teacher, alone and methods (name -> [always, adaptive]) of `teacher:student`; None where there are none."""
    return None if dataset in ABOUT else (_figures().get(dataset or "") or {}).get(pair)


def cell(dataset: str | None, pair: str, method: str, router: str) -> float | None:
    """One published figure."""
    both = ((pair_figures(dataset, pair) or {}).get("methods") or {}).get(method)
    return number(dict(zip(ROUTERS, both, strict=True)).get(router)) if both else None
