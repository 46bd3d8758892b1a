"""A number that is not finite stops a run before it reaches the weights, and is named."""

from pathlib import Path

import pytest
import torch
from emulator import Emulator
from test_engine import CPU, PlainTask, trainer_of
from torch import Tensor

from sakd_cli.batch import Batch
from sakd_cli.engine.graphs import Capturer, Cuda, GraphedStep
from sakd_cli.engine.recorder import Guard
from sakd_cli.engine.task import StepOutput
from sakd_cli.errors import NonFiniteError

CASES = ["input", "logits", "kd", "total loss", "gradients"]


def step(spoilt: str, value: float = float("nan"), rows: int = 3) -> tuple[Batch, StepOutput, list[Tensor]]:
    """What a step gives; one number in its second row, if it has rows, is spoilt."""
    images, logits = torch.zeros(rows, 3, 2, 2), torch.zeros(rows, 4)
    parts, loss, gradients = (
        {"ce": torch.ones(()), "kd": torch.ones(())},
        torch.ones(()),
        [torch.ones(5), torch.ones(2)],
    )
    where = {"input": images[1], "logits": logits[1], "kd": parts["kd"], "total loss": loss, "gradients": gradients[1]}
    if spoilt:
        where[spoilt].view(-1)[-1] = value
    index = torch.tensor([40, 50, 60, 70])[:rows]
    return (
        Batch(images, torch.zeros(rows, dtype=torch.int64), index, images),
        StepOutput(loss, logits, parts),
        gradients,
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("spoilt", CASES)
def test_the_first_bad_term_its_step_and_its_images_are_named(spoilt: str, value: float) -> None:
    images = "50;" if spoilt in ("input", "logits") else "40, 50, 60;"
    guard = Guard(CPU)
    assert guard.inspect(*step("")) == 0
    with pytest.raises(NonFiniteError, match=f"step 2: {spoilt} is not finite, with training images {images}"):
        guard.inspect(*step(spoilt, value))


def test_where_reading_is_dear_the_flag_stays_up_and_the_first_step_is_remembered() -> None:
    guard = Guard(CPU)
    guard.every_step = False
    found = [guard.inspect(*step(spoilt, rows=rows)).item() for spoilt, rows in SEEN]
    assert found == [0, 1, 1, 1]
    with pytest.raises(NonFiniteError, match="step 2: kd is not finite, with training images 40, 50, 60;"):
        guard.check()


SEEN = [("", 2), ("kd", 3), ("input", 4), ("", 4)]


def test_replayed_steps_of_two_kinds_and_sizes_are_told_apart() -> None:
    """A captured step writes where it was captured, and does not say here which names its terms have."""
    guard = Guard(CPU)
    guard.every_step = False
    guard.inspect(*step(""))
    place = guard._first
    batch, output, gradients = step("", rows=4)  # an epoch's last batch is one image larger
    guard.inspect(batch, output._replace(parts=output.parts | {"router": torch.ones(())}), gradients)
    assert guard._first is place
    guard._first[: 2 + 6 + 3] = torch.tensor([0, 7, 0, 0, 0, 1, 0, 0, 40, -1, 60])  # as a replay of the first kind
    guard.found.fill_(1)
    with pytest.raises(NonFiniteError, match="step 7: kd is not finite, with training images 40, 60;"):
        guard.check()


def told_by_replays(device: torch.device, graphs: Capturer) -> str:
    """Of steps of two kinds, captured one after the other, a later one of the first kind is bad in its second image."""
    guard, routed = Guard(device), [False]
    guard.every_step = False

    def one(batch: Batch) -> None:
        total = batch.images.detach().sum()
        parts = {"ce": total} | ({"router": total} if routed[0] else {})
        guard.inspect(batch, StepOutput(total, None, parts), [])

    advance = GraphedStep(one, graphs, lambda: routed[0], pytest.fail)
    for routed[0], rows in ((False, 3), (True, 4)):
        for _ in range(5):
            advance(step("", rows=rows)[0].map(lambda x: x.to(device)))
    routed[0] = False
    advance(step("input")[0].map(lambda x: x.to(device)))
    with pytest.raises(NonFiniteError) as told:
        guard.check()
    return str(told.value)


def test_a_replayed_step_is_told_as_what_it_is() -> None:
    graphs = Emulator()
    told = told_by_replays(CPU, graphs)
    assert (len(graphs.tapes), graphs.replays) == (2, 3)
    assert told.startswith("step 11: input is not finite, with training images 50;")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here: no step is captured in truth")
def test_on_a_gpu_a_replayed_step_is_told_as_what_it_is() -> None:
    gpu = torch.device("cuda")
    assert told_by_replays(gpu, Cuda(gpu)).startswith("step 11: input is not finite, with training images 50;")


@pytest.mark.parametrize("when", ["first step", "later"])
def test_the_weights_are_those_of_the_step_before(tmp_path: Path, when: str) -> None:
    good, bad = PlainTask(), PlainTask(nan_in=(1,) if when == "first step" else (2,))
    if when == "later":
        trainer_of(good, tmp_path / "good", 1).fit()
    with pytest.raises(NonFiniteError):
        trainer_of(bad, tmp_path / "bad", 2).fit()
    assert torch.equal(good.network[1].weight, bad.network[1].weight)
