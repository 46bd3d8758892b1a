"""What a recipe does to images, routing and the run's end; and what of it cannot be, each in one line."""

import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from emulator import Called, Emulator
from test_idle import heard
from test_imagefolder import folder, loaded, train
from test_recipe import PRETRAIN, STEPS, _float64, job_of, of, trainer_of
from torch import nn
from torchvision.transforms import v2

from sakd_cli.batch import Batch
from sakd_cli.cli.console import ConsoleReporter
from sakd_cli.config.resolve import ConfigSource, nested, resolve, set_sources
from sakd_cli.engine.evaluate import score_logits
from sakd_cli.engine.graphs import Capturer, GraphedStep
from sakd_cli.engine.optim import Optimizer
from sakd_cli.engine.recorder import Rows, SpotRecorder
from sakd_cli.engine.task import SpotUse
from sakd_cli.engine.trainer import Trainer
from sakd_cli.errors import UsageError
from sakd_cli.models.table import create
from sakd_cli.runs import build
from sakd_cli.runs.extension import loader_of
from sakd_cli.runs.launch import try_one_batch
from sakd_cli.runs.recipe import control_of, notes, require_same_length, undecayed
from sakd_cli.tasks.criterion import Criterion

__all__ = ["_float64"]  # the fixture of both files


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
    "unknown optimizer of timm 'lamp'; did you mean 'lamb'": of(optimizer="timm/lamp") | {"train.lr": None},
    "train.optimizer: timm/kron needs second derivatives": of(optimizer="timm/kron"),
    "train.optimizer: timm/lookahead_kron needs second": of(optimizer="timm/lookahead_kron"),
    "timm/adamw makes no use of momentum": of(optimizer="timm/adamw", momentum=0.5),
    "timm/lion makes no use of eps": of(optimizer="timm/lion", eps=1e-6),
    "nesterov belongs to sgd": of(optimizer="adam", nesterov=True),
    "betas belong to adam": of(betas=(0.9, 0.99)),
    "betas.0: must be less than 1": of(optimizer="adamw", betas=(1.0, 0.9)),
    "eps belong to adam, adamw, adamax, nadam, radam, rmsprop, adagrad, adadelta, not to sgd": of(eps=1e-6),
    "adadelta, not to adafactor": of(optimizer="adafactor", eps=1e-6),
    "momentum belongs to sgd, rmsprop, not to adamw": of(optimizer="adamw", momentum=0.5),
    "nesterov belongs to sgd, not to timm/sgd": of(optimizer="timm/sgd", nesterov=True),
    "asgd, not to rprop": of(optimizer="rprop", weight_decay=0.1),
    "lr_decay belongs to schedule step, not to one-cycle": of(schedule="one-cycle", lr_decay=0.5),
    "train.min_lr: 0.02 is above 0.01": of(schedule="cosine", min_lr=0.02),
    "router: warmup_epochs 4 must be fewer": {"router": {"name": "adaptive", "warmup_epochs": 4}},
    "router: momentum belongs to": {"router": {"name": "soft", "optimizer": "adam", "momentum": 0.5}},
    "randaugment has the operations and magnitude of augment=randaugment": {"data.randaugment": (3, 9)},
    "train.class_weights: all are 0": of(class_weights=(0, 0, 0, 0)),
    "train.class_weights: -1 for class 2 is no number from 0 up": of(class_weights=(1, -1, 1, 1)),
    "data.mixup: is 0, or from 0.05 to 1000": of(mixup=1e-9),
    "train.weight_decay: is a number beyond 3.4e38": of(weight_decay=1e300),
    "combine draw is of several teachers": {"teacher.combine": "draw"},
    "train.freeze: method ab trains the whole student": of(freeze=["stem"]) | {"method": "kd+ab", "router": "always"},
    "train.batchnorm: method fsp trains": of(batchnorm="frozen") | {"method": "fsp", "router": "always"},
    "milestones belong to schedule step": of(schedule="cosine", milestones=[2]),
    "warmup_epochs 4 must be fewer": of(warmup_epochs=4),
    "'stage9' is no part of the network: stem, stage1": of(freeze=["stage9"]),
    "'pool' is no part of the network: stem, stage1, stage2, stage3, head, or": of(freeze=["stem", "pool"]),
    "accumulate 4: a batch of 6 has at most 3 parts, of two images or more": of(accumulate=4),
    "leaves nothing of the network to train": of(freeze=["*"]),
    "freeze_epochs needs freeze": of(freeze_epochs=1),
    "train.drop_path: resnet8 has no stochastic depth": of(drop_path=0.1),
    "train.patience: there are no validation images": of(patience=1) | {"data.validation": 0},
    "augment crop is of pictures in files": of(augment="crop"),
    "did you mean 'train.warmup_epochs'": of(warmup_epoch=1),
    "here it is 'train.clip_norm'": of(clip_grad=1),
    "here it is 'train.ema'": of(model_ema=0.9),
    "here it is 'train.accumulate'": of(grad_accum_steps=2),
    "did you mean 'train.class_weights'": {"data.class_weights": "balanced"},
    "did you mean 'data.mixup'": {"train.mixup": 0.2},
    "did you mean 'data.cutmix'": {"data.cut_mix": 1},
}


@pytest.mark.parametrize("text", REFUSED)
def test_what_cannot_be_is_refused_in_one_line_before_anything_is_trained(text: str) -> None:
    with pytest.raises(UsageError) as refused:
        job_of(REFUSED[text])
    assert text in refused.value.message
    assert "\n" not in refused.value.message


def test_what_is_frozen_keeps_its_statistics_where_others_are_estimated_anew(tmp_path: Path) -> None:
    """With all frozen in the first epoch nothing is changed by it."""
    job = job_of(of(freeze=["*"], freeze_epochs=1, batchnorm="re-estimate", epochs=2))
    began = {name: tensor.clone() for name, tensor in job.network.state_dict().items()}
    trainer = trainer_of(job, tmp_path)
    trainer._one_epoch(1)
    with trainer._delivered():
        assert all(torch.equal(began[name], tensor) for name, tensor in job.network.state_dict().items())
    trainer._one_epoch(2)
    with trainer._delivered():
        assert all(not torch.equal(began[name], tensor) for name, tensor in job.network.state_dict().items())


def test_a_batch_of_classes_that_weigh_nothing_teaches_nothing() -> None:
    """The cross-entropy of images whose classes weigh nothing is 0, and has a gradient of 0."""
    logits = torch.randn(3, 2, requires_grad=True)
    batch = Batch(logits, torch.zeros(3, dtype=torch.int64), torch.arange(3), logits)
    loss = Criterion(torch.tensor([0.0, 1.0]))(logits, batch)
    loss.backward()
    assert not loss.any()
    assert logits.grad is not None
    assert not logits.grad.any()


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


@pytest.mark.parametrize("momentum", [0.01, 0.0])
def test_statistics_are_re_estimated_where_their_momentum_is_too_small(momentum: float) -> None:
    config = resolve("pretrain", [ConfigSource("test", nested(PRETRAIN | {"model": "resnet8"}))]).config
    job = build.build(config)
    assert not notes(job)
    for norm in [module for module in job.network.modules() if isinstance(module, nn.BatchNorm2d)]:
        norm.momentum = momentum
    assert f"BatchNorm in resnet8 has momentum {momentum:g}, too little for a run of 20 steps" in notes(job)[0]
    assert control_of(job, job.task).delivered is not None


@pytest.mark.parametrize("router", ["adaptive", "always"])
def test_a_step_with_all_of_it_is_replayed_by_a_graph(
    router: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole batches of three parts, mixed; the rate changes in every step, the frozen part after the first epoch."""
    torch.set_default_dtype(torch.float32)
    monkeypatch.setattr("sakd_cli.engine.optim.updates_on_device", lambda parameter: True)
    monkeypatch.setattr("sakd_cli.engine.graphs.WARMUP", 1)
    words = of(optimizer="adamw", schedule="cosine", clip_norm=1.0, clip_value=0.1, accumulate=3, mixup=0.2, cutmix=1.0)
    words |= of(ema=0.9, freeze=["stem"], freeze_epochs=1, label_smoothing=0.1, layer_decay=0.7, norm_decay=False)
    words |= {"method": "fitnet", "router": router, "runtime.shapes": "static"}

    def trained(device: Capturer) -> tuple[Trainer, list[str]]:
        trainer = trainer_of(job_of(words), tmp_path / type(device).__name__)
        trainer._advance = GraphedStep(trainer._advance, device, trainer._constants, trainer._refuse_graph)
        trainer.guard.every_step = False
        with heard() as names:
            for epoch in (1, 2):
                trainer._train(epoch)
        return trainer, names

    emulator = Emulator()
    (called, _), (recorded, names) = trained(Called()), trained(emulator)
    assert (len(emulator.tapes), emulator.replays) == (2, 6), "one for each epoch, behind a called step"
    assert not [fault for tape in emulator.tapes for fault in tape.faults]
    assert names == ["item", "tolist"] * 2, "at log points alone"
    ours, theirs = recorded._tensors(), called._tensors()
    assert not [name for name in theirs if not torch.equal(ours[name], theirs[name])]


def test_both_sets_of_weights_are_said_on_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.set_default_dtype(torch.float32)
    trainer_of(job_of(of(ema=0.5)), tmp_path, ConsoleReporter(quiet=False)).fit()
    told = capsys.readouterr().err
    assert told.count("as trained  top-1") == 4
    assert told.count("validation  top-1") == 4


@pytest.mark.parametrize("geometry", ["crop", "border"])
def test_files_are_changed_alike_whoever_reads_them(geometry: str, tmp_path: Path) -> None:
    """One by one or in batches, in this process or in another; an epoch may be taken up in its middle."""
    torch.set_default_dtype(torch.float32)
    root = folder(tmp_path, {"": 6})
    given = {"augment": [geometry, "trivialaugment"], "jitter": 0.4, "erase": 0.5, "validation": 0.1}

    def shown(start: int, **feed: Any) -> list[torch.Tensor]:
        loader = train(loaded(root, **given, **feed), batch_size=5)
        return [batch.images for batch in loader.epoch(2, start)]

    files = shown(0, cache=False)
    assert all(map(torch.equal, shown(1, cache=False, workers=1), files[1:]))
    cached = shown(0, cache=True)
    assert torch.stack([(a - b).abs().mean() for a, b in zip(cached, files, strict=True)]).max() < 0.05


@pytest.mark.parametrize("text", ["*.bias", "[*.bias]", "*.bias,stem", "stem,*.bias", "[stem, *.bias]", '["*.bias"]'])
def test_patterns_need_no_quotes_of_yaml(text: str) -> None:
    names = set(text.strip("[]").replace(" ", "").replace('"', "").split(","))
    below = ConfigSource("test", nested(PRETRAIN | {"model": "resnet8"}))
    config = resolve("pretrain", [below, *set_sources([f"train.freeze={text}"])]).config
    assert set(config.train.freeze) == names


LATE = "teacher.epochs has no effect: the teacher is not trained here (--pretrain trains one that is missing)"


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"train.patience": 2}, "train.patience=2 ends no run of 3 epochs early"),
        ({"train.patience": 1}, None),
        (
            {"train.freeze": ["stem"], "train.freeze_epochs": 3},
            "train.freeze_epochs=3: what is frozen stays so for all 3 epochs",
        ),
        ({"train.freeze": ["stem"], "train.freeze_epochs": 2}, None),
        ({"teacher.epochs": 2, "teacher.pretrain": False}, LATE),
        ({"teacher.epochs": 2}, None),
        ({"head": "replace"}, "head has no effect: training begins with random weights (--set student_weights=library"),
        ({"residual.alpha": 0.5}, "residual.alpha has no effect: there are no residual students"),
        ({"method": {"name": "kd", "kl_weight": 0}}, "method kd has no effect: its losses have the weight 0"),
    ],
)
def test_settings_that_change_nothing_are_told(settings: dict[str, Any], told: str | None) -> None:
    found = notes(job_of({"train.epochs": 3} | settings))
    assert [note.startswith(told) for note in found] == [True] if told else not found


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (
            of(lr_decay=1.0) | {"router": {"name": "adaptive", "weight_decay": 2.0}},
            "router.lr: 4e-05 in a run of 2 epochs",
        ),
        ({"router": "scheduled"}, "router.start and stop: [0, 1] in a run of 2 epochs and [0, 2] in one of 4, so"),
        ({"student": "torchvision/mobilenet_v3_small", "router": "always"}, "train.batchnorm: re-estimate in a run"),
        ({}, ""),
    ],
)
def test_a_run_whose_automatic_values_follow_from_its_length_is_not_extended(
    settings: dict[str, Any], told: str
) -> None:
    """Its first epochs were not those of the longer run."""
    before, longer = 2, 100 if told.startswith("train.batchnorm") else 4
    job = job_of(settings | {"train.epochs": longer, "train.milestones": [1]})
    train = job.config.train.model_copy(update={"epochs": before})
    with pytest.raises(UsageError, match=re.escape(told)) if told else nullcontext():
        require_same_length(job, job.config.model_copy(update={"train": train}))


@pytest.mark.parametrize(("augment", "said"), [("auto", True), ("none", True), ("crop", False)])
def test_a_crop_that_nothing_is_cropped_by_is_told(augment: str, said: bool, tmp_path: Path) -> None:
    data = {"name": "imagefolder", "root": str(folder(tmp_path, {"": 10})), "size": 16, "crop": [0.5, 1.0]}
    settings = {"data": data | {"augment": augment}, "model": "resnet8", "device": "cpu"}
    job = build.build(resolve("pretrain", [ConfigSource("test", settings)]).config)
    assert any("data.crop has no effect" in note for note in notes(job)) == said


@pytest.mark.parametrize(
    ("name", "side"),
    [
        ("vit_tiny_patch16_224", 32),
        ("swinv2_tiny_window8_256", 64),
        ("coat_tiny", 32),
        ("tnt_s_patch16_224", 32),
        ("tiny_vit_5m_224", 32),
        ("xcit_nano_12_p16_224", 32),
    ],
)
def test_what_is_not_decayed_is_timms_own_list(name: str, side: int) -> None:
    torch.set_default_dtype(torch.float32)
    network = create(f"timm/{name}", 4, side)
    # Before that its own list of swinv2 names modules, not their weights.
    timms: Any = pytest.importorskip("timm", minversion="1.0.31").create_model(name, num_classes=4)
    kept = timms.no_weight_decay()
    expected = [p for key, p in timms.named_parameters() if p.ndim <= 1 or key in kept or key.endswith(".bias")]
    ours = {*undecayed(network), *(p for p in network.parameters() if p.ndim <= 1)}
    assert len(ours) == len(expected)


def test_a_plan_counts_what_is_ever_trained() -> None:
    counts = []
    for freeze, epochs in (((), None), (("stem", "stage1"), None), (("stem", "stage1"), 1)):
        settings = PRETRAIN | {"model": "resnet8", "train.freeze": freeze, "train.freeze_epochs": epochs}
        job = build.build(resolve("pretrain", [ConfigSource("test", nested(settings))]).config)
        counts.append(try_one_batch(job).trainable["network"])
    frozen = sum(p.numel() for stage in job.network.stages[:2] for p in stage.parameters())
    assert counts == [counts[0], counts[0] - frozen, counts[0]]
