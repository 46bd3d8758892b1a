"""What of a run's settings cannot be together: each is refused in one line, before anything is trained."""

from sakd_cli.config.training import DistillConfig
from sakd_cli.distillers.table import Distillers
from sakd_cli.errors import UsageError


def require_possible(config: DistillConfig, method: Distillers) -> None:
    """Raise UsageError where a method cannot be had with what else is asked for."""
    name, memory = config.method.name, method.features is not None and method.features.scope == "memory"
    if config.data.balance is not None and memory:
        raise UsageError(
            f"data.balance: method {name} keeps one row per image, which a batch would write twice",
            "--set train.class_weights=balanced",
        )
