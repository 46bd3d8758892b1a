"""The effective values of a config: what the settings that are left open (None) come to, before anything is trained."""

import importlib
import math
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from sakd_cli.config.datasets import DataConfig
from sakd_cli.config.networks import Network, find_network, of_one_family
from sakd_cli.config.preprocessing import of_timm
from sakd_cli.config.routers import LearnedConfig, MetaConfig, TrainedConfig
from sakd_cli.config.train import OPTIMIZERS, Train, rate_factor
from sakd_cli.config.training import DistillConfig, ResidualConfig, RunConfig
from sakd_cli.errors import UsageError, unknown

SAME_FAMILY_BIAS = 10.0  # Song et al. (IEEE TIP 2022), and 0 for networks of two families
SHORT_RUN = 250  # the student's rate over the router's in a run too short for the published values
SATURATED = 0.995  # mean teacher-routing probability above which a router decides nothing
SATURATED_BIAS = math.log(SATURATED / (1 - SATURATED))


def automatic_precision(device: str) -> str:
    """Number type of the networks where none is asked for: bf16 on a GPU that has it, else fp32."""
    perhaps = sys.platform == "win32" or any(Path("/dev").glob("nvidia*"))
    if not (device.startswith("cuda") or (device == "auto" and perhaps)):  # torch takes seconds to load
        return "fp32"
    cuda = importlib.import_module("torch").cuda
    return "bf16" if cuda.is_available() and cuda.is_bf16_supported(including_emulation=False) else "fp32"


def initial_lr(config: RunConfig, network: str) -> float:
    """Learning rate of a network that this run trains. Raises UsageError where its optimizer has no usual one."""
    if config.train.lr is not None:
        return config.train.lr
    if (own := config.train.optimizer) == "sgd":
        return find_network(network).lr
    if (usual := OPTIMIZERS.get(own)) is None:
        known = of_timm(f"train.optimizer: {own}", "timm.optim").list_optimizers()
        if (name := own.removeprefix("timm/")).removeprefix("lookahead_") not in known:
            raise UsageError(f"train.optimizer: {unknown('optimizer of timm', name, known)}")
        raise UsageError(f"train.lr: missing, and {own} has no usual one", "--lr RATE")
    return usual


def router_train(config: DistillConfig) -> Train:
    """The settings of `train` as they are for the router's group: its own where it has some."""
    return config.router.trained(config.train) if isinstance(config.router, TrainedConfig) else config.train


class RouterStart(NamedTuple):
    """Rate and prior of a learned router, and what weight decay alone leaves of the prior: halfway and at the end.

    The prior is None where the teacher's family is not known.
    """

    lr: float
    bias: float | None
    halfway: float | None = None
    end: float | None = None

    @property
    def note(self) -> str | None:
        """A warning where every sample goes to the teacher to the end."""
        if self.end is None or self.end < SATURATED_BIAS:
            return None
        return (
            f"the router cannot act: its prior of {self.bias:g} at the teacher only falls to {self.end:.1f} in this "
            f"schedule, and above {SATURATED_BIAS:.1f} more than 99.5 % of the samples go there. This is ordinary "
            "distillation at almost twice its cost: --set router.recipe=auto, or --router always"
        )


def router_start(config: DistillConfig, *, one_family: bool | None, steps: int | None) -> RouterStart:
    """How the learned router of a run starts; `steps` of an epoch, None where it is unknown.

    As published (Song et al., IEEE TIP 2022) the prior is to fade by weight decay: of SGD with momentum m, a factor
    exp(-decay / (1 - m) sum of rates), of AdamW the same with m = 0; of others it is not known. `auto` takes the
    published values where this frees the router in the first half of the run, as in 240 epochs; else no prior, and a
    rate at which short runs do not saturate (the presets' choice; of others than SGD half the student's).
    """
    router = config.learned or LearnedConfig(name="none")
    student, train = initial_lr(config, config.student), router_train(config)
    bias = None if one_family is None else SAME_FAMILY_BIAS if one_family else 0.0
    momentum = {"sgd": train.momentum, "adamw": 0.0}.get(train.optimizer)

    def start(lr: float, prior: float | None) -> RouterStart:
        lr, prior = router.lr or lr, prior if router.teacher_bias is None else router.teacher_bias
        if steps is None or prior is None or momentum is None:
            return RouterStart(lr, prior)
        rates = [lr * rate_factor(train, epoch, 1) for epoch in range(train.epochs)]
        factor = steps * router.weight_decay / (1 - momentum)
        halfway, end = (prior * math.exp(-factor * sum(rates[:n])) for n in (train.epochs // 2, train.epochs))
        return RouterStart(lr, prior, halfway, end)

    published = start(student / 2, bias)
    long = start(student / 2, SAME_FAMILY_BIAS).halfway
    if router.recipe == "published" or long is None or long < SATURATED_BIAS:
        return published
    return start(student / (SHORT_RUN if train.optimizer == "sgd" else 2), 0.0)


def router_gamma(config: DistillConfig) -> float:
    """The router's own where it has one, else that of the method."""
    own = None if config.learned is None else config.learned.gamma
    return config.method.gamma if own is None else own


def image_counts(config: DataConfig, aside: ResidualConfig | MetaConfig | None = None) -> tuple[int, int] | None:
    """Number of training and of validation images; None where only the files say it."""
    if (total := config.training_images()) is None:
        return None
    total = min(total, config.limit or total)
    validation = round(config.validation * total)
    train = total - validation
    if aside is not None:
        train -= round(aside.set_aside(train) * train)
    return train, validation


def effective(
    config: RunConfig, *, teacher: str | None = None, counts: tuple[int, int] | None = None
) -> dict[str, Any]:
    """The values by dotted key; None for one that is only known when files are read.

    teacher  the teacher's network, where `teacher.source` is a path; counts: training and validation images, if read
    """
    network = config.student if isinstance(config, DistillConfig) else getattr(config, "model", "")
    lr = initial_lr(config, network)
    aside = config.aside if isinstance(config, DistillConfig) else None
    train, validation = counts or image_counts(config.data, aside) or (None, None)
    steps = None if train is None else steps_per_epoch(train, config.train.batch_size)
    values: dict[str, Any] = {"train.lr": lr, "train.milestones": list(config.train.decay_epochs())}
    if isinstance(config, DistillConfig):
        known: Network | None = None
        with suppress(UsageError):  # a path names no network
            known = find_network(teacher or config.teacher.source)
        if isinstance(config.router, TrainedConfig):
            values["router.lr"] = config.router.lr or lr / 2
        if config.learned:
            one_family = None if known is None else of_one_family(known.name, config.student)
            start = router_start(config, one_family=one_family, steps=steps)
            values |= {"router.lr": start.lr, "router.gamma": router_gamma(config)}
            values["router.teacher_bias"] = start.bias
        if (warmed := config.method.warmed) is not None:
            by_pair = known is None and warmed.warmup_lr is None and warmed.published_lr_of
            warmup_lr = warmed.lr_of_warmup(known.name if known else "", config.student, lr)
            section = "method" if warmed is config.method else f"method.{warmed.name}"
            values[f"{section}.warmup_lr"] = None if by_pair else warmup_lr
    return values | {"training_images": train, "validation_images": validation, "steps_per_epoch": steps}


def steps_per_epoch(images: int, batch_size: int) -> int:
    """Batches of an epoch. A single image that is left over joins the batch before.

    BatchNorm has no statistics of a map of 1x1 pixels of one image. Where no single image is left over these are the
    published steps.
    """
    full, rest = divmod(images, batch_size)
    return full + (rest > 1 or (rest == 1 and not full))


def steps_of_run(config: RunConfig, images: int) -> int:
    """Those of all epochs."""
    return config.train.epochs * steps_per_epoch(images, config.train.batch_size)
