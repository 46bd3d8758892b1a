"""What a sweep has found: every cell over its seeds, gains paired by seed, the published figures beside them

A cell is a method under a router for a pair; its results are of the last epoch on the test images. A gain is a cell
less that of another router of the same method and pair, over the seeds that both have. All tests are one family.
"""

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any, get_args

import yaml

from sakd_cli.config.routers import CLASSICAL, PLAIN, AdaptiveConfig
from sakd_cli.documents import sweep as doc
from sakd_cli.documents.base import PairedTest
from sakd_cli.report.render.format import plain
from sakd_cli.report.runs.statistics import LEVEL, Arm, answer, asked, by_seed, corrected, paired_test, seed_statistics

LEARNED = AdaptiveConfig().name
PUBLISHED = Path(__file__).with_name("published.yaml")  # numbers only, with their source
EPOCHS = 240  # of every published run
ROUTERS = (CLASSICAL, LEARNED)  # in the order in which that file has them
BASELINE = "baseline"  # what stands for the method of a student from scratch
STATES: tuple[doc.RunState, ...] = get_args(doc.RunState)
Cell = tuple[str, str]  # method, with dose and what is tried, and router
Cells = dict[Cell, list[doc.SweepRun]]  # the runs of one pair


def sweep_document(
    name: str,
    runs: Sequence[doc.SweepRun],
    skipped: Mapping[str, str],
    dataset: str | None,
    baseline: str | None = None,
) -> doc.SweepDocument:
    """See above.

    dataset   whose published figures may stand beside these; None where these are not on all of it
    baseline  words of the cells that all others are compared with instead
    """
    students, shared = [run for run in runs if run.role == "student"], shared_controls(runs)
    pairs = list(dict.fromkeys((run.teacher, run.student) for run in students if run.teacher))
    cells, questions, tests = list[doc.SweepCell](), asked(_arms(runs)), dict[tuple[str, str], PairedTest]()
    for k, pair in enumerate(pairs):
        own: Cells = {}
        for run in students:
            if (run.teacher, run.student) == pair and run.method and run.router:
                own.setdefault((run.method, run.router), []).append(run)
        cells += [_cell(k, f"{pair[0]}:{pair[1]}", key, same, dataset) for key, same in own.items()]
        published = {(cell.method, cell.router): cell.published for cell in cells if cell.pair == k}
        if baseline and (plainly := [run for run in runs if run.role == BASELINE and run.student == pair[1]]):
            own[BASELINE, ""] = plainly
        tests |= {
            (_label(own[ours][0], shared), _label(own[theirs][0], shared)): _gain(k, own, published, ours, theirs)
            for ours, theirs in _compared(own, baseline)
        }
    for _, ours, theirs in () if baseline else questions:
        tests.setdefault((ours.label, theirs.label), paired_test(ours.top1, theirs.top1))
    tests = dict(zip(tests, corrected(list(tests.values())), strict=True))
    gains = [test for test in tests.values() if isinstance(test, doc.Gain)]
    found = [_pair(str(teacher), student, runs, dataset) for teacher, student in pairs]
    states, known = [run.state for run in runs], any(pair.published for pair in found)
    return doc.SweepDocument(
        name=plain(name),
        level=LEVEL,
        baseline=baseline,
        counts={state: states.count(state) for state in STATES},
        pairs=found,
        cells=cells,
        gains=gains,
        mean_gains=list(_mean_gains(gains)),
        answers=[
            answer(question, ours, theirs, tests[ours.label, theirs.label])
            for question, ours, theirs in questions
            if (ours.label, theirs.label) in tests
        ],
        tests=sum(test.p is not None for test in tests.values()),
        skipped=[doc.Skipped(what=what, reason=plain(reason)) for what, reason in skipped.items()],
        published=doc.Provenance(**{key: _published()[key] for key in doc.Provenance.model_fields}) if known else None,
        runs=list(runs),
    )


def _arms(runs: Sequence[doc.SweepRun]) -> list[Arm]:
    """Every cell of every pair as the questions see it: doses of a method are compared, and with no distillation."""
    shared, cells = shared_controls(runs), dict[str, list[doc.SweepRun]]()
    labels = {run.key: _label(run, shared) for run in runs}
    for run in runs:
        if run.role != "teacher":
            cells.setdefault(labels[run.key], []).append(run)
    arms = list[Arm]()
    for label, same in cells.items():
        run = same[0]
        plain_training = run.role == "baseline" or run.router == PLAIN
        about = run.student, *(() if plain_training else (run.teacher, (run.method or "").split()[0]))
        top1, validation = by_seed(same), by_seed(same, "validation_top1")
        matched = labels.get(run.matched or "")
        method, found, rest = label.partition(f" {run.router}")
        said = f"method {method}, router {run.router}{rest}" if found else label
        arms.append(Arm(len(arms), label, about, run.router, top1, validation, matched, said))
    return arms


def shared_controls(runs: Iterable[doc.SweepRun]) -> dict[str, list[str]]:
    """The runs that distil nowhere and serve several cells: their directories, and the keys of the cells' runs."""
    found: dict[str, list[str]] = {}
    for run in runs:
        if run.router == PLAIN and run.run is not None:
            found.setdefault(run.run, []).append(run.key)
    return {path: keys for path, keys in found.items() if len(keys) > 1}


def _label(run: doc.SweepRun, shared: Container[str | None]) -> str:
    if run.run in shared:
        return f"{run.router} {run.student}"
    named = [run.method, run.router] if run.method else ["from scratch"]
    whom = f"({run.teacher}:{run.student})" if run.teacher else run.student
    return " ".join([*(name for name in named if name), whom])


def _pair(teacher: str, student: str, runs: Sequence[doc.SweepRun], dataset: str | None) -> doc.SweepPair:
    baseline = by_seed(run for run in runs if run.role == "baseline" and run.student == student)
    trained = by_seed(run for run in runs if run.role == "teacher" and run.student == teacher)
    # A teacher that was there already is known from its students' summaries.
    known = by_seed((run for run in runs if run.role == "student" and run.teacher == teacher), "teacher_top1")
    printed = published_pair(dataset, f"{teacher}:{student}")
    return doc.SweepPair(
        teacher=teacher,
        student=student,
        teacher_top1=next(iter([*trained.values(), *known.values()]), None),
        baseline_seeds=list(baseline),
        baseline=seed_statistics(baseline.values()),
        published=doc.PublishedPair(teacher=printed["teacher"], baseline=printed["baseline"]) if printed else None,
    )


def _cell(k: int, pair: str, key: tuple[str, str], runs: list[doc.SweepRun], dataset: str | None) -> doc.SweepCell:
    top1, best = by_seed(runs), by_seed(runs, "best_top1")
    return doc.SweepCell(
        pair=k,
        method=key[0],
        router=key[1],
        seeds=list(top1),
        top1=seed_statistics(top1.values()),
        best=seed_statistics(best.values()),
        published=published_cell(dataset, pair, *key),
    )


def _compared(cells: Cells, baseline: str | None) -> Iterator[tuple[Cell, Cell]]:
    """Every router with the classical one, that with none, and the learned one with every other.

    With a baseline: every other cell with the one of the baseline that differs least from it.
    """
    if baseline:
        found = of_baseline(baseline, cells)
        for one in (cell for cell in cells if found and cell not in found):
            yield one, min(found, key=lambda other: (other[0] != one[0], other[1] != one[1]))
        return
    for method, router in cells:
        others = [other for name, other in cells if name == method and other != router]
        for against in others:
            asked = against == CLASSICAL or (router, against) == (CLASSICAL, PLAIN)
            if router != PLAIN and (asked or (router == LEARNED and CLASSICAL in others)):
                yield (method, router), (method, against)


def of_baseline(wanted: str, cells: Iterable[Cell]) -> list[Cell]:
    """The cells that have all these words in their method and router."""
    return [cell for cell in cells if {*wanted.split()} <= {*cell[0].split(), cell[1]}]


def _gain(k: int, cells: Cells, published: Mapping[Cell, float | None], ours: Cell, theirs: Cell) -> doc.Gain:
    found = paired_test(by_seed(cells[ours]), by_seed(cells[theirs]))
    mine, other = published.get(ours), published.get(theirs)
    printed = None if mine is None or other is None else round(mine - other, 2)
    against = theirs[1] if ours[0] == theirs[0] else " ".join(filter(None, theirs))
    return doc.Gain(**dict(found), pair=k, method=ours[0], router=ours[1], against=against, published=printed)


def _mean_gains(gains: list[doc.Gain]) -> Iterator[doc.MeanGain]:
    for router, against in dict.fromkeys((gain.router, gain.against) for gain in gains):
        same = [gain.difference for gain in gains if (gain.router, gain.against) == (router, against)]
        if known := [difference for difference in same if difference is not None]:
            above, below = sum(one > 0 for one in known), sum(one < 0 for one in known)
            cells, mean = len(known), fmean(known)
            yield doc.MeanGain(router=router, against=against, cells=cells, above=above, below=below, mean=mean)


@cache
def _published() -> Any:
    return yaml.safe_load(PUBLISHED.read_text(encoding="utf-8"))


def published_pair(dataset: str | None, pair: str) -> dict[str, Any]:
    """Published figures of `teacher:student` on a data set; nothing where none are published."""
    return _published().get(dataset or "", {}).get(pair, {})


def published_cell(dataset: str | None, pair: str, method: str, router: str) -> float | None:
    """One published top-1."""
    figures = published_pair(dataset, pair).get("methods", {}).get(method, (None, None))
    return dict(zip(ROUTERS, figures, strict=True)).get(router)
