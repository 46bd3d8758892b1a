"""Where each word of a config comes from: option > environment (SAKD_*) > file > preset > default.

A layer is a nested dict with the name of its origin. Layers are laid over each other from the weakest to the
strongest; every leaf remembers who set it, so that an error and `sakd config show --origin` can say so.
"""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import ValidationError

from sakd_cli.config import datasets, friendly, methods, residual, routers, training
from sakd_cli.config.base import Config
from sakd_cli.config.plugins import usable
from sakd_cli.config.training import STUDENT_WORDS, TASKS
from sakd_cli.errors import UsageError, unknown
from sakd_cli.files import MOST_YAML, parse_yaml, read_bytes

# Named options of the command line and the key each one sets. The environment variable is SAKD_ + the name.
OPTIONS = {
    "teacher": "teacher.source",
    "teacher_weights": "teacher.weights",
    "student": "student",
    "model": "model",
    "head": "head",
    "student_friendly": "friendly.students",
    "method": "method.name",
    "dfa_weights": "method.weights",
    "router": "router.name",
    "residual_students": "residual.students",
    "pretrain": "teacher.pretrain",
    "dataset": "data.name",
    "data_root": "data.root",
    "holdout": "data.holdout",
    "runs_dir": "runs_dir",
    "epochs": "train.epochs",
    "batch_size": "train.batch_size",
    "seed": "seed",
    "device": "device",
    "precision": "runtime.precision",
    "compile": "runtime.compile",
    "sync_batchnorm": "runtime.sync_batchnorm",
    "gather": "runtime.gather",
    "deterministic": "runtime.deterministic",
    "teacher_bank": "teacher.bank",
    "allow_teacher_mismatch": "teacher.allow_mismatch",
    "log": "log",
}
# Sections that may be written as one word, the key that word stands for, and the keys that outlive a change of it
# (as far as the new choice has them).
_PRIMARY_KEYS = {
    "method": ("name", set[str]()),
    "router": ("name", set(routers.LearnedConfig.model_fields)),
    "data": ("name", set(datasets.DataConfig.model_fields)),
    "teacher": ("source", {"pretrain", "epochs", "bank", "allow_mismatch"}),
    "friendly": ("students", set(friendly.FriendlyConfig.model_fields)),
}


_TABLES: dict[str, Mapping[str, type[Config]]] = {
    "method": methods.METHODS,
    "router": routers.ROUTERS,
    "data": datasets.DATASETS,
}


class ConfigSource(NamedTuple):
    """Config of one origin, nested as in a config file."""

    origin: str
    values: dict[str, Any]


class Resolved(NamedTuple):
    """The config (of the class that `TASKS` names), and the origin of each dotted key that some layer set."""

    config: Any
    origins: dict[str, str]


def nested(dotted: Mapping[str, Any]) -> dict[str, Any]:
    """`{"a.b": 1}` as `{"a": {"b": 1}}`."""
    tree: dict[str, Any] = {}
    for key, value in dotted.items():
        *parents, leaf = key.split(".")
        branch = tree
        for parent in parents:
            branch = branch.setdefault(parent, {})
        branch[leaf] = value
    return tree


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` as `{"a.b": 1}`."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            leaves |= flat(value, f"{prefix}{key}.")
        else:
            leaves[f"{prefix}{key}"] = value
    return leaves


def option_layers(options: Mapping[str, Any]) -> list[ConfigSource]:
    """One layer per named option that was given."""
    return [
        ConfigSource(f"--{name.replace('_', '-')}", nested({OPTIONS[name]: value}))
        for name, value in options.items()
        if value is not None
    ]


def set_layers(assignments: Iterable[str]) -> list[ConfigSource]:
    """One layer per `--set a.b=c`; the value is read as YAML."""
    layers = []
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not all(key.split(".")):
            raise UsageError(
                f"--set {assignment!r} is not of the form key=value", hint="for example --set data.limit=1000"
            )
        try:
            value = parse_yaml(text)
        except (yaml.YAMLError, ValueError):  # ValueError: YAML reads 2020-13-45 as a date
            raise UsageError(f"--set {key}: {text[:40]!r} is no YAML value") from None
        layers.append(ConfigSource(f"--set {key}", nested({key: value})))
    return layers


def environment_layers(known: Iterable[str]) -> list[ConfigSource]:
    """One layer per `SAKD_<OPTION>` that is set and not empty, for the options a command has."""
    values = {name: os.environ.get(f"SAKD_{name.upper()}") for name in known}
    return [
        ConfigSource(f"SAKD_{name.upper()}", nested({OPTIONS[name]: value})) for name, value in values.items() if value
    ]


def file_layer(path: Path, origin: str) -> ConfigSource:
    """A YAML file as a layer. Raises UsageError naming the file and, where YAML says so, the line."""
    try:
        values = parse_yaml(read_bytes(path, MOST_YAML).decode())
    except OSError as error:
        raise UsageError(f"{path}: {(error.strerror or 'cannot be read').lower()}") from None
    except UnicodeDecodeError:
        raise UsageError(f"{path}: not a text file") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise UsageError(
            f"{path}{where}: not valid YAML: {getattr(error, 'problem', None) or 'cannot be read'}"
        ) from None
    except ValueError as error:
        raise UsageError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise UsageError(f"{path}: a config is a mapping of keys to values")
    return ConfigSource(origin, values)


def _lay_over(below: dict[str, Any], layer: ConfigSource, origins: dict[str, str]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in layer.values.items():
        head, outlives = _PRIMARY_KEYS.get(key, ("", set[str]()))
        if head and isinstance(value, str):
            value = {head: value}
        if not isinstance(value, dict):
            merged[key] = value
            origins[key] = layer.origin
            continue
        section = dict(merged[key]) if isinstance(merged.get(key), dict) else {}
        if head in value and head in section and value[head] != section[head]:
            kind = _TABLES.get(key, {}).get(str(value[head]))
            dropped = section.keys() - (outlives & kind.model_fields.keys() if kind else outlives)
            section = {name: kept for name, kept in section.items() if name not in dropped}
            for name in dropped:
                origins.pop(f"{key}.{name}", None)
        merged[key] = section | value
        origins |= {f"{key}.{leaf}": layer.origin for leaf in flat(value)}
    return merged


def resolve(task: str, layers: Iterable[ConfigSource]) -> Resolved:
    """Lay the layers over each other and read the result as the config of `task`.

    Raises UsageError: which key, what is wrong with it, the nearest name, and who set it.
    """
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for layer in layers:
        values = _lay_over(values, _for_task(task, layer), origins)
    try:
        return Resolved(TASKS[task].model_validate(values), origins)
    except ValidationError as error:
        raise _told(task, error, origins) from None


def _for_task(task: str, layer: ConfigSource) -> ConfigSource:
    """A preset or file written for a distillation also says how to train its teacher."""
    values = {key: value for key, value in layer.values.items() if key != "task"}
    written_for = layer.values.get("task", task)
    if written_for == task:
        return ConfigSource(layer.origin, values)
    if task == "eval":
        return ConfigSource(layer.origin, {key: values[key] for key in TASKS["eval"].model_fields if key in values})
    if (written_for, task) != ("distill", "pretrain"):
        raise UsageError(f"{layer.origin} is written for {written_for!r}, not for {task!r}")
    teacher = values.pop("teacher", {})
    teacher = teacher if isinstance(teacher, dict) else {"source": teacher}
    kept = {key: value for key, value in values.items() if key not in STUDENT_WORDS}
    kept |= {"model": teacher["source"]} if "source" in teacher else {}
    if teacher.get("epochs") is not None and isinstance(kept.get("train", {}), dict):
        kept["train"] = {**kept.get("train", {}), "epochs": teacher["epochs"]}
    return ConfigSource(layer.origin, kept)


def _told(task: str, error: ValidationError, origins: Mapping[str, str]) -> UsageError:
    """The first of pydantic's complaints in one line of ours."""
    first = error.errors()[0]
    place = [str(part) for part in first["loc"]]
    key = ".".join(place)
    origin = _origin_of(key, origins)
    where = f" (from {origin})" if origin else ""
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if first["type"] == "extra_forbidden":
        known = _known_keys(task, place)
        text = f"{key}: belongs to another {place[0]}" if key in known else unknown("key", key, known)
        if len(place) == 1 and (below := [full for full in _below(task) if full.endswith(f".{key}")]):
            text = f"unknown key {key!r}; did you mean {below[0]!r}?"
    elif first["type"] == "missing":
        option = next(
            (f"--{name.replace('_', '-')}" for name, path in OPTIONS.items() if key in (path, path.split(".")[0])), None
        )
        if key == "model":
            option = "the name of a network"
        return UsageError(f"{key}: missing", hint=f"give {option}, or a preset that has it: sakd list presets")
    else:
        text = f"{key}: {_PLAIN.get(first['type']) or first['msg'].removeprefix('Value error, ')}"
        text += (
            f", got {_short(first['input'])}"
            if isinstance(first["input"], str | int | float) and "unknown" not in text
            else ""
        )
    return UsageError(text + where + more)


def _below(task: str) -> list[str]:
    """Full names of all keys in the sections of a config."""
    sections = TASKS[task].model_fields
    return [
        f"{name}.{leaf}"
        for name in sections
        for kind in _classes_below(TASKS[task], name)
        for leaf in kind.model_fields
    ]


# Pydantic's complaints in our words.
_PLAIN = {
    "int_parsing": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_parsing": "must be a number",
    "bool_parsing": "must be true or false",
}


def _short(value: str | float) -> str:
    """A value as it is shown in a message."""
    try:
        text = repr(value)
    except ValueError:  # an integer of thousands of digits
        text = hex(int(value))
    return text if len(text) <= 40 else f"{text[:40]}..."


def _origin_of(key: str, origins: Mapping[str, str]) -> str | None:
    """Who set this key, a key below it (the last one), or the nearest one above it."""
    for known in (key, f"{key}.name", f"{key}.source"):
        if known in origins:
            return origins[known]
    below = [origin for known, origin in origins.items() if known.startswith(f"{key}.")]
    if below:
        return below[-1]
    parent = key.rpartition(".")[0]
    return origins.get(parent)


def _known_keys(task: str, place: list[str]) -> list[str]:
    """Full names of the keys that could stand where the unknown one stands."""
    kinds: list[type[Config]] = [TASKS[task]]
    for part in place[:-1]:
        kinds = [kind for parent in kinds for kind in _classes_below(parent, part)]
    prefix = "".join(f"{part}." for part in place[:-1])
    return [f"{prefix}{name}" for kind in kinds for name in kind.model_fields]


def _classes_below(parent: type[Config], name: str) -> list[type[Config]]:
    if name not in parent.model_fields:
        return []
    plain: dict[str, list[type[Config]]] = {
        "train": [training.Train],
        "teacher": [training.TeacherConfig],
        "friendly": [friendly.FriendlyConfig],
        "residual": [residual.ResidualConfig],
        "runtime": [training.Runtime],
    }
    return plain.get(name) or list(usable(_TABLES.get(name, {})).values())
