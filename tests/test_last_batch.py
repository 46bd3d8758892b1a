"""A single image that an epoch has left over joins the batch before, for every network; nothing else changes."""

import pytest
import torch
from conftest import CliRunner

from sakd_cli import distributed
from sakd_cli.config.effective import steps_per_epoch
from sakd_cli.config.networks import NETWORKS
from sakd_cli.data.loader import step_slices
from sakd_cli.models.table import create

FAMILIES = {network.family: network.name for network in reversed(NETWORKS.values())}
LIBRARIES = ["torchvision/resnet18", "torchvision/mobilenet_v3_small", "torchvision/efficientnet_b0"]
LIBRARIES += ["torchvision/regnet_y_400mf", "timm/mobilenetv3_small_050", "timm/resnet10t", "timm/lcnet_050"]


@pytest.mark.parametrize(
    ("samples", "sizes"),
    [(1, [1]), (2, [2]), (4, [4]), (5, [5]), (6, [4, 2]), (8, [4, 4]), (9, [4, 5]), (10, [4, 4, 2]), (13, [4, 4, 5])],
)
def test_a_single_image_joins_the_batch_before_it(samples: int, sizes: list[int]) -> None:
    steps = list(step_slices(samples, 4, 0))
    assert [step.global_size for step in steps] == sizes
    assert [place for step in steps for place in range(samples)[step.rows]] == list(range(samples))
    assert len(steps) == steps_per_epoch(samples, 4)
    assert list(step_slices(samples, 4, len(steps) - 1)) == steps[-1:], "an epoch that is resumed at its last step"
    assert steps_per_epoch(samples, 1) == samples


@pytest.mark.parametrize("batch_size", [1, 2, 7, 64])
def test_all_other_epochs_have_the_published_steps(batch_size: int) -> None:
    for samples in range(1, 300):
        expected = -(-samples // batch_size) - (batch_size > 1 and samples > batch_size and samples % batch_size == 1)
        assert steps_per_epoch(samples, batch_size) == expected


@pytest.mark.parametrize("processes", [2, 3, 4, 8])
def test_no_process_gets_a_single_row(processes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "world_size", lambda: processes)
    for size in range(2, 40):
        sizes = distributed.shard_sizes(size)
        assert (sum(sizes), len(sizes)) == (size, processes)
        assert min(part for part in sizes if part) > 1
        if size >= 2 * processes:
            assert max(sizes) - min(sizes) <= 1
        for place in range(processes):
            monkeypatch.setattr(distributed, "rank", lambda place=place: place)
            assert len(range(size)[distributed.shard_rows(size)]) >= 2


@pytest.mark.parametrize("name", [*FAMILIES.values(), *LIBRARIES])
@torch.no_grad()
def test_every_network_trains_on_every_batch_of_such_an_epoch(name: str) -> None:
    """It is the forward pass that BatchNorm refuses."""
    network = create(name, 3, 32).train()
    for step in step_slices(5, 2, 0):
        network(torch.randn(step.global_size, 3, 32, 32))


def test_such_an_epoch_ends(cli: CliRunner) -> None:
    settings = "--dataset shapes --set data.train=23 --set data.test=20 --validation 0 --batch-size 11 --epochs 1"
    result = cli.sakd("pretrain-teacher", "torchvision/mobilenet_v3_small", *settings.split(), "--run-dir", "run", "-q")
    assert result.code == 0, result.err
    assert (cli.path / "run" / "config.yaml").read_text().count("steps_per_epoch: 2") == 1
