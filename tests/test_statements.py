"""What is said of results: one sentence for one thing, and nothing side by side that is not alike."""

from pathlib import Path
from typing import Any

import pytest
from test_report import CONFIG, Tree, epoch, make_run, spot, text_of

from sakd_cli.report.spots.charts import panels_of
from sakd_cli.report.spots.log import spots_document
from sakd_cli.report.spots.page import Seen, spot_sections
from sakd_cli.report.spots.tables import spot_tables

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
