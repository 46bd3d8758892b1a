"""What the router makes of every image, as tables: the "measured" part of the document, for terminal and page alike."""

from typing import Any

from sakd_cli.documents.spots import cell_name
from sakd_cli.report.render.format import DASH, WHAT, bar, deviation, fixed, fraction, whole, word
from sakd_cli.report.render.sheet import BAR, Column, Sheet, both_ends

PATHS = 10
NETWORKS = {
    "student": "student alone",
    "teacher": "teacher alone",
    "sampled": "routed, gates drawn",
    "all_student": "routed, student everywhere",
    "all_teacher": "routed, teacher everywhere",
}


def survey_tables(
    measured: dict[str, Any], *, top: int | None = 10, extremes: int | None = 3
) -> dict[str, list[Sheet]]:
    """The sections that are there; `top` classes and `extremes` images at each end, None: all that there are."""
    spots = [spot["name"] for spot in measured["spots"]]
    classes, difficulty, paths = (measured[key] for key in ("classes", "difficulty", "paths"))
    tables = {"spots": [_spots(measured)]}
    tables["classes"] = [_classes(classes, spots, top)] if classes else []
    if difficulty:
        tables["difficulty"] = [
            _bins("By difficulty: the student's loss (%)", "Loss", difficulty["by_student_loss"], spots),
            _bins("By difficulty: the teacher's confidence (%)", "Sure", difficulty["by_teacher_confidence"], spots),
            _right_wrong(difficulty["right_wrong"], spots),
        ]
    tables["paths"] = [_paths(paths, spots, top)] if paths else []
    tables["extremes"] = [_extremes(spot, extremes) for spot in measured["extremes"] if extremes != 0]
    tables["routed"] = [_routed(measured["routed"])] if measured["routed"] else []
    return {section: sheets for section, sheets in tables.items() if sheets}


def _spots(measured: dict[str, Any]) -> Sheet:
    headers = ("Mean", "Drawn", "> 50", "Bits", "5 %", "50 %", "95 %")
    columns = [Column("Spot", text=True), Column("Student", text=True), Column("Teacher", text=True)]
    columns += [Column(header) for header in headers]
    rows = [
        [word(spot["name"]), word(spot["student_stage"]), word(spot["teacher_stage"])]
        + [fraction(spot[key]) for key in ("mean", "drawn", "above_half")]
        + [fixed(spot["entropy"], 2)]
        + [fraction(spot[key]) for key in ("p05", "p50", "p95")]
        for spot in measured["spots"]
    ]
    images = f"{whole(measured['images'])} {measured['split']} images"
    of = f" of {word(measured['dataset'])}" if measured["dataset"] else ""
    notes = [f"{images}{of}; drawn with seed {measured['seed']}; bits: mean entropy.", *measured["notes"]]
    return Sheet(f"The trained router ({WHAT[measured['value']]})", columns if rows else [], rows, notes)


def _means(row: dict[str, Any]) -> list[str]:
    return [fraction(mean) for mean in row["mean"]]


def _classes(classes: dict[str, Any], spots: list[str], top: int | None) -> Sheet:
    known = [row for row in classes["rows"] if row["images"]]
    ranked = sorted(known, key=lambda row: -max(row["deviation"], key=abs))
    columns = [Column("#"), Column("Class", text=True), Column("Images"), Column("Student top-1 %")]
    columns += [Column(word(name)) for name in spots]
    cells = [
        [str(rank), word(row["name"]), whole(row["images"]), fixed(row["student_top1"], 1)]
        + [f"{fraction(m)} {deviation(d):>6}" for m, d in zip(row["mean"], row["deviation"], strict=True)]
        for rank, row in enumerate(ranked, start=1)
    ]
    shown, left_out = both_ends(cells, top)
    related = ", ".join(
        f"{word(name)} {DASH if r is None else fixed(r, 2)}"
        for name, r in zip(spots, classes["correlation"], strict=True)
    )
    notes = [f"Correlation of a class's mean with the student's top-1 on it: {related}."]
    notes += [f"{len(shown) - 1} of {len(cells)} classes are shown; all of them: --json"] if left_out else []
    return Sheet("The trained router by class (%)", columns, shown, notes)


def _bins(title: str, measure: str, bins: list[dict[str, Any]], spots: list[str]) -> Sheet:
    columns = [Column(header) for header in (f"{measure} from", "to", "Images", "Student top-1", "Teacher top-1")]
    columns += [Column(word(name)) for name in spots]
    rows = [
        [fixed(row["from"], 3), fixed(row["to"], 3), whole(row["images"])]
        + [fixed(row[f"{who}_top1"], 1) for who in ("student", "teacher")]
        + _means(row)
        for row in bins
    ]
    return Sheet(title, columns, rows)


def _right_wrong(cells: list[dict[str, Any]], spots: list[str]) -> Sheet:
    columns = [Column("Who is right", text=True), Column("Images"), *(Column(word(name)) for name in spots)]
    rows = [[cell_name(cell), whole(cell["images"]), *_means(cell)] for cell in cells]
    return Sheet("By who is right (%)", columns, rows)


def _paths(paths: list[dict[str, Any]], spots: list[str], top: int | None) -> Sheet:
    shown = paths if top is None else paths[:PATHS]
    rows = [[row["path"], fraction(row["share"]), bar(row["share"], BAR)] for row in shown]
    notes = [f"A letter per spot ({', '.join(word(name) for name in spots)}): T the teacher's part, S the student's."]
    notes += [f"{len(shown)} of {len(paths)} paths are shown; all of them: --json"] if len(shown) < len(paths) else []
    return Sheet("Paths (%)", [Column("Path", text=True), Column("Share"), Column("", True, "cyan")], rows, notes)


def _extremes(spot: dict[str, Any], most: int | None) -> Sheet:
    columns = [Column("Value"), Column("Image")]
    columns += [Column(header, text=True) for header in ("Class", "Student says", "Teacher says")]
    columns += [Column("Student loss"), Column("Teacher sure of")]
    rows = [
        [fraction(row["value"]), str(row["index"])]
        + [word(row[key]) for key in ("label", "student_prediction", "teacher_prediction")]
        + [fixed(row["student_loss"], 2), fraction(row["teacher_confidence"])]
        for row in extremes_of(spot, most)
    ]
    notes = ["Highest first, then lowest. Image: its place in the data set; student loss in nats."]
    return Sheet(f"Extremes at {word(spot['spot'])} (%)", columns, rows, notes)


def extremes_of(spot: dict[str, Any], most: int | None = None) -> list[dict[str, Any]]:
    """From the highest down, then up to the lowest."""
    rows: list[dict[str, Any]] = [*spot["highest"][:most], *reversed(spot["lowest"][:most])]
    return rows


def _routed(routed: dict[str, Any]) -> Sheet:
    columns = [Column("Network", text=True), Column("Top-1 %"), Column("Loss")]
    there = [(name, routed[key]) for key, name in NETWORKS.items() if routed[key] is not None]
    rows = [[name, fixed(row["top1"], 2), fixed(row["loss"], 3)] for name, row in there]
    notes = [f"{whole(routed['images'])} test images."]
    if sampled := routed["sampled"]:
        spread = fixed(sampled["spread"], 2)
        notes.append(f"Gates drawn: mean of {sampled['draws']} draws, standard deviation of top-1 {spread}.")
    return Sheet("The routed network", columns, rows, notes)
