"""The engine: figures, rates, counters, checkpoints that show every damage, and a resume that changes no bit."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from sakd_cli.batch import Batch
from sakd_cli.config.resolve import ConfigSource, resolve
from sakd_cli.config.train import Train
from sakd_cli.data.dataset import Dataset, Split
from sakd_cli.data.loader import EvalLoader, TrainLoader
from sakd_cli.engine import checkpoint
from sakd_cli.engine.evaluate import InterruptibleBatches, evaluate
from sakd_cli.engine.optim import Optimizer
from sakd_cli.engine.recorder import Rows, SpotRecorder
from sakd_cli.engine.reporter import NullReporter, Reporter
from sakd_cli.engine.task import ParamGroup, SpotUse, StepOutput, Task
from sakd_cli.engine.trainer import EvaluationData, Trainer, TrainingOutput
from sakd_cli.errors import NonFiniteError, Stopped
from sakd_cli.models.table import create
from sakd_cli.rundir import RunDir
from sakd_cli.runs.build import assemble

CPU = torch.device("cpu")
CLASSES, SAMPLES, SIDE = 4, 20, 8


def pictures(count: int, seed: int) -> Split:
    draw = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (count, 3, SIDE, SIDE), generator=draw, dtype=torch.uint8)
    return Split(images, torch.arange(count) % CLASSES)


SPLITS = {"train": pictures(SAMPLES, 1), "test": pictures(12, 2)}
DATASET = Dataset("noise", tuple("abcd"), (0.5, 0.5, 0.5), (0.3, 0.3, 0.3), padding=1, flip=True, **SPLITS)


class PlainTask(Task):
    """A linear classifier; its loss is spoilt in the epochs `nan_in`."""

    def __init__(self, nan_in: tuple[int, ...] = ()) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIDE * SIDE, CLASSES))
        self.nan_in, self.epoch = nan_in, 0

    def groups(self) -> list[ParamGroup]:
        return [ParamGroup("network", list(self.network.parameters()), 0.01, 0.0)]

    def begin_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def forward(self, batch: Batch) -> StepOutput:
        logits = self.network(batch.images)
        loss = nn.functional.cross_entropy(logits, batch.labels) * (float("nan") if self.epoch in self.nan_in else 1.0)
        return StepOutput(loss, logits, {"loss": loss.detach()})


class FileDelivery:
    """Writes bare weights; remembers what it was told to publish."""

    def __init__(self, network: nn.Module) -> None:
        self.network, self.published = network, list[dict[str, Any]]()

    def weights(self) -> bytes:
        return save({name: tensor.contiguous() for name, tensor in self.network.state_dict().items()})

    def publish(self, run: RunDir, weights: bytes, facts: dict[str, Any]) -> None:
        self.published.append(facts)


class RecordingReporter(NullReporter):
    """Remembers how the run began, every step, and that it ended."""

    def __init__(self) -> None:
        self.heard: list[Any] = []
        self.advance = self.heard.append

    def begin(self, title: str, steps: int, done: int = 0) -> None:
        self.heard.append(steps)

    def end(self) -> None:
        self.heard.append("end")


def trainer_of(
    task: Task, folder: Path, epochs: int, *, evaluation: EvaluationData | None = None, **parts: Any
) -> Trainer:
    folder.mkdir(exist_ok=True)
    test = EvalLoader(DATASET.test, DATASET, device=CPU)
    evaluation = evaluation or EvaluationData("test", test, test, CLASSES)
    loader = TrainLoader(DATASET.train, DATASET, batch_size=8, seed=3, noise_width=task.noise_width, device=CPU)
    optimizer = Optimizer(task.groups(), Train(milestones=(2,)))
    parts = {"reporter": NullReporter(), "output": TrainingOutput(evaluation, FileDelivery(task.network))} | parts
    return Trainer(task, loader, optimizer, RunDir(folder), epochs=epochs, log_every=2, **parts)


def distiller_of(method: str, router: str, folder: Path, epochs: int, seed: int = 0) -> Trainer:
    arguments = {"teacher": "resnet8", "student": "resnet8", "method": method, "router": router, "seed": seed}
    config = resolve("distill", [ConfigSource("test", arguments)]).config
    torch.manual_seed(42)
    teacher = create("resnet8", CLASSES)
    torch.manual_seed(seed)
    student = create("resnet8", CLASSES)
    task = assemble(config, student, teacher.requires_grad_(False).eval(), SIDE)
    names = [(spot.name, spot.kind) for spot in task.spots]
    return trainer_of(task, folder, epochs, recorder=SpotRecorder(names, CLASSES, SAMPLES, CPU))


TENTHS = [(1, 1), (150, 1), (151, 0.1), (180, 0.1), (181, 0.01), (210, 0.01), (211, 0.001), (240, 0.001)]


@pytest.mark.parametrize(("epoch", "factor"), TENTHS)
def test_every_groups_rate_falls_to_a_tenth_after_each_milestone(epoch: int, factor: float) -> None:
    groups = [ParamGroup(name, [nn.Parameter(torch.ones(1))], lr, 0.0) for name, lr in (("a", 0.05), ("b", 0.025))]
    optimizer = Optimizer(groups, Train(milestones=(150, 180, 210)))
    optimizer.begin_epoch(epoch)
    assert [group["lr"] for group in optimizer.parts[0][0].param_groups] == pytest.approx(
        [0.05 * factor, 0.025 * factor]
    )


def test_a_step_is_sgd_with_momentum_and_each_groups_own_decay() -> None:
    first, second = nn.Parameter(torch.tensor([1.0])), nn.Parameter(torch.tensor([2.0]))
    none = ParamGroup("none", [], 9.0, 0.0)
    groups = [ParamGroup("a", [first], 0.1, 0.5), none, ParamGroup("b", [second], 0.01, 0.0)]
    optimizer = Optimizer(groups, Train(momentum=0.5))
    optimizer.begin_epoch(1)
    for _ in range(2):
        optimizer.step((3 * first + 4 * second).sum())
    # v1 = 3 + 0.5 * 1 = 3.5, w1 = 0.65; v2 = 1.75 + 3 + 0.325 = 5.075, w2 = 0.1425
    assert first.item() == pytest.approx(0.1425)
    assert second.item() == pytest.approx(2 - 0.04 - 0.06)
    momenta = {name: tensor.item() for name, tensor in optimizer.tensors().items()}
    assert momenta == pytest.approx({"a/0/momentum_buffer": 5.075, "b/0/momentum_buffer": 6})


def test_the_recorder_counts_by_class_by_sample_and_by_step() -> None:
    recorder = SpotRecorder([("stage1", "map"), ("logits", "logits")], classes=3, samples=5, device=CPU)
    batches = [([0, 1, 1], [4, 0, 2], [[1, 0, 1], [0, 0, 0]]), ([0], [1], [[1], [1]])]
    for labels, index, weight in batches:
        size = len(labels)
        batch = Batch(torch.zeros(size, 3, 1, 1), torch.tensor(labels), torch.tensor(index), torch.zeros(size, 0))
        chosen = torch.tensor(weight, dtype=torch.float32)
        recorder.add(
            SpotUse(chosen, chosen * 0.5 + 0.25, {"router_loss_scaled_up": torch.tensor(float(size == 1))}),
            Rows(batch.labels, batch.index),
        )
    line = recorder.close_epoch(7)
    first, last = line.spots
    assert (line.epoch, line.samples, line.empty_selection) == (7, 4, [0.0, 0.5])
    assert [(spot.name, spot.kind) for spot in line.spots] == list(recorder.names)
    assert (first.fraction, first.by_class) == (0.75, [1.0, 0.5, None])
    assert (last.fraction, last.by_class) == (0.25, [0.5, 0.0, None])
    assert (first.probability, last.probability) == (0.625, 0.375)
    scaling = (line.router_loss_scaled_up, line.router_loss_scaled_down, line.count_penalty_active)
    assert scaling == (0.5, None, None)
    assert [(image.index, image.visits, image.distilled) for image in line.tracked] == [
        (0, 1, [0, 0]), (1, 1, [1, 1]), (2, 1, [1, 0]), (3, 0, [0, 0]), (4, 1, [1, 0])
    ]  # fmt: skip
    tensors = recorder.by_sample()
    assert tensors["visits"].tolist() == [1, 1, 1, 0, 1]
    assert tensors["distilled"].tolist() == [[0, 0], [1, 1], [1, 0], [0, 0], [1, 0]]
    empty = recorder.close_epoch(8)
    assert (empty.samples, empty.spots[0].fraction, empty.spots[0].by_class) == (0, 0, [None] * 3)


def test_a_network_is_scored_in_evaluation_mode_and_left_as_it_was() -> None:
    network = nn.Sequential(nn.Dropout(0.9), nn.Identity())
    logits = torch.tensor([[4.0, 1, 0, 0, 0, 0], [0.0, 0, 0, 0, 0, 9], [5, 4, 3, 2, 1, 0], [9.0, 8, 0, 0, 0, 0]])
    labels = torch.tensor([0, 5, 5, 1])
    scores = evaluate(network, [(logits[:3], labels[:3]), (logits[3:], labels[3:])], 6)
    assert network.training
    assert (scores.images, scores.top1) == (4, 50.0)
    assert scores.top5 == 75.0, "the third image's class comes last of six"
    assert scores.loss == pytest.approx(nn.functional.cross_entropy(logits, labels).item(), rel=1e-6)
    assert scores.images_of_class == (1, 1, 0, 0, 0, 2)
    assert scores.top1_of_class == (100.0, 0.0, None, None, None, 50.0)
    few = evaluate(nn.Identity(), [(torch.eye(3), torch.tensor([2, 2, 2]))], 3)
    assert (few.top1, few.top5) == (pytest.approx(100 / 3), 100.0)


def test_a_run_logs_judges_saves_and_ends(tmp_path: Path) -> None:
    recorder = RecordingReporter()
    trainer = trainer_of(PlainTask(), tmp_path, 2, reporter=recorder)
    figures = trainer.fit()
    assert recorder.heard == [6, 1, 2, 3, 4, 5, 6, "end"]
    lines = list(trainer.run.lines("metrics.jsonl"))
    assert [(line["kind"], line["epoch"], line.get("step")) for line in lines] == [
        *(("train", 1, 2), ("train", 1, 3), ("eval", 1, None)),
        *(("train", 2, 4), ("train", 2, 6), ("eval", 2, None)),
    ]
    assert figures["last"]["loss"] == lines[-1]["loss"]
    assert sum(figures["phases"].values()) == pytest.approx(1.0)
    assert trainer.output.writer.published[-1]["top1"] == figures["last"]["top1"]
    saved = checkpoint.read(tmp_path / "checkpoints" / "last")
    assert (saved.state["epoch"], saved.state["step"]) == (2, 6)
    assert all(torch.equal(saved.model[name], tensor) for name, tensor in trainer.task.network.state_dict().items())


def test_a_stage_without_an_outcome_only_trains(tmp_path: Path) -> None:
    task = PlainTask()
    before = task.network[1].weight.clone()
    figures = trainer_of(task, tmp_path, 1, output=None, phase="warm-up").fit()
    assert figures.keys() == {"seconds", "phases"}
    assert [line["kind"] for line in RunDir(tmp_path).lines("metrics.jsonl")] == ["warm-up"] * 2
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["warm-up"]
    saved = checkpoint.read(tmp_path / "checkpoints" / "warm-up" / "last")
    assert (saved.model, saved.state["step"]) == (None, 3)
    assert not torch.equal(task.network[1].weight, before)


class Verdicts:
    """Batches whose labels make the classifier of ever the same class right in the given share of cases."""

    def __init__(self, network: nn.Module, right: list[int]) -> None:
        self.network, self.right = network, iter(right)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        images = torch.ones(4, 3, SIDE, SIDE)
        answer = self.network(images).argmax(dim=1)
        yield images, torch.where(torch.arange(4) < next(self.right), answer, (answer + 1) % CLASSES)


def test_the_best_epoch_is_the_first_of_the_highest_and_its_own_weights_are_scored(tmp_path: Path) -> None:
    task = PlainTask()
    test = EvalLoader(DATASET.test, DATASET, device=CPU)
    evaluation = EvaluationData("validation", Verdicts(task.network, [1, 3, 3, 2]), test, CLASSES)
    figures = trainer_of(task, tmp_path, 4, evaluation=evaluation).fit()
    assert (figures["best"]["epoch"], figures["best"]["selected_on"], figures["last"]["epoch"]) == (
        2,
        "validation",
        4,
    )
    rates = {line["epoch"]: line["lr"] for line in RunDir(tmp_path).lines("metrics.jsonl") if "lr" in line}
    assert rates == pytest.approx({1: 0.01, 2: 0.01, 3: 0.001, 4: 0.001})
    best = PlainTask().network
    best.load_state_dict(load_file(tmp_path / "checkpoints" / "best" / "model.safetensors"))
    assert figures["best"]["loss"] == evaluate(best, test, CLASSES).loss != figures["last"]["loss"]


PAIRS = [("fitnet", "adaptive"), ("at", "anti"), ("sp", "random"), ("kd", "always"), ("simkd", "adaptive")]


@pytest.mark.parametrize(("method", "router"), PAIRS)
def test_a_run_that_was_interrupted_goes_on_bit_for_bit(tmp_path: Path, method: str, router: str) -> None:
    whole = distiller_of(method, router, tmp_path / "whole", 4)
    expected = whole.fit()
    distiller_of(method, router, tmp_path / "halves", 2).fit()
    # Everything that a checkpoint forgets would come from another seed.
    resumed = distiller_of(method, router, tmp_path / "halves", 4, seed=1)
    resumed.resume(checkpoint.read(tmp_path / "halves" / "checkpoints" / "last"))
    assert resumed.epoch == 2
    figures = resumed.fit()
    assert (figures["last"], figures["best"]) == (expected["last"], expected["best"])
    tables = [
        (run.task.state_dict(), run.optimizer.tensors(), load_file(run.run.path / "samples.safetensors"))
        for run in (resumed, whole)
    ]
    for ours, theirs in zip(*tables, strict=True):
        assert ours.keys() == theirs.keys()
        assert not [name for name in ours if not torch.equal(ours[name], theirs[name])]
    for log in ("metrics.jsonl", "spots.jsonl"):
        assert list(resumed.run.lines(log)) == list(whole.run.lines(log))


def test_a_checkpoint_of_an_adaptive_run_holds_all_that_is_trained(tmp_path: Path) -> None:
    trainer = distiller_of("fitnet", "adaptive", tmp_path, 1)
    trainer.fit()
    training = checkpoint.read(tmp_path / "checkpoints" / "last").training
    kept = {name.split("/")[0] + "/" + name.split("/")[1].split(".")[0] for name in training}
    assert {"task/router", "task/graft", "task/feature_distiller", "momentum/student", "momentum/router"} <= kept
    assert {"samples/sample_distilled", "samples/sample_visits", "random/cpu"} <= set(training)
    assert not [name for name in training if name.startswith("task/network")], "the network has its own file"
    momenta = sum(len(group.parameters) for group in trainer.task.groups())
    assert sum(name.startswith("momentum/") for name in training) == momenta


def test_the_state_of_torchs_own_generator_is_put_back(tmp_path: Path) -> None:
    trainer_of(PlainTask(), tmp_path, 1).fit()
    expected = torch.rand(3)
    again = trainer_of(PlainTask(), tmp_path, 1)
    torch.manual_seed(777)
    again.resume(checkpoint.read(tmp_path / "checkpoints" / "last"))
    assert torch.equal(torch.rand(3), expected)


def test_a_loss_that_is_no_number_stops_the_run_and_leaves_the_last_sound_checkpoint(tmp_path: Path) -> None:
    recorder = RecordingReporter()
    with pytest.raises(NonFiniteError, match="step 4: loss is not finite, with training images") as caught:
        trainer_of(PlainTask(nan_in=(2, 3)), tmp_path, 3, reporter=recorder).fit()
    assert caught.value.exit_code == 7
    assert recorder.heard[-1] == "end"
    saved = checkpoint.read(tmp_path / "checkpoints" / "last")
    assert saved.state["epoch"] == 1
    assert all(tensor.isfinite().all() for tensor in saved.model.values())
    assert not RunDir(tmp_path).finished


def test_weights_that_turn_out_infinite_only_when_judged_stop_the_run_too(tmp_path: Path) -> None:
    broken = [(torch.full((2, 3, SIDE, SIDE), float("nan")), torch.zeros(2, dtype=torch.int64))]
    with pytest.raises(NonFiniteError):
        trainer_of(PlainTask(), tmp_path, 1, evaluation=EvaluationData("test", broken, broken, CLASSES)).fit()
    assert not (tmp_path / "checkpoints").exists()


def test_an_infinite_running_variance_is_no_network_to_keep(tmp_path: Path) -> None:
    """Its outputs are finite: the loss does not show it."""
    task = PlainTask()
    norm = nn.BatchNorm1d(CLASSES)
    task.network.append(norm)
    trainer = trainer_of(task, tmp_path, 1)
    norm.momentum = 0.0
    norm.get_buffer("running_var").fill_(float("inf"))
    with pytest.raises(NonFiniteError, match=r"evaluation of epoch 1, tensor '2\.running_var' of the network"):
        trainer.fit()
    assert not (tmp_path / "checkpoints").exists()


class Impatient(NullReporter):
    """Wants the run to stop when it is asked for the N-th time."""

    def __init__(self, patience: int) -> None:
        self.patience = patience

    def stop(self) -> int:
        self.patience -= 1
        return 15 if self.patience < 0 else 0


def test_a_stop_at_any_moment_of_training_and_evaluation_changes_no_bit(tmp_path: Path) -> None:
    def trainer(folder: Path, reporter: Reporter) -> Trainer:
        slow = EvalLoader(DATASET.test, DATASET, device=CPU, batch_size=5)
        judged = InterruptibleBatches(slow, reporter)
        return trainer_of(
            PlainTask(), folder, 2, evaluation=EvaluationData("test", judged, judged, CLASSES), reporter=reporter
        )

    whole = trainer(tmp_path / "whole", NullReporter())
    expected = whole.fit()
    moments = 2 * 3 + 3 * 3  # every step, and every batch of three evaluations
    for moment in range(moments):
        stopped = trainer(tmp_path / str(moment), Impatient(moment))
        with pytest.raises(Stopped) as caught:
            stopped.fit()
        assert caught.value.exit_code == 143
        resumed = trainer(tmp_path / str(moment), NullReporter())
        resumed.resume(checkpoint.read(resumed.folder / "last"))
        assert resumed.step == stopped.step
        figures = resumed.fit()
        assert (figures["last"], figures["best"]) == (expected["last"], expected["best"])
        assert list(resumed.run.lines("metrics.jsonl")) == list(whole.run.lines("metrics.jsonl"))
        assert torch.equal(resumed.task.network[1].weight, whole.task.network[1].weight)
    trainer(tmp_path / "patient", Impatient(moments)).fit()
