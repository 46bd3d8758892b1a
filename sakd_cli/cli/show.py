"""`sakd list`, `sakd show` and `sakd config show`: what there is to choose from, what it means, what was chosen."""

import inspect
from json import dumps
from typing import Annotated, Any, Literal

import typer
import yaml

from sakd_cli.cli.console import ConsoleReporter, emit, show
from sakd_cli.cli.options import NAMES, Values, completion, with_options
from sakd_cli.config import code, methods, networks, routers
from sakd_cli.config.base import EFFECTIVE, choose, of_file, own_name, summary, written
from sakd_cli.config.effective import effective
from sakd_cli.config.keys import description_of, explain, keys_of
from sakd_cli.config.options import OPTIONS, options_of
from sakd_cli.config.plugins import NETWORKS, Table, plugged, usable
from sakd_cli.config.resolve import config_sources, flat, preset_summary, presets, resolve
from sakd_cli.config.training import TASKS
from sakd_cli.documents.listing import Listed, Listing, ShownConfig, ShownKey, ShownMeaning, ShownMethod
from sakd_cli.documents.table import DOCUMENTS
from sakd_cli.errors import UsageError, unknown
from sakd_cli.report.render.sheet import listing_table

Kind = Literal["models", "methods", "datasets", "presets", "routers"]


@with_options("list")
def listing(
    options: Values,
    json: bool,
    kind: Annotated[Kind, typer.Argument(help="What to list.")],
    file: Annotated[str | None, typer.Argument(metavar="[my.py]", help="Also what this file of yours has.")] = None,
) -> None:
    """List models, methods, datasets, presets or routers.

    Examples:

        sakd list methods

        sakd list models --json
    """
    document = Listing(kind=kind, rows=[*_rows(kind), *(_of_file(kind, file) if file else [])])
    if json:
        emit(document)
        return
    show(listing_table(kind, [row.model_dump(exclude_none=True) for row in document.rows]))
    if kind == "models":
        show("and torchvision/NAME, timm/NAME, package.module:function")


def _rows(kind: Kind) -> list[Listed]:
    if kind == "models":
        rows = [Listed(name=net.name, family=net.family, lr=net.lr) for net in networks.NETWORKS.values()]
        return rows + _plugged_networks()
    if kind == "presets":
        return [Listed(name=name, about=preset_summary(path)) for name, path in presets().items()]
    table = NAMES[kind]()
    found = dict(usable(table, ConsoleReporter(quiet=True).warn))
    packages = {name: table.package(name) for name in found} if isinstance(table, Table) else {}
    theirs = {name: package for name, package in packages.items() if package != "sakd"}
    return [Listed(name=name, about=summary(of), package=theirs.get(name)) for name, of in found.items()]


def _plugged_networks() -> list[Listed]:
    rows = []
    for name, (first, *_) in plugged(NETWORKS).items():
        try:
            network = networks.find_network(name)
            rows.append(Listed(name=name, family=network.family, lr=network.lr, package=first.package))
        except UsageError as error:
            ConsoleReporter(quiet=True).warn(error.message)
    return rows


def _of_file(kind: Kind, file: str) -> list[Listed]:
    """What of this kind a file of the user's own defines."""
    if kind not in ("methods", "routers"):
        raise UsageError(f"sakd list {kind}: shows no file; every function of {file} may be named")
    base, table = {"methods": ("Distiller", methods.METHODS), "routers": ("Router", routers.ROUTERS)}[kind]
    names = [f"{file}:{name}" for name, found in code.contents(file).items() if base in code.ancestors(found)]
    code.trust(*names)
    return [Listed(name=name, about=summary(table[name]), package=file) for name in names]


def kind_of(name: str) -> str | None:
    """Which `sakd show` explains what has this name; None where there is nothing of the kind."""
    if of_file(name):
        return "method|router"
    tables: dict[str, Any] = {"method": methods.METHODS, "router": routers.ROUTERS, "schema": DOCUMENTS}
    tables["key"] = [name for task in TASKS for key in keys_of(task) for name in (key, key.rpartition(".")[2])]
    return next((kind for kind, table in tables.items() if own_name(name, table)), None)


@with_options("show-router")
def show_router(
    options: Values,
    json: bool,
    name: Annotated[str, typer.Argument(help="A router of `sakd list routers`.", autocompletion=completion("routers"))],
) -> None:
    """Explain a router: what it decides, its settings and its source.

    Examples:

        sakd show router adaptive

        sakd show router my.py:Hard
    """
    code.trust(name)
    name = choose("router", name, routers.ROUTERS, "sakd list routers")
    config = routers.ROUTERS[name]
    _explained("router", name, config, code.load(name) if of_file(name) else config, "all", json=json)


@with_options("show-method")
def show_method(
    options: Values,
    json: bool,
    name: Annotated[str, typer.Argument(help="A method of `sakd list methods`.", autocompletion=completion("methods"))],
) -> None:
    """Explain a method: formula, spots, published defaults and source.

    Examples:

        sakd show method fitnet

        sakd show method sp --json
    """
    code.trust(name)
    parts = f"one at a time: sakd show method {name.partition('+')[0]}" if "+" in name else "sakd list methods"
    name = choose("method", name, list(methods.METHODS), parts)
    from sakd_cli.distillers.table import DISTILLERS

    entry = DISTILLERS.row(name)
    spots = f"{entry.places.__name__.replace('_', ' ')}, logits" if entry.features else "logits"
    _explained("method", name, methods.METHODS[name], entry.features or entry.logits, spots, json=json)


def _explained(section: str, name: str, config: Any, of: Any, spots: str, *, json: bool) -> None:
    """A method or a router by its settings and the class `of` it."""
    defaults = config().model_dump(mode="json", exclude={"name"})
    about, description = summary(config), inspect.getdoc(of) or ""
    document = ShownMethod(name=name, about=about, description=description, spots=spots, defaults=defaults)
    if json:
        emit(document)
        return
    rows = [{"key": f"{section}.{key}", "default": value} for key, value in document.defaults.items()]
    show(
        f"{document.name}: {document.about}\n",
        *([f"{document.description}\n"] if document.description != document.about else []),
        f"Spots: {document.spots}\n",
        listing_table("Defaults", rows),
    )


@with_options("show-key")
def show_key(
    options: Values,
    json: bool,
    key: Annotated[str, typer.Argument(help="A key of the configuration, such as train.lr.")],
) -> None:
    """Explain a setting: type, default, where the default comes from, and which methods have it.

    Examples:

        sakd show key train.lr

        sakd show key method.weight --json
    """
    document = ShownMeaning(key=key, rows=explain(key))
    if json:
        emit(document)
        return
    for text in dict.fromkeys(row.description for row in document.rows):
        show(f"{key}: {text}\n")
    show(listing_table(key, [row.model_dump(exclude={"description"}) for row in document.rows]))


@with_options("show-schema")
def show_schema(
    options: Values, json: bool, name: Annotated[str, typer.Argument(help=f"A document: {', '.join(DOCUMENTS)}.")]
) -> None:
    """Print the JSON schema of a command's `--json`.

    Examples:

        sakd show schema eval

        sakd show schema compare --json
    """
    if name not in DOCUMENTS:
        raise UsageError(unknown("document", name, DOCUMENTS))
    schema = DOCUMENTS[name].model_json_schema()
    show(dumps(schema, indent=2) if json else yaml.safe_dump(schema, sort_keys=False, allow_unicode=True).rstrip())


@with_options("config-show")
def show_config(options: Values, json: bool, task: str, origin: bool, describe: bool) -> None:
    """Print the complete configuration that these options make, and with --origin who set each key.

    Precedence: option, then environment (SAKD_*), then --config file, then --preset, then default.

    Examples:

        sakd config show --preset quickstart

        SAKD_SEED=3 sakd config show --preset quickstart --epochs 2 --origin
    """
    command = "distill" if task == "distill" else "pretrain-teacher"
    has = {*options_of(command)}
    for name in OPTIONS.keys() & options.keys() - has:
        if OPTIONS[name].key and options[name]:
            raise UsageError(f"{OPTIONS[name].flag}: is no option of sakd {command}")
    resolved = resolve(task, config_sources({name: value for name, value in options.items() if name in has}))
    settings, values = resolved.config.model_dump(mode="json"), effective(resolved.config)
    keys = [
        ShownKey(
            key=key,
            value=value,
            origin=resolved.origins.get(key, "default"),
            description=description_of(resolved.config, key) if describe else None,
        )
        for key, value in flat(settings).items()
    ]
    listed = origin or describe
    if json:
        emit(ShownConfig(task=task, config=settings, effective=values, keys=keys if listed else None))
    elif not listed:
        show(yaml.safe_dump(settings | {EFFECTIVE: values}, sort_keys=False).rstrip())
    else:
        rows = [key.model_dump(exclude_none=True) | {"value": written(key.value)} for key in keys]
        show(listing_table(f"config of {task}", rows))
