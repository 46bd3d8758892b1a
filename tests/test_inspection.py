"""Arithmetic of the survey's figures on columns small enough to be worked out by hand."""

import io
from typing import Any

import numpy as np
import pytest
from rich.cells import cell_len
from rich.console import Console
from sample_documents import sample
from scipy import stats

from sakd_cli.documents.spots import Measured, RoutedNetwork, SpotTotal, SurveyHeader
from sakd_cli.errors import UsageError
from sakd_cli.report.spots.survey import ALL_ALIKE, COMPLEMENT, STAND_IN, Survey, measure, records
from sakd_cli.report.spots.tables import survey_tables

PLACES = [{"name": "stage2", "kind": "map"}, {"name": "logits", "kind": "logits"}]
SPOTS = [sample(SpotTotal, place) for place in PLACES]
VALUE = np.array([[0.25, 1.0], [0.75, 1.0], [0.5, 0.0], [0.5, 0.5]], dtype=np.float32)
ANSWERS = {
    "label": np.array([0, 0, 1, 1]),
    "student_prediction": np.array([0, 1, 1, 0]),
    "teacher_prediction": np.array([0, 0, 1, 0]),
    "student_loss": np.array([0.1, 0.9, 0.2, 2.0], dtype=np.float32),
    "teacher_confidence": np.array([0.9, 0.8, 0.7, 0.6], dtype=np.float32),
}


def header(**other: Any) -> SurveyHeader:
    given = {"split": "test", "dataset": "toys", "classes": ["ball", "cube", "doll"], "spots": PLACES}
    return sample(SurveyHeader, given | {"routed": sample(RoutedNetwork)} | other)


def survey(**other: Any) -> Survey:
    given: dict[str, Any] = {"source": "live", "header": header(), "index": np.array([10, 11, 12, 13]), "value": VALUE}
    return Survey(**given | {"rated": False, "answers": ANSWERS, "images": {}} | other)


def measured(**other: Any) -> Measured:
    return measure(survey(**other), SPOTS, sample=False, seed=0, extremes=2)


def test_by_spot() -> None:
    stage, logits = measured().spots
    assert [stage.mean, stage.above_half, stage.p50] == pytest.approx([0.5, 0.25, 0.5])
    quarter = -(0.25 * np.log2(0.25) + 0.75 * np.log2(0.75))
    assert stage.entropy == pytest.approx((2 * quarter + 2) / 4)
    assert (logits.mean, logits.entropy) == (pytest.approx(0.625), pytest.approx(0.25))


def test_by_class_with_correlation_and_a_class_without_images() -> None:
    classes = measured().classes
    rows = {row.name: row for row in classes.rows}
    assert (rows["ball"].mean, rows["ball"].student_top1, rows["ball"].teacher_top1) == ([0.5, 1.0], 50, 100)
    assert rows["cube"].deviation == pytest.approx([0.0, -0.375])
    assert rows["doll"].plain() == {
        "name": "doll",
        "images": 0,
        "mean": [None] * 2,
        "deviation": [None] * 2,
    } | dict.fromkeys(("student_top1", "teacher_top1"))
    assert classes.rows[-1].name == "doll"
    assert classes.correlation == [None, None], "two classes make no correlation"
    answers = ANSWERS | {"label": np.arange(4), "student_prediction": np.array([0, 9, 2, 9])}
    tied = measured(answers=answers, header=header(classes=list("abcd")), value=VALUE[:, ::-1]).classes
    expected = stats.pearsonr([1.0, 1.0, 0.0, 0.5], [100, 0, 100, 0])
    assert (tied.correlation[0], tied.correlation_p[0]) == pytest.approx((expected.statistic, expected.pvalue))


def test_by_difficulty() -> None:
    difficulty = measured().difficulty
    bins = difficulty.by_student_loss
    assert [row.images for row in bins] == [1, 1, 1, 1], "no empty bins where there are fewer than ten images"
    assert [row.from_ for row in bins] == pytest.approx([0.1, 0.2, 0.9, 2.0])
    assert [row.mean[1] for row in bins] == [1.0, 0.0, 1.0, 0.5]
    assert [row.mean[0] for row in difficulty.by_teacher_confidence] == [0.5, 0.5, 0.75, 0.25]
    cells = {(row.student_correct, row.teacher_correct): row for row in difficulty.by_correctness}
    assert {key: row.images for key, row in cells.items()} == {
        (True, True): 2, (True, False): 0, (False, True): 1, (False, False): 1,
    }  # fmt: skip
    assert cells[True, True].mean == [0.375, 0.5]
    assert cells[True, False].mean == [None, None]


def test_paths_are_expected_fractions() -> None:
    paths = {row.path: row.fraction for row in measured().paths}
    # (.25 + .75 + 0 + .25) / 4, ...; sums to 1
    assert paths == pytest.approx({"TT": 0.3125, "ST": 0.3125, "TS": 0.1875, "SS": 0.1875})


def test_what_knowing_the_image_explains_of_the_decisions() -> None:
    stage, logits = measured().spots
    assert stage.by_image == pytest.approx(np.var([0.25, 0.75, 0.5, 0.5]) / 0.25)
    assert logits.by_image == pytest.approx(np.var([1, 1, 0, 0.5]) / (0.625 * 0.375))
    coins = measured(value=np.full((4, 2), [0.3, 1.0], dtype=np.float32)).spots
    assert [coins[0].by_image, coins[1].by_image] == [pytest.approx(0, abs=1e-9), None]


def test_agreement_of_the_networks_in_five_groups() -> None:
    answers = ANSWERS | {"student_prediction": np.array([0, 1, 0, 0]), "teacher_prediction": np.array([0, 0, 0, 2])}
    groups = measured(answers=answers).difficulty.by_agreement
    assert [group.images for group in groups] == [1, 1, 0, 1, 1]
    assert [group.mean[0] for group in groups] == [0.25, 0.5, None, 0.75, 0.5]
    (same, *_) = measured().difficulty.by_agreement
    assert (same.images, same.mean, same.error) == (2, [0.375, 0.5], pytest.approx([0.125, 0.5]))


def test_the_clearest_images_of_the_most_common_paths() -> None:
    value = np.array([[0.9, 0.9], [0.6, 0.8], [0.1, 0.6], [0.2, 0.9]], dtype=np.float32)
    one, both = measured(value=value).path_examples
    assert (both.path, both.images, [image.index for image in both.examples]) == ("TT", 2, [10, 11])
    assert (one.path, [image.index for image in one.examples]) == ("ST", [13, 12])
    assert [image.value for image in one.examples] == pytest.approx([0.72, 0.54])


def test_extremes_name_the_images_and_ties_keep_their_order() -> None:
    stage, logits = measured().extremes
    assert [row.index for row in stage.highest] == [11, 12]
    assert [row.index for row in stage.lowest] == [10, 12]
    assert [row.index for row in logits.highest] == [10, 11]
    first = stage.highest[0]
    assert (first.label, first.student_prediction, first.teacher_prediction) == ("ball", "cube", "ball")


def test_a_rate_has_no_paths_and_the_notes_say_what_stands_in() -> None:
    found = measured(rated=True)
    assert (found.value, found.paths) == ("rate", None)
    assert STAND_IN in found.notes
    assert COMPLEMENT in measured(header=header(complement=True)).notes
    assert ALL_ALIKE in measured(value=np.full((4, 2), 0.5, dtype=np.float32)).notes


def test_a_survey_of_other_spots_is_refused() -> None:
    with pytest.raises(UsageError, match="2 spots and the log 1"):
        measure(survey(), SPOTS[:1], sample=False, seed=0, extremes=1)


def test_records() -> None:
    rows = records(survey(), SPOTS)
    assert len(rows) == 4
    assert rows[1] | {"student_loss": 0, "teacher_confidence": 0} == {
        "index": 11, "label": 0, "student_prediction": 1, "teacher_prediction": 0, "student_loss": 0,
        "teacher_confidence": 0, "p_stage2": 0.75, "p_logits": 1.0,
    }  # fmt: skip


HOSTILE = "\x1b[31m<b>&\u202e[bold]x"


@pytest.mark.parametrize("width", [8, 40, 80])
def test_tables_fit_and_names_are_plain_text(width: int) -> None:
    routed = {"images": 9, "student": {"top1": 1.0, "loss": 2.0}, "teacher": {"top1": 1.0, "loss": 2.0}}
    routed |= {
        "sampled": {"top1": 1.0, "loss": 2.0, "draws": 3, "top1_std": 0.1},
        "all_student": None,
        "all_teacher": None,
    }
    found = measured(header=header(classes=[HOSTILE, "cube"], routed=sample(RoutedNetwork, routed), dataset=HOSTILE))
    sections = survey_tables(found, top=1, extremes=1)
    assert list(sections) == ["spots", "classes", "difficulty", "paths", "extremes", "routed"]
    buffer = io.StringIO()
    console = Console(file=buffer, width=width)
    for sheet in (sheet for sheets in sections.values() for sheet in sheets):
        console.print(sheet)
    text = buffer.getvalue()
    assert max(cell_len(line) for line in text.splitlines()) <= width
    assert not {"\x1b", "\u202e"} & set(text)
