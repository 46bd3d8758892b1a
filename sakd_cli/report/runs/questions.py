"""The three questions about a distillation, answered in words: does it help, is it the dose, is it where

1. distilling everywhere, at the best dose that was tried, against no distillation
2. a router that selects, against distilling everywhere at that dose
3. that router, against coins of its own rates

The best dose is that with the best validation accuracy of those that were tried, so that the test images choose
nothing. An answer is one of the tests of the document that it stands in, and is corrected with all of them.
"""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

from sakd_cli.config.routers import CLASSICAL, MATCHED, PLAIN, selects
from sakd_cli.documents.base import Answer, PairedTest, Question
from sakd_cli.report.render.format import plain
from sakd_cli.report.runs.statistics import in_words

ASKED: dict[Question, str] = {
    "help": "Does distilling help?",
    "dose": "Does the router give more than the dose?",
    "where": "Does where it distils add to how much?",
}


class Arm(NamedTuple):
    """Runs that differ in the seed only.

    number      of the arm, among those that are compared
    label       in the text
    about       what arms must share to be compared: student and data; and of those with a teacher: it and the method
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
