"""A distiller or a router that does not keep its contract costs one line, which names it and what came."""

import re
from typing import Any
from unittest import mock

import pytest
import torch
from conftest import PAIR, TINY, CliRunner

from sakd_cli.data.table import DATASETS
from sakd_cli.distillers.maps import AT
from sakd_cli.distillers.table import DISTILLERS
from sakd_cli.routing.router import Decision
from sakd_cli.routing.table import ROUTERS, Fixed

WORDS = [*PAIR, "--method", "at", "--router", "always", *TINY]


@pytest.mark.parametrize(
    ("losses", "told"),
    [
        (
            lambda weight: weight.sum(),
            "AT.forward: what it returns, a loss per spot [spots], must be a floating tensor",
        ),
        (lambda weight: weight.sum(), "of shape [3], not torch.float32 of shape []"),
        (lambda weight: weight.sum(1) > 0, "of shape [3], not torch.bool of shape [3]"),
        (lambda weight: [*weight], "of shape [3], not a list"),
    ],
)
def test_a_distiller_returns_a_loss_per_spot(cli: CliRunner, pretrained: Any, losses: Any, told: str) -> None:
    def forward(self: AT, student: Any, teacher: Any, weight: torch.Tensor, batch: Any) -> Any:
        return losses(weight)

    with mock.patch.object(AT, "forward", forward):
        cli.assert_rejects([*WORDS, "--dry-run"], 2, told)


@pytest.mark.parametrize(
    ("decision", "told"),
    [
        (lambda n: torch.ones(4, n), "Fixed.forward: must return a Decision, not a Tensor"),
        (
            lambda n: Decision(torch.ones(n, 4)),
            "Fixed.forward: the weight of its Decision [spots, N] must be a floating",
        ),
        (lambda n: Decision(torch.ones(4, n) > 0), "of shape [4, 64], not torch.bool of shape [4, 64]"),
        (lambda n: Decision(5 * torch.ones(4, n)), "the router gives weights outside of [0, 1]"),
    ],
)
def test_a_router_returns_a_weight_per_spot_and_sample(
    cli: CliRunner, pretrained: Any, decision: Any, told: str
) -> None:
    def forward(self: Fixed, teacher: torch.Tensor, student: torch.Tensor, noise: torch.Tensor) -> Any:
        return decision(len(student))

    with mock.patch.object(Fixed, "forward", forward):
        cli.assert_rejects([*WORDS, "--dry-run"], 2, told)
        if "outside" in told:
            assert told in cli.sakd(*WORDS, "-q").err


def test_the_student_s_side_is_tried_before_its_teacher_is_trained(cli: CliRunner) -> None:
    with mock.patch.object(Fixed, "forward", return_value=Decision(5 * torch.ones(4, 64))):
        cli.assert_rejects([*WORDS, "--pretrain", "-q", "--runs-dir", "none"], 2, "outside of [0, 1]")


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("sakd_cli.distillers.maps.attention", r"AT \(maps.py, line \d+\): ValueError: no such map"),
        ("sakd_cli.routing.table.Decision", r"Fixed \(table.py, line \d+\): ValueError: no such map"),
    ],
)
def test_an_error_of_their_own_code_is_shown_with_its_line(
    cli: CliRunner, pretrained: Any, name: str, told: str
) -> None:
    with mock.patch(name, side_effect=ValueError("no such\nmap")):
        result = cli.assert_rejects([*WORDS, "--dry-run"], 2, "ValueError")
    assert re.search(told, result.err)


@pytest.mark.parametrize(
    ("table", "name", "told"),
    [
        (DISTILLERS.own, "at", "method 'at' has settings but no row in sakd_cli/distillers/table.py"),
        (ROUTERS.own, "always", "router 'always' has settings but no row in sakd_cli/routing/table.py"),
        (DATASETS.own, "shapes", "data set 'shapes' has settings but no row in sakd_cli/data/table.py"),
    ],
)
def test_settings_without_a_row_say_which_table_lacks_it(
    cli: CliRunner, pretrained: Any, table: Any, name: str, told: str
) -> None:
    rest = {other: row for other, row in table.items() if other != name}
    with mock.patch.dict(table, rest, clear=True):
        assert "sakd guide extending" in cli.assert_rejects([*WORDS, "--dry-run"], 2, told).err
