"""Every setting of a recipe against a plain PyTorch script, and every one of them resumed inside of an epoch."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from test_ahead import Halt
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import lr_scheduler
from torch.optim.swa_utils import get_ema_multi_avg_fn, update_bn
from torchvision.transforms import v2

from sakd_cli.batch import Batch
from sakd_cli.config.resolve import ConfigSource, nested, resolve
from sakd_cli.config.training import DistillConfig
from sakd_cli.data.dataset import Split
from sakd_cli.data.loader import EvalLoader
from sakd_cli.engine import checkpoint
from sakd_cli.engine.evaluate import score_logits
from sakd_cli.engine.optim import Optimizer
from sakd_cli.engine.recorder import Rows, SpotRecorder
from sakd_cli.engine.reporter import NullReporter
from sakd_cli.engine.task import SpotUse
from sakd_cli.engine.trainer import EvaluationData, Trainer, TrainingOutput
from sakd_cli.errors import Stopped, UsageError
from sakd_cli.rundir import RunDir
from sakd_cli.runs import build
from sakd_cli.runs.extension import TrainerFactory, loader_of
from sakd_cli.runs.images import Images
from sakd_cli.runs.job import Job
from sakd_cli.runs.launch import FolderWriter, _untrained, run_extensions
from sakd_cli.runs.phases import training
from sakd_cli.runs.recipe import control_of, notes

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
    "milestones": (
        of(milestones=[1, 3], lr_decay=0.2),
        Plain(scheduler=lambda o: lr_scheduler.MultiStepLR(o, [5, 15], 0.2)),
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
    "mixup": (of(mixup=0.8), Plain(loss=mixed)),
    "cutmix": (of(cutmix=1.0), Plain(loss=mixed)),
    "mixup and cutmix": (of(mixup=0.2, cutmix=1.0), Plain(loss=mixed)),
    **{policy: (of(augment=policy), Plain()) for policy in ("randaugment", "autoaugment", "trivialaugment")},
    "jitter and erasing": (of(jitter=0.4, erase=0.5), Plain()),
    "frozen": (of(freeze=["stem", "stages.1.*"], freeze_epochs=2), Plain(begin=frozen)),
    "norms frozen": (of(batchnorm="frozen"), Plain(begin=norms_frozen)),
    "norms re-estimated": (of(batchnorm="re-estimate"), Plain()),
    "average": (of(ema=0.9), Plain()),
}


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def job_of(words: dict[str, Any]) -> Job:
    config = resolve("distill", [ConfigSource("test", nested(WORDS | words))]).config
    assert isinstance(config, DistillConfig)
    _, job = _untrained(config)
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
    return next(training(job, "train", TrainingOutput(evaluation, FolderWriter(job, {}, [], None)), factory))


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
    expected = scripted(copy.deepcopy(job.network), plain, job)
    trainer = trainer_of(job, tmp_path)
    figures = trainer.fit()
    assert trainer.step == 20
    assert ("trained" in figures) == (name in ("average", "norms re-estimated"))
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


@pytest.mark.parametrize("name", RECIPES)
def test_a_run_that_was_stopped_inside_of_an_epoch_goes_on_bit_for_bit(name: str, tmp_path: Path) -> None:
    words, _ = RECIPES[name]
    torch.set_default_dtype(torch.float32)
    whole = trainer_of(job_of(words), tmp_path / "whole")
    figures = whole.fit()
    with pytest.raises(Stopped):
        trainer_of(job_of(words), tmp_path / "halted", Halt(7)).fit()
    again = trainer_of(job_of(words), tmp_path / "halted")
    again.resume(checkpoint.read(tmp_path / "halted" / "checkpoints" / "last"))
    assert again.step == 7
    found = again.fit()
    assert {key: found[key] for key in ("last", "best")} == {key: figures[key] for key in ("last", "best")}
    ours, theirs = again._tensors(), whole._tensors()
    assert ours.keys() == theirs.keys()
    assert not [key for key in ours if not torch.equal(ours[key], theirs[key])]
    assert all(map(torch.equal, again.task.network.state_dict().values(), whole.task.network.state_dict().values()))


@pytest.mark.parametrize(
    "settings", [{"augment": "randaugment"}, {"augment": "autoaugment"}, {"jitter": 0.4, "erase": 1.0}]
)
def test_changed_images_are_torchvisions(settings: dict[str, Any]) -> None:
    """Four in a row are changed by one call, whatever the batches are; torch's own generator is not touched."""
    loaders = [loader_of(job_of(of(**given))) for given in ({}, settings)]
    state = torch.get_rng_state()
    plain, changed = (torch.cat([batch.images for batch in loader.epoch(2)]) for loader in loaders)
    assert torch.equal(torch.get_rng_state(), state)
    data = loaders[0]._dataset
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (data.mean, data.std))
    pixels = ((plain * std + mean) * 255).round().to(torch.uint8)
    fill = [round(255 * value) for value in data.mean]
    policies = {
        "randaugment": v2.RandAugment(2, 9, interpolation=v2.InterpolationMode.BILINEAR),
        "autoaugment": v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10, v2.InterpolationMode.BILINEAR),
    }
    own = v2.Compose([v2.ColorJitter(0.4, 0.4, 0.4), v2.RandomErasing(1.0, value=fill)])
    transform = policies.get(settings.get("augment", ""), own)
    seeds = loaders[1]._seeds(2)
    assert len(set(seeds)) == len(seeds) // 4 + 1
    for first in range(0, len(seeds), 4):
        torch.manual_seed(seeds[first])
        expected = (transform(pixels[first : first + 4]).double() / 255 - mean) / std
        torch.testing.assert_close(changed[first : first + 4], expected)


def test_a_mixed_image_is_two_by_their_shares_and_counts_for_both() -> None:
    loader = loader_of(job_of(of(mixup=1.0, cutmix=1.0)))
    single = {
        int(k): x for batch in loader_of(job_of({})).epoch(1) for k, x in zip(batch.index, batch.images, strict=True)
    }
    for batch in loader.epoch(1):
        pairs = zip(batch.images, batch.index, batch.other_index, batch.ratio, strict=True)
        for image, one, other, ratio in pairs:
            ours, theirs = single[int(one)], single[int(other)]
            blended = torch.allclose(image, ratio * ours + (1 - ratio) * theirs)
            kept = (image == ours).all(dim=0).double().mean()
            assert blended or kept >= ratio - 1e-9
            assert ((image == ours) | (image == theirs)).all() or blended
    recorder = SpotRecorder([("logits", "logits")], 4, 3, torch.device("cpu"))
    rows = Rows(*map(torch.tensor, ([0, 1], [0, 1], [0.75, 0.5], [1, 2], [1, 2])))
    recorder.add(SpotUse(torch.tensor([[1.0, 0.0]]), None, {}), rows)
    record = recorder.by_sample()
    assert record["visits"].tolist() == [0.75, 0.75, 0.5]
    assert record["distilled"][:, 0].tolist() == [0.75, 0.25, 0.0]


REFUSED = {
    "method crd keeps one row per image": of(mixup=0.2) | {"method": "crd"},
    "method dkd sets the one class": of(cutmix=1.0) | {"method": "dkd"},
    "method cc compares neighbours": of(mixup=0.2) | {"method": "cc", "router": "always"},
    "router wsld compares both networks on the one label": of(mixup=0.2) | {"router": "wsld"},
    "router teacher-correct asks whether": of(mixup=0.2) | {"router": "teacher-correct"},
    "data.mixup: teacher.cache has": of(mixup=0.2) | {"teacher.cache": True},
    "data.augment: changes images in more ways": of(augment="randaugment") | {"teacher.cache": True},
    "unknown optimizer 'adm'; did you mean 'adam'": of(optimizer="adm"),
    "train.optimizer: timm/nothing": of(optimizer="timm/nothing"),
    "train.lr: missing, and timm/lamb has no usual one": of(optimizer="timm/lamb") | {"train.lr": None},
    "nesterov belongs to sgd": of(optimizer="adam", nesterov=True),
    "betas belong to adam": of(betas=(0.9, 0.99)),
    "milestones belong to schedule step": of(schedule="cosine", milestones=[2]),
    "warmup_epochs 4 must be fewer": of(warmup_epochs=4),
    "'stage9' is no part of the network: stem, stage1": of(freeze=["stage9"]),
    "leaves nothing of the network to train": of(freeze=["*"]),
    "freeze_epochs needs freeze": of(freeze_epochs=1),
    "train.drop_path: resnet8 has no stochastic depth": of(drop_path=0.1),
    "train.patience: there are no validation images": of(patience=1) | {"data.validation": 0},
    "augment crop is of pictures in files": of(augment="crop"),
    "did you mean 'train.warmup_epochs'": of(warmup_epoch=1),
    "here it is 'train.clip_norm'": of(clip_grad=1),
    "here it is 'train.ema'": of(model_ema=0.9),
    "here it is 'train.accumulate'": of(grad_accum_steps=2),
    "did you mean 'data.mixup'": {"train.mixup": 0.2},
    "did you mean 'data.cutmix'": {"data.cut_mix": 1},
}


@pytest.mark.parametrize("text", REFUSED)
def test_what_cannot_be_is_refused_in_one_line_before_anything_is_trained(text: str) -> None:
    with pytest.raises(UsageError) as refused:
        job_of(REFUSED[text])
    assert text in refused.value.message
    assert "\n" not in refused.value.message


def test_a_run_ends_when_its_metric_gets_no_better(tmp_path: Path) -> None:
    trainer = trainer_of(job_of(of(patience=1, metric="macro_f1", lr=1e-12)), tmp_path)
    figures = trainer.fit()
    assert (trainer.epoch, figures["last"]["epoch"], trainer.best["epoch"]) == (2, 2, 1)
    lines = [line for line in trainer.run.lines("metrics.jsonl") if line["kind"] == "eval"]
    assert [line["epoch"] for line in lines] == [1, 2]
    assert lines[0]["macro_f1"] == pytest.approx(trainer.best["value"], abs=1e-3)


def test_metrics_of_unequal_classes() -> None:
    """Answers 0 0 0 1 of labels 0 0 1 1: recalls 1 and 1/2, F1 0.8 and 2/3; class 2 has no images."""
    logits = torch.eye(3)[[0, 0, 0, 1]] * 9
    scores = score_logits([(logits, torch.tensor([0, 0, 1, 1]))], 3)
    assert scores.value("top1") == 75
    assert scores.value("balanced_accuracy") == 75
    assert scores.value("macro_f1") == pytest.approx(100 * (0.8 + 2 / 3) / 2)
    assert scores.value("nll") == -scores.loss


def test_the_routers_group_has_settings_of_its_own(tmp_path: Path) -> None:
    words = of(optimizer="adamw", schedule="cosine", clip_norm=1.0, norm_decay=False)
    own = {
        "optimizer": "sgd",
        "schedule": "constant",
        "lr": 0.02,
        "momentum": 0.5,
        "norm_decay": True,
        "clip_norm": 2.0,
    }
    job = job_of(words | {"router": {"name": "adaptive"} | own})
    optimizer = trainer_of(job, tmp_path).optimizer
    assert isinstance(optimizer, Optimizer)
    optimizer.begin_step(10, STEPS)
    (adamw, _), (sgd, _) = optimizer.parts
    assert (type(adamw), type(sgd)) == (torch.optim.AdamW, torch.optim.SGD)
    assert [(group["lr"], group["weight_decay"]) for group in adamw.param_groups] == [(0.005, 5e-4), (0.005, 0)]
    assert [(group["lr"], group["weight_decay"]) for group in sgd.param_groups] == [(0.02, 1e-3)]
    assert [settings.clip_norm for settings, _ in optimizer._clipped] == [1.0, 2.0]


def test_statistics_are_re_estimated_where_their_momentum_is_too_small(tmp_path: Path) -> None:
    config = resolve("pretrain", [ConfigSource("test", nested(PRETRAIN | {"model": "resnet8"}))]).config
    job = build.build(config)
    assert not notes(job)
    for norm in [module for module in job.network.modules() if isinstance(module, nn.BatchNorm2d)]:
        norm.momentum = 0.01
    assert "BatchNorm in resnet8 has momentum 0.01, too little for a run of 20 steps" in notes(job)[0]
    assert control_of(job, job.task).delivered is not None
