"""What the router makes of every image: `survey.safetensors`, or `samples.safetensors` where that is all there is.

The format is written down in `tasks/survey.py`. numpy and safetensors are loaded here on first use, torch never.
"""

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from sakd_cli.errors import UsageError
from sakd_cli.report.render.format import plain
from sakd_cli.rundir import RunDir

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Column = NDArray[Any]

FILE, COUNTS = "survey.safetensors", "samples.safetensors"
FORMAT = "sakd.survey/1"
ANSWERS = ("label", "student_prediction", "teacher_prediction", "student_loss", "teacher_confidence")
Source = Literal["survey", "live", "samples"]


@dataclass(frozen=True)
class Survey:
    """N images, S spots.

    source  "survey": at the end of the run; "live": just now; "samples": only how often each image was taught
    about   header of the file: split, dataset, classes, spots, complement, routed; empty for "samples"
    index   [N] place of each image in the data set's own split
    value   [N, S] probability of the teacher, or the rate at which the image was taught; None: neither is known
    rated   value is such a rate
    answers the columns of `ANSWERS`, [N] each; empty for "samples"
    images  index -> [3, H, W] uint8, for the extremes
    """

    source: Source
    about: dict[str, Any]
    index: "Column"
    value: "Column | None"
    rated: bool
    answers: "dict[str, Column]"
    images: "dict[int, Column]"


def survey_of(run: RunDir, live: bytes | None = None) -> Survey | None:
    """The survey that was just made or that the run has kept, or its counts by sample; None where there is nothing.

    A live survey of the training images under a router without a policy has the run's counts for values.
    Raises UsageError where a file is damaged.
    """
    if live is None and not (run.path / FILE).is_file():
        return _counts(run)
    where = "the survey" if live is not None else plain(run.path / FILE)
    survey = _read((run.path / FILE).read_bytes() if live is None else live, where, live is not None)
    if survey.value is not None or survey.about["split"] != "train" or (counts := _counts(run)) is None:
        return survey
    import numpy as np

    if not np.array_equal(counts.index, survey.index):
        return survey
    return Survey(survey.source, survey.about, survey.index, counts.value, True, survey.answers, {})


def _read(content: bytes, where: str, live: bool) -> Survey:
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        columns = load(content)
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        about = json.loads(header["__metadata__"]["sakd"])
        if about["format"] != FORMAT:
            raise UsageError(f"{where}: written by another version of sakd ({plain(about['format'])!r})")
        if about["digest"] != _digest(columns):
            raise ValueError
        value = columns.get("probability")
        index, answers = columns["index"], {name: columns[name] for name in ANSWERS}
        rows = columns["extreme"] if "extreme" in columns else index[:0]
        images = dict(zip(index[rows].tolist(), columns["images"], strict=True)) if len(rows) else {}
        return Survey("live" if live else "survey", about, index, value, False, answers, images)
    except (SafetensorError, ValueError, KeyError, TypeError, IndexError, AttributeError):
        raise UsageError(f"{where}: damaged", hint="--live measures it anew") from None


def _digest(columns: "dict[str, Column]") -> str:
    """The sum that `tasks/survey.py` wrote: whoever has it has the columns that were written, with their shapes."""
    summed = hashlib.sha256()
    for name in sorted(columns):
        summed.update(name.encode() + columns[name].tobytes())
    return summed.hexdigest()


def _counts(run: RunDir) -> Survey | None:
    """How often each training image was taught; None where no record of it can be read."""
    import numpy as np
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        columns = load((run.path / COUNTS).read_bytes())
        taught, visits, index = columns["taught"], columns["visits"], columns["index"]
        rate = taught / np.maximum(visits, 1)[:, None]
        if rate.ndim != 2 or not len(rate) or index.shape != visits.shape or not np.isfinite(rate).all():
            raise ValueError
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, IndexError):
        return None
    return Survey("samples", {}, index, rate, True, {}, {})
