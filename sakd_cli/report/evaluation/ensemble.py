"""A student with its residual students, as tables: stage by stage, where images leave, and the cost/accuracy curve.

`sakd eval --json` of an ensemble ("sakd.ensemble/1") has the figures of a plain network (top1, top5, loss ...;
parameters of all members; macs the mean per image; classes[].macs the same by class) and, under `ensemble`:

    early        whether images could leave early (false: --always-on)
    members, member_macs      networks in order, and what each costs
    teacher      network, macs; null where not known
    rule, delta, theta, budget, uncertainty     as `residual.*`: how the thresholds were fitted
    thresholds   one per stage but the last; -1: nobody leaves there
    exits        images that left after each stage
    macs, cost   mean per image; cost is a share of the teacher's
    sweep        null without --sweep, else one object per shared threshold, the dearest first:
        theta        null: nobody leaves early
        top1, agreement   right answers, and answers as of all members, in percent
        exits, macs, cost as above
        hull         whether no other points, or mixtures of two, are better and as cheap

`ensemble` of summary.json has members, member_macs, thresholds as above, and

    early, all   top1, top5, loss, exits, macs, cost on the test images: leaving early, and all members for every image
    sweep        as above
    stage_top1   top-1 after each stage that was trained
    energies     calibration, train: relative energy of what is missing after each of these stages
    dropped, stopped   1 where the last stage was dropped; why no further one came
    rule, teacher, calibration_images     how the thresholds were fitted, and on how many images
"""

from typing import Any

from rich.console import RenderableType

from sakd_cli.report.render.format import fixed, large, number, share, whole, word
from sakd_cli.report.render.sheet import Column, Sheet


def ensemble_tables(result: dict[str, Any]) -> list[RenderableType]:
    """What stands under `ensemble` in the document of `sakd eval`; nothing where it is of a network alone."""
    told = result.get("ensemble")
    if told is None:
        return []
    sheets: list[RenderableType] = [_stages(told, told["exits"], result["images"], [_cost_note(told)])]
    return [*sheets, *([curve] if (curve := exit_table(told)) else [])]


def ensemble_summary(told: dict[str, Any]) -> RenderableType:
    """What stands under `ensemble` in `summary.json`."""
    early, everyone = told.get("early") or {}, told.get("all") or {}
    notes = [
        f"{label}: top-1 {fixed(side.get('top1'), 2, ' %')} at {share(side.get('cost'))} % of the teacher's MACs."
        for label, side in (("Images leave early", early), ("All members for every image", everyone))
    ]
    left_out = ", the last one was dropped" if told.get("dropped") else ""
    notes.append(f"No further residual student: {word(told.get('stopped'))}{left_out}.")
    exits = early.get("exits") or []
    return _stages(told, exits, sum(exits), notes)


def _stages(told: dict[str, Any], exits: Any, images: int | None, notes: list[str]) -> Sheet:
    """One row per member: cost so far, accuracy and energy after it (in a summary), threshold, who leaves."""
    macs, teacher = told.get("member_macs") or [], (told.get("teacher") or {}).get("macs")
    energies, tops = told.get("energies") or {}, told.get("stage_top1")
    rows, total = [], 0
    for place, name in enumerate(told.get("members") or []):
        total += macs[place]
        limits = [*(told.get("thresholds") or []), None]
        row = [whole(place), word(name), large(macs[place]), share(total / teacher if teacher else None)]
        if tops is not None:
            row += [fixed(tops[place], 2)]
            row += [fixed(energies[split][place], 3) for split in ("calibration", "train")]
        left = exits[place] if exits else None
        rows.append([*row, _limit(limits[place]), whole(left), share(left / images if images and left else left)])
    headers = ["MACs", "Cost so far %"]
    headers += ["Top-1 %", "Energy", "on train"] if tops is not None else []
    columns = [Column("Stage"), Column("Network", text=True)]
    columns += [Column(header) for header in (*headers, "Threshold", "Leave", "Leave %")]
    if tops is not None:
        notes = [*notes, "Energy: mean square of what the logits lack, as a share of the teacher's."]
    return Sheet("Student and residual students", columns, rows, notes)


def _cost_note(told: dict[str, Any]) -> str:
    all_macs, teacher = sum(told["member_macs"]), (told.get("teacher") or {}).get("macs")
    how = f"rule {word(told.get('rule'))}" if told["early"] else "every image goes to the end"
    text = f"Mean cost {large(told['macs'])} MACs per image ({how})"
    if number(told.get("cost")) is None or not teacher:
        return f"{text}; the teacher is not known."
    floor = told["member_macs"][0] / teacher
    return (
        f"{text}: {share(told['cost'])} % of the teacher's; the student alone {share(floor)} %, "
        f"all members {share(all_macs / teacher)} %."
    )


def exit_table(told: dict[str, Any]) -> Sheet | None:
    """The `sweep` of an ensemble; None where it has none."""
    if not (points := told.get("sweep")):
        return None
    known = any(number(point.get("cost")) is not None for point in points)
    columns = [Column("Threshold"), Column("Cost %" if known else "MACs"), Column("Top-1 %"), Column("Agree %")]
    columns += [Column("Leave at the end %"), Column("Hull", text=True)]
    rows = [
        [
            fixed(point.get("theta"), 3),
            share(point.get("cost")) if known else large(point.get("macs")),
            fixed(point.get("top1"), 2),
            fixed(point.get("agreement"), 1),
            share(point["exits"][-1] / max(sum(point["exits"]), 1)),
            "*" if point.get("hull") else "",
        ]
        for point in points
    ]
    return Sheet("Accuracy and cost over one threshold for all stages", columns, rows, ["*: on the upper hull."])


def _limit(threshold: Any) -> str:
    """A threshold; below 0 lies no uncertainty."""
    known = number(threshold)
    return "never" if known is not None and known < 0 else fixed(threshold, 3)
