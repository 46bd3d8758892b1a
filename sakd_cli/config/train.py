"""How networks are trained, as settings: the section `train` of every run, and its learning rates as pure functions."""

import math
from collections.abc import Callable
from contextlib import suppress
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    model_validator,
)
from yaml import YAMLError

from sakd_cli.config.base import Config, own_name
from sakd_cli.errors import unknown, unreadable
from sakd_cli.files import MOST_YAML, expanded, parse_yaml, read_bytes

Share = Annotated[float, Field(ge=0.0, le=1.0)]
Below1 = Annotated[float, Field(ge=0.0, lt=1.0)]
# torch.optim's own, and the learning rate that each has there; what needs a closure, sparse or 2-D weights is not among
# them. SGD's rate is the network's published one.
OPTIMIZERS: dict[str, float | None] = {
    "sgd": None,
    "adam": 1e-3,
    "adamw": 1e-3,
    "adamax": 2e-3,
    "nadam": 2e-3,
    "radam": 1e-3,
    "rmsprop": 1e-2,
    "adagrad": 1e-2,
    "adadelta": 1.0,
    "adafactor": 1e-2,
    "asgd": 1e-2,
    "rprop": 1e-2,
}
ADAMS = ("adam", "adamw", "adamax", "nadam", "radam")
# What belongs to some optimizers or schedules, and would do nothing under the others. timm's take what they have.
BELONGS: dict[str, tuple[str, tuple[str, ...]]] = {
    "momentum": ("optimizer", ("sgd", "rmsprop")),
    "nesterov": ("optimizer", ("sgd",)),
    "betas": ("optimizer", ADAMS),
    "eps": ("optimizer", (*ADAMS, "rmsprop", "adagrad", "adadelta")),
    "weight_decay": ("optimizer", tuple(name for name in OPTIMIZERS if name != "rprop")),
    "milestones": ("schedule", ("step",)),
    "lr_decay": ("schedule", ("step",)),
    "min_lr": ("schedule", ("cosine",)),
}
Schedule = Literal["step", "cosine", "one-cycle", "constant"]
Metric = Literal["top1", "macro_f1", "balanced_accuracy", "nll"]


def _optimizer(name: str) -> str:
    if name.startswith("timm/"):
        return name
    if (own := own_name(name.rpartition(".")[2], OPTIMIZERS)) is None:
        raise ValueError(f"{unknown('optimizer', name, OPTIMIZERS)}; timm's as timm/NAME")
    return own


Optimizer = Annotated[str, AfterValidator(_optimizer)]


def _read(weights: Any) -> Any:
    """Class weights: of a file its content; every number is looked at here, where it can be told whose it is."""
    where = ""
    if isinstance(weights, str) and weights not in ("balanced", "None", "null"):
        where = f"{weights}: "
        try:
            weights = parse_yaml(read_bytes(expanded(weights), MOST_YAML).decode())
        except OSError as error:
            raise ValueError(f"{where}{unreadable(error)}; balanced, a number per class, or a file of them") from None
        except (YAMLError, ValueError):
            raise ValueError(f"{where}neither JSON nor YAML of a number per class") from None
        if not (weights and isinstance(weights, dict | list)):
            raise ValueError(f"{where}holds no number per class, neither in order nor as name: number")
    if not isinstance(weights, dict | list | tuple):
        return weights
    named = weights if isinstance(weights, dict) else dict(enumerate(weights, start=1))
    if wrong := [(name, one) for name, one in named.items() if not _weighs(one)]:
        raise ValueError(f"{where}{wrong[0][1]!r:.40} for class {wrong[0][0]!r:.40} is no number from 0 up")
    return {str(name): one for name, one in weights.items()} if isinstance(weights, dict) else weights


def _weighs(one: Any) -> bool:
    with suppress(TypeError, ValueError, OverflowError):
        return not isinstance(one, bool) and 0 <= float(one) < math.inf
    return False


class Train(Config):
    """How the field trains CIFAR networks: SGD with steps, the recipe of RepDistiller (Tian et al., ICLR 2020)."""

    epochs: Annotated[PositiveInt, Field(le=100_000)] = 240
    """Passes over the training images; 240 is the published recipe."""
    batch_size: PositiveInt = 64
    """Images per optimizer step, of all processes; 64 is the published recipe."""
    accumulate: PositiveInt = 1
    """Parts into which a batch is cut, whose gradients are added up before the one update: a part needs less memory."""
    optimizer: Optimizer = "sgd"
    """Optimizer: sgd, adamw or another of torch.optim by its name, or timm/NAME."""
    lr: PositiveFloat | None = None
    """Initial learning rate; null: the network's published one for sgd (0.05, 0.01 for MobileNetV2), else torch's."""
    momentum: Below1 = 0.9
    """Momentum of sgd and rmsprop; 0.9 is the published recipe."""
    betas: tuple[Below1, Below1] | None = None
    """Averaging of adam and its kin; null: torch's, 0.9 and 0.999."""
    eps: PositiveFloat | None = None
    """What adam and its kin add to a denominator; null: the optimizer's own."""
    weight_decay: NonNegativeFloat = 5e-4
    """Weight decay; 5e-4 is the published recipe, 0.05 is usual for adamw."""
    norm_decay: bool = True
    """Whether norms, biases, class tokens and position embeddings are decayed too, as in the published recipe."""
    layer_decay: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Factor of the learning rate from each block to the one before it, for fine-tuning transformers (0.65 to 0.9)."""
    nesterov: bool = False
    """Whether SGD uses Nesterov momentum; not in the published recipe."""
    schedule: Schedule = "step"
    """Learning rate over the run: step (at milestones), cosine (to min_lr), one-cycle or constant."""
    milestones: tuple[PositiveInt, ...] | None = None
    """Epochs at whose end lr is multiplied by lr_decay; null: 5/8, 6/8 and 7/8 of all (150, 180, 210 of 240)."""
    lr_decay: Annotated[float, Field(gt=0.0, le=1.0)] = 0.1
    """Factor of the learning rate at each milestone; 0.1 is the published recipe."""
    min_lr: NonNegativeFloat = 0.0
    """Learning rate at which schedule cosine ends."""
    warmup_epochs: NonNegativeFloat = 0.0
    """Epochs in which the rate first rises from a hundredth to lr, step by step; of one-cycle: its rise, else 30 %."""
    clip_norm: PositiveFloat | None = None
    """Largest norm of all gradients together: longer ones are scaled down; null: as they are."""
    clip_value: PositiveFloat | None = None
    """Largest absolute value of a gradient's entry; null: as they are."""
    class_weights: Annotated[
        Literal["balanced"] | tuple[NonNegativeFloat, ...] | dict[str, NonNegativeFloat] | None, BeforeValidator(_read)
    ] = None
    """Weights in the cross-entropy: balanced (1/images), one per class, or a YAML or JSON file; null: all alike."""
    focal_gamma: NonNegativeFloat = 0.0
    """Exponent of the focal loss in place of the cross-entropy (Lin et al. 2017: 2); 0: the cross-entropy."""
    label_smoothing: Below1 = 0.0
    """Share of each label that is spread over all classes, in every cross-entropy with the labels."""
    drop_path: Below1 = 0.0
    """Largest chance that a residual block is skipped (stochastic depth), in networks of timm and torchvision."""
    ema: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    """Decay of a running average of the weights, which is evaluated and delivered; null: the weights themselves are."""
    patience: PositiveInt | None = None
    """Epochs without a better metric on the validation images after which the run ends; null: it never ends early."""
    metric: Metric = "top1"
    """What chooses the best epoch and ends a run early: top1, macro_f1, balanced_accuracy or nll."""
    freeze: tuple[str, ...] = ()
    """Parameters that are not trained, as patterns of their names: stem, stage1, stages.0.*, *.bias."""
    freeze_epochs: PositiveInt | None = None
    """Epochs for which freeze holds; null: all of them."""
    batchnorm: Literal["auto", "running", "re-estimate", "frozen"] = "auto"
    """BatchNorm's statistics: running averages, re-estimated to evaluate, or frozen; auto: where runs are too short."""

    def strangers(self) -> dict[str, str]:
        """The settings that belong to another optimizer or schedule, and what to say of each."""
        found = {}
        for key, (choice, names) in BELONGS.items():
            chosen = getattr(self, choice)
            known = chosen in names or (chosen.startswith("timm/") and key != "nesterov")
            if not known and getattr(self, key) not in (type(self).model_fields[key].default, ()):
                owners = ("schedule " if choice == "schedule" else "") + ", ".join(names)
                found[key] = f"{key} belong{'' if key.endswith('s') else 's'} to {owners}, not to {chosen}"
        return found

    @model_validator(mode="after")
    def _settings_fit(self) -> "Train":
        return self.fitting()

    def fitting(self) -> "Train":
        """These settings. ValueError where they do not go together."""
        steps = self.milestones or ()
        if list(steps) != sorted(set(steps)):
            raise ValueError(f"milestones {list(steps)} must rise")
        if steps and steps[-1] >= self.epochs:
            raise ValueError(f"milestone {steps[-1]} must come before the last epoch ({self.epochs})")
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov needs a momentum above 0")
        for text in self.strangers().values():
            raise ValueError(text)
        if self.warmup_epochs >= self.epochs and self.warmup_epochs:
            raise ValueError(f"warmup_epochs {self.warmup_epochs:g} must be fewer than all epochs ({self.epochs})")
        if self.focal_gamma and self.label_smoothing:
            raise ValueError("focal_gamma is of the label's probability alone; it goes with label_smoothing 0")
        if self.accumulate > 1 and 2 * self.accumulate > self.batch_size:
            most = f"at most {self.batch_size // 2} parts, of two images or more"
            raise ValueError(f"accumulate {self.accumulate}: a batch of {self.batch_size} has {most}")
        if self.freeze_epochs and not self.freeze:
            raise ValueError("freeze_epochs needs freeze, which says what is frozen")
        return self

    def for_another(self) -> "Train":
        """The same for another network than the one whose blocks and parameters these settings speak of."""
        own = {"drop_path": 0.0, "layer_decay": 1.0, "freeze": (), "freeze_epochs": None}
        return self.model_copy(update=own)

    def decay_epochs(self) -> tuple[int, ...]:
        """Epochs (counted from 1) after which the learning rate falls; none of schedules without such."""
        if self.schedule != "step":
            return ()
        if self.milestones is not None:
            return self.milestones
        return tuple(sorted({self.epochs * eighth // 8 for eighth in (5, 6, 7)} - {0}))


WARMUP_START = 0.01  # share of lr at which a warm-up begins, as in torchvision's recipes
PEAK, DIVISOR, END = 0.3, 25.0, 1e-4  # of torch's OneCycleLR: share of the run, lr over the first rate, last over first


def _annealed(x: float, begin: float, end: float) -> float:
    """Half a cosine from `begin` (x = 0) to `end` (x = 1)."""
    return end + (begin - end) / 2 * (1 + math.cos(math.pi * min(max(x, 0.0), 1.0)))


def _one_cycle(train: Train, at: float, floor: float, step: float) -> float:
    peak = (train.warmup_epochs or PEAK * train.epochs) - step
    if at <= peak:
        return _annealed(at / peak if peak > 0 else 1.0, 1 / DIVISOR, 1.0)
    return _annealed((at - peak) / (train.epochs - step - peak), 1.0, END / DIVISOR)


SCHEDULES: dict[Schedule, Callable[[Train, float, float, float], float]] = {
    "step": lambda train, at, floor, step: float(train.lr_decay ** sum(at >= n for n in train.decay_epochs())),
    "cosine": lambda train, at, floor, step: _annealed(
        (at - train.warmup_epochs) / (train.epochs - train.warmup_epochs), 1.0, floor
    ),
    "one-cycle": _one_cycle,
    "constant": lambda train, at, floor, step: 1.0,
}


def rate_factor(train: Train, step: int, steps_per_epoch: int, floor: float = 0.0) -> float:
    """What the starting rates are multiplied by in this step, counted from 0; floor: min_lr over the starting rate.

    As torch's MultiStepLR, CosineAnnealingLR, OneCycleLR (without its cycle of the momentum) and
    LinearLR, each stepped after every update; a cosine begins behind the warm-up.
    """
    at = step / steps_per_epoch
    factor = SCHEDULES[train.schedule](train, at, floor, 1 / steps_per_epoch)
    if at >= train.warmup_epochs or train.schedule == "one-cycle":
        return factor
    return factor * (WARMUP_START + (1 - WARMUP_START) * at / train.warmup_epochs)
