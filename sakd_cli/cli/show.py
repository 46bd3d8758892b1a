"""`sakd list` and `sakd show`: what there is to choose from, and what each of it means."""

import inspect
from collections.abc import Mapping
from enum import StrEnum
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
    rows = _rows(kind)
    if json:
        emit(rows)
        return
    from sakd_cli.report.render.listing import listing_table

    show(listing_table(kind.value, rows))
    if kind is Kind.models:
        show("and torchvision/NAME, timm/NAME, package.module:function")


def _rows(kind: Kind) -> list[dict[str, Any]]:
    if kind is Kind.models:
        rows = [{"name": net.name, "family": net.family, "lr": net.lr} for net in networks.NETWORKS.values()]
        return rows + _plugged_networks()
    if kind is Kind.presets:
        return [{"name": name, "about": preset_summary(path)} for name, path in presets().items()]
    tables: dict[Kind, Mapping[str, type[Any]]] = {
        Kind.methods: methods.METHODS,
        Kind.routers: routers.ROUTERS,
        Kind.datasets: datasets.DATASETS,
    }
    found = usable(tables[kind], ConsoleReporter(quiet=True).warn)
    return [{"name": name, "about": summary(config)} | _whose(tables[kind], name) for name, config in found.items()]


def _whose(table: Mapping[str, Any], name: str) -> dict[str, str]:
    """The package of a row that is not ours."""
    package = table.package(name) if isinstance(table, Table) else "sakd"
    return {} if package == "sakd" else {"package": package}


def _plugged_networks() -> list[dict[str, Any]]:
    rows = []
    for name, (first, *_) in plugged(NETWORKS).items():
        try:
            network = networks.find_network(name)
        except UsageError as error:
            ConsoleReporter(quiet=True).warn(error.message)
            continue
        rows.append({"name": name, "family": network.family, "lr": network.lr, "package": first.package})
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
    about: dict[str, Any] = {
        "name": name,
        "about": summary(config),
        "text": inspect.getdoc(distiller) or "",
        "spots": f"{entry.places.__name__.replace('_', ' ')}, logits" if entry.features else "logits",
        "defaults": config().model_dump(mode="json", exclude={"name"}),
    }
    if json:
        emit(about)
        return
    from sakd_cli.report.render.listing import listing_table

    rows = [{"key": f"method.{key}", "default": value} for key, value in about["defaults"].items()]
    show(
        f"{name}: {about['about']}\n",
        f"{about['text']}\n",
        f"Spots: {about['spots']}\n",
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
    rows = explain(key)
    if json:
        emit([row | {"default": str(row["default"])} for row in rows])
        return
    from sakd_cli.report.render.listing import listing_table

    for text in dict.fromkeys(str(row["description"]) for row in rows):
        show(f"{key}: {text}\n")
    columns = ("of", "type", "default", "source")
    show(listing_table(key, [{name: str(row[name]) for name in columns} for row in rows]))


def show_schema(
    name: Annotated[
        str,
        typer.Argument(
            help="A document: summary, plan, eval, ensemble, evals, compare, report, export, spots, data, sweep, "
            "sweep-plan, bench, import."
        ),
    ],
    json: Json = False,
) -> None:
    """Print the JSON schema of a command's `--json`.

    Examples:

        sakd show schema eval

        sakd show schema compare --json
    """
    from sakd_cli.documents.table import DOCUMENTS

    if name not in DOCUMENTS:
        raise UsageError(unknown("document", name, DOCUMENTS))
    schema = DOCUMENTS[name].model_json_schema()
    emit(schema) if json else show(yaml.safe_dump(schema, sort_keys=False, allow_unicode=True).rstrip())
