"""What is tried of a job before it is trained: a batch, and a router and a loss (with weights of 0) of one's own."""

import copy
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from sakd_cli.batch import Batch, Loader
from sakd_cli.config.code import GUIDE, as_usage_errors, contained, line_of
from sakd_cli.distillers.distiller import Distiller
from sakd_cli.engine.runtime import to_fp32, translate_oom
from sakd_cli.engine.task import StepOutput
from sakd_cli.errors import NonFiniteError, UsageError
from sakd_cli.models.staged import Features
from sakd_cli.routing.router import Router
from sakd_cli.runs.extension import loader_of
from sakd_cli.runs.job import Job
from sakd_cli.tasks.distill import DistillTask
from sakd_cli.tasks.own_code import check_decision, method_of, of_own_code, require_floating


def first_losses(job: Job, loader: Loader) -> dict[str, float]:
    """The terms of the first batch's loss: that goes forward and backward, then the last one where its size differs."""
    job.task.train()
    job.task.begin_epoch(1)
    with translate_oom(job.config.train.batch_size):
        check_own_losses(job)
        first = next(loader.epoch(1))
        output: StepOutput = job.task(first)
        output.loss.backward()
    parts = {name: float(part) for name, part in output.parts.items()}
    bad = [name for name, part in parts.items() if not math.isfinite(part)]
    gradients = [parameter.grad for parameter in job.task.parameters() if parameter.grad is not None]
    if bad := bad or ["gradients"] * any(not bool(one.isfinite().all()) for one in gradients):
        error = NonFiniteError(f"the first batch: {', '.join(bad)} is not finite", "other weights of the losses")
        raise of_own_code(error, job.task)
    if output.use is not None and not bool(((output.use.weight >= 0) & (output.use.weight <= 1)).all()):
        raise UsageError("the router gives weights outside of [0, 1]", "sakd guide extending")
    with translate_oom(job.config.train.batch_size):
        last = next(loader.epoch(1, loader.steps_per_epoch - 1))
        if len(last.labels) != len(first.labels):
            job.task(last)
    return parts


def check_own_losses(job: Job) -> None:
    """Try every router and loss of somebody's own on an epoch's first batch, before anything is compiled or captured.

    Raises UsageError where one is wrong. Networks, losses and random numbers are left as they were.
    """
    task = job.task
    if not isinstance(task, DistillTask) or not any(map(_own, task.modules())):
        return
    batch, training = next(loader_of(job).epoch(1)), [module for module in task.modules() if module.training]
    task.eval()
    devices = [batch.images.device] if batch.images.is_cuda else []
    try:
        with torch.no_grad(), task.mode.networks(batch.images.device), torch.random.fork_rng(devices):
            student = task.student_features(batch.images).map(to_fp32)
            for member in task.members:
                part = replace(batch, precomputed=None) if task.others else batch
                teacher = member.teacher_features(part).map(to_fp32)
                _require_decision(member, student, teacher, part)
                for one in (member.feature_distiller, member.logit_distiller):
                    for distiller in filter(_own, [] if one is None else one.modules()):
                        _require_zero(distiller, student, teacher, part)
    finally:
        for module in training:
            module.training = True


def _own(module: torch.nn.Module) -> bool:
    return isinstance(module, Distiller | Router) and bool(line_of(module))


def _require_decision(task: DistillTask, student: Features, teacher: Features, batch: Batch) -> None:
    if not _own(task.router):
        return
    with as_usage_errors(method_of(task.router)), contained():
        tried = copy.deepcopy(task.router)  # it may keep what it sees
        tried.begin_epoch(1)
        seen = teacher.embedding, student.embedding, batch.noise[:, : tried.noise_width]
        decision = tried(*seen, *task.answers(teacher, student, batch.labels))
        decision = check_decision(tried, decision, (len(task.spots), len(batch.labels)), routed=task.graft is not None)
        if (given := decision.weight.device) != (here := batch.images.device):
            raise _wrong(tried, f"gives weights on device {given}, and not on {here}")
        for what, value in (("gate", decision.gate), ("probability", decision.probability)):
            # Straight through (hard + soft - soft) leaves a gate a rounding beside 0 or 1.
            if value is not None and not bool(((value - 0.5).abs() < 0.501).all()):
                raise _wrong(tried, f"gives a {what} that is NaN or outside of 0 to 1")


def _require_zero(distiller: torch.nn.Module, student: Features, teacher: Features, batch: Batch) -> None:
    tried = copy.deepcopy(distiller).train()  # it may keep what it sees
    assert isinstance(tried, Distiller)
    tried.active = (True,) * len(tried.spots)
    weights = [batch.images.new_full((len(tried.spots), len(batch.labels)), value) for value in (0.0, 1.0)]
    student = student.map(lambda feature: feature.detach().requires_grad_())
    known, before = {*tried.parameters(), *student.tensors()}, [one._version for one in teacher.tensors()]
    with as_usage_errors(method_of(distiller)), contained(), torch.enable_grad():
        losses, plain = (tried(student, teacher, weight, batch) for weight in weights)
    require_floating(distiller, "what it returns, a loss per spot [spots],", losses, (len(tried.spots),))
    if losses.device != batch.images.device:
        raise _wrong(distiller, f"gives a loss on device {losses.device}, and not on {batch.images.device}")
    for spot, loss, whole in zip(tried.spots, losses.tolist(), plain.tolist(), strict=True):
        if loss != 0 and math.isfinite(whole):  # the first step tells what is never finite
            text = f"gives {loss:.4g} at spot {spot.name} where every weight is 0, and must give exactly 0"
            cure = "multiply each image's loss by its `weight`, and take the mean over all images"
            raise _wrong(distiller, f"{text}: {cure}")
    if [one._version for one in teacher.tensors()] != before:
        raise _wrong(distiller, "changes the teacher's features in place, which others read too: work on a copy")
    finite = bool(plain.isfinite().all())
    if finite and not bool((weights[1] == 1).all()):
        raise _wrong(distiller, "changes its `weight`")
    if not known.issuperset(_leaves(plain)):
        text = "uses weights that no optimizer gets: make them in __init__, as nn.Parameter, layers in nn.ModuleList"
        raise _wrong(distiller, text)
    with as_usage_errors(method_of(distiller)), contained():
        found = list[torch.Tensor | None]()
        if plain.requires_grad:
            found = [*torch.autograd.grad(plain, student.tensors(), torch.ones_like(plain), allow_unused=True)]
    if finite and all(gradient is None for gradient in found):
        raise _wrong(distiller, "gives a loss without a gradient by what it is given")


def _wrong(module: torch.nn.Module, text: str) -> UsageError:
    return UsageError(f"{method_of(module)}: {text}", GUIDE)


def _leaves(value: torch.Tensor) -> Iterator[torch.Tensor]:
    """What a gradient of this value would be added to."""
    met, nodes = set[Any](), [value.grad_fn]
    while nodes:
        if (node := nodes.pop()) is None or node in met:
            continue
        met.add(node)
        nodes += [before for before, _ in node.next_functions]
        if (leaf := getattr(node, "variable", None)) is not None:
            yield leaf
