"""What a run's router decides for every image: read from the run, and by spot, class, difficulty, path and extremes.

Read from `survey.safetensors` (`runs/survey.py`), or from `samples.safetensors` where that is all there is. numpy and
safetensors are loaded on first use, torch never.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from sakd_cli.documents import spots as doc
from sakd_cli.documents.base import Number
from sakd_cli.errors import DamagedError, UsageError
from sakd_cli.files import columns_digest, parse_json, read_bytes, unsealed
from sakd_cli.report.render.format import csv_text, plain
from sakd_cli.report.runs.statistics import p_of_correlation
from sakd_cli.rundir import RunDir
from sakd_cli.writing import write_aside

Header = TypeVar("Header", doc.SurveyHeader, doc.SamplesHeader)

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Column = NDArray[Any]
    Spots = Sequence[doc.SpotPlace] | Sequence[doc.SpotTotal]

FILE, COUNTS = "survey.safetensors", "samples.safetensors"
ANSWERS = ("label", "student_prediction", "teacher_prediction", "student_loss", "teacher_confidence")
PLACE = set(doc.SpotPlace.model_fields)
BINS = 10  # deciles of the student's loss and of the teacher's confidence
MOST_SURVEY = 2**30  # bytes; that of all 1.28 million images of ImageNet has 0.1 GB
LONGEST = 12  # spots up to which all 2^S paths are counted
MODES = "Both networks in evaluation mode, images not augmented; the router learned from the student in training mode."
STAND_IN = "The router has no policy or the run has no survey: the rate at which each image was distilled is shown."
COMPLEMENT = (
    "The probability is that of the teacher's part in the routed network; this router distilled the other images."
)
COMMON, EXAMPLES = 4, 6  # paths whose images are shown, and how many of each
GROUPS = ("both right", "both wrong alike", "student alone right", "teacher alone right", "both wrong unlike")
ALL_ALIKE = "No image differs from another at any spot: the router is saturated, and there is nothing to compare."


@dataclass(frozen=True)
class Survey:
    """N images, S spots.

    source  "survey": at the end of the run; "live": just now; "samples": only how often each image was distilled
    header  None for "samples"
    index   [N] place of each image in the data set's own split
    value   [N, S] teacher-routing probability, or the rate at which the image was distilled; None: neither is known
    rated   value is such a rate
    answers the columns of `ANSWERS`, [N] each; empty for "samples"
    images  index -> [3, H, W] uint8, for the extremes
    files   path of each image below the data set's folder; empty where they are not in files, or it is not known
    """

    source: Literal["survey", "live", "samples"]
    header: doc.SurveyHeader | None
    index: "Column"
    value: "Column | None"
    rated: bool = False
    answers: "dict[str, Column]" = field(default_factory=dict)
    images: "dict[int, Column]" = field(default_factory=dict)
    files: tuple[str, ...] = ()


def notes_on_missing(run: RunDir) -> list[str]:
    """What to say of the files that a run has left and that are not there any more.

    A stopped run has its counts by sample from its first checkpoint on.
    """
    saved = (run.path / "checkpoints" / "last").is_dir() and (run.path / "spots.jsonl").is_file()
    known = set(run.summary.files) if run.finished else {COUNTS} if saved else ()
    taken = [run.path / name for name in (FILE, COUNTS) if name in known and not (run.path / name).is_file()]
    return [f"{path}: is gone; what it held by image is not shown" for path in taken]


def read_survey(run: RunDir, live: bytes | None = None) -> Survey | None:
    """The survey that was just made (`live`), else the run's, else its counts by sample; None where it has neither.

    A survey of the training images under a router without a policy has the run's counts for values.
    Raises UsageError where a file is damaged.
    One that was taken away is done without (`notes_on_missing`).
    """
    path = run.path / FILE
    named = (COUNTS,) if live is not None else (COUNTS, FILE)
    run.require_files("images.json", *(name for name in named if (run.path / name).is_file()))
    if live is None and not path.is_file():
        return _counts(run)
    where = plain(path) if live is None else "the survey"
    try:
        content = read_bytes(path, MOST_SURVEY) if live is None else live
    except (OSError, ValueError) as error:
        raise DamagedError(f"{where}: cannot be read ({error})", hint="--live measures it anew") from None
    survey = _parse(content, where, "survey" if live is None else "live")
    if survey.value is not None or survey.header is None or survey.header.split != "train":
        return survey
    counts = _counts(run)
    if counts is None or counts.index.tolist() != survey.index.tolist():
        return survey
    return replace(survey, value=counts.value, rated=True)


def _parse(content: bytes, where: str, source: Literal["survey", "live"]) -> Survey:
    from safetensors import SafetensorError

    try:
        header, columns = _opened(content, doc.SurveyHeader, where)
        index, answers = columns["index"], {name: columns[name] for name in ANSWERS}
        images: dict[int, Column] = {}
        if "extreme" in columns:
            images = dict(zip(index[columns["extreme"]].tolist(), columns["images"], strict=True))
        files = tuple(map(str, parse_json(columns["files"].tobytes()))) if "files" in columns else ()
        if files and len(files) != len(index):
            raise ValueError
        return Survey(source, header, index, columns.get("probability"), answers=answers, images=images, files=files)
    except (SafetensorError, ValueError, KeyError, TypeError, IndexError, AttributeError):
        raise DamagedError(f"{where}: damaged", hint="--live measures it anew") from None


def _opened(content: bytes, kind: type[Header], where: str) -> "tuple[Header, dict[str, Column]]":
    """The entry "sakd" of a safetensors file, and its arrays. Raises SafetensorError, ValueError or KeyError."""
    from safetensors.numpy import load

    columns = load(content)
    text = parse_json(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]["sakd"]
    if (version := parse_json(text)["format"]) != kind.model_fields["format"].default:
        raise DamagedError(f"{where}: written by another version of sakd ({plain(version)!r})")
    header = kind.model_validate_json(json.dumps(unsealed(parse_json(text))), strict=True)
    if header.digest != columns_digest(columns):
        raise ValueError
    return header, columns


def _counts(run: RunDir) -> Survey | None:
    """How often each training image was distilled; None where there is no record. DamagedError where it is damaged."""
    import numpy as np
    from safetensors import SafetensorError

    path = run.path / COUNTS
    if not path.is_file():
        return None
    try:
        _, columns = _opened(read_bytes(path, MOST_SURVEY), doc.SamplesHeader, plain(path))
        visits, index = columns["visits"], columns["index"]
        rate = columns["distilled"] / np.where(visits > 0, visits, 1)[:, None]
        if rate.ndim != 2 or not len(rate) or index.shape != visits.shape or not np.isfinite(rate).all():
            raise ValueError
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, IndexError):
        raise DamagedError(f"{plain(path)}: damaged") from None
    return Survey("samples", None, index, rate, rated=True, files=_files(run, len(index)))


def _files(run: RunDir, count: int) -> tuple[str, ...]:
    """Paths of the training images, as the run has listed them; empty where it has not, or they are in memory."""
    try:
        names = [str(row[0]) for row in run.read_json("images.json")["parts"]["train"]]
    except (UsageError, KeyError, TypeError, IndexError):
        return ()
    return tuple(names) if len(names) == count and all(names) else ()


def measure(survey: Survey, spots: Sequence[doc.SpotTotal], *, sample: bool, seed: int, extremes: int) -> doc.Measured:
    """All sections that the survey has the columns for.

    spots     name and kind of each, from the log
    sample    draw once per image and spot instead of using probabilities
    extremes  how many images to name at each end
    """
    import numpy as np

    value, answers, header = survey.value, survey.answers, survey.header
    if value is not None and value.shape[1] != len(spots):
        raise UsageError(f"the survey has {value.shape[1]} spots and the log {len(spots)}")
    chance = np.zeros((len(survey.index), 0)) if value is None else value.astype(np.float64)
    drawn = (np.random.default_rng(seed).random(chance.shape) < chance).astype(np.float64)
    used = drawn if sample and not survey.rated else chance
    classes = [plain(name) for name in header.classes] if header else []
    notes = [MODES] * bool(header) + [STAND_IN] * survey.rated + [COMPLEMENT] * bool(header and header.complement)
    if value is not None and not survey.rated and float(used.std(axis=0).max()) < 1e-6:
        notes.append(ALL_ALIKE)
    names = [spot.name for spot in spots[: chance.shape[1]]]
    by_answers = value is not None and bool(answers)
    return doc.Measured(
        source=survey.source,
        value=None if value is None else "rate" if survey.rated else "draw" if sample else "probability",
        seed=seed,
        split=header.split if header else "train",
        dataset=plain(header.dataset) if header else None,
        images=len(survey.index),
        complement=bool(header and header.complement),
        notes=notes,
        spots=_spots(used, drawn, (header.spots if header else spots)[: len(names)]),
        classes=_classes(used, answers, classes) if by_answers else None,
        difficulty=_difficulty(used, answers) if by_answers else None,
        paths=None if value is None or survey.rated else _paths(used),
        extremes=_extremes(survey, chance, names, classes, extremes),
        path_examples=_path_examples(survey, chance, classes) if by_answers and not survey.rated else [],
        routed=header.routed if header else None,
    )


def records(survey: Survey, spots: Sequence[doc.SpotTotal]) -> list[dict[str, Any]]:
    """One record per image, for `--samples`: index, file, answers, and per spot `p_NAME` (`distilled_NAME` for a rate).

    file  where the images are in files: the path below the data set's folder
    """
    prefix = "distilled" if survey.rated else "p"
    columns: dict[str, Sequence[Any]] = {"index": survey.index.tolist()}
    columns |= {"file": survey.files} if survey.files else {}
    columns |= {name: column.tolist() for name, column in survey.answers.items()}
    if survey.value is not None:
        columns |= {f"{prefix}_{spot.name}": survey.value[:, k].tolist() for k, spot in enumerate(spots)}
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _spots(used: "Column", drawn: "Column", spots: "Spots") -> list[doc.SpotStatistics]:
    import numpy as np

    clipped = np.clip(used, 1e-12, 1 - 1e-12)
    entropy = -(clipped * np.log2(clipped) + (1 - clipped) * np.log2(1 - clipped)).mean(axis=0)
    columns = [used.mean(axis=0), drawn.mean(axis=0), (used > 0.5).mean(axis=0), np.maximum(entropy, 0)]
    columns += list(np.quantile(used, (0.05, 0.5, 0.95), axis=0))
    keys = ("mean", "sampled", "above_half", "entropy", "p05", "p50", "p95")
    coins = columns[0] * (1 - columns[0])  # the variance of a coin that knows no image
    by_image = [float(v / c) if c > 1e-6 else None for v, c in zip(used.var(axis=0), coins, strict=True)]
    return [
        doc.SpotStatistics(**spot.model_dump(include=PLACE), **dict(zip(keys, row, strict=True)), by_image=explained)
        for spot, row, explained in zip(spots, np.stack(columns, axis=1).tolist(), by_image, strict=True)
    ]


def less_base(values: Sequence[Number], base: Sequence[Number]) -> list[Number]:
    """Each value less its base; None where one of them is not known."""
    return [None if a is None or b is None else a - b for a, b in zip(values, base, strict=True)]


def by_peak(row: doc.ClassDeviation) -> tuple[bool, float]:
    """To sort classes: the largest absolute deviation first, classes without an image last."""
    return row.peak is None, -abs(row.peak or 0)


def _correct(answers: "dict[str, Column]") -> "list[Column]":
    return [answers[f"{who}_prediction"] == answers["label"] for who in ("student", "teacher")]


def _group(used: "Column", answers: "dict[str, Column]", rows: "Column") -> doc.ImageGroup:
    """`rows`: a mask or indices."""
    if not (count := int(rows.sum()) if rows.dtype == bool else len(rows)):
        return doc.ImageGroup(images=0, mean=[None] * used.shape[1], student_top1=None, teacher_top1=None)
    student, teacher = (100 * float(right[rows].mean()) for right in _correct(answers))
    mean = used[rows].mean(axis=0).tolist()
    return doc.ImageGroup(images=count, mean=mean, student_top1=student, teacher_top1=teacher)


def _classes(used: "Column", answers: "dict[str, Column]", names: list[str]) -> doc.Classes:
    import numpy as np

    base = used.mean(axis=0).tolist()
    groups = [_group(used, answers, answers["label"] == label) for label in range(len(names))]
    rows = [
        doc.ClassGroup(name=name or f"class {label}", deviation=less_base(group.mean, base), **dict(group))
        for label, (name, group) in enumerate(zip(names, groups, strict=True))
    ]
    correlation: list[Number] = []
    seen = [group for group in groups if group.images]
    for k in range(used.shape[1]):
        pairs = np.array([[group.mean[k], group.student_top1] for group in seen])
        vary = len(seen) >= 3 and bool((pairs.std(axis=0) >= 1e-6).all())  # less is the rounding of float32
        correlation.append(float(np.corrcoef(pairs.T)[0, 1]) if vary else None)
    chances = [None if r is None else p_of_correlation(r, len(seen)) for r in correlation]
    return doc.Classes(correlation=correlation, correlation_p=chances, rows=sorted(rows, key=by_peak))


def _difficulty(used: "Column", answers: "dict[str, Column]") -> doc.Difficulty:
    """Deciles of the images in order of both measures, the lowest first, and by correctness."""
    import numpy as np

    def decile(measure: "Column", rows: "Column") -> doc.Decile:
        low, high = measure[rows[[0, -1]]].tolist()
        return doc.Decile(from_=low, to=high, **dict(_group(used, answers, rows)))

    def deciles(measure: "Column") -> list[doc.Decile]:
        ranked = np.argsort(measure, kind="stable")
        return [decile(measure, rows) for rows in np.array_split(ranked, BINS) if len(rows)]

    student, teacher = _correct(answers)
    cells = []
    for s, t in product((True, False), repeat=2):
        group = _group(used, answers, (student == s) & (teacher == t))
        cells.append(doc.Correctness(student_correct=s, teacher_correct=t, images=group.images, mean=group.mean))
    return doc.Difficulty(
        by_student_loss=deciles(answers["student_loss"]),
        by_teacher_confidence=deciles(answers["teacher_confidence"]),
        by_correctness=cells,
        by_agreement=_agreement(used, answers),
    )


def _agreement(used: "Column", answers: "dict[str, Column]") -> list[doc.AgreementGroup]:
    """One of GROUPS for every image; a group of one image has no error."""
    student, teacher = _correct(answers)
    one = answers["student_prediction"] == answers["teacher_prediction"]
    masks = (one & student, one & ~student, student & ~teacher, teacher & ~student, ~one & ~student & ~teacher)
    found = []
    for name, rows in zip(GROUPS, masks, strict=True):
        group = _group(used, answers, rows)
        error: list[Number] = [None] * used.shape[1]
        if group.images > 1:
            error = (used[rows].std(axis=0, ddof=1) / group.images**0.5).tolist()
        found.append(doc.AgreementGroup(name=name, images=group.images, mean=group.mean, error=error))
    return found


def _paths(used: "Column") -> list[doc.RoutingPath] | None:
    """Expected fraction of every path, most frequent first: given an image, its spots are sampled independently."""
    import numpy as np

    if used.shape[1] > LONGEST:
        return None
    paths = []
    for owners in product((True, False), repeat=used.shape[1]):
        mean = float(np.prod(np.where(owners, used, 1 - used), axis=1).mean())
        paths.append(doc.RoutingPath(path="".join("T" if owner else "S" for owner in owners), fraction=mean))
    return sorted(paths, key=lambda row: -row.fraction)


def common_paths(chance: "Column") -> list[tuple[str, int, list[int]]]:
    """(path, images whose most probable one it is, rows of the clearest EXAMPLES) of COMMON paths; `chance` [N, S]."""
    import numpy as np

    owners = chance > 0.5
    certain = np.maximum(chance, 1 - chance).prod(axis=1)
    found = []
    for path in np.unique(owners, axis=0) if owners.shape[1] else ():
        rows = np.flatnonzero((owners == path).all(axis=1))
        clearest = rows[np.argsort(-certain[rows], kind="stable")[:EXAMPLES]]
        found.append(("".join("T" if owner else "S" for owner in path), len(rows), clearest.tolist()))
    return sorted(found, key=lambda one: -one[1])[:COMMON]


def _path_examples(survey: Survey, chance: "Column", classes: list[str]) -> list[doc.PathExamples]:
    def named_images(rows: list[int]) -> list[doc.ExtremeImage]:
        found = zip(rows, chance[rows].tolist(), strict=True)
        return [_image(survey, row, prod(max(p, 1 - p) for p in spots), classes) for row, spots in found]

    paths = common_paths(chance)
    return [doc.PathExamples(path=path, images=n, examples=named_images(rows)) for path, n, rows in paths]


def _image(survey: Survey, row: int, value: float, classes: list[str]) -> doc.ExtremeImage:
    found: dict[str, Any] = {name: column[row].item() for name, column in survey.answers.items()}
    for key in found.keys() & {"label", "student_prediction", "teacher_prediction"}:
        label = found[key]
        found[key] = classes[label] if 0 <= label < len(classes) else f"class {label}"
    file = survey.files[row] if survey.files else None
    return doc.ExtremeImage(index=int(survey.index[row]), file=file, value=value, **found)


def _extremes(
    survey: Survey, chance: "Column", spots: list[str], classes: list[str], most: int
) -> list[doc.SpotExtremes]:
    """The images with the highest and the lowest value at each spot; ties in the order of the images."""
    found = []
    for k, spot in enumerate(spots):
        down, up = ((sign * chance[:, k]).argsort(kind="stable")[:most].tolist() for sign in (-1, 1))
        highest, lowest = ([_image(survey, row, float(chance[row, k]), classes) for row in rows] for rows in (down, up))
        found.append(doc.SpotExtremes(spot=spot, highest=highest, lowest=lowest))
    return found


def write_records(records: list[dict[str, Any]], path: Path) -> None:
    """The records of all images as JSON lines, or as CSV. Raises UsageError where there is none."""
    if not records:
        raise UsageError("--samples: this run has no record by image", hint="--live measures it")
    lines = (json.dumps(record) + "\n" for record in records)
    write_aside(path, (csv_text(list(records[0]), records) if path.suffix == ".csv" else "".join(lines)).encode())
