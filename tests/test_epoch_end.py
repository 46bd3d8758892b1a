"""What is written at the ends of epochs, where these are too short for all of it."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from test_engine import CLASSES, CPU, DATASET, FileDelivery, PlainTask, trainer_of
from torch import Tensor, nn

from sakd_cli.data.dataset import Split
from sakd_cli.data.loader import EvalLoader
from sakd_cli.engine import checkpoint
from sakd_cli.engine.reporter import NullReporter
from sakd_cli.engine.trainer import EvaluationData, TrainingOutput
from sakd_cli.errors import Stopped
from sakd_cli.rundir import RunDir


def test_no_checkpoint_is_written_before_it_is_time_and_a_run_goes_on_from_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of the best epoch but its network is ever read."""
    folder, seen = tmp_path / "run" / "checkpoints", []

    class Looks(FileDelivery):
        def publish(self, run: RunDir, weights: bytes, facts: dict[str, Any]) -> None:
            seen.append(checkpoint.read(folder / "last").state["epoch"])

    whole = trainer_of(PlainTask(), tmp_path / "whole", 7)
    whole.fit()
    monkeypatch.setattr("sakd_cli.engine.trainer.SAVING", 1e-9)
    for epochs, written, save_every in ((4, [1, 4, 4], None), (7, [5, 6, 7, 7], 99)):  # given, at every end too
        task = PlainTask()
        test = EvalLoader(DATASET.test, DATASET, device=CPU)
        output = TrainingOutput(EvaluationData("test", test, test, CLASSES), Looks(task.network))
        trainer = trainer_of(task, tmp_path / "run", epochs, output=output, save_every=save_every)
        if epochs == 7:
            trainer.resume(checkpoint.read(folder / "last"))
        trainer.fit()
        assert seen == written
        seen.clear()
    assert torch.equal(trainer.task.network[1].weight, whole.task.network[1].weight)
    assert not checkpoint.read(folder / "best").training


@pytest.mark.parametrize("stop_at", [None, 10])
def test_the_best_network_is_kept_until_there_is_time_to_write_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_at: int | None
) -> None:
    """Right in epoch 3 alone, whose end is not written; three steps an epoch."""
    monkeypatch.setattr("sakd_cli.engine.trainer.SAVING", 1e-9)
    evaluated = list[nn.Module]()

    class Says(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return nn.functional.one_hot(images.new_full((len(images),), len(evaluated) == 3).long(), CLASSES).float()

    def evaluation() -> EvaluationData:
        evaluated.clear()
        test = EvalLoader(Split(DATASET.test.images, torch.ones(12).long()), DATASET, device=CPU)
        return EvaluationData("test", test, test, CLASSES, wrap=lambda network: (evaluated.append(network), Says())[1])

    class StopsAt(NullReporter):
        def stop(self) -> int:
            return 15 * (trainer.step == stop_at)

    third, task = PlainTask(), PlainTask()
    trainer_of(third, tmp_path / "third", 3).fit()
    trainer = trainer_of(task, tmp_path / "run", 5, evaluation=evaluation(), reporter=StopsAt())
    with pytest.raises(Stopped) if stop_at else nullcontext():
        trainer.fit()
    saved = checkpoint.read(tmp_path / "run" / "checkpoints" / "best")
    assert saved.state["epoch"] == saved.state["best"]["epoch"] == 3
    assert saved.model is not None
    assert all(torch.equal(saved.model[name], value) for name, value in third.network.state_dict().items())
    assert checkpoint.read(tmp_path / "run" / "checkpoints" / "last").state["step"] == (stop_at or 15)
