"""How a job's networks are trained, from its section `train`: optimizer, what is frozen, what is delivered."""

from collections.abc import Iterator
from dataclasses import replace
from fnmatch import filter as filter_names
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from sakd_cli import torchrun
from sakd_cli.config.datasets import FilesConfig
from sakd_cli.config.effective import router_train
from sakd_cli.config.routers import ScheduledConfig
from sakd_cli.config.training import DistillConfig, RunConfig
from sakd_cli.engine.control import Control, Delivered, Frozen
from sakd_cli.engine.optim import Optimizer
from sakd_cli.engine.task import Task
from sakd_cli.errors import UsageError
from sakd_cli.models.staged import StagedModel
from sakd_cli.runs.job import Job, effective_values, warnings_of
from sakd_cli.runs.resume import NEW_RUN
from sakd_cli.tasks.distill import ROUTER

BLOCKS = ("Block", "Bottleneck", "EncoderLayer")  # ends of the class names of what a network has many of
EMBEDDINGS = {"pos_embed", "pos_embedding", "cls_token", "class_token", "reg_token", "dist_token", "patch_pos"}
EMBEDDINGS |= {"relative_position_bias_table", "attention_biases", "logit_scale", "pixel_pos"}
EMBEDDINGS |= {f"cls_token{k}" for k in range(1, 5)}  # all as in timm's own lists of what is not decayed
USUAL = 0.1  # momentum of BatchNorm
REMAINS = 0.01  # share of the initial statistics above which running averages say too little of a network


def optimizer_of(job: Job, task: Task) -> Optimizer:
    """The optimizer of an ordinary training. Raises UsageError where it cannot be had."""
    config, train = job.config, job.config.train
    if train.accumulate > 1:  # each process has a part of the batch already
        torchrun.require_single_process("train.accumulate")
    own = {ROUTER: router_train(config)} if isinstance(config, DistillConfig) else {}
    scales = layer_scales(task.network, train.layer_decay) if train.layer_decay < 1 else {}
    return Optimizer(task.groups(), train, own=own, scales=scales, undecayed=undecayed(task.network))


def undecayed(network: nn.Module) -> list[nn.Parameter]:
    """What is no weight of a layer though it is no vector: class tokens, embeddings of places, biases of attention."""
    named = network.named_parameters()
    return [own for name, own in named if name.rpartition(".")[2] in EMBEDDINGS or ".cpb_mlp." in name]


def layer_scales(network: nn.Module, decay: float) -> dict[nn.Parameter, float]:
    """decay^(L + 1 - l) for a parameter of layer l of L: blocks in order, 0 in front of them, L + 1 behind (the head).

    As in the fine-tuning of BEiT (Bao et al., ICLR 2022) and in timm, which counts a ViT's last norm to its last block;
    blocks are known by the names of their classes, and in a network without any a stage is one.
    """
    names: list[str] = []
    for name, module in network.named_modules():
        if type(module).__name__.endswith(BLOCKS) and not any(name.startswith(f"{other}.") for other in names):
            names.append(name)
    if len(names) < 2:
        names = [name for name, _ in network.named_modules() if name.count(".") == 1 and name.startswith("stages.")]
    found, behind = {}, 0
    for name, parameter in network.named_parameters():
        inside = next((k for k, block in enumerate(names, start=1) if name.startswith(f"{block}.")), None)
        behind = max(behind, inside or 0)
        layer = inside or (len(names) + 1 if behind == len(names) or name.startswith("head.") else behind)
        found[parameter] = decay ** (len(names) + 1 - layer)
    return found


def control_of(job: Job, task: Task) -> Control:
    """What steers an ordinary training. Raises UsageError where it cannot be had."""
    train, network = job.config.train, task.network
    if train.patience is not None and job.images.held_out is None:
        raise UsageError("train.patience: there are no validation images to wait for", "--validation 0.1")
    if parameters := _frozen(network, train.freeze):
        task.has_unused_parameters = True
    if parameters and len(never_trained(job)) == len(_trained(network)):
        hint = "freeze less, or for fewer epochs than there are: --set train.freeze_epochs=N"
        raise UsageError("train.freeze: leaves nothing of the network to train", hint)
    norms = train.batchnorm == "frozen"
    stale = train.batchnorm == "auto" and _forgets_too_late(job, network) is not None
    re_estimate = stale or train.batchnorm == "re-estimate"
    frozen = Frozen(network, parameters, train.freeze_epochs, norms=norms)
    beside = Delivered(network, train.ema, frozen, re_estimate=re_estimate) if train.ema or re_estimate else None
    return Control(train.metric, train.patience, frozen if parameters or norms else None, beside)


def never_trained(job: Job) -> set[nn.Parameter]:
    """The parameters that are frozen from the first epoch to the last."""
    train = job.config.train
    for_good = train.freeze_epochs is None or train.freeze_epochs >= train.epochs
    return set(_frozen(job.task.network, train.freeze)) if for_good else set()


def check(job: Job) -> None:
    """Raise UsageError, before anything is trained, where the settings cannot be had."""
    if not _trained(job.task.network):
        raise UsageError(f"{job.network.name}: none of its parameters is trained (requires_grad)")
    train, (rate, *_) = job.config.train, (group.lr for group in optimizer_of(job, job.task).groups)
    if train.min_lr > rate:
        raise UsageError(f"train.min_lr: {train.min_lr:g} is above {rate:g}, the learning rate that is to fall to it")
    warmed = job.config.method.warmed if isinstance(job.config, DistillConfig) else None
    kept = [*(["freeze"] if train.freeze else []), *(["batchnorm"] if train.batchnorm == "frozen" else [])]
    if warmed is not None and warmed.trains_student and kept:
        raise UsageError(f"train.{kept[0]}: method {warmed.name} trains the whole student in a stage of its own before")
    control_of(job, job.task)


def notes(job: Job) -> list[str]:
    """What is worth knowing before hours are spent, also of the recipe."""
    config, train, steps, found = job.config, job.config.train, job.steps, warnings_of(job)
    fit = f"{1 - 10 / steps:.4g}" if steps >= 20 else "null"
    if train.ema is not None and (over := 1 / (1 - train.ema)) > steps / 5:
        found.append(
            f"train.ema={train.ema:g} averages over about {over:,.0f} steps, of {steps:,} that this run has: what is "
            f"delivered is close to the initial weights (--set train.ema={fit})"
        )
    methods = (config.method, *config.method.parts) if isinstance(config, DistillConfig) else ()
    if late := [(one.name, one.weight_warmup) for one in methods if one.weight_warmup > train.epochs]:
        (name, rise), reached = late[0], train.epochs / late[0][1]
        length = f"{rise} epochs, and this run has {train.epochs}"
        found.append(f"weight_warmup of {name} is {length}: its weights get to {reached:.2g} of their value")
    if train.patience is not None and train.patience >= train.epochs - 1:
        found.append(f"train.patience={train.patience} ends no run of {train.epochs} epochs early")
    if train.freeze_epochs is not None and train.freeze_epochs >= train.epochs:
        found.append(
            f"train.freeze_epochs={train.freeze_epochs}: what is frozen stays so for all {train.epochs} epochs"
        )
    found += [f"{key} has no effect: {why}" for key, why in _without_effect(config)]
    if train.batchnorm == "auto" and (momentum := _forgets_too_late(job, job.task.network)) is not None:
        found.append(
            f"BatchNorm in {job.network.name} has momentum {momentum:g}, too little for a run of {steps:,} steps: "
            "every evaluation re-estimates its statistics (--set train.batchnorm=running: not)"
        )
    return found


def require_same_length(job: Job, before: RunConfig) -> None:
    """Raise UsageError where the job, longer than the run `before`, has other automatic values than that began with."""
    (old, was), (new, now) = ((_by_length(replace(job, config=one)), one.train.epochs) for one in (before, job.config))
    for key in [key for key in new if old[key] != new[key]]:
        reason = f"{old[key]} in a run of {was} epochs and {new[key]} in one of {now}, so this one is not extended"
        raise UsageError(f"{key}: {reason}", NEW_RUN)


def _by_length(job: Job) -> dict[str, Any]:
    """What follows from the number of epochs, beside schedules."""
    values, train, router = effective_values(job), job.config.train, getattr(job.config, "router", None)
    late = train.batchnorm == "auto" and _forgets_too_late(job, job.network) is not None
    spans = (*router.start, *router.stop) if isinstance(router, ScheduledConfig) else ()
    found = {key: values.get(key) for key in ("router.lr", "router.teacher_bias")}
    found |= {"train.batchnorm": "re-estimate" if late else "running"}
    return found | {"router.start and stop": [int(part * train.epochs + 1e-9) for part in spans]}


def _without_effect(config: RunConfig) -> Iterator[tuple[str, str]]:
    """Settings that differ from their defaults and change nothing beside the others, and why."""
    data = config.data
    if (
        isinstance(data, FilesConfig)
        and data.crop != type(data).model_fields["crop"].default
        and (data.bordered or data.geometry == "none")
    ):
        yield "data.crop", "it is of random resized crops (--set data.augment=crop)"
    begin = "student_weights" if isinstance(config, DistillConfig) else "init_from"
    if getattr(config, "head", "keep") == "replace" and getattr(config, begin) is None:
        yield "head", f"training begins with random weights (--set {begin}=library: with those of the library)"
    if not isinstance(config, DistillConfig):
        return
    parts = config.method.parts
    weights = [config.method.kl_weight, *(part.weight for part in parts if not part.of_logits)]
    if not any(weights) and not any(part.trains_student for part in parts):
        yield f"method {config.method.name}", "its losses have the weight 0"
    if config.teacher.epochs is not None and not config.teacher.pretrain:
        yield "teacher.epochs", "the teacher is not trained here (--pretrain trains one that is missing)"
    if not config.residual.students:
        for key in config.residual.model_dump(exclude_defaults=True):
            yield f"residual.{key}", "there are no residual students (--residual-students N)"


def deviations(job: Job, epoch: int) -> Iterator[str]:
    """What the protocol of a run that ended with this epoch says of its recipe."""
    train = job.config.train
    if train.ema is not None:
        yield "the running average of the weights is what is evaluated and delivered"
    if epoch < train.epochs:
        yield f"ended after epoch {epoch}: {train.patience} without a better {train.metric}"


def _forgets_too_late(job: Job, network: nn.Module) -> float | None:
    """Least momentum of a BatchNorm whose averages still hold much of their start when the run ends; None: of none."""
    momenta = {module.momentum for module in network.modules() if isinstance(module, _BatchNorm)}
    late = [one for one in momenta if one is not None and one < USUAL and (1 - one) ** job.steps > REMAINS]
    return min(late, default=None)


def _trained(network: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}


def _frozen(network: nn.Module, patterns: tuple[str, ...]) -> list[nn.Parameter]:
    """Parameters by patterns of their names, of the names they have in their library, or of their stages."""
    stages = network.infos if isinstance(network, StagedModel) else ()
    parts = {info.name: f"stages.{k}.*" for k, info in enumerate(stages)} | {"head": "head.*"}
    parts = {part: own for part, own in parts.items() if filter_names(_trained(network), own)}
    found: dict[str, nn.Parameter] = {}
    for pattern in patterns:
        names = {name: parameter for name, parameter in _trained(network).items() if _matches(name, pattern, parts)}
        if not names:
            some = ", ".join(list(_trained(network))[:3])
            raise UsageError(
                f"train.freeze: {pattern!r} is no part of the network: {', '.join(parts)}, or a pattern of {some} ..."
            )
        found |= names
    return list(found.values())


def _matches(name: str, pattern: str, parts: dict[str, str]) -> bool:
    pattern, own = parts.get(pattern, pattern), name.split(".", 2)[-1] if name.startswith("stages.") else name
    return fnmatchcase(name, pattern) or fnmatchcase(own, pattern)
