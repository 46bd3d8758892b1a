"""`sakd list` and `sakd show`: what there is to choose from, and what each of it means."""

import inspect
from collections.abc import Mapping
from enum import StrEnum
from json import dumps
from typing import Annotated, Any

import typer
import yaml

from sakd_cli.cli.console import ConsoleReporter, emit, show
from sakd_cli.cli.options import Json, completion
from sakd_cli.config import datasets, methods, networks, routers
from sakd_cli.config.base import own_name, summary
from sakd_cli.config.keys import explain
from sakd_cli.config.plugins import NETWORKS, Table, plugged, usable
from sakd_cli.config.resolve import preset_summary, presets
from sakd_cli.documents.listing import Listed, Listing, ShownMeaning, ShownMethod
from sakd_cli.documents.table import DOCUMENTS
from sakd_cli.errors import UsageError, unknown


class Kind(StrEnum):
    """What can be listed."""

    models = "models"
    methods = "methods"
    datasets = "datasets"
    presets = "presets"
    routers = "routers"


def listing(kind: Annotated[Kind, typer.Argument(help="What to list.")], json: Json = False) -> None:
    """List models, methods, datasets, presets or routers.

    Examples:

        sakd list methods

        sakd list models --json
    """
    document = Listing(kind=kind.value, rows=_rows(kind))
    if json:
        emit(document)
        return
    from sakd_cli.report.render.listing import listing_table

    show(listing_table(kind.value, [row.model_dump(exclude_none=True) for row in document.rows]))
    if kind is Kind.models:
        show("and torchvision/NAME, timm/NAME, package.module:function")


def _rows(kind: Kind) -> list[Listed]:
    if kind is Kind.models:
        rows = [Listed(name=net.name, family=net.family, lr=net.lr) for net in networks.NETWORKS.values()]
        return rows + _plugged_networks()
    if kind is Kind.presets:
        return [Listed(name=name, about=preset_summary(path)) for name, path in presets().items()]
    tables: dict[Kind, Mapping[str, type[Any]]] = {
        Kind.methods: methods.METHODS,
        Kind.routers: routers.ROUTERS,
        Kind.datasets: datasets.DATASETS,
    }
    found = usable(tables[kind], ConsoleReporter(quiet=True).warn)
    return [Listed(name=name, about=summary(of), package=_package(tables[kind], name)) for name, of in found.items()]


def _package(table: Mapping[str, Any], name: str) -> str | None:
    """The package of a row that is not ours."""
    package = table.package(name) if isinstance(table, Table) else "sakd"
    return None if package == "sakd" else package


def _plugged_networks() -> list[Listed]:
    rows = []
    for name, (first, *_) in plugged(NETWORKS).items():
        try:
            network = networks.find_network(name)
        except UsageError as error:
            ConsoleReporter(quiet=True).warn(error.message)
            continue
        rows.append(Listed(name=name, family=network.family, lr=network.lr, package=first.package))
    return rows


def show_method(
    name: Annotated[str, typer.Argument(help="A method of `sakd list methods`.", autocompletion=completion("methods"))],
    json: Json = False,
) -> None:
    """Say what a method matches: formula, spots, published defaults and source.

    Examples:

        sakd show method fitnet

        sakd show method sp --json
    """
    if (own := own_name(name, methods.METHODS)) is None:
        raise UsageError(unknown("method", name, methods.METHODS), hint="sakd list methods")
    name = own
    from sakd_cli.distillers.table import DISTILLERS

    entry = DISTILLERS.row(name)
    distiller = entry.features or entry.logits
    config = methods.METHODS[name]
    document = ShownMethod(
        name=name,
        about=summary(config),
        description=inspect.getdoc(distiller) or "",
        spots=f"{entry.places.__name__.replace('_', ' ')}, logits" if entry.features else "logits",
        defaults=config().model_dump(mode="json", exclude={"name"}),
    )
    if json:
        emit(document)
        return
    from sakd_cli.report.render.listing import listing_table

    rows = [{"key": f"method.{key}", "default": value} for key, value in document.defaults.items()]
    show(
        f"{name}: {document.about}\n",
        f"{document.description}\n",
        f"Spots: {document.spots}\n",
        listing_table("Defaults", rows),
    )


def show_key(
    key: Annotated[str, typer.Argument(help="A key of the configuration, such as train.lr.")], json: Json = False
) -> None:
    """Say what a setting means: type, default, where the default comes from, and which methods have it.

    Examples:

        sakd show key train.lr

        sakd show key method.weight --json
    """
    document = ShownMeaning(key=key, rows=explain(key))
    if json:
        emit(document)
        return
    from sakd_cli.report.render.listing import listing_table

    for text in dict.fromkeys(row.description for row in document.rows):
        show(f"{key}: {text}\n")
    show(listing_table(key, [row.model_dump(exclude={"description"}) for row in document.rows]))


def show_schema(
    name: Annotated[str, typer.Argument(help=f"A document: {', '.join(DOCUMENTS)}.")], json: Json = False
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
