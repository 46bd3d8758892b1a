"""Networks without numbers, on the meta device, for tests that look at shapes and names alone."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sakd_cli.models.staged import StagedModel
from sakd_cli.models.table import create

FILLS = ("kaiming_uniform_", "kaiming_normal_", "uniform_", "normal_", "constant_", "ones_", "zeros_")


@contextmanager
def without_numbers() -> Iterator[None]:
    """Meanwhile nothing is drawn on the meta device, and a BatchNorm an addition: else they are most of the time."""
    norm = F.batch_norm

    def added(x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, *rest: Any) -> Tensor:
        return x + (weight + bias)[:, None, None] if x.is_meta else norm(x, mean, var, weight, bias, *rest)

    def unless_meta(fill: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda tensor, *rest, **more: tensor if tensor.is_meta else fill(tensor, *rest, **more)

    with ExitStack() as patches:
        patches.enter_context(mock.patch.object(F, "batch_norm", added))
        for name in FILLS:
            patches.enter_context(mock.patch.object(nn.init, name, unless_meta(getattr(nn.init, name))))
        yield


@cache
def ghost(name: str, classes: int = 100) -> StagedModel:
    with without_numbers(), torch.device("meta"):
        return create(name, classes)
