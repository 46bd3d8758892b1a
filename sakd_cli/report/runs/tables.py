"""A run as tables: what it will do, and how it ended"""

from rich.console import Group, RenderableType

from sakd_cli.documents.evaluation import Metrics
from sakd_cli.documents.training import Plan, Summary
from sakd_cli.report.evaluation import COSTS, branch_table
from sakd_cli.report.render.format import DASH, difference, duration, fixed, large, named, shape, whole
from sakd_cli.report.render.sheet import Sheet, columns_of, table
from sakd_cli.report.spots.tables import mixture_table

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
