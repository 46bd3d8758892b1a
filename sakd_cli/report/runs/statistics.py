"""Figures of several seeds: mean, spread, interval of the mean, and whether a paired difference is more than noise"""

import math
import statistics
from collections.abc import Sequence
from typing import Any

LEVEL = 0.95
FEWEST = 3  # seeds for a verdict


def two_sided(t: float, freedom: float) -> float:
    """Chance of a Student t at least this far from 0 (Abramowitz and Stegun, 26.7.1)."""
    from mpmath import betainc  # comes with torch (through sympy); half a second that only groups of seeds need

    return float(betainc(freedom / 2, 0.5, 0, freedom / (freedom + t * t), regularized=True))


def critical(freedom: float, level: float = LEVEL) -> float:
    """The t within which that share of the distribution lies: half the width of an interval, in standard errors."""
    low, high = 0.0, 1e4
    while high - low > 1e-9 * max(low, 1.0):
        middle = (low + high) / 2
        low, high = (middle, high) if two_sided(middle, freedom) > 1 - level else (low, middle)
    return high


def spread(values: Sequence[float]) -> dict[str, Any] | None:
    """mean; std (of the sample), low and high of the mean's 95 % interval: None for one value. None for no value."""
    if not values:
        return None
    mean = statistics.fmean(values)
    if len(values) == 1:
        return {"mean": mean, "std": None, "low": None, "high": None}
    std = statistics.stdev(values)
    half = critical(len(values) - 1) * std / math.sqrt(len(values))
    return {"mean": mean, "std": std, "low": mean - half, "high": mean + half}


def paired(differences: Sequence[float]) -> dict[str, Any]:
    """The same of differences within a seed, and p of a paired t-test: None below three seeds, or without spread."""
    about: dict[str, Any] = {"mean": None, "std": None, "low": None, "high": None} | (spread(differences) or {})
    if not about["std"] or len(differences) < FEWEST:
        return about | {"p": None}
    error = about["std"] / math.sqrt(len(differences))
    return about | {"p": two_sided(about["mean"] / error, len(differences) - 1)}


def verdict_of(found: dict[str, Any]) -> str:
    """What `paired` found, in a word: better, worse, noise; few seeds or unknown where nothing can be claimed."""
    if found["mean"] is None:
        return "unknown"
    if found["p"] is None:
        return "few seeds"
    if found["p"] >= 1 - LEVEL:
        return "noise"
    return "better" if found["mean"] > 0 else "worse"
