"""`sakd list`, `sakd show` and `sakd config`: the words one can use, and where each word of a config comes from."""

import inspect
from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, Any

import typer
import yaml

from sakd_cli.cli import options as o
from sakd_cli.cli.console import ConsoleReporter, emit, show
from sakd_cli.config import datasets, methods, networks, presets, routers
from sakd_cli.config.base import summary
from sakd_cli.config.plugins import NETWORKS, Table, plugged, usable
from sakd_cli.config.resolve import flat
from sakd_cli.errors import UsageError, unknown


class Kind(StrEnum):
    """What can be listed."""

    models = "models"
    methods = "methods"
    datasets = "datasets"
    presets = "presets"
    routers = "routers"


class Which(StrEnum):
    """Commands that have a config."""

    distill = "distill"
    pretrain = "pretrain"


Task = Annotated[Which, typer.Option(help="Command whose config is meant.", rich_help_panel="Configuration")]
Origin = Annotated[bool, typer.Option("--origin", help="Say who set each key.", rich_help_panel="Output")]


def listing(kind: Annotated[Kind, typer.Argument(help="What to list.")], json: o.Json = False) -> None:
    """List models, methods, datasets, presets or routers.

    Examples:

        sakd list methods

        sakd list models --json
    """
    rows = _rows(kind)
    if json:
        emit(rows)
        return
    from sakd_cli.report.runs.tables import listing_table

    show(listing_table(kind.value, rows))
    if kind is Kind.models:
        show("and torchvision/NAME, timm/NAME, package.module:function")


def _methods() -> Mapping[str, type[Any]]:
    return methods.METHODS


def _rows(kind: Kind) -> list[dict[str, Any]]:
    if kind is Kind.models:
        rows = [{"name": net.name, "family": net.family, "lr": net.lr} for net in networks.NETWORKS.values()]
        return rows + _plugged_networks()
    if kind is Kind.presets:
        return [{"name": name, "about": presets.about(path)} for name, path in presets.presets().items()]
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
    name: Annotated[str, typer.Argument(help="A method of `sakd list methods`.", autocompletion=o.names(_methods))],
    json: o.Json = False,
) -> None:
    """Say what a method matches: formula, spots, published defaults and source.

    Examples:

        sakd show method fitnet

        sakd show method sp --json
    """
    if name not in methods.METHODS:
        raise UsageError(unknown("method", name, methods.METHODS), hint="sakd list methods")
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
    from sakd_cli.report.runs.tables import listing_table

    rows = [{"key": f"method.{key}", "default": value} for key, value in about["defaults"].items()]
    show(
        f"{name}: {about['about']}\n",
        f"{about['text']}\n",
        f"Spots: {about['spots']}\n",
        listing_table("Defaults", rows),
    )


def show_config(
    ctx: typer.Context,
    task: Task = Which.distill,
    teacher: o.Teacher = None,
    teacher_weights: o.TeacherWeights = None,
    student: o.Student = None,
    model: Annotated[str | None, typer.Option(help="Network of a pretraining.", rich_help_panel="Distillation")] = None,
    student_friendly: o.StudentFriendly = None,
    method: o.Method = None,
    dfa_weights: o.DfaWeights = None,
    router: o.Router = None,
    head: o.Head = None,
    dataset: o.Dataset = None,
    data_root: o.DataRoot = None,
    holdout: o.Holdout = None,
    epochs: o.Epochs = None,
    batch_size: o.BatchSize = None,
    seed: o.Seed = None,
    preset: o.Preset = None,
    config: o.ConfigFile = None,
    set_: o.Set = None,
    runs_dir: o.RunsDir = None,
    device: o.Device = None,
    log: o.Log = None,
    origin: Origin = False,
    json: o.Json = False,
) -> None:
    """Print the whole config that these options would make, and with --origin who set each key.

    Precedence: option, then environment (SAKD_*), then --config file, then --preset, then default.

    Examples:

        sakd config show --preset quickstart

        SAKD_SEED=3 sakd config show --preset quickstart --epochs 2 --origin
    """
    of_task = {key: value for key, value in ctx.params.items() if key not in _FOREIGN[task]}
    resolved = o.resolved(task.value, of_task)
    words = resolved.config.model_dump(mode="json")
    if not origin:
        emit(words) if json else show(yaml.safe_dump(words, sort_keys=False).rstrip())
        return
    rows = [
        {"key": key, "value": value, "origin": resolved.origins.get(key, "default")}
        for key, value in flat(words).items()
    ]
    if json:
        emit(rows)
        return
    from sakd_cli.report.runs.tables import listing_table

    show(listing_table(f"config of {task.value}", [row | {"value": str(row["value"])} for row in rows]))


_FOREIGN = {
    Which.distill: {"model", "student_friendly"},
    Which.pretrain: {"teacher", "student", "method", "dfa_weights", "router"},
}


def show_schema(
    name: Annotated[
        str,
        typer.Argument(
            help="A document: summary, plan, eval, ensemble, evals, compare, report, export, spots, data, sweep, "
            "sweep-plan, bench, import."
        ),
    ],
    json: o.Json = False,
) -> None:
    """Print the JSON schema of a command's `--json`.

    Examples:

        sakd show schema eval

        sakd show schema compare --json
    """
    from sakd_cli.documents.evaluation import DOCUMENTS

    if name not in DOCUMENTS:
        raise UsageError(unknown("document", name, DOCUMENTS))
    schema = DOCUMENTS[name].model_json_schema()
    emit(schema) if json else show(yaml.safe_dump(schema, sort_keys=False, allow_unicode=True).rstrip())
