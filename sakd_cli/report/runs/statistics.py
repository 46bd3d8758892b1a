"""Results of several seeds: mean, deviation, interval of the mean, and what a paired difference shows

A test that finds nothing shows nothing: its verdict is "not shown", and the interval says which effects are compatible.

Three questions about a distillation are answered in words: does it help, is it the dose, is it where

1. distilling everywhere, at the best dose that was tried, against no distillation
2. a router that selects, against distilling everywhere at that dose
3. that router, against coins of its own rates

The best dose is that with the best validation accuracy of those that were tried, so that the test images choose
nothing. An answer is one of the tests of the document that it stands in, and is corrected with all of them.
"""

import math
from bisect import bisect_left
from collections.abc import Collection, Iterable, Mapping, Sequence
from statistics import fmean, stdev
from typing import Any, NamedTuple, TypeVar

from sakd_cli.config.routers import CLASSICAL, MATCHED, PLAIN, selects
from sakd_cli.documents.base import Answer, PairedTest, Question, SeedStatistics
from sakd_cli.documents.sweep import SweepRun
from sakd_cli.documents.table import RunRow
from sakd_cli.report.render.format import fixed, p_value, plain, points, whole

LEVEL = 0.95
EFFECT, POWER = 0.5, 0.8  # points of top-1 that are worth seeing, and how probably they should be seen
MOST_SEEDS = 10_000
LEAST_STD = 1e-6  # points; less is the rounding of accuracies that are written with nine figures
Test = TypeVar("Test", bound=PairedTest)
ASKED: dict[Question, str] = {
    "help": "Does distilling help?",
    "dose": "Does the router give more than the dose?",
    "where": "Does where it distils add to how much?",
}


def by_seed(runs: Iterable[RunRow | SweepRun], metric: str = "top1") -> dict[int, float]:
    """That metric of every finished run by its seed, which counts once: of several the last finished one."""
    found = [(run.seed, getattr(run, metric)) for run in runs]
    return {seed: value for seed, value in found if seed is not None and value is not None}


def seed_statistics(values: Collection[float]) -> SeedStatistics | None:
    """None for no value; only the mean for one value."""
    if len(values) < 2:
        return SeedStatistics(mean=fmean(values), std=None, low=None, high=None) if values else None
    from scipy.special import stdtrit  # a fifth of a second that only groups of seeds need

    mean, std = fmean(values), stdev(values)
    half = float(stdtrit(len(values) - 1, (1 + LEVEL) / 2)) * std / math.sqrt(len(values))
    return SeedStatistics(mean=mean, std=std, low=mean - half, high=mean + half)


def seeds_needed(std: float) -> int | None:
    """Seeds with which a paired t-test finds `EFFECT` points with a probability of at least `POWER`.

    std  of the differences, in points, as if it were known. None: more than `MOST_SEEDS`.
    """
    from scipy.special import nctdtr, stdtrit

    def power(seeds: int) -> float:
        limit, shift = stdtrit(seeds - 1, (1 + LEVEL) / 2), EFFECT * math.sqrt(seeds) / std
        below, above = (float(nctdtr(seeds - 1, shift, t)) for t in (-limit, limit))  # NaN: it is as good as 0
        return 1 - (0.0 if math.isnan(above) else above) + (0.0 if math.isnan(below) else below)

    counts = range(2, MOST_SEEDS + 1)
    place = bisect_left(counts, POWER, key=power)  # power grows with the seeds
    return counts[place] if place < len(counts) else None


def paired_test(ours: Mapping[int, float], theirs: Mapping[int, float]) -> PairedTest:
    """Ours less theirs over the seeds that both have, as if it were the only test (see `corrected`)."""
    # Accuracies have few digits; what is left of 71.1 - 70.1 behind the ninth is no deviation between seeds.
    differences = {seed: round(value - theirs[seed], 9) for seed, value in ours.items() if seed in theirs}
    found, seeds = seed_statistics(differences.values()), list(differences)
    if found is None:
        return PairedTest(seeds=[], verdict="unknown")
    if found.std is None or found.std < LEAST_STD:
        return PairedTest(seeds=seeds, difference=found.mean, verdict="one seed" if len(seeds) == 1 else "not shown")
    from scipy.special import stdtr

    effect = found.mean / found.std
    p = 2 * float(stdtr(len(seeds) - 1, -abs(effect) * math.sqrt(len(seeds))))
    figures = {"difference": found.mean, "low": found.low, "high": found.high, "effect": effect, "p": p}
    return corrected([PairedTest(seeds=seeds, **figures, needed=seeds_needed(found.std), verdict="not shown")])[0]


def p_of_correlation(r: float, pairs: int) -> float:
    """Two-sided p of Pearson's correlation of so many pairs, by Student's t with two degrees of freedom less."""
    from scipy.special import stdtr

    return 2 * float(stdtr(pairs - 2, -abs(r) * math.sqrt((pairs - 2) / max(1 - r * r, 1e-300))))


def holm(values: Sequence[float | None]) -> list[float | None]:
    """p values corrected for being several (step-down, Holm 1979); None stays None."""
    known = sorted((p, place) for place, p in enumerate(values) if p is not None)
    found: list[float | None] = [None] * len(values)
    largest = 0.0
    for rank, (p, place) in enumerate(known):
        found[place] = largest = max(largest, min(1.0, p * (len(known) - rank)))
    return found


def corrected(tests: Sequence[Test]) -> list[Test]:
    """The same tests as one family: p corrected for being several, and the verdicts that follow from it."""
    done = []
    for test, p in zip(tests, holm([test.p for test in tests]), strict=True):
        verdict = test.verdict
        if p is not None:
            verdict = "not shown" if p >= 1 - LEVEL else "better" if (test.difference or 0.0) > 0 else "worse"
        done.append(test.model_copy(update={"holm": p, "verdict": verdict}))
    return done


def interval(test: PairedTest) -> str | None:
    """`+1.58 to +6.46`; None where there is none."""
    return None if test.low is None or test.high is None else f"{points(test.low, 2)} to {points(test.high, 2)}"


def in_words(test: PairedTest) -> str:
    """What a test has found, behind its verdict: the difference, what is compatible with it, how sure it is."""
    if test.difference is None:
        return "no seed is finished in both"
    seeds, figure = len(test.seeds), f"{points(test.difference, 2)} points top-1"
    if seeds == 1:
        return f"{figure}, 1 seed: one seed cannot tell a difference from chance"
    if test.p is None:
        return f"{figure} in each of {seeds} seeds: without a deviation nothing can be tested"
    compatible = f"an effect between {' and '.join(str(interval(test)).split(' to '))} points is compatible"
    undecided = "inconclusive" + " after the correction" * (test.p < 1 - LEVEL)
    said = f"95 % interval {interval(test)}" if test.verdict != "not shown" else f"{undecided}: {compatible}"
    several = "" if test.holm == test.p else f", Holm {p_value(test.holm)}"
    need = "more than 10 000" if test.needed is None else whole(test.needed)
    return (
        f"{figure} ({said}; p {p_value(test.p)}{several}, d {fixed(test.effect, 2)}, {seeds} seeds; to see "
        f"{EFFECT:g} points at {100 * POWER:g} % power: {need} seeds)"
    )


def about_tests(count: int) -> str:
    """The note below tests that are one family of so many."""
    if not count:
        return "Paired by seed. One seed, or the same difference in all, cannot tell a difference from chance."
    return (
        "Paired by seed; 95 % intervals of each difference by itself; p of a paired t-test, corrected for being "
        f"{count} test{'s' * (count != 1)} (Holm), by which the verdicts go. Not shown: inconclusive, every effect in "
        "the interval is compatible. One seed cannot tell a difference from chance."
    )


class Arm(NamedTuple):
    """Runs that differ in the seed only.

    number      of the arm, among those that are compared
    label       in the text
    about       what arms must share to be compared: student and budget; and of those with a teacher: it and the method
    router      None: trained without a teacher
    top1        by seed, of the test images; validation: of the images that choose, likewise
    said        the label with what each word is: `method at, router adaptive`; empty: the label says it
    matched_of  label of the arm whose rates its coins have; None: it has none, or that is not known
    """

    number: int
    label: str
    about: tuple[Any, ...]
    router: str | None
    top1: Mapping[int, float]
    validation: Mapping[int, float]
    matched_of: str | None = None
    said: str = ""

    @property
    def plain(self) -> bool:
        """Whether nothing is distilled."""
        return self.router in (None, PLAIN)


def asked(arms: Sequence[Arm]) -> list[tuple[Question, Arm, Arm]]:
    """The questions that these arms can answer, in order: each with the arm it is about, and the one to compare with"""
    found: list[tuple[Question, Arm, Arm]] = []
    for about in dict.fromkeys(arm.about for arm in arms if not arm.plain):
        alike = [arm for arm in arms if arm.about == about[: len(arm.about)]]
        if (best := best_dose(alike)) is not None:
            found += [("help", best, plainly) for plainly in alike if plainly.plain]
        for ours in (arm for arm in alike if arm.router is not None and selects(arm.router)):
            found += [("dose", ours, best)] if best is not None else []
            coins = [arm for arm in alike if arm.router == MATCHED and arm.matched_of == ours.label]
            found += [("where", ours, coin) for coin in coins]
    return found


def best_dose(arms: Sequence[Arm]) -> Arm | None:
    """Of those that distil everywhere the one with the best mean validation accuracy."""
    everywhere = [arm for arm in arms if arm.router == CLASSICAL]
    # Of equals the first by label, whatever the order of the runs.
    return min(everywhere, key=lambda arm: (-fmean(arm.validation.values() or [0.0]), arm.label), default=None)


def answer(question: Question, ours: Arm, theirs: Arm, test: PairedTest) -> Answer:
    """The answer that the test of the two arms gives."""
    said = {"better": "Yes", "worse": "No, it takes away", "not shown": "Not shown"}.get(test.verdict, "Not known")
    mine, other = (plain(arm.said or arm.label) for arm in (ours, theirs))
    return Answer(
        **{key: getattr(test, key) for key in PairedTest.model_fields},
        question=question,
        ours=plain(ours.label),
        theirs=plain(theirs.label),
        text=f"{ASKED[question]} {said}: {mine}, over {other}: {in_words(test)}.",
    )
