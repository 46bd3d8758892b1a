"""What of a run's settings cannot be together: each is refused in one line, before anything is trained."""

from sakd_cli import torchrun
from sakd_cli.config.methods import DFAConfig
from sakd_cli.config.routers import MetaConfig, TeacherCorrectConfig, WSLDConfig
from sakd_cli.config.training import DistillConfig
from sakd_cli.distillers.table import DISTILLERS, Distillers
from sakd_cli.errors import UsageError
from sakd_cli.routing.router import Router
from sakd_cli.runs.answers import require_answers


def require_labels(config: DistillConfig) -> None:
    """Raise UsageError where images without labels cannot be mixed into the others, or logits are not enough."""
    require_answers(config)
    if config.data.unlabeled is None:
        return
    torchrun.require_single_process("data.unlabeled")
    mixed = config.data.mixed
    several = config.teacher.others and config.teacher.combine == "confidence"
    for what in (
        *(f"method {part.name}" for part in config.method.parts if DISTILLERS.row(part.name).reads_labels),
        *([f"router {config.router.name}"] if isinstance(config.router, OF_LABELS) else []),
        *([f"data.{mixed[0]}"] if mixed else []),
        *(["train.accumulate"] if config.train.accumulate > 1 else []),
        *(["teacher.cache"] if config.teacher.cache else []),
        *(["residual.students"] if config.residual.students else []),
        *(["teacher.combine=confidence"] if several else []),
        *(["method dfa's search"] if isinstance(config.method, DFAConfig) else []),
    ):
        raise UsageError(f"data.unlabeled: {what} needs labelled images alone")


OF_LABELS = (TeacherCorrectConfig, WSLDConfig, MetaConfig)


def require_possible(config: DistillConfig, method: Distillers, router: Router) -> None:
    """Raise UsageError where a method cannot be had with what else is asked for."""
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
