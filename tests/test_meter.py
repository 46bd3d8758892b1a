"""What a log line says: means over the steps since the last one, and the share of right answers."""

import pytest
import torch

from sakd_cli.engine.recorder import Meter, Rows, top1


def test_the_meter_counts_every_batch_with_its_size() -> None:
    meter = Meter()
    assert meter.read() == {}
    meter.add(3, {"loss": torch.tensor(1.0), "top1": torch.tensor(50.0)})
    meter.add(1, {"loss": torch.tensor(5.0), "top1": torch.tensor(10.0)})
    assert meter.read() == {"loss": 2.0, "top1": 40.0}
    meter.add(2, {"loss": torch.tensor(7.0)})
    assert meter.read() == {"loss": 7.0}, "a read starts anew"


def test_a_mean_is_of_all_steps_that_had_it_and_is_saved_in_between() -> None:
    """With router.update_every, steps have two sets of names."""
    meter, resumed = Meter(), Meter()
    meter.add(3, {"loss": torch.tensor(1.0), "router": torch.tensor(2.0)})
    meter.add(1, {"loss": torch.tensor(5.0)})
    resumed.load(*meter.state())
    for one in (meter, resumed):
        one.add(4, {"loss": torch.tensor(4.0)})
        assert one.read() == {"loss": 3.0, "router": 2.0}
    with pytest.raises(ValueError, match="belong together"):
        resumed.load({"0": torch.zeros(3)}, [["loss"]])


def test_the_share_of_right_answers_is_in_percent() -> None:
    assert top1(torch.tensor([[1.0, 2.0], [3.0, 0.0]]), Rows(torch.tensor([1, 1]), torch.arange(2))).item() == 50.0
