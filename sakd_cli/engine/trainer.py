"""The one training loop. It knows a task, a loader, an optimizer, a run directory; no model, distiller or router."""

import copy
import math
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from safetensors.torch import save
from torch import Tensor

from sakd_cli.batch import Batch
from sakd_cli.engine import checkpoint
from sakd_cli.engine.evaluate import Scores, evaluate
from sakd_cli.engine.meters import Meter, top1
from sakd_cli.engine.optim import Optimizer
from sakd_cli.engine.recorder import SpotRecorder
from sakd_cli.engine.task import Task
from sakd_cli.engine.watch import Watcher
from sakd_cli.errors import NonFiniteError
from sakd_cli.rundir import RunDir, write_aside


class Loader(Protocol):
    """Batches of one epoch, from any step on."""

    steps_per_epoch: int

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]: ...


class Delivery(Protocol):
    """How the finished network is written: as one file for a checkpoint, as a folder for its users."""

    def save_weights(self, path: Path) -> None: ...

    def publish(self, run: RunDir, facts: dict[str, Any]) -> None: ...


class Judge(NamedTuple):
    """selection: batches that choose the best epoch, and their name; test: the batches of the headline."""

    selected_on: str
    selection: Iterable[tuple[Tensor, Tensor]]
    test: Iterable[tuple[Tensor, Tensor]]
    classes: int


class Outcome(NamedTuple):
    """What a run is for: who judges the network, and who writes it down."""

    judge: Judge
    delivery: Delivery


class Trainer:
    """Runs `task` for `epochs` epochs in a run directory.

    With an `outcome` every epoch ends with an evaluation and a checkpoint; without one (a stage that only prepares
    another) the trained task itself is all there is. `phase` is what its lines in `metrics.jsonl` are called.
    """

    def __init__(
        self,
        task: Task,
        loader: Loader,
        optimizer: Optimizer,
        run: RunDir,
        watcher: Watcher,
        *,
        epochs: int,
        log_every: int,
        outcome: Outcome | None = None,
        recorder: SpotRecorder | None = None,
        phase: str = "train",
    ) -> None:
        self.task, self.loader, self.optimizer = task, loader, optimizer
        self.run, self.watcher, self.outcome, self.recorder = run, watcher, outcome, recorder
        self.epochs, self.log_every, self.phase = epochs, log_every, phase
        self.epoch = 0  # finished epochs
        self.best: dict[str, Any] = {}
        self.meter = Meter()
        self.seconds = {"train": 0.0, "evaluate": 0.0, "save": 0.0}

    def fit(self) -> dict[str, Any]:
        """Train to the end; returns how the time was spent and, with an outcome, the figures of last and best epoch."""
        started = time.perf_counter()
        figures: dict[str, Any] = {}
        self.watcher.begin(f"{self.phase}: {self.run.path.name}", self.epochs * self.loader.steps_per_epoch)
        try:
            for epoch in range(self.epoch + 1, self.epochs + 1):
                with self._timed("train"):
                    self._train_epoch(epoch)
                self.epoch = epoch
                if self.outcome is not None:
                    with self._timed("evaluate"):
                        self._judge_epoch(epoch, self.outcome.judge)
                    with self._timed("save"):
                        self._save(self.outcome.delivery)
            if self.outcome is not None:
                with self._timed("evaluate"):
                    figures = self._final_figures(self.outcome)
        finally:
            self.watcher.end()
        total = time.perf_counter() - started
        phases = {name: seconds / total for name, seconds in self.seconds.items()}
        return figures | {"seconds": total, "phases": phases | {"other": max(0.0, 1.0 - sum(phases.values()))}}

    def _train_epoch(self, epoch: int) -> None:
        self.task.train()
        self.task.begin_epoch(epoch)
        self.optimizer.begin_epoch(epoch)
        first = (epoch - 1) * self.loader.steps_per_epoch
        for step, batch in enumerate(self.loader.epoch(epoch), start=first + 1):
            output = self.task(batch)
            self.optimizer.step(output.loss)
            right = {} if output.logits is None else {"top1": top1(output.logits, batch.labels)}
            self.meter.add(len(batch.labels), output.parts | right)
            if self.recorder is not None and output.use is not None:
                self.recorder.add(output.use, batch)
            if step % self.log_every == 0:
                self._log(epoch, step)
            self.watcher.advance(step)
        self._log(epoch, first + self.loader.steps_per_epoch)
        if self.recorder is not None:
            self.run.append("spots.jsonl", self.recorder.close_epoch(epoch))

    def _log(self, epoch: int, step: int) -> None:
        means = self.meter.read()
        if not means:
            return
        _must_be_finite(means, f"epoch {epoch}, between steps {max(0, step - self.log_every) + 1} and {step}")
        rate = self.optimizer.sgd.param_groups[0]["lr"]
        self._tell({"kind": self.phase, "epoch": epoch, "step": step, "lr": rate} | means)

    def _judge_epoch(self, epoch: int, judge: Judge) -> None:
        scores = evaluate(self.task.network, judge.selection, judge.classes)
        _must_be_finite(scores.headline(), f"the evaluation of epoch {epoch}")
        self._tell({"kind": "eval", "epoch": epoch, "split": judge.selected_on} | scores.headline())
        if not self.best or scores.top1 > self.best["selection_top1"]:
            self.best = {"epoch": epoch, "selected_on": judge.selected_on, "selection_top1": scores.top1}

    def _save(self, delivery: Delivery) -> None:
        folder = self.run.path / "checkpoints"
        state = {"epoch": self.epoch, "step": self.epoch * self.loader.steps_per_epoch, "best": self.best}
        checkpoint.write(folder / "last", delivery.save_weights, self._training_tensors(), state, keep=True)
        if self.best["epoch"] == self.epoch:
            checkpoint.write(folder / "best", delivery.save_weights, self._training_tensors(), state, keep=False)
        if self.recorder is not None:
            record = {name: tensor.cpu() for name, tensor in self.recorder.tensors().items()}
            record["index"] = self.recorder.origin
            write_aside(self.run.path / "samples.safetensors", save(record))
        delivery.publish(self.run, {"epoch": self.epoch})

    def _training_tensors(self) -> dict[str, Tensor]:
        state = self.task.state_dict().items()
        tensors = {f"task/{name}": tensor for name, tensor in state if not name.startswith("network.")}
        tensors |= {f"momentum/{name}": tensor for name, tensor in self.optimizer.tensors().items()}
        if self.recorder is not None:
            tensors |= {f"samples/{name}": tensor for name, tensor in self.recorder.tensors().items()}
        return tensors | checkpoint.random_state()

    def resume(self, folder: Path) -> None:
        """Go on from a checkpoint of the same run: network, task, momentum, record, random state and position."""
        loaded = checkpoint.read(folder)
        self.task.network.load_state_dict(loaded.model)
        parts = {kind: _below(loaded.training, kind) for kind in ("task", "momentum", "samples")}
        self.task.load_state_dict(parts["task"], strict=False)
        self.optimizer.load_tensors(parts["momentum"])
        if self.recorder is not None:
            self.recorder.load_tensors(parts["samples"])
        self.epoch, self.best = loaded.state["epoch"], loaded.state["best"]
        checkpoint.restore_random_state(loaded.training)

    def _final_figures(self, outcome: Outcome) -> dict[str, Any]:
        last = evaluate(self.task.network, outcome.judge.test, outcome.judge.classes)
        best = last if self.best["epoch"] == self.epochs else self._best_scores(outcome.judge)
        outcome.delivery.publish(self.run, {"epoch": self.epochs} | last.headline())
        return {
            "headline": {"epoch": self.epochs, "split": "test"} | last.headline(),
            "best": {"epoch": self.best["epoch"], "selected_on": self.best["selected_on"]} | best.headline(),
        }

    def _best_scores(self, judge: Judge) -> Scores:
        network = copy.deepcopy(self.task.network)
        network.load_state_dict(checkpoint.read(self.run.path / "checkpoints" / "best").model)
        return evaluate(network, judge.test, judge.classes)

    def _tell(self, record: dict[str, Any]) -> None:
        self.run.append("metrics.jsonl", record)
        self.watcher.record(record)

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds[phase] += time.perf_counter() - started


def _must_be_finite(means: dict[str, Any], where: str) -> None:
    for name, value in means.items():
        if not math.isfinite(value):
            raise NonFiniteError(
                f"{name} is {value} in {where}",
                hint="a lower learning rate may help: --set train.lr=...",
            )


def _below(tensors: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
    return {name.removeprefix(f"{kind}/"): tensor for name, tensor in tensors.items() if name.startswith(f"{kind}/")}
