"""What is worth knowing of a survey: by spot, class, difficulty, path, and the extremes.

Plain data from numpy columns: `inspection` returns the "measured" part of `sakd inspect-spots --json`; `schema.py` says
what is in it.
"""

from itertools import product
from typing import TYPE_CHECKING, Any

from sakd_cli.errors import UsageError
from sakd_cli.report.render.format import plain
from sakd_cli.report.spots.log import spot_report
from sakd_cli.report.spots.survey import Survey
from sakd_cli.rundir import RunDir

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Column = NDArray[Any]

KEPT = 12  # images at each end of a spot, as many as a survey has pictures of
BINS = 10  # deciles of the student's loss and of the teacher's confidence
LONGEST = 12  # spots up to which all 2^S paths are counted
MODES = "Both networks in evaluation mode, images not augmented; the router learned from the student in training mode."
STAND_IN = "The router has no policy or kept no survey: how often each image was taught stands in for a probability."
COMPLEMENT = "p is the chance of the teacher in the routed network; this router taught the others."
ALL_ALIKE = "No image differs from another at any spot: the router has settled, and there is nothing to compare."


def spot_document(
    run: RunDir, survey: Survey | None, *, sample: bool = False, seed: int = 0, extremes: int = KEPT
) -> dict[str, Any]:
    """The whole of `--json`: the log of the training, and what was measured by image (null where nothing was)."""
    report = spot_report(run)
    spots = report["overall"]
    found = survey and inspection(survey, spots, sample=sample, seed=seed, extremes=extremes)
    return report | {"measured": found}


def inspection(
    survey: Survey, spots: list[dict[str, Any]], *, sample: bool, seed: int, extremes: int
) -> dict[str, Any]:
    """All sections that the survey has the columns for.

    spots     name and kind of each, from the log
    sample    draw once per image and spot instead of using probabilities
    extremes  how many images to name at each end
    """
    import numpy as np

    value, answers, about = survey.value, survey.answers, survey.about
    if value is not None and value.shape[1] != len(spots):
        raise UsageError(f"the survey has {value.shape[1]} spots and the log {len(spots)}")
    chance = None if value is None else value.astype(np.float64)
    drawn = None if chance is None else (np.random.default_rng(seed).random(chance.shape) < chance).astype(np.float64)
    used = drawn if sample and not survey.rated else chance
    classes = [plain(name) for name in about.get("classes", [])]
    return {
        "source": survey.source,
        "value": None if used is None else "rate" if survey.rated else "draw" if sample else "probability",
        "seed": seed,
        "split": about.get("split", "train"),
        "dataset": plain(about["dataset"]) if "dataset" in about else None,
        "images": len(survey.index),
        "complement": bool(about.get("complement", False)),
        "notes": _notes(survey, used),
        "spots": [] if used is None or drawn is None else _spots(used, drawn, about.get("spots") or spots),
        "classes": _classes(used, answers, classes) if used is not None and answers else None,
        "difficulty": _difficulty(used, answers) if used is not None and answers else None,
        "paths": _paths(used) if used is not None and not survey.rated else None,
        "extremes": [] if chance is None else _extremes(survey, chance, spots, classes, extremes),
        "routed": about.get("routed"),
    }


def records(survey: Survey, spots: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One record per image, for `--samples`: index, answers, and per spot `p_NAME` (`taught_NAME` for a rate)."""
    prefix = "taught" if survey.rated else "p"
    columns = {"index": survey.index, **survey.answers}
    if survey.value is not None:
        columns |= {f"{prefix}_{spot['name']}": survey.value[:, k] for k, spot in enumerate(spots)}
    rows = zip(*(column.tolist() for column in columns.values()), strict=True)
    return [dict(zip(columns, row, strict=True)) for row in rows]


def _notes(survey: Survey, used: "Column | None") -> list[str]:
    notes = [MODES] if survey.source != "samples" else []
    notes += [STAND_IN] if survey.rated else []
    notes += [COMPLEMENT] if survey.about.get("complement") else []
    return notes + (
        [ALL_ALIKE] if used is not None and not survey.rated and float(used.std(axis=0).max()) < 1e-6 else []
    )


def _spots(used: "Column", drawn: "Column", spots: list[dict[str, Any]]) -> list[dict[str, Any]]:
    import numpy as np

    clipped = np.clip(used, 1e-12, 1 - 1e-12)
    entropy = -(clipped * np.log2(clipped) + (1 - clipped) * np.log2(1 - clipped)).mean(axis=0)
    low, middle, high = np.quantile(used, (0.05, 0.5, 0.95), axis=0)
    stages = (
        "student_stage",
        "teacher_stage",
        "student_shape",
        "teacher_shape",
        "student_to_teacher",
        "teacher_to_student",
    )
    return [
        {"name": spot["name"], "kind": spot["kind"]}
        | {key: spot.get(key) for key in stages}
        | {"mean": float(used[:, k].mean()), "drawn": float(drawn[:, k].mean())}
        | {"above_half": float((used[:, k] > 0.5).mean()), "entropy": max(0.0, float(entropy[k]))}
        | {"p05": float(low[k]), "p50": float(middle[k]), "p95": float(high[k])}
        for k, spot in enumerate(spots)
    ]


def _right(answers: "dict[str, Column]", who: str) -> "Column":
    right: Column = answers[f"{who}_prediction"] == answers["label"]
    return right


def _group(used: "Column", answers: "dict[str, Column]", rows: "Column") -> dict[str, Any]:
    """Number of images, mean value at each spot, top-1 in percent of both; nulls where there is no image."""
    count = int(rows.sum()) if rows.dtype == bool else len(rows)
    if not count:
        return {"images": 0, "mean": [None] * used.shape[1], "student_top1": None, "teacher_top1": None}
    top1 = {f"{who}_top1": 100 * float(_right(answers, who)[rows].mean()) for who in ("student", "teacher")}
    return {"images": count, "mean": used[rows].mean(axis=0).tolist(), **top1}


def _classes(used: "Column", answers: "dict[str, Column]", names: list[str]) -> dict[str, Any]:
    """Sorted by the largest deviation from the mean of all images, classes without an image last."""
    base = used.mean(axis=0)
    rows = []
    for label, name in enumerate(names):
        row = _group(used, answers, answers["label"] == label)
        deviation = [None if mean is None else mean - float(all_) for mean, all_ in zip(row["mean"], base, strict=True)]
        rows.append({"name": name or f"class {label}", **row, "deviation": deviation})
    seen = [row for row in rows if row["images"]]
    accuracy = [row["student_top1"] for row in seen]
    correlation = [_correlation([row["mean"][k] for row in seen], accuracy) for k in range(used.shape[1])]
    rows.sort(key=lambda row: -max((abs(d) for d in row["deviation"] if d is not None), default=-1.0))
    return {"correlation": correlation, "rows": rows}


def _correlation(a: list[float], b: list[float]) -> float | None:
    """Pearson's; None where one of the two does not vary."""
    import numpy as np

    if len(a) < 3 or np.std(a) < 1e-9 or np.std(b) < 1e-9:
        return None
    return float(np.corrcoef(a, b)[0, 1])


def _difficulty(used: "Column", answers: "dict[str, Column]") -> dict[str, Any]:
    """Equal parts of the images in order of both measures, the easy ones first, and who is right where."""
    student, teacher = (_right(answers, who) for who in ("student", "teacher"))
    table = []
    for s, t in product((True, False), repeat=2):
        row = _group(used, answers, (student == s) & (teacher == t))
        table.append({"student_right": s, "teacher_right": t, "images": row["images"], "mean": row["mean"]})
    return {
        "by_student_loss": _bins(used, answers, answers["student_loss"]),
        "by_teacher_confidence": _bins(used, answers, answers["teacher_confidence"]),
        "right_wrong": table,
    }


def _bins(used: "Column", answers: "dict[str, Column]", measure: "Column") -> list[dict[str, Any]]:
    import numpy as np

    order = np.argsort(measure, kind="stable")
    parts = [rows for rows in np.array_split(order, BINS) if len(rows)]
    return [
        {"from": float(measure[rows[0]]), "to": float(measure[rows[-1]]), **_group(used, answers, rows)}
        for rows in parts
    ]


def _paths(used: "Column") -> list[dict[str, Any]] | None:
    """Expected share of every path, most frequent first: given an image, its spots are drawn independently."""
    import numpy as np

    if used.shape[1] > LONGEST:
        return None
    paths = []
    for owners in product((True, False), repeat=used.shape[1]):
        share = np.prod(np.where(owners, used, 1 - used), axis=1).mean()
        paths.append({"path": "".join("T" if owner else "S" for owner in owners), "share": float(share)})
    return sorted(paths, key=lambda row: -row["share"])


def _extremes(
    survey: Survey, chance: "Column", spots: list[dict[str, Any]], classes: list[str], most: int
) -> list[dict[str, Any]]:
    """The images with the highest and the lowest value at each spot; ties in the order of the images."""
    import numpy as np

    def named(label: Any) -> str:
        return classes[label] if 0 <= label < len(classes) else f"class {label}"

    def image(row: int, k: int) -> dict[str, Any]:
        said = {name: column[row].item() for name, column in survey.answers.items()}
        words = {key: named(said[key]) for key in ("label", "student_prediction", "teacher_prediction") if key in said}
        numbers = {key: said.get(key) for key in ("student_loss", "teacher_confidence")}
        none = dict.fromkeys(("label", "student_prediction", "teacher_prediction"))
        return {"index": int(survey.index[row]), "value": float(chance[row, k])} | none | words | numbers

    found = []
    for k, spot in enumerate(spots):
        down, up = (np.argsort(sign * chance[:, k], kind="stable")[:most] for sign in (-1, 1))
        sides = {"highest": [image(int(row), k) for row in down], "lowest": [image(int(row), k) for row in up]}
        found.append({"spot": spot["name"], **sides})
    return found
