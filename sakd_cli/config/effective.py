"""The effective values of a config: what the settings that are left open (None) come to, before anything is trained."""

from contextlib import suppress
from typing import Any

from sakd_cli.config.datasets import DataConfig
from sakd_cli.config.methods import WarmedConfig
from sakd_cli.config.networks import Network, find_network
from sakd_cli.config.routers import LearnedConfig
from sakd_cli.config.training import DistillConfig, ResidualConfig, RunConfig
from sakd_cli.errors import UsageError

SAME_FAMILY_BIAS = 10.0  # Song et al. (IEEE TIP 2022), and 0 for networks of two families


def initial_lr(config: RunConfig, network: str) -> float:
    """Learning rate of a network that this run trains."""
    return find_network(network).lr if config.train.lr is None else config.train.lr


def router_lr(router: LearnedConfig, lr: float) -> float:
    """Learning rate of a learned router beside a student's."""
    return router.lr or lr / 2


def router_gamma(router: LearnedConfig | None, config: DistillConfig) -> float:
    """Scale of the routed cross-entropy."""
    return config.method.gamma if router is None or router.gamma is None else router.gamma


def teacher_bias(router: LearnedConfig, *, one_family: bool) -> float:
    """What is added once to every teacher score."""
    return (SAME_FAMILY_BIAS if one_family else 0.0) if router.teacher_bias is None else router.teacher_bias


def calibration_fraction(residual: ResidualConfig, images: int) -> float:
    """Fraction of the training images that calibrates residual students."""
    return max(residual.calibration, min(residual.calibration_min / images, 0.2))


def image_counts(config: DataConfig, residual: ResidualConfig | None = None) -> tuple[int, int] | None:
    """Number of training and of validation images; None where only the files say it."""
    if (total := config.training_images()) is None:
        return None
    total = min(total, config.limit or total)
    validation = round(config.validation * total)
    train = total - validation
    if residual is not None and residual.students:
        train -= round(calibration_fraction(residual, train) * train)
    return train, validation


def effective(
    config: RunConfig, *, teacher: str | None = None, counts: tuple[int, int] | None = None
) -> dict[str, Any]:
    """The values by dotted key; None for one that is only known when files are read.

    teacher  the teacher's network, where `teacher.source` is a path; counts: training and validation images, if read
    """
    network = config.student if isinstance(config, DistillConfig) else getattr(config, "model", "")
    lr = initial_lr(config, network)
    values: dict[str, Any] = {"train.lr": lr, "train.milestones": list(config.train.decay_epochs())}
    if isinstance(config, DistillConfig):
        known: Network | None = None
        with suppress(UsageError):  # a path names no network
            known = find_network(teacher or config.teacher.source)
        if isinstance(router := config.router, LearnedConfig):
            one_family = None if known is None else known.kin == find_network(config.student).kin
            open_bias = router.teacher_bias is None and one_family is None
            values |= {"router.lr": router_lr(router, lr), "router.gamma": router_gamma(router, config)}
            values["router.teacher_bias"] = None if open_bias else teacher_bias(router, one_family=bool(one_family))
        if isinstance(config.method, WarmedConfig):
            by_pair = known is None and config.method.warmup_lr is None and config.method.published_lr_of
            warmup_lr = config.method.lr_of_warmup(known.name if known else "", config.student, lr)
            values["method.warmup_lr"] = None if by_pair else warmup_lr
    residual = config.residual if isinstance(config, DistillConfig) else None
    train, validation = counts or image_counts(config.data, residual) or (None, None)
    values |= {"training_images": train, "validation_images": validation}
    return values | {"steps_per_epoch": None if train is None else steps_per_epoch(train, config.train.batch_size)}


def steps_per_epoch(images: int, batch_size: int) -> int:
    """Batches of an epoch. A single image that is left over joins the batch before.

    BatchNorm has no statistics of a map of 1x1 pixels of one image. Where no single image is left over these are the
    published steps.
    """
    full, rest = divmod(images, batch_size)
    return full + (rest > 1 or (rest == 1 and not full))
