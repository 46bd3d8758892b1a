"""Runs in the same folder that a run can be compared with: its controls and other seeds, and what they say of it"""

from collections.abc import Mapping
from typing import Any

from sakd_cli.config.identity import LOCATIONS, is_plain
from sakd_cli.config.resolve import flat
from sakd_cli.config.routers import CLASSICAL, MATCHED, PLAIN
from sakd_cli.documents.base import Answer
from sakd_cli.documents.table import Comparison
from sakd_cli.errors import UsageError
from sakd_cli.report.render.format import DASH, difference, fixed, mean_std, named, plain, whole
from sakd_cli.report.render.sheet import Sheet
from sakd_cli.report.runs.compare import compare
from sakd_cli.report.runs.statistics import by_seed, interval, paired_test
from sakd_cli.rundir import RunDir
from sakd_cli.runindex import all_settings

FREE = ("router.", "seed", "method.balance", "effective.")  # by which a control, or another seed, differs
DISTILLATION = ("method.", "teacher.", "stage_map")  # what does not matter where nothing is distilled
LEAST_SEEDS = 3  # that a first answer needs
ROLES: dict[str | None, str] = {
    None: "student alone",
    PLAIN: "student alone",
    CLASSICAL: "distilled always",
    MATCHED: "distilled at random",
}
AGAINST = {"where": "distilling as often, but at random", "dose": "distilling everywhere, always"}


def beside(run: RunDir) -> list[RunDir]:
    """The run, and the finished ones of its folder that differ from it in router, balance or seed alone."""

    def kept(settings: Mapping[str, Any], free: tuple[str, ...]) -> dict[str, Any]:
        return {key: settings[key] for key in settings if key not in LOCATIONS and not key.startswith(free)}

    own, found = flat(run.config), [run]
    for path, settings in sorted(all_settings(run.path.absolute().parent).items()):
        other, folder = flat(settings or {}), RunDir(path.parent)
        free = (*FREE, *DISTILLATION) if is_plain(other) else FREE
        if path.parent != run.path.absolute() and kept(own, free) == kept(other, free) and folder.finished:
            found.append(folder)
    return found


def helped(run: RunDir) -> tuple[str, Sheet | None]:
    """Verdicts on where a run distils and on how much, empty where none are known; top-1 of the run and its controls.

    Where a run beside it is damaged the verdict is that, and there is no table.
    """
    if not run.finished:
        return "", None
    try:
        compared = compare(beside(run))
    except UsageError as error:  # one of them is damaged
        return f"Not compared with the runs beside it: {error.message}.", None
    own = compared.groups[compared.runs[0].group].label
    answers = {one.question: one for one in compared.answers if one.ours == own}
    asked = [answers[question] for question in ("where", "dose") if question in answers]
    verdicts, advice = zip(*map(_in_words, asked), strict=True) if asked else ((), ())
    return " ".join([*verdicts, *filter(None, dict.fromkeys(advice))]), _table(compared)


def _table(compared: Comparison) -> Sheet:
    """A row each for the teacher, the controls and the run's own group; differences are those of the own group."""
    first, mine = compared.runs[0], compared.runs[0].group
    of = [[run for run in compared.counted if run.group == k] for k in range(len(compared.groups))]
    own, teacher = compared.groups[mine].top1, first.teacher_top1
    less = DASH if own is None or teacher is None else difference(own.mean - teacher, own.mean, teacher)
    rows = [["teacher", fixed(teacher, 2), less, DASH]]
    for k, group in enumerate(compared.groups):
        router = of[k][0].router and f"`{named(of[k][0].router)}`"
        role = f"this run, {router}" if k == mine else ROLES.get(of[k][0].router, f"router {router}")
        words = [plain(word) for word in group.label.split() if word == "balanced" or "=" in word]
        name = " ".join([role, *(f"(`{word}`)" for word in words if not word.endswith("=null"))])
        ours, theirs = by_seed(of[mine]), by_seed(of[k])
        test = None if k == mine else paired_test(ours, theirs).difference
        means = [one.top1.mean for one in (compared.groups[mine], group) if one.top1 and ours.keys() == theirs.keys()]
        shown = DASH if test is None else difference(test, *(means or (None, None)))
        rows.append([name, mean_std(group.top1), shown, whole(len(group.seeds))])
    order = ["this run", "teacher", *dict.fromkeys(ROLES.values())]
    rows.sort(key=lambda row: next((n for n, role in enumerate(order) if row[0].startswith(role)), len(order)))
    notes = [f"In points. All but teacher and student alone are distilled by method `{named(first.method)}`."]
    at_random = any(row[0].startswith(ROLES[MATCHED]) for row in rows)
    notes += ["At random: as often as this run at every spot, but not the images that it chose."] * at_random
    balanced = any("balanced" in row[0] for row in rows)
    notes += ["Balanced: at the weight that finds itself, --loss-weight auto."] * balanced
    return Sheet("Test accuracy", ["Training", "Top-1 %", "This run minus it", "Seeds"], rows, notes, own=0)


def _in_words(asked: Answer) -> tuple[str, str]:
    """What is said of one question, and what to do for more."""
    against, seeds = AGAINST.get(asked.question, ""), len(asked.seeds)
    if asked.difference is None:
        return f"Not known: no seed is finished both here and for {against}.", ""
    size = fixed(abs(asked.difference), 2)
    figure = f"{size} points {'worse' if asked.difference < 0 else 'better'} than {against}"
    figure = f"as good as {against}" if size == "0.00" else figure
    if asked.p is None:
        some, least = ("one seed" if seeds == 1 else f"{seeds} seeds that agree"), max(LEAST_SEEDS, seeds + 1)
        return f"Cannot be told from {some}: {figure}.", f"Run at least {least} seeds: `--seeds {least}`."
    known = asked.verdict in ("better", "worse")
    said = {"better": "Yes", "worse": "No"}.get(asked.verdict, "Cannot be told from chance")
    need = f", {whole(asked.needed)} to see 0.5 points" if asked.needed and not known else ""
    return f"{said}: {figure} (95 % interval {interval(asked)}; {seeds} seeds{need}).", ""
