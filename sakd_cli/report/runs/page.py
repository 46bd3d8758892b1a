"""A run as tables (what it will do, how it ended) and, for `sakd report`, on one page, from its directory alone

PARTS is what the page is made of. A training procedure that leaves something of its own in the run directory adds a
function there, which adds nothing for runs that have nothing of the kind.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType

from sakd_cli.config.base import written
from sakd_cli.config.resolve import flat
from sakd_cli.documents.evaluation import Metrics
from sakd_cli.documents.table import Comparison, Report
from sakd_cli.documents.training import Plan, Summary
from sakd_cli.errors import DamagedError, UsageError
from sakd_cli.report.evaluation import COSTS, branch_table, curve_table, ensemble_summary, exit_chart
from sakd_cli.report.render import html, plots
from sakd_cli.report.render.charts import Chart
from sakd_cli.report.render.format import DASH, difference, duration, fixed, large, named, shape, whole
from sakd_cli.report.render.html import Answer, Folded, Opening, Section
from sakd_cli.report.render.sheet import Sheet, columns_of, table
from sakd_cli.report.runs.compare import compare
from sakd_cli.report.runs.compare_tables import curve_charts, epoch_table
from sakd_cli.report.spots.charts import mixture_chart, spot_figure
from sakd_cli.report.spots.log import read_mixtures, spots_document
from sakd_cli.report.spots.page import context_of, spot_opening, spot_sections
from sakd_cli.report.spots.survey import notes_on_missing, read_survey
from sakd_cli.report.spots.tables import mixture_table
from sakd_cli.rundir import RunDir
from sakd_cli.writing import require_room, write_aside

RAREST = 20  # classes that a table shows


def summary_table(summary: Summary) -> RenderableType:
    """The student's last epoch, its best one and the teacher side by side."""
    who = "Student" if summary.teacher else "Network"
    own = (summary.network, summary.parameters, summary.macs)
    sides: list[tuple[str, Metrics, int | None, str, int, int]] = [
        (f"{who}, last epoch", summary.last, summary.last.epoch, *own),
        (f"{who}, best epoch", summary.best, summary.best.epoch, *own),
    ]
    if summary.trained is not None:
        sides.append((f"{who}, last epoch as trained", summary.trained, summary.trained.epoch, *own))
    names = named(summary.network)
    if teacher := summary.teacher:
        for one in (teacher, *summary.more_teachers):
            sides.append(("Teacher", one, None, one.network, one.parameters, one.macs))
        names = f"{', '.join(named(one.network) for one in (teacher, *summary.more_teachers))} → {names}"
    rows = [
        ["Network", *(named(network) for *_, network, _, _ in sides)],
        ["Epoch", *(whole(epoch) for _, _, epoch, *_ in sides)],
        ["Chosen on", DASH, named(summary.best.selected_on), *[DASH] * len(sides[2:])],
        ["Top-1", *(fixed(side.top1, 2, " %") for _, side, *_ in sides)],
        ["Top-5", *(fixed(side.top5, 2, " %") for _, side, *_ in sides)],
        ["Loss", *(fixed(side.loss, 3) for _, side, *_ in sides)],
        ["Parameters", *(large(parameters) for *_, parameters, _ in sides)],
        ["MACs", *(large(macs) for *_, macs in sides)],
    ]
    title = f"{names} on {named(summary.dataset)} ({named(summary.last.split)})"
    sheet = Sheet(title, ["", *(header for header, *_ in sides)], rows, _notes(summary))
    more = [branch_table(summary.friendly.branches)] if summary.friendly else []
    more += [_balance(summary)] if summary.classes else []
    return Group(sheet, *more) if more else sheet


def _balance(summary: Summary) -> Sheet:
    """The classes, the rarest first."""
    rarest = sorted(summary.classes, key=lambda one: one.images)[:RAREST]
    columns = columns_of(named, {"Class": "class_"}) | columns_of(whole, {"Images": "images"})
    columns |= {"Shown": lambda one: fixed(one.shown, 2), "Weight": lambda one: fixed(one.weight, 2)}
    columns |= {"Top-1 %": lambda one: fixed(one.top1, 2)}
    rest = len(summary.classes) - len(rarest)
    notes = ["Shown: times an epoch shows one of its images; weight: in the cross-entropy; top-1: of the last epoch."]
    notes += [f"{whole(rest)} more classes are in summary.json."] if rest else []
    return table("Classes, the rarest first", rarest, columns, notes, text=1)


def _notes(summary: Summary) -> list[str]:
    notes = [f"Protocol: {named(summary.protocol).removesuffix('.')}."]
    teachers = [summary.teacher, *summary.more_teachers] if summary.teacher else []
    for teacher in teachers:
        who = "teacher" if len(teachers) == 1 else named(teacher.network)
        less = difference(summary.last.top1 - teacher.top1, summary.last.top1, teacher.top1)
        notes.append(
            f"Student against {who}: {less} points top-1, "
            f"{_percent(summary.parameters, teacher.parameters)} of the parameters, "
            f"{_percent(summary.macs, teacher.macs)} of the MACs."
        )
    spent = ", ".join(f"{name} {fixed(100 * part, 0)} %" for name, part in summary.phases.items())
    epochs = f"{whole(summary.epochs)} epoch{'s' * (summary.epochs != 1)}"
    epochs += "".join(f", extended from {whole(before)}" for before in summary.extended[-1:])
    notes.append(f"Time: {duration(summary.seconds)} for {epochs}: {spent}.")
    if summary.search_seconds is not None:
        notes.append(f"Search for the mixtures before: {duration(summary.search_seconds)}.")
    sums = ", ".join(named(teacher.sha256)[:16] for teacher in teachers)
    return [*notes, f"Teacher weights: sha256 {sums}"] if teachers else notes


def _percent(part: int, whole: int | None) -> str:
    """`12 %`, and what is below ten with one digit: `0.2 %`."""
    share = 100 * part / (whole or 1)
    return fixed(share, 0 if share >= 9.95 else 1, " %")


def plan_table(plan: Plan) -> RenderableType:
    """What a run would do (`--dry-run`): its networks, how much of them is trained, and its spots."""
    # Counted by optimizer group: a student's group also holds what its distiller learns.
    trained = [f"{named(name)} {large(count)}" for name, count in plan.trainable.items() if count]
    note = [f"Trained parameters: {', '.join(trained)}."] if trained else []
    note += [f"The {one.role} {named(one.name)} is {named(one.path)}" for one in plan.networks if one.path is not None]
    parts = table("Networks", plan.networks, columns_of(named, {"Role": "role", "Name": "name"}) | COSTS, note, text=2)
    columns = columns_of(named, {"Spot": "name", "Kind": "kind", "Student stage": "student_stage"})
    columns |= columns_of(named, {"Teacher stage": "teacher_stage", "To teacher": "student_to_teacher"})
    columns |= columns_of(named, {"To student": "teacher_to_student"})
    columns |= columns_of(shape, {"Student shape": "student_shape", "Teacher shape": "teacher_shape"})
    notes = ["To teacher: the student-to-teacher adapter; to student: the way back."]
    adapted = any(spot.student_to_teacher for spot in plan.spots)
    tables = [parts, *([table("Spots", plan.spots, columns, notes if adapted else [], text=6)] if plan.spots else [])]
    return Group(*tables, *([mixture_table(plan.mixtures)] if plan.mixtures else []))


class RunPage:
    """The page of a run while it is made, and its charts as PNG files beside it, which need matplotlib.

    warn  is told what is left out of it
    """

    def __init__(self, run: RunDir, warn: Callable[[str], Any]) -> None:
        self.comparison: Comparison = compare([run])
        self.run, self.warn, self.plotted = run, warn, plots.available(warn)
        self.sections: list[Section] = []
        self.plots: dict[str, bytes] = {}
        self.opening = Opening([], [])
        for part in PARTS:
            part(self)

    def add(self, title: str, blocks: Sequence[Any], question: str = "", plot: str = "", answer: str = "") -> None:
        """A section; plot: the name of the PNG file with its charts."""
        self.sections.append(Section(title, blocks, question, answer))
        charts = [block for block in blocks if isinstance(block, Chart)]
        if plot and charts and self.plotted:
            self.plots[plot] = plots.rendered(plots.figure_of(charts), "png")

    def write(self, path: Path) -> Report:
        """Save the page, and each plot as `<page>-<name>.png` beside it."""
        row = self.comparison.runs[0]
        facts = html.facts_of(row, ("network", "dataset", "method", "router", "seed", "epochs"))
        facts += [("State", "finished" if row.finished else "not finished"), ("Run", named(row.run))]
        title = f"{named(row.task)}: {named(self.run.path.name)}"
        contents = {path: html.page(title, facts, self.sections, self.opening).encode()}
        contents |= {path.with_name(f"{path.stem}-{name}.png"): plot for name, plot in self.plots.items()}
        require_room(path.parent, sum(map(len, contents.values())))
        for place in sorted(contents, key=lambda place: -len(place.name)):  # the page last: where it is, its plots are
            write_aside(place, contents[place])
        sections = [section.title for section in self.sections]
        return Report(run=str(self.run.path), written=list(map(str, contents)), sections=sections)


def _result(page: RunPage) -> None:
    if page.run.finished:
        summary = summary_table(page.run.summary)
        blocks = summary.renderables if isinstance(summary, Group) else [summary]
        last, teacher, more = (getattr(page.run.summary, key) for key in ("last", "teacher", "more_teachers"))
        said = f"Top-1 {fixed(last.top1, 2)} % on the test images after the last epoch"
        teachers = [teacher, *more] if teacher else []
        taught = [f"{named(one.network)} " * bool(more) + f"{fixed(one.top1, 2)} %" for one in teachers]
        said += f"; its teacher{'s' * bool(more)} {', '.join(taught)}." if taught else "."
        page.add("Result", blocks, "How good are student and teacher on the test images?", answer=said)
    else:
        said = f"Not known: the run is not finished. Its command with `--resume {page.run.path}` goes on with it."
    page.opening = Opening([Answer("How good is it?", [said])], [])


def _curves(page: RunPage) -> None:
    if not (curve := page.comparison.runs[0].curve):
        return
    selected = named(next((point.selected_on for point in curve if point.selected_on), None)).capitalize()
    notes = [
        f"{selected}: the images that choose the best epoch. Training: means over the epoch's steps, as augmented."
    ]
    sheet = epoch_table("By epoch", curve, notes)
    known = [(point.top1, point.epoch) for point in curve if point.top1 is not None]
    said = ""
    if known:
        (best, epoch), (last, end) = max(known, key=lambda one: (one[0], -one[1])), known[-1]
        said = f"{selected} top-1 was highest in epoch {epoch} of {end}, {fixed(best, 2)} %"
        said += f"; in the last {fixed(last, 2)} %." if epoch < end else ": more epochs may help."
    blocks = [*curve_charts(page.comparison), Folded("By epoch", [sheet])]
    page.add("Curves", blocks, "Was the training long enough, and did it overfit?", "curves", said)


def _spots(page: RunPage) -> None:
    try:
        survey = read_survey(page.run)
        for text in notes_on_missing(page.run):
            page.warn(text)
        report = spots_document(page.run, survey)
    except DamagedError:
        raise
    except UsageError:  # no epoch is finished
        return
    if page.plotted:
        page.plots["spots"] = plots.rendered(spot_figure(report, None), "png")
    context = context_of(page.run, survey)
    opening = spot_opening(report, context)
    page.opening = Opening([*page.opening.answers, *opening.answers], opening.groups)
    page.sections += spot_sections(report, context)


def _mixtures(page: RunPage) -> None:
    if (record := read_mixtures(page.run)) is not None:
        question = "Which blocks of the teacher does the student learn from?"
        blocks = [mixture_chart(record), mixture_table(record)]
        groups = (f"{named(one.name)} most from block {one.largest} of {len(one.alpha)}" for one in record.groups)
        page.add("Mixtures of the teacher's blocks", blocks, question, "mixtures", f"{'; '.join(groups)}.")


def _residual(page: RunPage) -> None:
    if page.run.finished and (found := page.run.summary.ensemble):
        unit = 100 / found.teacher.macs if found.early.cost is not None and found.teacher.macs else 1e-6
        costs = [unit * macs for macs in accumulate(found.member_macs)]
        stages = list(zip(costs, found.stage_top1, strict=False))
        chart = exit_chart(found.curve, found.early, found.early.top1, "thresholds in use", stages)
        question = "How much accuracy does each further student buy, and at what cost?"
        unit_name = "% of the teacher's operations" if unit != 1e-6 else "million operations"
        steps = [f"{fixed(top1, 2)} % at {fixed(cost, 0)}" for cost, top1 in stages]
        more = "With one student more at a time" if steps[1:] else f"The student alone ({named(found.stopped)})"
        said = f"{more}: {', '.join(steps)} {unit_name}."
        blocks = [chart, ensemble_summary(found), curve_table(found.curve)]
        page.add("Residual students", blocks, question, "exits", said)


def _environment(page: RunPage) -> None:
    if any((page.run.path / name).exists() for name in ("env.json", "metrics.jsonl")):  # else it has only begun
        page.add("Environment", [_keys("Where and how it ran", page.run.environment)])


def _settings(page: RunPage) -> None:
    settings = {key: written(value) for key, value in flat(page.run.config).items()}
    page.add("Settings", [_keys("config.yaml", settings)])


def _keys(title: str, found: Mapping[str, Any]) -> Sheet:
    return Sheet(title, ("Key", "Value"), [[named(key), named(value)] for key, value in found.items()], text=2)


PARTS = (_result, _curves, _spots, _mixtures, _residual, _environment, _settings)
