"""How metrics and counts are written: short, with units, a dash for what is not known."""

from typing import Any

import pytest

from sakd_cli.report.render import format


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0, "0"), (772, "772"), (8448, "8.45 k"), (83_892, "0.084 M"), (278_324, "0.28 M"), (1_233_540, "1.23 M"),
        (40_800_000, "40.8 M"), (278_000_000, "278 M"), (1_250_000_000, "1.25 G"), (3e13, "30.0 T"),
        (None, "–"), ("x", "–"), (float("nan"), "–"), (True, "–"), (10**400, "–"),
    ],
)  # fmt: skip
def test_large(value: Any, expected: str) -> None:
    assert format.large(value) == expected


def test_small_figures() -> None:
    assert format.fraction(0.613) == "61.3"
    assert format.fixed(61.3, 1, " %") == "61.3 %"
    deviations = [format.deviation(value, 0.5) for value in (0.042, -0.042, 0.0, -1e-9, None)]
    assert deviations == ["+4.2", "−4.2", "0.0", "0.0", "–"]
    assert format.deviation(0.0006, 0.5003) == "0.0", "shown are 50.0 and 50.0"
    assert format.deviation(0.0412, 0.5006) == "+4.2", "shown are 50.1 and 45.9"
    durations = [format.duration(value) for value in (12.34, 83.1, 7512, 59.96, None)]
    assert durations == ["12.3 s", "1 min 23 s", "2 h 05 min", "1 min 00 s", "–"]
    assert format.shape([16, 32, 32]) == "16×32×32"
    bars = [format.bar(value) for value in (0.0, 0.5, 0.56, 1.0, 1.2, None)]
    assert bars == ["", "█████", "█████▋", "██████████", "██████████", ""]
