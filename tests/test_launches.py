"""How many launches a training step needs, counted: the bar of the project, without a clock (`launches.py`)."""

from functools import cache

import pytest
import torch
from launches import Launch, Launches, launches, setup_of

BAR = 560  # of a whole step in bf16, wrn40_2 to wrn16_2, fitnet, fixed shapes: guard, meter and recorder inside
MOST = {"bf16": 636, "fp32": 606}  # with the teacher's plain pass in every step, what it is now; more is a loss
AHEAD = 8  # as by default on CUDA


@cache
def of_a_step(precision: str) -> list[Launch]:
    return [one for one in launches(setup_of(precision=precision)) if one.part != "loader"]


@pytest.mark.parametrize("precision", MOST)
def test_launches_of_a_step(precision: str) -> None:
    assert len(of_a_step(precision)) <= MOST[precision]


def test_launches_of_a_step_as_it_is_by_default_on_a_gpu() -> None:
    """The teacher's plain pass is one for eight steps: counted over eight of them."""
    setup = setup_of(batch=2)._replace(images=3 * AHEAD * 2)
    seen = [one for one in launches(setup, AHEAD) if one.part != "loader"]
    assert 100 < len([one for one in seen if one.part == "teacher"]) < 200, "the pass is in it, once"
    assert len(seen) / AHEAD <= BAR


def test_every_part_of_the_loop_is_counted() -> None:
    parts = {one.part for one in of_a_step("bf16")}
    assert {"guard", "recorder", "optimizer", "router and graft", "distillers", "teacher", "networks"} <= parts
    assert not [one for one in of_a_step("bf16") if one.place == "?"]


def test_a_launch_is_no_view_and_belongs_to_the_line_behind_it() -> None:
    x = torch.randn(3, 4, requires_grad=True)
    with torch.autograd.set_detect_anomaly(True, check_nan=False), Launches() as seen:
        (x.t().reshape(-1).exp().sum() * 2.0).backward()
    forward = [one.name for one in seen.seen if not one.backward]
    assert forward == ["clone", "exp", "sum", "mul", "ones_like"]
    assert {one.name for one in seen.seen if one.backward} >= {"mul"}
