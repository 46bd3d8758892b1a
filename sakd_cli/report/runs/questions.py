"""The three questions about a distillation, answered in words: does it help, is it the dose, is it where

1. distilling everywhere, at the best dose that was tried, against no distillation
2. a router that selects, against distilling everywhere at that dose
3. that router, against coins of its own rates

The best dose is that with the best validation accuracy of those that were tried, so that the test images choose
nothing. p values are Holm's (Scandinavian Journal of Statistics 1979) over all answers given together.
"""

from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

from sakd_cli.config.routers import CLASSICAL, PLAIN, ROUTERS, RandomMatchedConfig
from sakd_cli.documents.base import Answer, PairedTest, Question
from sakd_cli.report.render.format import fixed, plain, points
from sakd_cli.report.runs.statistics import LEVEL, paired_test

ASKED: dict[Question, str] = {
    "help": "Does distilling help?",
    "dose": "Does the router give more than the dose?",
    "where": "Does where it distils add to how much?",
}


class Arm(NamedTuple):
    """Runs that differ in the seed only.

    label       in the text
    about       what arms must share to be compared: student and data; and of those with a teacher: it and the method
    router      None: trained without a teacher
    top1        by seed, of the test images; validation: of the images that choose, likewise
    matched_of  label of the arm whose rates its coins have; None: it has none, or that is not known
    """

    label: str
    about: tuple[Any, ...]
    router: str | None
    top1: Mapping[int, float]
    validation: Mapping[int, float]
    matched_of: str | None = None

    @property
    def plain(self) -> bool:
        """Whether nothing is distilled."""
        return self.router in (None, PLAIN)


def answers(arms: Sequence[Arm]) -> list[Answer]:
    """The questions that these arms can answer, in order; p corrected over all of them."""
    asked = [
        (question, ours, theirs, paired_test(ours.top1, theirs.top1))
        for about in dict.fromkeys(arm.about for arm in arms if not arm.plain)
        for question, ours, theirs in _asked([arm for arm in arms if arm.about == about[: len(arm.about)]])
    ]
    corrected = holm([found.p for *_, found in asked])
    return [_answer(*one, p) for one, p in zip(asked, corrected, strict=True)]


def holm(values: Sequence[float | None]) -> list[float | None]:
    """p values corrected for being several (step-down); None stays None."""
    known = sorted((p, place) for place, p in enumerate(values) if p is not None)
    found: list[float | None] = [None] * len(values)
    largest = 0.0
    for rank, (p, place) in enumerate(known):
        found[place] = largest = max(largest, min(1.0, p * (len(known) - rank)))
    return found


def best_dose(arms: Sequence[Arm]) -> Arm | None:
    """Of those that distil everywhere the one with the best mean validation accuracy."""
    everywhere = [arm for arm in arms if arm.router == CLASSICAL]
    return max(everywhere, key=lambda arm: fmean(arm.validation.values() or [0.0]), default=None)


def _asked(arms: Sequence[Arm]) -> Iterator[tuple[Question, Arm, Arm]]:
    best = best_dose(arms)
    for plainly in (arm for arm in arms if arm.plain):
        if best is not None:
            yield "help", best, plainly
    for ours in (arm for arm in arms if arm.router is not None and ROUTERS[arm.router].selects):
        if best is not None:
            yield "dose", ours, best
        coins = [a for a in arms if a.router is not None and ROUTERS[a.router] is RandomMatchedConfig]
        yield from (("where", ours, coin) for coin in coins if coin.matched_of == ours.label)


def _answer(question: Question, ours: Arm, theirs: Arm, found: PairedTest, p: float | None) -> Answer:
    seeds, names = len(found.seeds), f"{plain(ours.label)} over {plain(theirs.label)}"
    figure = "no seed is finished in both"
    if found.difference is not None:
        figure = f"{points(found.difference, 2)} points"
        if found.low is not None and found.high is not None:
            figure += f", 95 % interval {points(found.low, 2)} to {points(found.high, 2)}"
        figure += "" if p is None else f", p {fixed(p, 3)} (Holm)"
        figure += f", {seeds} seed{'s' * (seeds != 1)}"
    said = "Not known (too few seeds)" if p is None else "Not shown"
    if p is not None and p < 1 - LEVEL:
        said = "Yes" if (found.difference or 0) > 0 else "No, it takes away"
    return Answer(
        **dict(found),
        question=question,
        ours=plain(ours.label),
        theirs=plain(theirs.label),
        holm=p,
        text=f"{ASKED[question]} {said}: {names} {figure}.",
    )
