"""What is done for all layers at once: the bits of autocast and BatchNorm's own counts, and only within a step."""

import copy
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from emulator import Called
from launches import Launches
from test_replay import OTHERS, SIZE, differing, memory, trained
from test_runtime import batch, make, optimizer
from torch import Tensor, nn

from sakd_cli.engine.foreach import ConvertedWeights, CountedBatches
from sakd_cli.engine.runtime import Mode


def steps(method: str, **runtime: Any) -> dict[str, Tensor]:
    task = make(method, precision="bf16", **runtime)
    optim = optimizer(task)
    for seed in range(3):
        optim.step(task(batch(task, seed=seed)).loss)
    return {**task.state_dict(), **optim.tensors()}


@pytest.mark.parametrize(
    ("method", "shapes"),
    [("fitnet", "static"), ("fitnet", "dynamic"), ("vid", "dynamic"), ("simkd", "static"), ("ofd", "dynamic")],
)
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


@pytest.mark.parametrize("name", [name for name in OTHERS if "search" not in name])
def test_what_is_trained_before_a_distillation_has_the_bits_of_layer_by_layer(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, _ = trained(OTHERS[name](), tmp_path / "ours", Called(), SIZE)
    monkeypatch.setattr("sakd_cli.tasks.pretrain.ConvertedWeights", lambda *given: nullcontext)
    monkeypatch.setattr("sakd_cli.tasks.pretrain.CountedBatches", lambda *given: nullcontext)
    theirs, _ = trained(OTHERS[name](), tmp_path / "theirs", Called(), SIZE)
    assert not differing(memory(ours), memory(theirs))


def test_a_batchnorm_counts_as_torchs_own_do() -> None:
    """Not one that is frozen; one without momentum, which reads its count, for itself; none where a pass fails."""
    norms = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3, momentum=None), nn.BatchNorm2d(3))
    norms[2].eval()
    theirs, x, counted = copy.deepcopy(norms), torch.randn(4, 3, 2, 2), CountedBatches([norms])
    for _ in range(3):
        with counted(), Launches() as seen:
            norms(x)
        theirs(x)
    assert sum(one.name == "add_" for one in seen.seen) == 1, "that of the second, by itself"
    assert all(torch.equal(norms.state_dict()[name], tensor) for name, tensor in theirs.state_dict().items())
    assert [int(norm.num_batches_tracked) for norm in norms] == [3, 3, 0]
    with pytest.raises(ZeroDivisionError), counted():
        raise ZeroDivisionError
    assert [int(norm.num_batches_tracked) for norm in norms] == [3, 3, 0]


@pytest.mark.parametrize("method", ["ab", "ft"])
def test_a_warm_up_translates_in_the_number_type_of_the_networks(method: str, tmp_path: Path) -> None:
    task, seen = OTHERS[f"warm-up of {method}"](), set[torch.dtype]()
    for layer in task.warmup.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            layer.register_forward_hook(lambda module, x, y: seen.add(y.dtype))
    trained(task, tmp_path / "run", Called(), SIZE)
    assert seen <= {torch.bfloat16}
    assert bool(seen) == (method == "ft"), "the maps of ab's networks have one shape and pass no connector"
    assert all(p.dtype == torch.float32 for p in task.warmup.parameters())


class InFp32(nn.Module):
    """A layer that somebody keeps out of autocast."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return self.fc(x.float())


def test_layers_that_their_owner_keeps_out_of_autocast_stay_as_they_are() -> None:
    network, x = nn.Sequential(nn.Linear(3, 3), InFp32()), torch.randn(2, 3)
    mode = Mode(autocast_dtype=torch.bfloat16)
    with mode.networks(x.device):
        expected = network(x)
        assert torch.equal(mode.frozen(network)(x), expected)
        with ConvertedWeights([network], [], torch.bfloat16)():
            assert network[0].weight.dtype == torch.bfloat16
            assert torch.equal(network(x), expected)
