"""Config of routers: where to distil. One small class per policy; the objects are in `routing/table.py`."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, SerializeAsAny

from sakd_cli.config import code, plugins
from sakd_cli.config.base import Config, by_name, chosen_by_name
from sakd_cli.config.train import Optimizer, Schedule, Train

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Fractions = Annotated[tuple[Fraction, ...], Field(min_length=1)]  # one per spot, the logits last; one alone: of all


class RouterConfig(Config):
    """Where to distill."""

    selects: ClassVar[bool] = False  # whether it decides by the sample: what coins of its rates are compared with
    idle: ClassVar[tuple[str, ...]] = ("method.gamma",)  # settings without effect under it
    name: str
    """Router, as in `sakd list routers`."""
    dose: Literal["published", "selected-mean"] = "published"
    """A spot's loss: the selected samples' mean, as published times their fraction of the batch, or that mean alone."""


class TrainedConfig(RouterConfig):
    """What routers with parameters share."""

    selects: ClassVar[bool] = True
    idle: ClassVar[tuple[str, ...]] = ()
    lr: PositiveFloat | None = None
    """Learning rate of the router; null: half the student's, as published, or by recipe where the router has one."""
    weight_decay: NonNegativeFloat = 1e-3
    """Weight decay of the router."""
    optimizer: Optimizer | None = None
    """Optimizer of the router; null: train.optimizer."""
    momentum: Annotated[float, Field(ge=0.0, lt=1.0)] | None = None
    """Momentum of the router's optimizer; null: train.momentum."""
    norm_decay: bool | None = None
    """Whether norms and biases of the router and of its adapters are decayed; null: train.norm_decay."""
    schedule: Schedule | None = None
    """Learning rate of the router over the run; null: train.schedule."""
    warmup_epochs: NonNegativeFloat | None = None
    """Epochs in which the router's rate rises; null: train.warmup_epochs."""
    clip_norm: PositiveFloat | None = None
    """Largest norm of the router's gradients together; null: train.clip_norm."""
    clip_value: PositiveFloat | None = None
    """Largest absolute value in the router's gradients; null: train.clip_value."""
    update_every: PositiveInt = 1
    """The pass that trains the router, in every so many steps only; it decides in every step. Published: 1."""

    def trained(self, train: Train) -> Train:
        """The settings of `train` as they are for the router's group: its own where it has some.

        What is not its own is left out where it belongs to another optimizer or schedule. ValueError where its own
        settings do not go together.
        """
        shared = TrainedConfig.model_fields.keys() & Train.model_fields.keys() - {"lr", "weight_decay"}
        own = {key: value for key in shared if (value := getattr(self, key)) is not None}
        whole = train.model_copy(update={"layer_decay": 1.0} | own)
        others = {key: Train.model_fields[key].default for key in whole.strangers() if key not in own}
        return whole.model_copy(update=others).fitting()


class LearnedConfig(TrainedConfig):
    """What routers share that learn from the routed network; the defaults are published, but for `recipe`.

    Song et al., IEEE TIP 2022.
    """

    tau: PositiveFloat = 5.0
    """Gumbel-Softmax temperature; it shapes the gradient, not the sampling rate."""
    gamma: PositiveFloat | None = None
    """Scale of the routed cross-entropy; null: the method's."""
    recipe: Literal["auto", "published"] = "auto"
    """What teacher_bias and lr are unless set: published; auto: 0 and 1/250 where a run is too short for the former."""
    teacher_bias: float | None = None
    """Added once to every teacher score; null: by recipe, as published 10 for two networks of one family, else 0."""
    min_teacher_fraction: Fraction = 0.5
    """Fraction of the batch below which the count penalty pushes the logit spot; 0 switches it off."""


class AdaptiveConfig(LearnedConfig):
    """Learned per sample, spot and step: the published method"""

    name: Literal["adaptive"] = "adaptive"


class AntiConfig(LearnedConfig):
    """Learned likewise, but distils exactly where the adaptive router would not"""

    name: Literal["anti"] = "anti"


class SoftConfig(LearnedConfig):
    """Learned likewise, but without a draw: weights and paths are mixtures by the probabilities"""

    name: Literal["soft"] = "soft"
    tau: PositiveFloat = 1.0


class MetaConfig(TrainedConfig):
    """Learned from held-out images: where a small step of distilling lowers their cross-entropy"""

    name: Literal["meta"] = "meta"
    dose: Literal["published", "selected-mean"] = "selected-mean"
    sees: Literal["features", "class"] = "features"
    """What it decides by: the last features of both networks, or the label alone, so that it routes whole classes."""
    held_out: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.1
    """Fraction of the training images that the student does not train on, and the router learns from."""

    def set_aside(self, images: int) -> float:
        """Fraction of so many training images that do not train the student."""
        return self.held_out


class AgreementConfig(RouterConfig):
    """Where a sample's distillation does not work against its label: their gradients agree"""

    selects: ClassVar[bool] = True
    name: Literal["gradient-agreement"] = "gradient-agreement"
    dose: Literal["published"] = "published"


class TeacherCorrectConfig(RouterConfig):
    """The samples that the teacher classifies correctly (Meng et al., ICASSP 2019)"""

    selects: ClassVar[bool] = True
    name: Literal["teacher-correct"] = "teacher-correct"


class WeightedConfig(RouterConfig):
    """What weights share whose mean over the batch is 1."""

    selects: ClassVar[bool] = True
    dose: Literal["published", "selected-mean"] = "selected-mean"
    cap: Annotated[float, Field(ge=1.0)] = 2.0
    """Largest weight of a sample, where the mean is 1."""


class ConfidenceConfig(WeightedConfig):
    """More where the teacher is confident: by its largest probability"""

    name: Literal["teacher-confidence"] = "teacher-confidence"


class EntropyConfig(WeightedConfig):
    """More where the teacher is certain: by its entropy (after Kwon et al., ICASSP 2020)"""

    name: Literal["teacher-entropy"] = "teacher-entropy"


class WSLDConfig(RouterConfig):
    """Less where the student is as good as the teacher (Zhou et al., ICLR 2021)"""

    selects: ClassVar[bool] = True
    name: Literal["wsld"] = "wsld"


class AlwaysConfig(RouterConfig):
    """Every sample at every spot: ordinary distillation"""

    idle: ClassVar[tuple[str, ...]] = ("method.gamma", "router.dose")
    name: Literal["always"] = "always"


class NeverConfig(RouterConfig):
    """No sample at any spot: plain training of the network"""

    idle: ClassVar[tuple[str, ...]] = ("method.gamma", "router.dose")
    name: Literal["never"] = "never"


class FixedConfig(RouterConfig):
    """The same weight for every sample: one per spot, or a table of them by epoch"""

    name: Literal["fixed"] = "fixed"
    weights: Fractions | Annotated[tuple[Fractions, ...], Field(min_length=1)] = (0.5,)
    """Weight of each spot, logits last (one: of all spots); or a list of those, one per epoch, the last one stays."""

    @property
    def table(self) -> tuple[Fractions, ...]:
        rows: Any = self.weights if isinstance(self.weights[0], tuple) else (self.weights,)
        return tuple(rows)

    @property
    def scales(self) -> bool:
        """Whether a feature spot has a weight between 0 and 1."""
        return any(0 < weight < 1 for row in self.table for weight in (row[:-1] or row))


class ScheduledConfig(RouterConfig):
    """Every sample at every spot, from a fraction of the run up to another; outside, nothing is computed there"""

    name: Literal["scheduled"] = "scheduled"
    start: Fractions = (0.0,)
    """Fraction of the epochs before which a spot rests: one per spot, logits last, or one for all."""
    stop: Fractions = (0.625,)
    """Fraction of the epochs after which it does; 0.625 is where the learning rate first falls."""


class RandomConfig(RouterConfig):
    """An independent coin per sample and spot"""

    name: Literal["random"] = "random"
    rate: Fraction = 0.5
    """Probability of distilling a sample at a spot."""


class RandomMatchedConfig(RouterConfig):
    """Coins with the rates that an adaptive run logged per spot and epoch"""

    name: Literal["random-matched"] = "random-matched"
    run: str | None = None
    """Adaptive run whose rates per spot and epoch are used; null: the newest with these settings."""
    run_sha256: str | None = None
    """SHA-256 of its record of spots when this run began."""


def _plugged(name: str, kind: object) -> type[RouterConfig]:
    """The settings of somebody's router, which decides by the sample as far as is known."""
    if "Router" not in code.ancestors(kind):
        raise ValueError("is no Router of sakd_cli.api")
    if getattr(kind, "__abstractmethods__", None):
        raise ValueError("has no method decide")
    found = code.settings_class(name, kind, RouterConfig, GIVEN)
    found.selects = True
    return found


# What the class of a router may take by name; all else are settings (`routing.table.Pair`).
GIVEN = ("spots", "teacher", "student", "epochs", "classes", "config")
ROUTERS = plugins.Table[type[Any]]("router", by_name(RouterConfig), plugins.ROUTERS, _plugged)
PLAIN, CLASSICAL = NeverConfig().name, AlwaysConfig().name  # the two controls: no distillation, and the ordinary one
MATCHED = RandomMatchedConfig().name


def selects(name: str) -> bool:
    """Whether a router decides by the sample, as far as is known: nothing of others is loaded."""
    kind = ROUTERS.own.get(name)
    return kind is None or bool(kind.selects)


Router = Annotated[SerializeAsAny[RouterConfig], chosen_by_name("router", ROUTERS, default="adaptive")]
