"""What modules give in a step is checked, and somebody's own code is named by its place in its file."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from sakd_cli.config.code import GUIDE, line_of
from sakd_cli.engine.task import Task
from sakd_cli.errors import NonFiniteError, UsageError
from sakd_cli.routing.router import Decision, Router


def require_floating(module: nn.Module, what: str, value: object, shape: tuple[int, ...]) -> None:
    """Raise UsageError where it is no floating tensor of this shape. Nothing is read from the device."""
    if isinstance(value, Tensor) and value.shape == shape and value.is_floating_point():
        return
    text = f"{what} must be a floating tensor of shape {list(shape)}, not {_told(value)}"
    raise UsageError(f"{method_of(module)}: {text}", GUIDE)


def _told(value: object) -> str:
    return f"{value.dtype} of shape {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def method_of(module: nn.Module) -> str:
    """The method that a module is called by, and where it stands if that is somebody's own code."""
    line = line_of(module, "decide", "spot_loss", "forward")
    name = next((name for name in ("decide", "spot_loss") if line and name in vars(type(module))), "forward")
    return f"{f'{line}: ' if line else ''}{type(module).__name__}.{name}"


def check_decision(router: Router, decision: object, shape: tuple[int, int], *, routed: bool) -> Decision:
    """What a router gave for [spots, N]. Raises UsageError where it is not what its contract says."""
    if not isinstance(decision, Decision):
        text = f"must return a Decision, not a {type(decision).__name__}"
        if router.decides:
            text = f"must return a tensor [N] or [spots, N] ([{shape[1]}] or {list(shape)}) or a Decision, not "
            text += _told(decision)
        raise UsageError(f"{method_of(router)}: {text}", GUIDE)
    require_floating(router, "the weight of its Decision [spots, N]", decision.weight, shape)
    if not router.decides:
        return decision
    for what, value, layout in (("gate", decision.gate, shape[::-1]), ("probability", decision.probability, shape)):
        if value is not None:
            require_floating(router, f"the {what} of its Decision", value, layout)
    if (decision.gate is not None) != routed:
        text = "gives no gate to learn by, beside" if routed else "gives a gate, and nothing is routed by it, without"
        raise UsageError(f"{method_of(router)}: {text} `settings` of a LearnedConfig", GUIDE)
    return decision


def of_own_code(error: NonFiniteError, task: Task) -> NonFiniteError:
    """The same, with the place of somebody's own code where that gave the number."""
    given = {"router_weight": "router", "feature": "feature_distiller", "logit": "logit_distiller"}
    for term, name in given.items():
        module = getattr(task, name, None)
        suspected = "gradients is" in error.message  # while all that it gives is finite
        if module is not None and (suspected or term in error.message) and line_of(module):
            text = "gives weights that are NaN or outside of 0 to 1: " if name == "router" else ""
            text = "perhaps its gradient, as of a root at 0: " if suspected else text
            return NonFiniteError(f"{method_of(module)}: {text}{error.message}", GUIDE)
    return error


@contextmanager
def naming_own_code(task: Task) -> Iterator[None]:
    """Whatever is not finite is told as `of_own_code` has it."""
    try:
        yield
    except NonFiniteError as error:
        raise of_own_code(error, task) from None
