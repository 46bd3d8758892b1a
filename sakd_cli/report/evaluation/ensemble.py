"""A student with its residual students, as tables: stage by stage, where images leave, and the cost/accuracy curve."""

from collections.abc import Sequence
from math import ceil, floor

from rich.console import RenderableType

from sakd_cli.documents.evaluation import EnsembleEvaluation, EnsembleExits, Evaluation, ExitCosts, ExitPoint
from sakd_cli.documents.training import EnsembleTraining
from sakd_cli.report.render.charts import Lines, Series
from sakd_cli.report.render.format import fixed, fraction, large, named, whole
from sakd_cli.report.render.sheet import Sheet, table


def ensemble_tables(result: EnsembleEvaluation) -> list[RenderableType]:
    """What stands under `ensemble` in the document of `sakd eval`."""
    found = result.ensemble
    stages = _stages(found, found.exits, result.images, found.teacher.macs, [_cost_note(found)])
    return [stages, *([curve_table(found.curve)] if found.curve else [])]


def ensemble_summary(found: EnsembleTraining) -> RenderableType:
    """What stands under `ensemble` in `summary.json`."""
    notes = [
        f"{label}: top-1 {fixed(side.top1, 2, ' %')} at {fraction(side.cost)} % of the teacher's MACs."
        for label, side in (("Early exits", found.early), ("All members for every image", found.all))
    ]
    dropped = ", the last one was dropped" if found.dropped else ""
    notes += [
        f"No further residual student: {named(found.stopped)}{dropped}.",
        "Energy: mean square of what the logits lack, as a fraction of the teacher's, on the calibration images; on "
        "train: on the training images; top-1 and exits: on the test images.",
    ]
    exits = found.early.exits
    return _stages(found, exits, sum(exits), found.teacher.macs, notes)


def _stages(
    found: EnsembleExits | EnsembleTraining, exits: Sequence[int], images: int, teacher: int | None, notes: list[str]
) -> Sheet:
    """One row per member: cost so far, accuracy and energy after it (in a summary), threshold, images that leave."""
    trained = found if isinstance(found, EnsembleTraining) else None
    rows, total = [], 0
    for place, (name, macs) in enumerate(zip(found.members, found.member_macs, strict=True)):
        total += macs
        row = [whole(place), named(name), large(macs), fraction(total / teacher if teacher else None)]
        if trained:
            energies = (trained.energies.calibration, trained.energies.train)
            row += [fixed(trained.stage_top1[place], 2), *(fixed(values[place], 3) for values in energies)]
        limit = [*found.thresholds, None][place]
        # Below 0 lies no uncertainty.
        row.append("never" if limit is not None and limit < 0 else fixed(limit, 3))
        rows.append([*row, whole(exits[place]), fraction(exits[place] / images if images else None)])
    measured = ["Top-1 %", "Energy", "on train"] if trained else []
    headers = ["Stage", "Network", "MACs", "Cost so far %", *measured, "Threshold", "Exit", "Exit %"]
    return Sheet("Student and residual students", headers, rows, notes, text=["Network"])


def _cost_note(found: EnsembleExits) -> str:
    teacher = found.teacher.macs
    how = f"rule {named(found.rule)}" if found.early_exit else "every image goes to the end"
    text = f"Mean cost {large(found.macs)} MACs per image ({how})"
    if found.cost is None or not teacher:
        return f"{text}; the teacher is not known."
    least = found.member_macs[0] / teacher
    over = f" Warning: the budget, {fraction(found.budget)} %, is less than the student alone costs."
    return (
        f"{text}: {fraction(found.cost)} % of the teacher's; the student alone {fraction(least)} %, "
        f"all members {fraction(sum(found.member_macs) / teacher)} %."
        + over
        * (found.early_exit and found.rule == "budget" and least > found.budget)
    )


def exit_chart(
    curve: Sequence[ExitPoint], used: ExitCosts, top1: float, label: str, stages: Sequence[tuple[float, float]] = ()
) -> Lines:
    """Top-1 over mean cost of an ensemble: every shared threshold, the Pareto front, and what is in use (`used`).

    stages  (cost as in the curve, top-1) where every image goes on to that stage, from the student alone to all
    """

    def cost(point: ExitCosts) -> float:
        return 100 * point.cost if point.cost is not None else 1e-6 * point.macs

    best = sorted((cost(point), point.top1) for point in curve if point.pareto)
    series = [
        Series("one threshold for all stages", list(map(cost, curve)), [point.top1 for point in curve], 0, "marks"),
        Series("Pareto front", [x for x, _ in best], [y for _, y in best], 1),
        Series(label, [cost(used)], [top1], 3, "marks"),
    ]
    if stages:
        name = "every image up to each stage"
        series.append(Series(name, [x for x, _ in stages], [y for _, y in stages], 2, "dashed"))
    unit = "million MACs" if used.cost is None else "% of the teacher's MACs"
    shown = [top1, *(point.top1 for point in curve), *(y for _, y in stages)]
    limits = max(0.0, floor(min(shown)) - 1.0), min(100.0, ceil(max(shown)) + 1.0)
    note = "Test images. Each point is a threshold: images that are less certain go on to the next student. "
    note += f"Zoom: the upright axis shows {limits[0]:g} to {limits[1]:g} % only, the other one the costs that occur."
    return Lines("Accuracy and cost", f"mean cost per image, {unit}", "top-1, %", series, limits, note)


def exit_chart_of(result: EnsembleEvaluation | Evaluation) -> Lines:
    """The curve of an evaluation that was asked for one."""
    assert isinstance(result, EnsembleEvaluation)
    found = result.ensemble
    label = "thresholds in use" if found.early_exit else "all members for every image"
    return exit_chart(found.curve or [], found, result.top1, label)


def curve_table(points: Sequence[ExitPoint]) -> Sheet:
    """Accuracy and cost over all thresholds."""
    known = any(point.cost is not None for point in points)
    columns = {
        "Threshold": lambda point: fixed(point.theta, 3),
        "Cost %" if known else "MACs": lambda point: fraction(point.cost) if known else large(point.macs),
        "Top-1 %": lambda point: fixed(point.top1, 2),
        "Agree %": lambda point: fixed(point.agreement, 1),
        "Exit at the end %": lambda point: fraction(point.exits[-1] / max(sum(point.exits), 1)),
        "Pareto": lambda point: "*" * point.pareto,
    }
    title = "Accuracy and cost over one threshold for all stages"
    return table(title, points, columns, ["*: on the Pareto front."], text=0)
