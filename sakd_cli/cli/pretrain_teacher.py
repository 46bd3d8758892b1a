"""`sakd pretrain-teacher`, and the command of any further training procedure."""

from collections.abc import Callable
from typing import Annotated

import typer

from sakd_cli.cli.distill import print_result, train
from sakd_cli.cli.options import Values, completion, with_options
from sakd_cli.config.base import summary
from sakd_cli.config.keys import keys_of
from sakd_cli.config.training import PROCEDURES

Model = Annotated[
    str | None, typer.Argument(help="Network to train, as in `sakd list models`.", autocompletion=completion("models"))
]


@with_options("pretrain-teacher")
def pretrain_teacher(options: Values, json: bool, quiet: bool, model: Model = None) -> None:
    """Train one network with cross-entropy: a teacher, or a student from scratch.

    Examples:

        sakd pretrain-teacher wrn40_2 --dataset cifar100

        sakd pretrain-teacher wrn40_2 --student-friendly wrn16_2
    """
    _train("pretrain", options, json=json, quiet=quiet)


def command_of(task: str) -> Callable[..., None]:
    """The command of a training procedure that has none of its own: the options of the keys that its config has."""

    @with_options("pretrain-teacher", keys_of(task))
    def command(options: Values, json: bool, quiet: bool, model: Model = None) -> None:
        _train(task, options, json=json, quiet=quiet)

    command.__doc__ = summary(PROCEDURES[task].config)
    return command


def _train(task: str, options: Values, *, json: bool, quiet: bool) -> None:
    found = train(task, options, quiet=quiet)
    assert not isinstance(found, list)
    print_result(found, json=json)
