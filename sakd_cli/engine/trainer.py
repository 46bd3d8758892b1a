"""The one training loop. It knows a task, a loader, an optimizer, a run directory; no model, distiller or router."""

import copy
import math
import time
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import islice
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from sakd_cli import distributed
from sakd_cli.batch import Loader
from sakd_cli.engine import checkpoint
from sakd_cli.engine.checkpoint import Checkpoint
from sakd_cli.engine.control import ESTIMATED, Control
from sakd_cli.engine.evaluate import Batches, Scores, evaluate
from sakd_cli.engine.graphs import Capturer, GraphedStep
from sakd_cli.engine.optim import BilevelOptimizer, Optimizer
from sakd_cli.engine.recorder import LOWER, SpotRecorder
from sakd_cli.engine.reporter import Reporter
from sakd_cli.engine.runtime import full_fp32
from sakd_cli.engine.step import TrainStep
from sakd_cli.engine.task import Task
from sakd_cli.errors import CheckpointError, NonFiniteError, Stopped, one_line
from sakd_cli.rundir import RunDir
from sakd_cli.writing import write_aside

MAIN = "train"  # the phase that a run is for
SAVING = 0.01  # of the time, at most, goes into what is written at the ends of epochs


class ModelWriter(Protocol):
    """How the delivered network is written: `weights` makes its file, `publish` the folder for its users around it."""

    def weights(self) -> bytes: ...

    def publish(self, run: RunDir, weights: bytes, facts: dict[str, Any]) -> None: ...


class EvaluationData(NamedTuple):
    """Batches that choose the best epoch, with their name, and those of the reported result.

    wrap      the network that is evaluated, given the task's; None: that itself
    networks  the context in which it is run to choose the best epoch; the reported result is in fp32
    """

    selected_on: str
    validation: Batches
    test: Batches
    classes: int
    wrap: Callable[[nn.Module], nn.Module] | None = None
    networks: Callable[[], AbstractContextManager[Any]] = nullcontext


class TrainingOutput(NamedTuple):
    """What a run is for: what evaluates the network, and what writes it."""

    evaluation: EvaluationData
    writer: ModelWriter


class Trainer:
    """Runs `task` for `epochs` epochs in a run directory; killed at any instant, another resumes to the same bits.

    With an `output` every epoch ends with an evaluation; without one (a stage that only prepares another) the trained
    task itself is all there is. A checkpoint is written after every epoch (of short ones not after each), every
    `save_every` steps, and when the reporter asks the run to stop. `phase` is what its lines in `metrics.jsonl` and its
    checkpoints are called; any but the main one has its spots in `spots-PHASE.jsonl` and `samples-PHASE.safetensors`.
    With `graphs` its steps are captured there and replayed. What is delivered, and evaluated, may be other weights than
    those that are trained (`control`), which are then evaluated beside.
    """

    def __init__(
        self,
        task: Task,
        loader: Loader,
        optimizer: Optimizer | BilevelOptimizer,
        run: RunDir,
        reporter: Reporter,
        *,
        epochs: int,
        log_every: int,
        save_every: int | None = None,
        output: TrainingOutput | None = None,
        recorder: SpotRecorder | None = None,
        phase: str = MAIN,
        graphs: Capturer | None = None,
        control: Control | None = None,
    ) -> None:
        self.task, self.loader, self.optimizer = task, loader, optimizer
        self.run, self.reporter, self.output, self.recorder = run, reporter, output, recorder
        self.epochs, self.log_every, self.save_every, self.phase = epochs, log_every, save_every, phase
        self.folder = run.path / "checkpoints" / ("" if phase == MAIN else phase)
        self.suffix = "" if phase == MAIN else f"-{phase}"
        self.steps = epochs * loader.steps_per_epoch
        self.step = 0  # steps done
        self.epoch = 0  # epochs done: trained, evaluated, recorded
        self.best: dict[str, Any] = {}
        self.device = next(task.parameters()).device
        self.control = control or Control()
        step = TrainStep(task, optimizer, recorder, self.control.delivered)
        self.meter, self.guard = step.meter, step.guard
        self._stop_signal = distributed.AsyncMax()
        self._advance = step if graphs is None else GraphedStep(step, graphs, self._constants, self._refuse_graph)
        if not optimizer.capturable:
            self.guard.every_step = True
            if graphs is not None:
                self._refuse_graph("its optimizer counts on the host")
                self._advance = step
        self.seconds = {"train": 0.0, "evaluate": 0.0, "save": 0.0, "other": 0.0}
        self._timing, self._since = "other", 0.0
        self._last_save = -math.inf, 0.0  # when it ended, and seconds that it took
        self._best: tuple[bytes | None, dict[str, Any]] | None = None  # network and figures not yet written

    def _constants(self) -> Hashable:
        frozen = self.control.frozen
        return self.optimizer.constants(), self.task.constants, frozen is not None and frozen.holds

    def fit(self) -> dict[str, Any]:
        """Train to the end; returns the time spent and, with an output, metrics of last and best epoch; or Stopped."""
        figures: dict[str, Any] = {}
        self.reporter.begin(f"{self.phase}: {self.run.path.name}", self.steps, self.step)
        self._since = time.perf_counter()
        try:
            while not self.done:
                self._one_epoch(self.epoch + 1)
            if self.output is not None:
                figures = self._final_metrics(self.output)
                if self.control.delivered is not None:
                    self.control.delivered.swap()  # for whatever comes after the training
        except Stopped as stopped:
            self._save()
            raise Stopped(stopped.signal, f"step {self.step} of {self.steps} is saved") from None
        finally:
            self.reporter.end()
        self._switch("other")
        total = sum(self.seconds.values())
        return figures | {"seconds": total, "phases": {name: part / total for name, part in self.seconds.items()}}

    def _one_epoch(self, epoch: int) -> None:
        with self._timed("train"):
            self._train(epoch)
        if self.output is not None:
            with self._timed("evaluate"):
                self._evaluate_epoch(epoch, self.output.evaluation)
        if self.recorder is not None:
            record = self.recorder.close_epoch(epoch)
            self.run.append(f"spots{self.suffix}.jsonl", record.plain())
            self.reporter.spots([spot.fraction for spot in record.spots])
        self.epoch = epoch
        self._save(at_leisure=True)

    def _train(self, epoch: int) -> None:
        self.task.train()
        if self.control.frozen is not None:
            self.control.frozen.begin_epoch(epoch)
        self.task.begin_epoch(epoch)
        first = (epoch - 1) * self.loader.steps_per_epoch
        last = first + self.loader.steps_per_epoch
        for place, batch in enumerate(self.loader.epoch(epoch, start=self.step - first)):
            if not place:
                self.reporter.plan(self.epochs, len(batch.index) * distributed.world_size())
            if signal := self._stop_signal(self.reporter.stop()):
                raise Stopped(signal)
            self.task.begin_step(self.step)
            self.optimizer.begin_step(self.step, self.loader.steps_per_epoch)
            self._advance(batch)
            self.step += 1
            if self.step % self.log_every == 0 or self.step == last:
                self.guard.check()
                means, record = self.meter.read(), {"kind": self.phase, "epoch": epoch, "step": self.step}
                self._log_record(record | {"lr": self.optimizer.rates[0]} | means)
            self.reporter.advance(self.step)
            if self.save_every and self.step % self.save_every == 0 and self.step != last:
                self._save()

    def _refuse_graph(self, reason: str) -> None:
        self.reporter.warn(f"runtime.graph: a step of {self.phase} cannot be captured ({reason}); it is called instead")

    def _evaluate_epoch(self, epoch: int, evaluation: EvaluationData) -> None:
        record = {"phase": self.phase, "epoch": epoch, "split": evaluation.selected_on}
        with evaluation.networks():
            if (delivered := self.control.delivered) is not None:
                beside = self._evaluate(self.task.network, evaluation, evaluation.validation)
                self._log_record({"kind": "eval-trained"} | record | beside.metrics())
                loader = getattr(self.loader, "loader", self.loader)  # nobody need look ahead for a few images
                delivered.estimate(batch.images for batch in islice(loader.epoch(1), ESTIMATED))
            with self._delivered():
                scores = self._evaluate(self.task.network, evaluation, evaluation.validation)
        metric, value = self.control.metric, scores.value(self.control.metric)
        chosen_by = {} if metric == "top1" else {metric: abs(value)}
        self._log_record({"kind": "eval"} | record | scores.metrics() | chosen_by)
        if not self.best or value > self.best["value"]:
            self.best = {"epoch": epoch, "selected_on": evaluation.selected_on, "metric": metric, "value": value}

    def _delivered(self) -> AbstractContextManager[None]:
        return nullcontext() if self.control.delivered is None else self.control.delivered.in_place()

    def _evaluate(self, network: nn.Module, evaluation: EvaluationData, batches: Batches) -> Scores:
        evaluated = network if evaluation.wrap is None else evaluation.wrap(network)
        try:
            return evaluate(evaluated, batches, evaluation.classes, together=True)
        except NonFiniteError as error:
            epoch = self.step // self.loader.steps_per_epoch
            raise NonFiniteError(f"in the evaluation of epoch {epoch}, {error.message}", LOWER) from None

    def _weights(self) -> bytes | None:
        """The file of the delivered network, made once for all who write it; None where this process delivers none."""
        if self.output is None or not distributed.is_main_process():
            return None
        with self._timed("save"), self._delivered():
            return self.output.writer.weights()

    def _save(self, *, at_leisure: bool = False) -> None:
        """Write where a resumed run goes on; at leisure, at an epoch's end, only where it is time for that again."""
        self.guard.check()
        others = checkpoint.random_state_of_others()
        if distributed.is_main_process():
            with self._timed("save"):
                begin, (since, took) = time.perf_counter(), self._last_save
                due = not at_leisure or self.done or begin - since >= took / SAVING or self.save_every is not None
                # At its end only: a step later these are no longer the weights that were evaluated.
                ended = self.step == self.epoch * self.loader.steps_per_epoch > 0
                if (better := ended and self.best.get("epoch") == self.epoch) or due:
                    weights, state = self._weights(), self._state()
                    self._best = (weights, state) if better else self._best
                    if due:
                        self._write(weights, state, self._tensors() | others)
                        if at_leisure:
                            self._publish(weights, {"epoch": self.epoch})
                        self._last_save = (end := time.perf_counter()), end - begin
        distributed.barrier()

    def _state(self) -> dict[str, Any]:
        return {
            "run": self.run.identity,
            "fingerprint": self.run.fingerprint,
            "phase": self.phase,
            "epoch": self.epoch,
            "step": self.step,
            "best": self.best,
            "meter": self.meter.state()[1],
            "seconds": dict(self.seconds),
        }

    def _write(self, weights: bytes | None, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """The best epoch's network, where a new one was found since, and the last checkpoint."""
        logs = self.run.log_ends()
        state = state | {
            "logs": {name: end.bytes for name, end in logs.items()},
            "log_sha256": {name: end.sha256 for name, end in logs.items()},
        }
        # All before `last`: a process that dies in between does the epochs since the one before again, and this again.
        if self.recorder is not None:
            write_aside(self.run.path / f"samples{self.suffix}.safetensors", self.recorder.file())
        if self._best is not None:
            checkpoint.write(self.folder / "best", self._best[0], {}, self._best[1], keep=False)
            self._best = None
        checkpoint.write(self.folder / "last", weights, tensors, state, keep=True)

    def _tensors(self) -> dict[str, Tensor]:
        """All that a step depends on or changes, but for the delivered network, which has its own file."""
        own = "network." if self.output is not None else None
        state = self.task.state_dict().items()
        tensors = {f"task/{name}": tensor for name, tensor in state if own is None or not name.startswith(own)}
        if (delivered := self.control.delivered) is not None:
            tensors |= {f"trained/{name}": tensor.clone() for name, tensor in delivered.tensors().items()}
        tensors |= {f"momentum/{name}": tensor for name, tensor in self.optimizer.tensors().items()}
        tensors |= {f"meter/{name}": tensor for name, tensor in self.meter.state()[0].items()}
        if self.recorder is not None:
            tensors |= {f"samples/{name}": tensor for name, tensor in self.recorder.tensors().items()}
        return tensors | checkpoint.random_state()

    def resume(self, loaded: Checkpoint) -> None:
        """Go on from a checkpoint of the same run. Raises CheckpointError where it is that of another one."""
        kinds = ("task", "momentum", "meter", "samples", "trained")
        saved = loaded.training.items()
        parts = {kind: {k.removeprefix(f"{kind}/"): v for k, v in saved if k.startswith(f"{kind}/")} for kind in kinds}
        state, delivered = loaded.state, self.control.delivered
        trained = (parts["trained"] if delivered else loaded.model) or {}
        network = {f"network.{name}": tensor for name, tensor in trained.items()}
        try:
            if delivered is not None:
                delivered.load(loaded.model or {})
            self.task.load_state_dict(parts["task"] | network)
            self.optimizer.load_tensors(parts["momentum"])
            if self.recorder is not None:
                self.recorder.load_tensors(parts["samples"])
            self.meter.load({k: sums.to(self.device) for k, sums in parts["meter"].items()}, state["meter"])
            self.epoch, self.step, self.best = int(state["epoch"]), int(state["step"]), dict(state["best"])
            self.seconds = dict(state["seconds"])
            self.guard.go_on(self.step)
            checkpoint.restore_random_state(loaded.training)
        except (RuntimeError, KeyError, ValueError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{loaded.folder}: is not of this run ({one_line(error, 120)})") from None
        try:
            if self.best and checkpoint.read(self.folder / "best").state.get("run") != self.run.identity:
                raise CheckpointError(f"{self.folder / 'best'}: is of another run")
        except CheckpointError as error:  # ends no run
            self.best = {}
            self.reporter.warn(f"{error.message}; the best of the epochs to come takes its place")

    @property
    def done(self) -> bool:
        """Whether nothing is left to train, or nothing has become better for so long that it ends."""
        waited = self.epoch - self.best["epoch"] if self.best else 0
        return self.epoch == self.epochs or (self.control.patience is not None and waited >= self.control.patience)

    def _final_metrics(self, output: TrainingOutput) -> dict[str, Any]:
        evaluation = output.evaluation
        best = self.best or {"epoch": self.epoch, "selected_on": evaluation.selected_on}
        beside: dict[str, Any] = {}
        with self._timed("evaluate"), full_fp32():
            if self.control.delivered is not None:
                trained = self._evaluate(self.task.network, evaluation, evaluation.test)
                beside = {"trained": {"epoch": self.epoch, "split": "test"} | trained.metrics()}
            with self._delivered():
                last_scores = best_scores = self._evaluate(self.task.network, evaluation, evaluation.test)
            if best["epoch"] != self.epoch:
                saved = checkpoint.read(self.folder / "best")
                network = copy.deepcopy(self.task.network)
                network.load_state_dict(saved.model or {})
                best, best_scores = saved.state["best"], self._evaluate(network, evaluation, evaluation.test)
        measured = {"split": "test", "images": last_scores.images} | last_scores.metrics()
        self._publish(self._weights(), {"epoch": self.epoch} | measured)
        return beside | {
            "last": {"epoch": self.epoch, "split": "test"} | last_scores.metrics(),
            "best": {"epoch": best["epoch"], "selected_on": best["selected_on"]} | best_scores.metrics(),
            "top1_of_class": last_scores.top1_of_class,
        }

    def _publish(self, weights: bytes | None, facts: dict[str, Any]) -> None:
        if self.output is not None and weights is not None:
            self.output.writer.publish(self.run, weights, facts)

    def _log_record(self, record: dict[str, Any]) -> None:
        self.run.append("metrics.jsonl", record)
        self.reporter.record(record)

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        before = self._timing
        self._switch(phase)
        try:
            yield
        finally:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            self._switch(before)

    def _switch(self, phase: str) -> None:
        """The time since the last switch was that of the phase before; from now on it is this one's."""
        now = time.perf_counter()
        self.seconds[self._timing] += now - self._since
        self._timing, self._since = phase, now
