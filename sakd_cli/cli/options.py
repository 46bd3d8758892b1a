"""The rows of the table of options as parameters of a command. No torch."""

import inspect
from collections.abc import Callable, Collection, Mapping
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, get_origin

import typer

from sakd_cli.config import datasets, methods, networks, routers
from sakd_cli.config.keys import default_of
from sakd_cli.config.options import FLAG, Option, options_of
from sakd_cli.config.resolve import presets
from sakd_cli.errors import UsageError

Values = Mapping[str, Any]
RunOrNewest = Annotated[Path | None, typer.Argument(metavar="RUN", help="Run directory. Default: the newest.")]
NAMES: dict[str, Callable[[], Any]] = {
    "models": networks.all_names,
    "methods": lambda: methods.METHODS,
    "routers": lambda: routers.ROUTERS,
    "datasets": lambda: datasets.DATASETS,
    "presets": presets,
}


def completion(kind: str) -> Callable[[str], list[str]] | None:
    """Shell completion from the names of a kind of `sakd list`."""
    if not kind:
        return None
    return lambda incomplete: [name for name in NAMES[kind]() if name.startswith(incomplete)]


def with_options(
    command: str, keys: Collection[str] | None = None
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command function the options of `command`, and pass it their values as its first argument.

    keys  of the config; options that set another one are left out. None: none is.

    A parameter that the function has besides gets the value of the option of its name; one with an annotation of
    typer's is an argument of that command.
    """

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        _, *own = inspect.signature(function, eval_str=True).parameters.values()
        special = {one.name: one for one in own if get_origin(one.annotation) is Annotated}
        table = options_of(command)
        fitting = [row for row in table.values() if keys is None or not row.key or row.key in keys]
        rows = [_parameter(row) for row in fitting if row.name not in special]
        parameters = [*(one.replace(kind=one.KEYWORD_ONLY) for one in special.values()), *rows]

        @wraps(function)
        def run(**values: Any) -> None:
            if values.get("json") and values.get("csv"):
                raise UsageError("--json and --csv both write to stdout; choose one")
            options = {name: value for name, value in values.items() if name not in special or name in table}
            function(options, **{one.name: values[one.name] for one in own})

        # This is where typer looks for the options of a command.
        run.__dict__["__signature__"] = inspect.Signature(parameters)
        run.__annotations__ = {one.name: one.annotation for one in parameters}
        return run

    return decorate


def _parameter(row: Option) -> inspect.Parameter:
    option = typer.Option(
        *(row.flags or row.flag).split(),
        metavar=row.metavar,
        min=row.least,
        help=row.help + _default(row) + (f" [env: {row.variable}]" if row.key else ""),
        rich_help_panel=row.panel,
        autocompletion=completion(row.complete),
        show_default=False,
    )
    value = inspect.Parameter.empty if row.default is ... else row.default
    value = False if row.type is FLAG and value is None else value
    return inspect.Parameter(
        row.name, inspect.Parameter.KEYWORD_ONLY, default=value, annotation=Annotated[row.type, option]
    )


def _default(row: Option) -> str:
    value = default_of(row.key) if row.key and "(default" not in row.help else row.default
    return "" if value is None or value is ... or isinstance(value, bool) else f" (default {value})"
