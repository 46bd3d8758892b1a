"""Config of distillers: one small class per method. Its defaults are the published recipe.

To add one: a class here, a file in `distillers/`, one line in `distillers/table.py`; or the same in a package of one's
own, whose entry points name them (`plugins.py`).
"""

from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    SerializeAsAny,
    create_model,
)

from sakd_cli.config import code, plugins
from sakd_cli.config.base import by_name, chosen_by_name
from sakd_cli.config.method import SHARED, ComposedConfig, MethodConfig, WarmedConfig
from sakd_cli.errors import UsageError
from sakd_cli.files import expanded

VECTORS = 0.3  # what `auto` is for RKD and CRD: 1 is too strong there (guide `compare`, "How much")


class KDConfig(MethodConfig):
    """Softened logits (Hinton et al. 2015)"""

    of_logits: ClassVar[bool] = True
    name: Literal["kd"] = "kd"
    hard: bool = False
    """Cross-entropy with the class of the teacher's largest logit (DeiT) in place of softened logits."""


class FitNetConfig(MethodConfig):
    """Regression of one hidden map (Romero et al., ICLR 2015)"""

    name: Literal["fitnet"] = "fitnet"
    stage: Annotated[int, Field(ge=1)] = 2
    """Stage whose map is the hint layer, counted from 1."""


class ATConfig(MethodConfig):
    """Attention maps of every stage (Zagoruyko and Komodakis, ICLR 2017)"""

    name: Literal["at"] = "at"
    weight: NonNegativeFloat = 1000.0
    gamma: PositiveFloat = 2.0
    power: Annotated[int, Field(ge=1)] = 2
    """Exponent of the attention maps."""


class SPConfig(MethodConfig):
    """Pairwise similarities inside the batch (Tung and Mori, ICCV 2019)"""

    name: Literal["sp"] = "sp"
    weight: NonNegativeFloat = 3000.0


class NSTConfig(MethodConfig):
    """Distribution of the channels over positions, every stage (Huang and Wang, 2017)"""

    name: Literal["nst"] = "nst"
    weight: NonNegativeFloat = 50.0


class RKDConfig(MethodConfig):
    """Distances and angles between samples (Park et al., CVPR 2019)"""

    auto_balance: ClassVar[float] = VECTORS
    name: Literal["rkd"] = "rkd"
    gamma: PositiveFloat = 2.0
    distance: NonNegativeFloat = 25.0
    """Weight of the distance loss."""
    angle: NonNegativeFloat = 50.0
    """Weight of the angle loss."""


class PKTConfig(MethodConfig):
    """Probabilities of being neighbours in the batch (Passalis and Tefas, ECCV 2018)"""

    name: Literal["pkt"] = "pkt"
    weight: NonNegativeFloat = 30000.0


class CCConfig(MethodConfig):
    """Correlation of the differences of neighbouring samples (Peng et al., ICCV 2019)"""

    name: Literal["cc"] = "cc"
    weight: NonNegativeFloat = 0.02
    width: PositiveInt = 128
    """Dimensions of the embedding."""


class VIDConfig(MethodConfig):
    """Gaussian of the teacher's map given the student's, every stage (Ahn et al., CVPR 2019)"""

    name: Literal["vid"] = "vid"
    gamma: PositiveFloat = 2.0


class CRDConfig(MethodConfig):
    """Telling a sample from those of other classes across the networks (Tian et al., ICLR 2020)"""

    auto_balance: ClassVar[float] = VECTORS
    name: Literal["crd"] = "crd"
    weight: NonNegativeFloat = 0.8
    width: PositiveInt = 128
    """Dimensions of the embedding."""
    negatives: PositiveInt = 16384
    """Negative samples per image."""
    contrast_temperature: PositiveFloat = 0.07
    """Temperature of the contrastive loss."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """Momentum of the memory banks."""
    memory_limit: PositiveFloat = 8.0
    """Largest memory in GiB of banks and one step; ImageNet at batch 64 needs 3.7."""


class DKDConfig(MethodConfig):
    """Target class and the others decoupled, in place of softened logits (Zhao et al., CVPR 2022)"""

    of_logits: ClassVar[bool] = True
    name: Literal["dkd"] = "dkd"
    target: NonNegativeFloat = 1.0
    """Weight of the target-class term (alpha in the paper)."""
    others: NonNegativeFloat = 8.0
    """Weight of the non-target term (beta in the paper)."""


class DISTConfig(MethodConfig):
    """Correlations of the probabilities, in place of softened logits (Huang et al., NeurIPS 2022)"""

    of_logits: ClassVar[bool] = True
    name: Literal["dist"] = "dist"
    temperature: PositiveFloat = 1.0
    inter: NonNegativeFloat = 1.0
    """Weight of the correlation between classes of one sample."""
    intra: NonNegativeFloat = 1.0
    """Weight of the correlation between samples of one class."""


class LSConfig(MethodConfig):
    """Softened logits of one scale (Sun et al., CVPR 2024)"""

    of_logits: ClassVar[bool] = True
    name: Literal["ls"] = "ls"
    kl_weight: NonNegativeFloat = 9.0
    temperature: PositiveFloat = 2.0


class ReviewKDConfig(MethodConfig):
    """Fused maps of every stage and the pooled vector (Chen et al., CVPR 2021)"""

    name: Literal["reviewkd"] = "reviewkd"
    width: PositiveInt = 512
    """Channels of the fusion, at most those of the student's pooled vector."""


class OFDConfig(MethodConfig):
    """Maps in front of their activation, by margin and partial distance (Heo et al., ICCV 2019)"""

    name: Literal["ofd"] = "ofd"
    weight: NonNegativeFloat = 0.001


class KDSVDConfig(MethodConfig):
    """Changes of the main directions from stage to stage (Lee et al., ECCV 2018)"""

    name: Literal["kdsvd"] = "kdsvd"
    directions: PositiveInt = 1
    """Singular vectors of the teacher per map."""
    extra: NonNegativeInt = 3
    """Further singular vectors of the student to match them with."""


class SimKDConfig(MethodConfig):
    """The teacher's pooling and classifier reused behind a projector (Chen et al., CVPR 2022)"""

    trains_student: ClassVar[bool] = True
    name: Literal["simkd"] = "simkd"
    kl_weight: NonNegativeFloat = 0.0
    ce_weight: NonNegativeFloat = 0.0
    factor: PositiveInt = 2
    """Factor by which the projector's inner width is less than the teacher's."""


class FTConfig(WarmedConfig):
    """Translated factors of the last map (Kim et al., NeurIPS 2018)"""

    trains_student: ClassVar[bool] = False  # but a paraphraser of the teacher's maps
    name: Literal["ft"] = "ft"
    weight: NonNegativeFloat = 200.0
    rate: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Width of the factors, as a fraction of the map's channels."""
    factor_power: PositiveInt = 2
    """Exponent of the factor's norm."""
    power: PositiveInt = 1
    """Exponent of the difference."""

    published_lr: ClassVar[float | None] = 0.01
    published_lr_of: ClassVar[Mapping[tuple[str, str], float]] = {("ResNet50", "vgg8"): 0.05}


class FSPConfig(WarmedConfig):
    """Flow from stage to stage, before the distillation proper (Yim et al., CVPR 2017)"""

    of_logits: ClassVar[bool] = True
    name: Literal["fsp"] = "fsp"
    weight: NonNegativeFloat = 50.0


class ABConfig(WarmedConfig):
    """Activation boundaries, before the distillation proper (Heo et al., AAAI 2019)"""

    of_logits: ClassVar[bool] = True
    name: Literal["ab"] = "ab"
    margin: PositiveFloat = 1.0
    """Margin of the activation boundary."""


class Mixtures(StrEnum):
    """Where the mixtures of `DFAConfig` come from, if not from a file."""

    SEARCH = "search"
    UNIFORM = "uniform"
    LAST = "last"
    RANDOM = "random"


def _word_or_path(weights: str) -> str:
    if not weights:
        raise ValueError(f"needs a file or one of {', '.join(Mixtures)}")
    return weights if weights in list(Mixtures) else str(expanded(weights).absolute())


class DFAConfig(MethodConfig):
    """Mixtures of the teacher's block outputs, found by a search (Guan et al., ECCV 2020)"""

    name: Literal["dfa"] = "dfa"
    weight: NonNegativeFloat = 10.0
    weights: Annotated[str, AfterValidator(_word_or_path)] = Mixtures.SEARCH.value
    """search; uniform, last or random (no search); or the dfa.json of an earlier run."""
    weights_sha256: str | None = None
    """SHA-256 of that file when the run began."""
    norm: Literal["rms", "none", "preact"] = "rms"
    """Normalisation of maps: rms (divide by the root mean square), none, preact (behind the next BatchNorm)."""
    distance: Literal["l2", "partial_l2"] = "l2"
    """l2, or partial_l2: no error where neither side would pass a ReLU."""
    search_epochs: PositiveInt = 20
    """Epochs of the search."""
    search_split: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Fraction of the training images that the mixtures learn from."""
    search_lr: PositiveFloat = 0.1
    """Learning rate of the search's students; not published, this project's choice."""
    search_weight_decay: NonNegativeFloat = 5e-4
    """Weight decay of the search's students."""
    arch_lr: PositiveFloat = 0.01
    """Learning rate of the mixtures' Adam; not published, this project's choice."""
    arch_reg: Literal["l2", "entropy", "none"] = "l2"
    """Regularisation of the mixtures: l2 (weight decay), entropy or none."""
    arch_decay: NonNegativeFloat = 1e-3
    """Strength of that regularisation."""
    st: NonNegativeFloat = 1.0
    """Weight of the term from the student's map to the mixture."""
    ts: NonNegativeFloat = 1.0
    """Weight of the term of the mixture through the student."""
    search_ce: bool = True
    """Whether the search's students also learn the labels."""
    second_order: bool = False
    """Whether each step of the mixtures looks one step of the students ahead."""
    joint: bool = False
    """One student for all groups instead of one for each."""


def _plugged(name: str, kind: object) -> type[MethodConfig]:
    """A plug-in's config class, or that of a distiller. Raises ValueError where it is none, or of another name."""
    if "Distiller" in code.ancestors(kind):
        return code.settings_class(name, kind, MethodConfig, ("spots", "labels", "batch_size", "config"))
    if not (isinstance(kind, type) and issubclass(kind, MethodConfig)):
        raise ValueError("is no Distiller of sakd_cli.api, and no MethodConfig")
    if kind.model_fields["name"].default != name:
        raise ValueError(f"calls itself {kind.model_fields['name'].default!r}")
    return kind


ALONE: Mapping[type, str] = {SimKDConfig: "makes another network of the student", DFAConfig: "has a search of its own"}


def _composed(kinds: Mapping[str, type[Any]]) -> type[MethodConfig]:
    """The config class of several; what they share is as in the one that has the logit loss, or else in the first."""
    name = "+".join(kinds)
    if unfit := next((f"{one} {ALONE[kind]}" for one, kind in kinds.items() if kind in ALONE), None):
        raise UsageError(f"method {name}: {unfit}, and goes with no other")
    if len(warmed := [one for one, kind in kinds.items() if issubclass(kind, WarmedConfig)]) > 1:
        raise UsageError(f"method {name}: {' and '.join(warmed)} both train something before; one of them can")
    main = next((kind for kind in kinds.values() if kind in OF_LOGITS), next(iter(kinds.values())))
    fields: dict[str, Any] = {"name": (Literal[name], name)} | {one: (kind, kind()) for one, kind in kinds.items()}
    for key in (*SHARED[1:], "gamma"):
        fields[key] = (MethodConfig.__annotations__[key], main.model_fields[key].default)
    made = create_model(f"Composed_{name}", __base__=ComposedConfig, **fields)
    made.trains_student = any(kind.trains_student for kind in kinds.values())
    made.auto_balance = max(kind.auto_balance for kind in kinds.values())
    return made


OF_LOGITS = (DKDConfig, DISTConfig, LSConfig)
METHODS = plugins.Table[type[Any]]("method", by_name(MethodConfig), plugins.METHODS, _plugged, _composed)
Method = Annotated[SerializeAsAny[MethodConfig], chosen_by_name("method", METHODS, default="fitnet")]
