"""Settings of a distillation that exclude each other: each is refused in one line, before anything is trained.

What a section of the settings knows by itself its config class refuses; what several teachers exclude, `teachers.py`.
"""

from sakd_cli import torchrun
from sakd_cli.config.methods import DFAConfig
from sakd_cli.config.preprocessing import size_text
from sakd_cli.config.routers import MetaConfig, TeacherCorrectConfig, TrainedConfig, WSLDConfig
from sakd_cli.config.training import DistillConfig
from sakd_cli.distillers.table import DISTILLERS, Distillers
from sakd_cli.errors import UsageError
from sakd_cli.models.staged import StagedModel
from sakd_cli.routing.router import Router
from sakd_cli.runs.images import Images

READ_LABELS = (TeacherCorrectConfig, WSLDConfig, MetaConfig)  # routers


def require_combinable(config: DistillConfig) -> None:
    """Raise UsageError for settings that exclude each other, before images or networks are loaded."""
    if config.teacher.logits is not None:
        _require_logits_suffice(config)
    if config.data.unlabeled is not None:
        _require_labels_spared(config)


def _require_logits_suffice(config: DistillConfig) -> None:
    """Raise UsageError where something needs more of a teacher than the logits of single images."""
    rows = [DISTILLERS.row(part.name) for part in config.method.parts]
    mixed = config.data.mixed
    for what, refused in (
        (f"method {config.method.name} needs features", any(row.features or row.warmup for row in rows)),
        (f"router {config.router.name} needs features", isinstance(config.router, TrainedConfig)),
        (f"data.{''.join(mixed[:1])} needs answers for mixed images", mixed),
        ("teacher.cache needs a network", config.teacher.cache),
        ("several teachers need networks", config.teacher.others),
        ("residual students need a network", config.residual.students),
    ):
        if refused:
            raise UsageError(f"teacher.logits: {what}, and a file has logits of images alone")


def _require_labels_spared(config: DistillConfig) -> None:
    """Raise UsageError where images without labels cannot be mixed into the others."""
    torchrun.require_single_process("data.unlabeled")
    mixed = config.data.mixed
    several = config.teacher.others and config.teacher.combine == "confidence"
    for what in (
        *(f"method {part.name}" for part in config.method.parts if DISTILLERS.row(part.name).reads_labels),
        *([f"router {config.router.name}"] if isinstance(config.router, READ_LABELS) else []),
        *([f"data.{mixed[0]}"] if mixed else []),
        *(["train.accumulate"] if config.train.accumulate > 1 else []),
        *(["teacher.cache"] if config.teacher.cache else []),
        *(["residual.students"] if config.residual.students else []),
        *(["teacher.combine=confidence"] if several else []),
        *(["method dfa's search"] if isinstance(config.method, DFAConfig) else []),
    ):
        raise UsageError(f"data.unlabeled: {what} needs labelled images alone")


def require_one_size(config: DistillConfig, images: Images) -> None:
    """Raise UsageError where the teacher sees another size than the student, and something cannot have that."""
    if images.teacher_sees is None:
        return
    sizes = f"the teacher sees {size_text(images.teacher_side)} pixels, the student {size_text(images.side)}"
    if config.teacher.cache:
        raise UsageError(f"teacher.cache: {sizes}; a teacher cache is for one size", "--set teacher.cache=false")
    if config.residual.students:
        raise UsageError(f"{sizes}; residual students need one size", "--set residual.students=0")


def require_possible(config: DistillConfig, method: Distillers, router: Router, teacher: StagedModel) -> None:
    """Raise UsageError where a method, as it was built, cannot be had with what else is asked for."""
    mixed = config.data.mixed
    reasons = {f"method {part.name}": DISTILLERS.row(part.name).unmixed for part in config.method.parts}
    reasons[f"router {config.router.name}"] = router.unmixed
    by_label = config.teacher.others and config.teacher.combine == "confidence"
    reasons["teacher.combine"] = "confidence is of one label" if by_label else ""
    reasons["teacher.cache"] = "has the answers for single images" if config.teacher.cache else ""
    for what, why in reasons.items():
        if mixed and why:
            raise UsageError(f"data.{mixed[0]}: {what} {why}", f"--set data.{mixed[0]}=0; guide methods says which mix")
    changed = [key for key in ("jitter", "erase") if getattr(config.data, key)] + ["augment"] * bool(config.data.policy)
    if changed and config.teacher.cache:
        reason = "changes images in more ways than a teacher cache has answers for"
        raise UsageError(f"data.{changed[0]}: {reason}", "--set teacher.cache=false")
    name, memory = config.method.name, method.features is not None and method.features.scope == "memory"
    if config.data.balance is not None and memory:
        raise UsageError(
            f"data.balance: method {name} keeps one row per image, which a batch would write twice",
            "--set train.class_weights=balanced",
        )
    in_other_ways = method.want == "preactivations" or method.warmup is not None
    maps = any(spot.teacher < len(teacher.infos) - 1 for spot in method.spots)
    if config.teacher.cache and (in_other_ways or maps):
        raise UsageError(f"teacher.cache: method {name} uses maps, the cache stores pooled vectors and logits")
