"""Several processes that train one network: the same numbers as one process with the same batches."""

import copy
import multiprocessing
import pickle
import traceback
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist
from launches import Launches
from torch import nn

from sakd_cli import distributed
from sakd_cli.batch import Batch
from sakd_cli.config.resolve import ConfigSource, nested, resolve
from sakd_cli.config.train import Train
from sakd_cli.data.loader import step_slices
from sakd_cli.engine.checkpoint import random_state, random_state_of_others, restore_random_state
from sakd_cli.engine.evaluate import evaluate
from sakd_cli.engine.optim import Optimizer
from sakd_cli.engine.recorder import Rows
from sakd_cli.engine.step import of_all_processes, wrap_ddp
from sakd_cli.engine.task import Task
from sakd_cli.models.table import create
from sakd_cli.runs.build import assemble
from sakd_cli.tasks.team import COMBINE

# Python 3.12 warns of forks beside other threads; those of the test runner hold no lock that the children need.
pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
CLASSES, SIDE, IMAGES, BATCH = 5, 8, 22, 8  # batches of 8, 8 and 6
COUNTS = (2, 4)


def _one(count: int, rank: int, path: Path, work: Callable[[], Any]) -> None:
    try:
        store = dist.FileStore(str(path / "store"), count)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=count)
        found = work()
    except BaseException:
        found = traceback.format_exc()
    (path / f"{rank}.pkl").write_bytes(pickle.dumps(found))


def in_processes(count: int, path: Path, work: Callable[[], Any]) -> list[Any]:
    """What `work` gives in each of `count` processes that have met; fails with what one of them failed with."""
    path.mkdir()
    torch.set_num_threads(1)
    context = multiprocessing.get_context("fork")  # torch is there already
    started = [context.Process(target=_one, args=(count, rank, path, work)) for rank in range(count)]
    for process in started:
        process.start()
    for process in started:
        process.join(120)
        assert process.exitcode == 0
    found = [pickle.loads((path / f"{rank}.pkl").read_bytes()) for rank in range(count)]
    for one in found:
        assert not (isinstance(one, str) and "Traceback" in one), one
    return found


def batch_of(places: slice, whole: int, share: float) -> Batch:
    draw = torch.Generator().manual_seed(3)
    images = torch.randn(IMAGES, 3, SIDE, SIDE, generator=draw, dtype=torch.float64)
    noise = torch.rand(IMAGES, 16, generator=draw)
    labels, index = torch.arange(IMAGES) % CLASSES, torch.arange(IMAGES)
    rows = (tensor[places] for tensor in (images, labels, index, noise))
    batch = Batch(*rows, global_size=whole, shard_weight=share)
    return replace(batch, held_out=batch)


def test_parts_of_a_batch_are_all_of_it_in_order(tmp_path: Path) -> None:
    def work() -> Any:
        kept = []
        for size in (9, 2, 1):
            (turn,) = step_slices(size, 9, 0)
            own = torch.arange(size, dtype=torch.float64)[turn.rows]
            batch = Batch(own, own, own, own, global_size=turn.global_size, shard_weight=turn.shard_weight)
            x = (batch.images * 2).requires_grad_()
            rows, sums = distributed.all_gather(x, batch), distributed.all_reduce_sum_with_grad(x.sum(), batch)
            mean = distributed.all_reduce_mean(x.mean(), batch).item()
            (gradient,) = torch.autograd.grad((rows.square().sum() + sums) * batch.shard_weight / 4, x)
            kept.append((rows.tolist(), sums.item(), mean, gradient.tolist(), x.tolist()))
        buffers = [torch.full((2,), float(distributed.rank())), torch.tensor(float(distributed.rank()))]
        distributed.average_buffers(buffers)
        poll = distributed.AsyncMax()
        polled = [poll(number if distributed.rank() == 2 else 0) for number in (15, 0, 0)]
        return kept, [b.tolist() for b in buffers], polled, list(distributed.shard(range(6)))

    found = in_processes(4, tmp_path / "p", work)
    for kept, buffers, polled, _ in found:
        for (rows, sums, mean, gradient, own), size in zip(kept, (9, 2, 1), strict=True):
            whole = [2.0 * k for k in range(size)]
            assert (rows, sums) == (whole, sum(whole))
            assert mean == pytest.approx(sum(whole) / size)
            lent = own == whole[:2] and not any(gradient)  # rows that are another process's too
            assert lent or gradient == pytest.approx([2 * x + 1 for x in own])
        assert buffers == [[1.5, 1.5], 1.5]
        assert polled == [0, 15, 0], "every process hears of it, one step later"
    assert [row for *_, part in found for row in part] == [0, 4, 1, 5, 2, 3]


def steps(task: Task) -> dict[str, Any]:
    """An epoch over 22 images in batches of 8, 8 and 6; the state afterwards and what the log would say."""
    task = task.train()
    spread_task, result = wrap_ddp(task), []
    optimizer = Optimizer(task.groups(), Train())
    task.begin_epoch(1)
    optimizer.begin_epoch(1)
    for turn in step_slices(IMAGES, BATCH, 0):
        batch = batch_of(*turn)
        output = spread_task(batch)
        optimizer.step(output.loss * batch.shard_weight)
        distributed.average_buffers(distributed.running_statistics(task))
        parts, use, rows = of_all_processes(output.parts, output.use, Rows(batch.labels, batch.index), batch)
        assert use is not None
        assert use.lengths is not None
        ratio = use.lengths[:, 1] / use.lengths[:, 0].clamp(min=1e-30)
        seen = (use.weight, rows.labels, rows.places, *use.events.values(), ratio)
        result.append([part.double() for part in parts.values()] + [tensor.double().clone() for tensor in seen])
    return {"state": copy.deepcopy(task.state_dict()), "result": result}


def task_of(
    method: str, router: str, balance: float = 0.0, *, norms: bool = False, dtype: torch.dtype = torch.float64
) -> Task:
    given: dict[str, Any] = {"method.balance": balance}
    given |= {"teacher": "resnet14", "student": "resnet8", "method.name": method, "router": router, "train.lr": 0.01}
    given |= {"runtime.global_batch": True, "train.batch_size": BATCH}
    config = resolve("distill", [ConfigSource("test", nested(given))]).config
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        student, teacher = create("resnet8", CLASSES), create("resnet14", CLASSES)
        teacher = teacher.eval().requires_grad_(False)
        task: Task = assemble(config, student, teacher, SIDE, torch.arange(IMAGES) % CLASSES)
    finally:
        torch.set_default_dtype(torch.float32)
    if not norms:  # as if there were none: rows do not see each other
        task.train = lambda mode=True: _but_norms(nn.Module.train(task, mode))  # type: ignore[method-assign]
    return task


def _but_norms(module: nn.Module) -> nn.Module:
    for part in module.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            part.eval()
    return module


def alike(ours: dict[str, Any], whole: dict[str, Any], tolerance: float) -> None:
    for name, tensor in whole["state"].items():
        scale = max(1.0, float(tensor.double().abs().max()))
        assert float((ours["state"][name].double() - tensor.double()).abs().max()) <= tolerance * scale, name
    for here, there in zip(ours["result"], whole["result"], strict=True):
        for one, other in zip(here, there, strict=True):
            assert torch.allclose(one, other, rtol=tolerance, atol=tolerance)


CASES = [("fitnet", "adaptive"), ("fitnet", "anti"), ("at", "always"), ("sp", "adaptive"), ("rkd", "adaptive")]
CASES += [("fitnet", "never"), ("kd", "wsld"), ("fitnet", "gradient-agreement")]
CASES += [("at", "meta"), ("fitnet", "teacher-confidence"), ("kd", "teacher-entropy")]
CASES += [("pkt", "adaptive"), ("cc", "random"), ("dist", "adaptive"), ("crd", "adaptive"), ("vid", "adaptive")]


@pytest.mark.parametrize(("method", "router"), CASES)
def test_several_processes_do_what_one_does(tmp_path: Path, method: str, router: str) -> None:
    """In float64 and without BatchNorm, uneven last batch included."""
    whole = steps(task_of(method, router))
    for count in COUNTS if (method, router) == CASES[0] else COUNTS[:1]:
        path = tmp_path / str(count)
        for ours in in_processes(count, path, lambda: steps(task_of(method, router))):
            alike(ours, whole, 1e-12)


def test_a_teacher_is_drawn_for_the_whole_batch(tmp_path: Path) -> None:
    def work() -> list[Any]:
        logits = [torch.zeros(BATCH // distributed.world_size(), CLASSES)] * 5
        turns = (batch_of(*turn) for turn in step_slices(IMAGES, BATCH, 0))
        return [COMBINE["draw"](logits, batch.labels, batch.noise)[:, 0].tolist() for batch in turns]

    assert in_processes(2, tmp_path / "p", work) == [work()] * 2


@pytest.mark.parametrize("method", ["at", "sp"])
def test_a_balanced_dose_is_by_the_whole_batch(tmp_path: Path, method: str) -> None:
    whole = steps(task_of(method, "adaptive", 1.0))
    for ours in in_processes(2, tmp_path / "p", lambda: steps(task_of(method, "adaptive", 1.0))):
        alike(ours, whole, 1e-12)


def test_shared_batchnorm_is_that_of_the_whole_batch(tmp_path: Path) -> None:
    """In fp32: statistics, gradients through them, running means; uneven last batch included."""
    whole = steps(single(task_of("fitnet", "adaptive", norms=True, dtype=torch.float32)))

    def work() -> Any:
        task = task_of("fitnet", "adaptive", norms=True, dtype=torch.float32)
        distributed.convert_sync_batchnorm(task)
        return steps(single(task))

    for ours in in_processes(2, tmp_path / "p", work):
        alike(ours, whole, 2e-5)  # fp32, four steps: rounding of sums over other parts of a batch


def single(task: Task) -> Task:
    """On fp32 images."""

    def narrow(x: torch.Tensor) -> torch.Tensor:
        return x.float() if x.is_floating_point() else x

    task.register_forward_pre_hook(lambda _, given: (given[0].map(narrow),))
    return task


def test_every_process_draws_for_itself_and_goes_on_with_its_own_numbers(tmp_path: Path) -> None:
    """What layers draw, dropout above all."""

    def work() -> Any:
        torch.manual_seed(distributed.rank())
        others = random_state_of_others()
        saved = distributed.broadcast_object(random_state() | others)
        drawn = torch.rand(3).tolist()
        torch.rand(distributed.rank())  # as of batches of other sizes
        restore_random_state(saved)
        return drawn, torch.rand(3).tolist()

    first, second = in_processes(2, tmp_path / "p", work)
    assert first[0] == first[1] != second[1] == second[0]


def test_evaluation_in_turn_scores_what_one_process_scores(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = create("resnet8", CLASSES)
    batches = [(torch.randn(size, 3, SIDE, SIDE), torch.arange(size) % CLASSES) for size in (4, 3, 2)]
    whole = evaluate(network, batches, CLASSES)
    found = in_processes(4, tmp_path / "p", lambda: evaluate(network, batches, CLASSES, together=True))
    assert all(one._replace(loss=0) == whole._replace(loss=0) for one in found)
    assert all(one.loss == pytest.approx(whole.loss) for one in found)


def test_a_lost_process_is_noticed_within_minutes_and_one_that_writes_is_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """NCCL sees no closed connection: its exchanges end by their timeout alone."""
    joined, made, exchanged = Mock(), Mock(return_value="those who wait"), Mock()
    monkeypatch.setattr(distributed, "rendezvous", lambda *_, **__: iter([(dist.HashStore(), 0, 2)]))
    monkeypatch.setattr(distributed, "requested_world_size", lambda: 2)
    monkeypatch.setattr(distributed, "_WAITING", [])
    monkeypatch.setattr(dist, "init_process_group", joined)
    monkeypatch.setattr(dist, "new_group", made)
    monkeypatch.setattr("torch.cuda.set_device", lambda device: None)
    monkeypatch.setattr("atexit.register", lambda call: None)
    distributed.init_process_group(torch.device("cuda:0"))
    assert joined.call_args.kwargs["timeout"] <= timedelta(minutes=10)
    assert made.call_args.kwargs["timeout"] >= timedelta(minutes=30)
    assert made.call_args.kwargs["backend"] == "gloo"
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_reduce", exchanged)
    distributed.barrier()
    assert exchanged.call_args.kwargs == {"group": "those who wait"}


def test_statistics_are_averaged_in_two_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many there are; without the exchange."""
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_reduce", lambda flat: flat.mul_(2))
    buffers = [torch.full((k + 1,), float(k)) for k in range(30)]
    with Launches() as seen:
        distributed.average_buffers(buffers)
    assert [one.name for one in seen.seen] == ["cat", "mul_", "div_", "_foreach_copy_"]
    assert all(torch.equal(buffer, torch.full((k + 1,), float(k))) for k, buffer in enumerate(buffers))
