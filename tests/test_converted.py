"""Weights that are converted once a step: the bits of autocast, and nothing of them outside of a step."""

from typing import Any

import pytest
import torch
from test_runtime import batch, make, optimizer
from torch import Tensor

from sakd_cli.engine.runtime import ConvertedWeights


def steps(method: str, **runtime: Any) -> dict[str, Tensor]:
    task = make(method, precision="bf16", **runtime)
    optim = optimizer(task)
    for seed in range(3):
        optim.step(task(batch(task, seed=seed)).loss)
    return {**task.state_dict(), **optim.tensors()}


@pytest.mark.parametrize("method", ["fitnet", "vid", "simkd", "ofd"])
@pytest.mark.parametrize("shapes", ["static", "dynamic"])
def test_steps_are_those_of_autocast_bit_for_bit(method: str, shapes: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = steps(method, shapes=shapes)
    none = lambda trained, views, dtype: ConvertedWeights(trained, views, None)  # noqa: E731
    monkeypatch.setattr("sakd_cli.tasks.distill.ConvertedWeights", none)
    theirs = steps(method, shapes=shapes)
    assert ours.keys() == theirs.keys()
    assert not [name for name in ours if not torch.equal(ours[name], theirs[name])]


def test_outside_of_a_step_a_network_and_its_view_have_their_own_weights() -> None:
    task = make("fitnet", precision="bf16")
    view, seen = task.graft.run_student.__self__, set[torch.dtype]()
    for network in (task.network, view):
        network.stages[2][0].conv1.register_forward_hook(lambda layer, x, y: seen.add(layer.weight.dtype))
    before = dict(task.network.named_parameters())
    optimizer(task).step(task(batch(task)).loss)
    assert seen == {torch.bfloat16}
    after = dict(task.network.named_parameters())
    assert all(after[name] is before[name] for name in before)
    for ours, shared in zip(task.network.parameters(), view.parameters(), strict=True):
        assert ours.dtype == shared.dtype == torch.float32
        assert ours.data_ptr() == shared.data_ptr()
    with pytest.raises(ZeroDivisionError), task._converted():
        raise ZeroDivisionError
    assert {p.dtype for p in task.network.parameters()} == {torch.float32}
