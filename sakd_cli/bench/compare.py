"""Whether we became slower since an earlier result. No torch."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sakd_cli.documents.bench import Bench, BenchComparison, BenchSetup, RatioChange, RisenCounter
from sakd_cli.errors import UsageError
from sakd_cli.files import read_document

SLOWER = 0.85  # of the earlier ratio: below it in two results in a row is a regression
MACHINE = ("cpu", "cpu_flags", "cores", "device", "chip", "threads", "torch", "mode")
COUNTED = ("gflop", "synchronisations", "saved_bytes")


def earlier(path: Path) -> Bench:
    """A result from a file. Raises UsageError where it is none."""
    try:
        return read_document(path, Bench)
    except UsageError as error:
        raise UsageError(f"--compare {error.message}", "a file that `sakd bench --json` has printed") from None


def must_be_alike(before: Bench, environment: Mapping[str, Any], setup: BenchSetup) -> None:
    """Raise UsageError where an earlier result is of another machine or of another setup."""
    machine = [key for key in MACHINE if before.environment.get(key) != environment[key]]
    changed = [key for key, value in setup if getattr(before.setup, key) != value]
    for what, different in (("machine or mode", machine), ("setup", changed)):
        if different:
            raise UsageError(f"--compare: another {what} (differs in {', '.join(different)})")


def comparison(before: Bench, now: Bench) -> BenchComparison:
    """Ratios and counters then and now; the results `must_be_alike`.

    A ratio is slow where it is 15 % below what was recorded; `base` is what it is compared with, and stays the same
    while it is slow. It has regressed where it was slow in the earlier result already. A counter has where it rose.
    """
    slow = {one.name: one.base for one in before.comparison.ratios if one.slow} if before.comparison else {}
    bases = {ratio.above: ratio.median for ratio in before.ratios} | slow
    ratios = [_change(ratio.above, bases, ratio.median, slow) for ratio in now.ratios if ratio.above in bases]
    old = {step.name: step for step in before.steps}
    risen = [
        RisenCounter(name=step.name, counter=key, before=then, now=count)
        for step in now.steps
        if step.name in old
        for key in COUNTED
        if (then := getattr(old[step.name], key)) is not None
        if (count := getattr(step, key)) is not None and count > then
    ]
    regressed = bool(risen) or any(ratio.regressed for ratio in ratios)
    return BenchComparison(ratios=ratios, risen=risen, regressed=regressed)


def _change(name: str, bases: Mapping[str, float], now: float, already_slow: Mapping[str, float]) -> RatioChange:
    slow = now < SLOWER * bases[name]
    return RatioChange(name=name, base=bases[name], now=now, slow=slow, regressed=slow and name in already_slow)
