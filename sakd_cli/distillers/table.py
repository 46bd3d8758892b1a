"""Method -> its distillers and the places where it distils. The only place where a method's name meets an object."""

import inspect
from collections.abc import Callable, Sequence
from functools import partial, wraps
from typing import Any, NamedTuple

from torch import Tensor

from sakd_cli.config import code, plugins
from sakd_cli.config.method import MethodConfig
from sakd_cli.config.methods import METHODS
from sakd_cli.config.preprocessing import ImageSize
from sakd_cli.distillers.dfa import DFA, mixable_blocks
from sakd_cli.distillers.distiller import SCOPES, Composed, Distiller, Ingredient, Warmup
from sakd_cli.distillers.kdsvd import KDSVD
from sakd_cli.distillers.logits import DIST, DKD, KD, LS
from sakd_cli.distillers.maps import AT, NST, OFD, VID, FitNet, ReviewKD, SimKD, reuse
from sakd_cli.distillers.relations import CC, CRD, PKT, RKD, SP
from sakd_cli.distillers.warmups import AB, FSP, FT
from sakd_cli.errors import UsageError, unknown
from sakd_cli.models.spot import Spot, resolve_stage_map, spots_at
from sakd_cli.models.staged import StagedModel, Want

StagePairs = list[tuple[int, int]]


class Stages(NamedTuple):
    """(student stage, teacher stage): the maps that belong together, in order of depth, and the pooled vectors."""

    maps: StagePairs
    pooled: tuple[int, int]


def nowhere(config: Any, stages: Stages) -> StagePairs:
    return []


def stem_and_maps(config: Any, stages: Stages) -> StagePairs:
    return [(0, 0), *stages.maps]


def every_map(config: Any, stages: Stages) -> StagePairs:
    return stages.maps


def last_map(config: Any, stages: Stages) -> StagePairs:
    return stages.maps[-1:]


def in_front_of_pooling(config: Any, stages: Stages) -> StagePairs:
    return [(stages.pooled[0] - 1, stages.pooled[1] - 1)]


def every_map_and_pooled(config: Any, stages: Stages) -> StagePairs:
    return [*stages.maps, stages.pooled]


def pooled(config: Any, stages: Stages) -> StagePairs:
    return [stages.pooled]


def chosen_map(config: Any, stages: Stages) -> StagePairs:
    if config.stage > (last := len(stages.maps)):
        text = f"method.stage: {config.stage} is beyond the last of {last} stage{'s' * (last != 1)} of this pair"
        raise UsageError(text, f"--set method.stage={last}")
    return [stages.maps[config.stage - 1]]


# What a class says of itself as `places`, where it stands in no row.
PLACES: dict[str, Callable[[Any, Stages], StagePairs]] = {
    one.__name__: one
    for one in (nowhere, stem_and_maps, every_map, last_map, in_front_of_pooling, every_map_and_pooled, pooled)
}
PLACES |= {chosen_map.__name__: chosen_map}


class DistillerRow(NamedTuple):
    """Class of the feature distiller (None: the logits are all there is), where it distils, class at the logit spot.

    needs_labels  the feature distiller remembers every training image: it is built with their labels and batch size
    needs_norms   it is built with the BatchNorms in front of the teacher's activations
    needs_blocks  it is built with the teacher's blocks at every place
    unmixed     why images cannot be mixed in pairs (mixup, cutmix); empty: they can
    warmup      a stage of the student's in front of the distillation proper, and its places
    network     what is trained and delivered, made of the config, the student and the teacher; None: the student
    """

    features: Callable[..., Distiller] | None
    places: Callable[[Any, Stages], StagePairs]
    logits: Callable[..., Distiller] = KD
    needs_labels: bool = False
    needs_norms: bool = False
    needs_blocks: bool = False
    unmixed: str = ""
    warmup: tuple[Callable[..., Warmup], Callable[[Any, Stages], StagePairs]] | None = None
    network: Callable[[Any, StagedModel, StagedModel], StagedModel] | None = None

    @property
    def reads_labels(self) -> bool:
        return self.needs_labels or self.logits is DKD


_BUILTIN = {
    "kd": DistillerRow(None, nowhere),
    "fitnet": DistillerRow(FitNet, chosen_map),
    "at": DistillerRow(AT, every_map),
    "sp": DistillerRow(SP, last_map),
    "nst": DistillerRow(NST, every_map),
    "rkd": DistillerRow(RKD, pooled),
    "pkt": DistillerRow(PKT, pooled),
    "cc": DistillerRow(CC, pooled, unmixed="compares neighbours in the batch, which may be of the same pair"),
    "vid": DistillerRow(VID, every_map),
    "crd": DistillerRow(
        CRD, pooled, needs_labels=True, unmixed="keeps one row per image, with images of other classes"
    ),
    "dkd": DistillerRow(None, nowhere, DKD, unmixed="sets the one class of the label apart from all others"),
    "dist": DistillerRow(None, nowhere, DIST),
    "ls": DistillerRow(None, nowhere, LS),
    "reviewkd": DistillerRow(ReviewKD, every_map_and_pooled),
    "ofd": DistillerRow(OFD, every_map, needs_norms=True),
    "kdsvd": DistillerRow(KDSVD, every_map),
    "simkd": DistillerRow(SimKD, in_front_of_pooling, network=reuse),
    "dfa": DistillerRow(DFA, every_map, needs_blocks=True),
    "ft": DistillerRow(FT, last_map),
    "ab": DistillerRow(None, nowhere, warmup=(AB, every_map)),
    "fsp": DistillerRow(None, nowhere, warmup=(FSP, stem_and_maps)),
}


def _plugged(name: str, row: Any) -> DistillerRow:
    if isinstance(row, DistillerRow):
        return row
    if "MethodConfig" in code.ancestors(row):  # settings alone
        raise KeyError(name)
    if not (isinstance(row, type) and issubclass(row, Distiller)):
        raise ValueError("is no DistillerRow of sakd_cli.distillers.table, and no Distiller")
    if (places := PLACES.get(row.places)) is None:
        raise ValueError(unknown("place", str(row.places), PLACES))
    if row.scope not in SCOPES:
        raise ValueError(unknown("scope", str(row.scope), SCOPES))
    if places is chosen_map and "stage" not in METHODS[name].model_fields:
        raise ValueError("acts at `chosen_map` and has no setting `stage`")

    @wraps(row, updated=())
    def make(spots: tuple[Spot, ...], config: MethodConfig, *given: Any) -> Distiller:
        several = dict(zip(("spots", "config", "labels", "batch_size"), (spots, config, *given), strict=False))
        return code.construct(row, config, several)

    remembers = bool({"labels", "batch_size"} & inspect.signature(row).parameters.keys())
    return DistillerRow(None, places, make) if places is nowhere else DistillerRow(make, places, needs_labels=remembers)


GROUPS = f"{plugins.DISTILLERS} {plugins.METHODS}"
DISTILLERS = plugins.Table("method", _BUILTIN, GROUPS, _plugged, folder="distillers")


class Distillers(NamedTuple):
    """What one method distils: `features` at all spots but the last, `logits` at the last.

    network  what learns and is delivered: the student, but for methods that make another network of it
    warmup   what is trained before; None for most
    schedule  factor of the logit loss by epoch, of a part of a composed method; None: always 1
    """

    network: StagedModel
    spots: tuple[Spot, ...]
    features: Distiller | None
    logits: Distiller
    warmup: Warmup | None = None
    schedule: Callable[[int], float] | None = None

    @property
    def want(self) -> Want:
        """What else the teacher's features must hold; the student's, too, where these are pre-activations."""
        return "stages" if self.features is None else self.features.want

    @property
    def student_want(self) -> Want:
        return "preactivations" if self.want == "preactivations" else "stages"


def build(
    config: MethodConfig,
    student: StagedModel,
    teacher: StagedModel,
    side: ImageSize,
    *,
    teacher_side: ImageSize | None = None,
    stage_map: Sequence[tuple[int, int]] | None = None,
    labels: Tensor | None = None,
    batch_size: int = 64,
    epochs: int = 1,
) -> Distillers:
    """The distillers of a method for this pair of networks and images of `side` pixels; the spots are of `network`.

    teacher_side  of the teacher's images; None: the same
    stage_map   pairs of maps that belong together; None: `align_stages`
    labels      class of every training image, in the order of `Batch.index`; for methods that remember images
    epochs      of the run
    """
    rows = [(part, DISTILLERS.row(part.name)) for part in config.parts]
    for part, row in rows:
        student = student if row.network is None else row.network(part, student, teacher)
    stages = Stages(resolve_stage_map(student, teacher, stage_map), (len(student.infos) - 1, len(teacher.infos) - 1))
    at = partial(spots_at, student, teacher, side=side, teacher_side=teacher_side)
    places = [row.places(part, stages) for part, row in rows]
    spots = tuple(at(places[0] if len(rows) == 1 else sorted({place for some in places for place in some})))
    ingredients, warmup = list[Ingredient](), None
    named = [(part, row.logits) for part, row in rows if row.logits is not KD or (row.features or row.warmup) is None]
    if len(named) > 1:
        raise UsageError(f"method {config.name}: two of these replace the softened logits; one can")
    of_logits: tuple[MethodConfig, Callable[..., Distiller]] = named[0] if named else (config, KD)
    for (part, row), own in zip(rows, places, strict=True):
        if row.features is not None:
            here = spots[:-1] if len(rows) == 1 else tuple(at(own)[:-1])
            distiller = row.features(here, part, *_given(row, part, student, teacher, here, labels, batch_size))
            ingredients.append(Ingredient(distiller, part.weight, part.schedule(epochs)))
            warmup = warmup or distiller.warmup
        if row.warmup is not None:
            kind, before = row.warmup
            warmup = kind(tuple(at(before(part, stages))[:-1]), part)
    if len(rows) == 1:
        features, schedule = (ingredients[0].distiller if ingredients else None), None
    else:
        if len({one.distiller.want for one in ingredients}) > 1:
            raise UsageError(f"method {config.name}: one compares in front of an activation, the others behind it")
        features = Composed(spots[:-1], ingredients) if ingredients else None
        schedule = None if of_logits[0] is config else of_logits[0].schedule(epochs)
    if warmup is not None:
        warmup.requires_grad_(False)  # but for its own stage
    if any(part is not None and part.want == "preactivations" for part in (features, warmup)):
        _need_preactivations(config, student, teacher)
    return Distillers(student, spots, features, of_logits[1](spots[-1:], of_logits[0]), warmup, schedule)


def _given(
    row: DistillerRow,
    config: MethodConfig,
    student: StagedModel,
    teacher: StagedModel,
    spots: tuple[Spot, ...],
    labels: Tensor | None,
    batch_size: int,
) -> tuple[Any, ...]:
    """What a feature distiller is built with beside its spots and settings."""
    if row.needs_labels:
        if labels is None:
            raise UsageError(f"method {config.name} needs the labels of the training images")
        return labels, batch_size
    if row.needs_norms:
        _need_preactivations(config, student, teacher)
        return ([teacher.affine_before_activation(spot.teacher) for spot in spots],)
    if row.needs_blocks:
        return ([mixable_blocks(teacher, spot.teacher) for spot in spots],)
    return ()


def _need_preactivations(config: MethodConfig, student: StagedModel, teacher: StagedModel) -> None:
    for network in (student, teacher):
        if not network.has_preactivations:
            raise UsageError(f"method {config.name} needs features in front of an activation; {network.name} has none")
