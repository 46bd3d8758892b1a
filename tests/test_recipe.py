"""Every setting of a recipe against a plain PyTorch script; what keeps something is resumed inside of an epoch, too."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from test_ahead import Halt
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import lr_scheduler
from torch.optim.swa_utils import get_ema_multi_avg_fn, update_bn

from sakd_cli.batch import Batch
from sakd_cli.config.datasets import ShapesConfig
from sakd_cli.config.resolve import ConfigSource, nested, resolve
from sakd_cli.config.training import DistillConfig
from sakd_cli.data import table
from sakd_cli.data.dataset import Split
from sakd_cli.data.loader import EvalLoader
from sakd_cli.engine import checkpoint
from sakd_cli.engine.reporter import NullReporter
from sakd_cli.engine.trainer import EvaluationData, Trainer, TrainingOutput
from sakd_cli.errors import Stopped
from sakd_cli.models.cost import Cost
from sakd_cli.rundir import RunDir
from sakd_cli.runs import build
from sakd_cli.runs.build import untrained
from sakd_cli.runs.extension import TrainerFactory, loader_of
from sakd_cli.runs.images import Images
from sakd_cli.runs.job import Job
from sakd_cli.runs.launch import run_extensions
from sakd_cli.runs.phases import training
from sakd_cli.runs.residual_chain import MemberWriter

EPOCHS, STEPS, SIZE = 4, 5, 6  # 30 images
WORDS = {"teacher.source": "resnet8", "student": "resnet8", "method": "kd", "router": "never", "teacher.pretrain": True}
WORDS |= {"data.name": "shapes", "data.train": 200, "data.test": 40, "data.validation": 0.25, "data.classes": 4}
WORDS |= {"train.epochs": EPOCHS, "train.batch_size": SIZE, "train.lr": 0.01, "device": "cpu"}


PRETRAIN = {key: WORDS[key] for key in WORDS if key.startswith(("data", "train", "device"))}


class Plain(NamedTuple):
    """A plain script: optimizer, scheduler and all that is unusual of a step."""

    optimizer: Callable[[nn.Module], torch.optim.Optimizer] = lambda net: torch.optim.SGD(
        net.parameters(), 0.01, 0.9, weight_decay=5e-4
    )
    scheduler: Callable[[torch.optim.Optimizer], Any] = lambda optim: lr_scheduler.MultiStepLR(optim, [10, 15])
    loss: Callable[[nn.Module, Batch], Tensor] = lambda net, batch: F.cross_entropy(net(batch.images), batch.labels)
    clip: Callable[[nn.Module], Any] = lambda net: None
    parts: int = 1
    begin: Callable[[nn.Module, int], Any] = lambda net, epoch: None


def sgd(*groups: tuple[Any, float, float]) -> torch.optim.Optimizer:
    settings = [{"params": list(params), "lr": lr, "weight_decay": decay} for params, lr, decay in groups]
    return torch.optim.SGD(settings, lr=0.01, momentum=0.9)


def of(**settings: Any) -> dict[str, Any]:
    images = ("mixup", "cutmix", "augment", "jitter", "erase")
    return {f"{'data' if key in images else 'train'}.{key}": value for key, value in settings.items()}


def warmed(optim: torch.optim.Optimizer) -> Any:
    rise = lr_scheduler.LinearLR(optim, 0.01, total_iters=STEPS)
    fall = lr_scheduler.CosineAnnealingLR(optim, (EPOCHS - 1) * STEPS, eta_min=0.001)
    return lr_scheduler.SequentialLR(optim, [rise, fall], [STEPS])


def by_dimension(net: nn.Module) -> torch.optim.Optimizer:
    vectors = [p for p in net.parameters() if p.ndim <= 1]
    return sgd(([p for p in net.parameters() if p.ndim > 1], 0.01, 5e-4), (vectors, 0.01, 0.0))


def by_block(net: Any) -> torch.optim.Optimizer:
    """resnet8: a stem, three blocks, the head."""
    stem, *blocks, _ = net.stages
    layers = [stem, *blocks, net.head]
    return sgd(*((layer.parameters(), 0.01 * 0.5 ** (4 - k), 5e-4) for k, layer in enumerate(layers)))


def frozen(net: Any, epoch: int) -> None:
    for part in (net.stages[0], net.stages[1]):
        part.requires_grad_(epoch > 2)
        for module in part.modules():
            if isinstance(module, nn.BatchNorm2d) and epoch <= 2:
                module.eval()


def norms_frozen(net: nn.Module, epoch: int) -> None:
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()


def mixed(net: nn.Module, batch: Batch) -> Tensor:
    """The mixed image and the mixed label, written out image by image."""
    target = F.one_hot(batch.labels, 4) * batch.ratio[:, None] + F.one_hot(batch.other_labels, 4) * (
        1 - batch.ratio[:, None]
    )
    return -(target * F.log_softmax(net(batch.images), dim=1)).sum(dim=1).mean()


def mixed_by_class(net: nn.Module, batch: Batch) -> Tensor:
    """Both labels of a mixed image, smoothed, each by the weight of its class; torch divides by the weights' sum."""
    weights, ratio = torch.tensor([1.0, 2.0, 0.5, 4.0]), batch.ratio
    logs = F.log_softmax(net(batch.images), dim=1)
    above, below = torch.zeros(()), torch.zeros(())
    for labels, share in ((batch.labels, ratio), (batch.other_labels, 1 - ratio)):
        own = F.nll_loss(logs, labels, weights, reduction="none")
        above = above + (share * (0.9 * own - 0.1 * (logs * weights).mean(dim=1))).sum()
        below = below + (share * weights[labels]).sum()
    return above / below


def clipped_both_ways(net: nn.Module) -> None:
    nn.utils.clip_grad_value_(net.parameters(), 0.1)
    nn.utils.clip_grad_norm_([p for p in net.parameters() if p.grad is not None], 0.5)


def adamw_by_block(net: Any) -> torch.optim.Optimizer:
    """Vectors are not decayed."""
    layers = [*net.stages[:4], net.head]
    rates = [(p, 0.01 * 0.7 ** (4 - k)) for k, layer in enumerate(layers) for p in layer.parameters()]
    each_one = [{"params": [p], "lr": lr, "weight_decay": 0.05 * (p.ndim > 1)} for p, lr in rates]
    return torch.optim.AdamW(each_one, betas=(0.8, 0.95), eps=1e-6)


def focal(net: nn.Module, batch: Batch) -> Tensor:
    """Equation 4 of Lin et al. 2017, without alpha."""
    chance = F.softmax(net(batch.images), dim=1)[torch.arange(len(batch.labels)), batch.labels]
    return -((1 - chance) ** 2 * chance.log()).mean()


def each(kind: Callable[..., torch.optim.Optimizer], **settings: Any) -> Plain:
    return Plain(lambda net: kind(net.parameters(), 0.01, weight_decay=5e-4, **settings))


RECIPES: dict[str, tuple[dict[str, Any], Plain]] = {
    "published": ({}, Plain()),
    "nesterov": (of(nesterov=True), each(torch.optim.SGD, momentum=0.9, nesterov=True)),
    **{
        name.lower(): (of(optimizer=name.lower()), each(getattr(torch.optim, name)))
        for name in ("Adam", "AdamW", "Adamax", "NAdam", "RAdam", "Adagrad", "Adadelta", "Adafactor", "ASGD")
    },
    "rmsprop": (of(optimizer="RMSprop"), each(torch.optim.RMSprop, momentum=0.9)),
    "rprop": (of(optimizer="rprop"), Plain(lambda net: torch.optim.Rprop(net.parameters(), 0.01))),
    "betas": (
        of(optimizer="adamw", betas=(0.8, 0.95), eps=1e-6),
        each(torch.optim.AdamW, betas=(0.8, 0.95), eps=1e-6),
    ),
    "timm": (
        of(optimizer="timm/lamb"),
        Plain(lambda net: __import__("timm.optim").optim.Lamb(net.parameters(), 0.01, weight_decay=5e-4)),
    ),
    "timm, looked ahead": (
        of(optimizer="timm/lookahead_lamb", schedule="constant"),
        Plain(
            lambda net: __import__("timm.optim").optim.create_optimizer_v2(
                [{"params": list(net.parameters()), "lr": 0.01, "weight_decay": 5e-4}], "lookahead_lamb", 0.01
            ),
            lambda o: lr_scheduler.ConstantLR(o.__dict__["_base_optimizer"], 1.0),
        ),
    ),
    "milestones": (
        of(milestones=[1], lr_decay=0.2),
        Plain(scheduler=lambda o: lr_scheduler.MultiStepLR(o, [5], 0.2)),
    ),
    "cosine": (of(schedule="cosine"), Plain(scheduler=lambda o: lr_scheduler.CosineAnnealingLR(o, EPOCHS * STEPS))),
    "warm-up": (of(schedule="cosine", warmup_epochs=1, min_lr=0.001), Plain(scheduler=warmed)),
    "one-cycle": (
        of(schedule="one-cycle"),
        Plain(scheduler=lambda o: lr_scheduler.OneCycleLR(o, 0.01, EPOCHS * STEPS, cycle_momentum=False)),
    ),
    "constant": (of(schedule="constant"), Plain(scheduler=lambda o: lr_scheduler.ConstantLR(o, 1.0))),
    "no decay of norms": (of(norm_decay=False), Plain(by_dimension)),
    "layer-wise decay": (of(layer_decay=0.5), Plain(by_block)),
    "clipped norm": (of(clip_norm=0.5), Plain(clip=lambda net: nn.utils.clip_grad_norm_(net.parameters(), 0.5))),
    "clipped values": (of(clip_value=0.01), Plain(clip=lambda net: nn.utils.clip_grad_value_(net.parameters(), 0.01))),
    "accumulation": (of(accumulate=3), Plain(parts=3)),
    "accumulation of the whole batch": (of(accumulate=3, batchnorm="frozen"), Plain(begin=norms_frozen)),
    "label smoothing": (
        of(label_smoothing=0.1),
        Plain(loss=lambda net, b: F.cross_entropy(net(b.images), b.labels, label_smoothing=0.1)),
    ),
    "class weights": (
        of(class_weights=(1.0, 2.0, 0.5, 4.0)),
        Plain(loss=lambda net, b: F.cross_entropy(net(b.images), b.labels, torch.tensor([1.0, 2.0, 0.5, 4.0]))),
    ),
    "focal loss": (of(focal_gamma=2.0), Plain(loss=focal)),
    "balanced sampling": ({"data.balance": "balanced"}, Plain()),
    "repeated-factor sampling": ({"data.balance": "repeated-factor", "data.balance_threshold": 0.5}, Plain()),
    "mixup": (of(mixup=0.8), Plain(loss=mixed)),
    "cutmix": (of(cutmix=1.0), Plain(loss=mixed)),
    "mixup and cutmix": (of(mixup=0.2, cutmix=1.0), Plain(loss=mixed)),
    **{policy: (of(augment=policy), Plain()) for policy in ("randaugment", "autoaugment", "trivialaugment")},
    "jitter and erasing": (of(jitter=0.4, erase=0.5), Plain()),
    "frozen": (of(freeze=["stem", "stages.1.*"], freeze_epochs=2), Plain(begin=frozen)),
    "drop path": (of(drop_path=0.5) | {"student": "timm/test_resnet"}, Plain()),
    "norms frozen": (of(batchnorm="frozen"), Plain(begin=norms_frozen)),
    "norms re-estimated": (of(batchnorm="re-estimate"), Plain()),
    "average": (of(ema=0.9), Plain()),
    "much at once": (
        of(optimizer="adamw", betas=(0.8, 0.95), eps=1e-6, weight_decay=0.05, norm_decay=False, layer_decay=0.7)
        | of(schedule="constant", clip_norm=0.5, clip_value=0.1, accumulate=3, ema=0.9, freeze=["stem", "stages.1.*"])
        | of(freeze_epochs=2, label_smoothing=0.1, class_weights=(1.0, 2.0, 0.5, 4.0), mixup=0.8, cutmix=1.0),
        Plain(
            adamw_by_block,
            lambda o: lr_scheduler.ConstantLR(o, 1.0),
            mixed_by_class,
            clipped_both_ways,
            parts=3,
            begin=frozen,
        ),
    ),
}


DRAWN = cache(partial(table.load, ShapesConfig(train=200, test=40, classes=4)))


@pytest.fixture(autouse=True)
def _float64(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """And nothing is computed twice that is the same for all."""
    monkeypatch.setattr(table, "load", lambda config: DRAWN())
    monkeypatch.setattr(build, "cost", lambda *given: Cost(1, 1))
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def job_of(words: dict[str, Any]) -> Job:
    config = resolve("distill", [ConfigSource("test", nested(WORDS | words))]).config
    assert isinstance(config, DistillConfig)
    _, job = untrained(config)
    run_extensions(job)
    images = job.images
    train, held_out, test = (small(split) for split in (images.train, images.held_out, images.dataset.test))
    return replace(job, images=Images(replace(images.dataset, padding=1, test=test), train, held_out))


def small(split: Split | None) -> Split:
    """8 pixels a side, for speed."""
    assert split is not None
    return replace(split, images=split.pixels[..., ::4, ::4].contiguous())


def trainer_of(job: Job, folder: Path, reporter: Any = None) -> Trainer:
    folder.mkdir(exist_ok=True)
    data, reporter = job.images.dataset, reporter or NullReporter()
    batches = EvalLoader(job.images.held_out, data, device=job.device)
    evaluation = EvaluationData("validation", batches, batches, len(data.classes))
    factory = TrainerFactory(RunDir(folder), evaluation, reporter)
    return next(training(job, "train", TrainingOutput(evaluation, MemberWriter(job.network, job.card)), factory))


def scripted(net: nn.Module, plain: Plain, job: Job) -> dict[str, Tensor]:
    """The weights after training by hand, and their average where `train.ema` asks for one."""
    optim, decay = plain.optimizer(net), job.config.train.ema
    scheduler, average = plain.scheduler(optim), copy.deepcopy(net).state_dict()
    loader = loader_of(job)
    for epoch in range(1, EPOCHS + 1):
        net.train()
        plain.begin(net, epoch)
        for batch in loader.epoch(epoch):
            optim.zero_grad()
            rows = torch.arange(len(batch.labels)).tensor_split(plain.parts)
            for part in (batch.map(lambda x, own=own: x[own]) for own in rows):
                (plain.loss(net, part) * len(part.labels) / len(batch.labels)).backward()
            plain.clip(net)
            optim.step()
            scheduler.step()
            if decay is not None:
                own = [(average[name], x) for name, x in net.state_dict().items() if x.is_floating_point()]
                get_ema_multi_avg_fn(decay)(*map(list, zip(*own, strict=True)), 1)
    return net.state_dict() | (average if decay is not None else {})


@pytest.mark.parametrize("name", RECIPES)
def test_the_weights_after_20_steps_are_those_of_a_plain_script(name: str, tmp_path: Path) -> None:
    words, plain = RECIPES[name]
    job = job_of(words)
    torch.manual_seed(1)  # of what layers draw
    expected = scripted(copy.deepcopy(job.network), plain, job)
    trainer = trainer_of(job, tmp_path)
    torch.manual_seed(1)
    figures = trainer.fit()
    assert trainer.step == 20
    assert ("trained" in figures) == (name in ("average", "much at once", "norms re-estimated"))
    statistics = name == "norms re-estimated"
    for key, ours in job.network.state_dict().items():
        if ours.is_floating_point() and not (statistics and "running" in key):
            torch.testing.assert_close(ours, expected[key], rtol=1e-10, atol=1e-12)


def test_re_estimated_statistics_are_those_of_torchs_update_bn(tmp_path: Path) -> None:
    job = job_of(of(batchnorm="re-estimate"))
    trainer = trainer_of(job, tmp_path)
    trainer.fit()
    again = copy.deepcopy(job.network)
    update_bn((batch.images for batch in loader_of(job).epoch(1)), again)
    for ours, theirs in zip(job.network.state_dict().values(), again.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs)


# Of these nothing is kept between two steps but the optimizer's own, which others prove.
FORGETFUL = {"milestones", "cosine", "constant", "no decay of norms", "layer-wise decay", "clipped norm"}
FORGETFUL |= {"clipped values", "label smoothing", "class weights", "focal loss", "norms frozen"}


@pytest.mark.parametrize("name", [name for name in RECIPES if name not in FORGETFUL])
def test_a_run_that_was_stopped_inside_of_an_epoch_goes_on_bit_for_bit(name: str, tmp_path: Path) -> None:
    words = RECIPES[name][0] | {"train.epochs": 2}
    torch.set_default_dtype(torch.float32)
    whole = trainer_of(job_of(words), tmp_path / "whole")
    torch.manual_seed(1)
    figures = whole.fit()
    halted = trainer_of(job_of(words), tmp_path / "halted", Halt(7))
    torch.manual_seed(1)
    with pytest.raises(Stopped):
        halted.fit()
    again = trainer_of(job_of(words), tmp_path / "halted")
    again.resume(checkpoint.read(tmp_path / "halted" / "checkpoints" / "last"))
    assert again.step == 7
    found = again.fit()
    assert {key: found[key] for key in ("last", "best")} == {key: figures[key] for key in ("last", "best")}
    ours, theirs = again._tensors(), whole._tensors()
    assert ours.keys() == theirs.keys()
    assert not [key for key in ours if not torch.equal(ours[key], theirs[key])]
    assert all(map(torch.equal, again.task.network.state_dict().values(), whole.task.network.state_dict().values()))
