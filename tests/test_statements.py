"""What is said of results: one sentence for one thing, and nothing side by side that is not alike."""

from pathlib import Path
from typing import Any

import pytest
from sample_documents import sample
from test_report import CONFIG, Tree, epoch, make_run, spot, text_of

from sakd_cli.documents.base import SeedStatistics
from sakd_cli.documents.evaluation import Evaluation
from sakd_cli.documents.spots import Measured
from sakd_cli.report.evaluation.tables import score_tables
from sakd_cli.report.render import format
from sakd_cli.report.spots.charts import panels_of
from sakd_cli.report.spots.log import spots_document
from sakd_cli.report.spots.page import Seen, spot_sections
from sakd_cli.report.spots.tables import spot_tables, survey_tables

ALWAYS = "of 100 % at every spot in every epoch. It decided nothing and did what router always does, at almost twice"
RECIPE = "--set router.recipe=auto lets it decide"


@pytest.mark.parametrize(
    ("chances", "shares", "router", "said"),
    [
        ((0.996, 1.0), (1.0, 0.999), {"recipe": "published"}, [ALWAYS, f"the cost; {RECIPE}."]),
        ((0.004, 0.0), (0.0, 0.0), {"lr": 0.1}, ["of 0 % at", "router never does", f"{RECIPE} (without router.lr)."]),
        (
            (0.004, 0.996),
            (0.0, 1.0),
            {},
            ["of 0 % or 100 % at", "one fixed weight", "a smaller --set router.lr"],
        ),
        ((0.994, 1.0), (1.0, 1.0), {}, []),
        ((1.0, None), (1.0, 1.0), {}, []),
    ],
)
def test_a_saturated_router_is_one_sentence_with_the_cure(
    tmp_path: Path, chances: Any, shares: Any, router: Tree, said: list[str]
) -> None:
    names = ("stage2", "logits")
    spots = [spot(name, share, [share], p) for name, share, p in zip(names, shares, chances, strict=True)]
    config = CONFIG | {"router": {"name": "adaptive"} | router}
    report = spots_document(make_run(tmp_path / "run", [epoch(n, 10, *spots) for n in (1, 2)], config=config))
    if not said:
        assert (report.saturated, len(spot_tables(report))) == (None, 3)
        return
    assert report.saturated is not None
    assert all(part in report.saturated for part in said)
    [sheet] = spot_tables(report)
    assert (sheet.rows, panels_of(report), "100.0" in text_of([sheet])) == ([], ["epochs"], False)
    [section] = spot_sections(report, Seen({}))
    assert [block.title for block in section.blocks] == [report.saturated]


def test_a_difference_is_that_of_the_figures_beside_it_or_has_one_more_digit() -> None:
    def over_seeds(mean: float) -> SeedStatistics:
        return SeedStatistics(mean=mean, std=None, low=None, high=None)

    assert format.difference(0.5, over_seeds(70.5), over_seeds(70.0)) == "+0.50"
    assert format.difference(0.012, over_seeds(70.006), over_seeds(69.994)) == "+0.012", "shown are 70.01 and 69.99"
    assert format.difference(-0.004, None, over_seeds(1.0)) == "0.00"


def test_accuracies_on_two_sets_of_images_say_so() -> None:
    """In the tables by image and of the routed network, and of two evaluations."""
    score = {"top1": 60.0, "loss": 1.0}
    sampled = {"top1": 50.0, "loss": 2.0, "draws": 4, "top1_std": 0.5}
    rows = [{"name": name, "images": 5, "deviation": [0.1, None], "mean": [0.5, None]} for name in "abc"]
    given = {
        "images": 40,
        "split": "train",
        "spots": [{"name": "stage2"}, {"name": "logits"}],
        "classes": {"correlation": [0.5, None], "correlation_p": [0.098, None], "rows": rows},
        "routed": {"images": 100, "student": score, "teacher": score, "sampled": sampled},
    }
    sheets = [sheet for sheets in survey_tables(sample(Measured, given)).values() for sheet in sheets]
    text = " ".join(text_of(sheets, 400).split())
    assert "Top-1: on these 40 train images." in text
    assert "All on 100 test images, not on those of the tables by class and by difficulty." in text
    assert "They are below both networks: where a path changes from one to the other, only the adapter was" in text
    assert "n = 3 classes: stage2 0.50 (p 0.098), logits –." in text
    two = [sample(Evaluation, {"split": split, "dataset": "shapes", "images": 9}) for split in ("test", "val")]
    assert "Not on the same images: these figures cannot be compared." in text_of(score_tables(two), 120)
    assert "Not on the same images" not in text_of(score_tables(two[:1] * 2), 120)
