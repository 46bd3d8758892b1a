"""The published figures beside which a sweep's stand: `published.yaml`, numbers only, with their source"""

from functools import cache
from pathlib import Path
from typing import Any

import yaml

from sakd_cli.config.routers import CLASSICAL, AdaptiveConfig
from sakd_cli.documents.sweep import Provenance, PublishedPair

FILE = Path(__file__).with_name("published.yaml")
EPOCHS = 240  # of every published run
ROUTERS = (CLASSICAL, AdaptiveConfig().name)  # in the order in which the file has them


@cache
def _content() -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    return content


def provenance() -> Provenance:
    """Where the figures come from."""
    return Provenance(**{key: _content()[key] for key in Provenance.model_fields})


def published_pair(dataset: str | None, pair: str) -> PublishedPair | None:
    """Of `teacher:student`; None where nothing is published."""
    found = _pair(dataset, pair)
    return PublishedPair(teacher=found["teacher"], baseline=found["baseline"]) if found else None


def published_cell(dataset: str | None, pair: str, method: str, router: str) -> float | None:
    """One published top-1."""
    figures = _pair(dataset, pair).get("methods", {}).get(method, (None, None))
    return dict(zip(ROUTERS, figures, strict=True)).get(router)


def _pair(dataset: str | None, pair: str) -> dict[str, Any]:
    found: dict[str, Any] = _content().get(dataset or "", {}).get(pair, {})
    return found
