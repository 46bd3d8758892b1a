"""Results of several seeds: mean, deviation, interval of the mean, and whether a paired difference is noise"""

import math
from collections.abc import Collection, Iterable, Mapping
from statistics import fmean, stdev

from sakd_cli.documents.base import PairedTest, SeedStatistics, Verdict
from sakd_cli.documents.sweep import SweepRun
from sakd_cli.documents.table import RunRow

LEVEL = 0.95
FEWEST = 3  # seeds for a verdict


def two_sided(t: float, freedom: float) -> float:
    """Probability of a Student t at least this far from 0 (Abramowitz and Stegun, 26.7.1)."""
    from mpmath import betainc  # comes with torch (through sympy); half a second that only groups of seeds need

    return float(betainc(freedom / 2, 0.5, 0, freedom / (freedom + t * t), regularized=True))


def critical(freedom: float, level: float = LEVEL) -> float:
    """The t within which that fraction of the distribution lies: half the width of an interval, in standard errors."""
    low, high = 0.0, 1e4
    while high - low > 1e-9 * max(low, 1.0):
        middle = (low + high) / 2
        low, high = (middle, high) if two_sided(middle, freedom) > 1 - level else (low, middle)
    return high


def by_seed(runs: Iterable[RunRow | SweepRun], metric: str = "top1") -> dict[int, float]:
    """That metric of every finished run by its seed, which counts once: of several the last finished one."""
    found = [(run.seed, getattr(run, metric)) for run in runs]
    return {seed: value for seed, value in found if seed is not None and value is not None}


def seed_statistics(values: Collection[float]) -> SeedStatistics | None:
    """None for no value; only the mean for one value."""
    if len(values) < 2:
        return SeedStatistics(mean=fmean(values), std=None, low=None, high=None) if values else None
    mean, std = fmean(values), stdev(values)
    half = critical(len(values) - 1) * std / math.sqrt(len(values))
    return SeedStatistics(mean=mean, std=std, low=mean - half, high=mean + half)


def paired_test(ours: Mapping[int, float], theirs: Mapping[int, float]) -> PairedTest:
    """Ours less theirs over the seeds that both have."""
    differences = {seed: value - theirs[seed] for seed, value in ours.items() if seed in theirs}
    values, p = list(differences.values()), None
    if (found := seed_statistics(values)) is None:
        return PairedTest(seeds=[], difference=None, low=None, high=None, p=None, verdict="unknown")
    if len(values) >= FEWEST and (error := stdev(values) / math.sqrt(len(values))):
        p = two_sided(fmean(values) / error, len(values) - 1)
    verdict: Verdict = "better" if found.mean > 0 else "worse"
    if p is None or p >= 1 - LEVEL:
        verdict = "few seeds" if p is None else "noise"
    low, high = found.low, found.high
    return PairedTest(seeds=list(differences), difference=found.mean, low=low, high=high, p=p, verdict=verdict)
