"""The keys of all configs: which there are, their defaults and descriptions, and what to say of a key that is wrong."""

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from itertools import chain
from typing import Any, get_args

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from sakd_cli.config.base import Config, description, of_file, own_name, summary, written
from sakd_cli.config.datasets import DATASETS
from sakd_cli.config.foreign import VALUES, ours, theirs
from sakd_cli.config.methods import METHODS
from sakd_cli.config.options import OPTIONS
from sakd_cli.config.plugins import usable
from sakd_cli.config.routers import ROUTERS
from sakd_cli.config.training import TASKS
from sakd_cli.documents.listing import KeyMeaning
from sakd_cli.errors import UsageError, unknown

# Sections whose class is chosen by a name.
TABLES: dict[str, Mapping[str, type[Any]]] = {"method": METHODS, "router": ROUTERS, "data": DATASETS}

# Pydantic's messages in plain English.
_PLAIN = {
    "int_parsing": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_parsing": "must be a number",
    "bool_parsing": "must be true or false",
    "string_type": "must be text",
    "int_type": "must be a whole number",
    "float_type": "must be a number",
    "bool_type": "must be true or false",
    "path_type": "must be a path",
    "model_type": "must be a section of keys",
}


def classes_of(parent: type[Config], name: str) -> Iterator[type[Config]]:
    """The config classes that a section may have, ours first; none for a plain key or an unknown one."""
    if name not in parent.model_fields:
        return
    annotation = parent.model_fields[name].annotation
    kinds = [kind for kind in (annotation, *get_args(annotation)) if isinstance(kind, type)]
    found = [kind for kind in kinds if issubclass(kind, Config)]
    for base in found:
        yield from (kind for _, kind in usable(TABLES[name])) if name in TABLES else [base]


def places_of(key: str, task: str | None = None) -> Iterator[tuple[str, type[Config]]]:
    """The task and class of every place where a dotted key stands."""
    *sections, leaf = key.split(".")
    for name in [task] if task else TASKS:
        kinds: Iterable[type[Config]] = [TASKS[name]]
        for section in sections:  # lazily: a plug-in of which nothing is asked is not loaded
            kinds = chain.from_iterable(map(partial(classes_of, name=section), kinds))
        yield from ((name, kind) for kind in kinds if leaf in kind.model_fields)


def default_of(key: str) -> Any:
    """Its default, of a section its name; None where it has none or not one."""
    for _, kind in places_of(key):
        value = kind.model_fields[key.rpartition(".")[2]].get_default(call_default_factory=True)
        if key.endswith(".name"):
            section = key.partition(".")[0]
            return next(t.model_fields[section].default.name for t in TASKS.values() if section in t.model_fields)
        return None if repr(value) == "PydanticUndefined" else value
    return None


def description_of(config: Config, key: str) -> str:
    *sections, leaf = key.split(".")
    for section in sections:
        if not isinstance(config := getattr(config, section), Config):
            return ""
    return description(type(config), leaf)


def explain(key: str) -> list[KeyMeaning]:
    """What a key means wherever it stands: class, type, default and description. Raises UsageError if unknown."""
    places: dict[type[Config], list[str]] = {}
    for task, kind in places_of(key):
        places.setdefault(kind, []).append(task)
    if not places:
        known = sorted({name for task in TASKS for name in keys_of(task)})
        near = [name for name in known if key.lower() in (name, name.rpartition(".")[2])]
        foreign = None if near else ours(key)
        near = near or difflib.get_close_matches(key.lower(), known, n=1, cutoff=0.6)
        section = key.partition(".")[0]
        hint = f"did you mean {' or '.join(map(repr, near[:3]))}?" if near else "sakd guide settings"
        if section in ("router", "method"):
            hint += f"; of your own file: sakd show {section} FILE.py:CLASS"
        raise UsageError(f"unknown key {key!r}", hint=f"here it is {foreign!r}" if foreign else hint)
    rows = []
    for kind, tasks in places.items():
        field, name = kind.model_fields[leaf := key.rpartition(".")[2]], kind.model_fields.get("name")
        default = None if field.is_required() else field.default
        rows.append(
            KeyMeaning(
                of=str(name.default) if name and isinstance(name.default, str) else ", ".join(tasks),
                type=_type_name(field.annotation),
                default="required" if field.is_required() else written(getattr(default, "name", default)),
                description=description(kind, leaf),
                source=summary(kind),
            )
        )
    return rows


def _type_name(annotation: Any) -> str:
    text = str(annotation) if get_args(annotation) else str(getattr(annotation, "__name__", annotation))
    return re.sub(r"Annotated\[(\w+),[^\[\]]*\]", r"\1", text.replace("typing.", ""))


def keys_of(task: str) -> list[str]:
    found = dict[str, None]()
    for name in TASKS[task].model_fields:
        leaves = (leaf for kind in classes_of(TASKS[task], name) for leaf in kind.model_fields)
        found |= dict.fromkeys([name, *(f"{name}.{leaf}" for leaf in leaves)])
    return list(found)


def usage_error(task: str, error: ValidationError, values: Mapping[str, Any], origins: Mapping[str, str]) -> UsageError:
    """The first of pydantic's complaints in one line of ours."""
    errors = sorted(error.errors(), key=lambda one: one["type"] == "missing")  # perhaps it has another name there
    place = _place(task, errors[0])
    # Of the branches of a union, the one that looked deepest.
    places = [_place(task, one) for one in errors]
    same = [one for one, at in zip(errors, places, strict=True) if at[: len(place)] == place[: len(at)]]
    first = max(same, key=lambda one: len(_place(task, one)))
    place = _place(task, first)
    key = ".".join(place)
    if first["type"] == "missing" and not place[-1].isdigit():
        flags = [row.flag for row in OPTIONS.values() if row.key and key in (row.key, row.key.split(".")[0])]
        what = "the name of a network" if key == "model" else flags[0] if flags else f"--set {key}=..."
        return UsageError(f"{key}: missing", hint=f"give {what}, or a preset that has it: sakd list presets")
    text = _unknown_key(task, place, values) if first["type"] == "extra_forbidden" else _wrong_value(place, first, same)
    named = f"{key}.{first['msg'].removeprefix('Value error, ').partition(' ')[0]}"  # of a section, what it speaks of
    origin = _origin_of(named if named in origins else key, origins)
    where = f" (from {origin})" if origin else ""
    more = f" (and {len(errors) - len(same)} more)" if len(errors) > len(same) else ""
    return UsageError(text + where + more)


def _wrong_value(place: list[str], first: ErrorDetails, same: list[ErrorDetails]) -> str:
    """What is wrong with the value at this place: the first of the complaints of all branches of a union."""
    key, value = ".".join(place), first["input"]
    if first["type"] == "missing":
        return f"{'.'.join(place[:-1])}: has too few values, got {written(value)}"
    if first["type"] == "literal_error" and isinstance(value, str):
        if meant := VALUES.get(key, {}).get(re.sub("[-_ ]", "", value).lower()):
            return f"{key}: unknown value {value!r}; here it is {meant!r}"
        words = [word for one in same for word in _words(one)]
        words += ["true", "false"] * any(one["type"] == "bool_parsing" for one in same)
        return f"{key}: {unknown('value', value, words)}"
    if first["type"] == "string_type" and isinstance(value, dict):
        inner = ".".join([*place, *_deepest(value, [])])
        foreign = ours(inner)
        return f"{key}: is one value, not a section; " + (f"{inner!r} is {foreign!r} here" if foreign else f"{key}=...")
    text = f"{key}: {_PLAIN.get(first['type']) or first['msg'].removeprefix('Value error, ')}"
    text = text.replace("Input should be", "must be").replace("a valid tuple", "a list")
    given = isinstance(value, str | int | float) and "unknown" not in text
    return f"{text}, got {_short(value)}" if given else text


def _place(task: str, error: ErrorDetails) -> list[str]:
    """The key that is wrong; pydantic's names of the branches of a union are left out."""
    place = [str(part) for part in error["loc"]]
    if error["type"] in ("missing", "extra_forbidden"):
        return place
    known = next((n for n in range(len(place), 0, -1) if ".".join(place[:n]) in keys_of(task)), len(place))
    if known == 1 and place[0] in (*TABLES, "grid", "overrides"):  # settings that are no keys of ours
        return place
    return place[:known] + [part for part in place[known:] if part.isdigit()]


def _words(error: ErrorDetails) -> list[str]:
    """What a setting may be, of the error of one branch."""
    return re.findall(r"'([^']*)'", str(error.get("ctx", {}).get("expected", "")))


def _unknown_key(task: str, place: list[str], values: Mapping[str, Any]) -> str:
    # Inside a section that is chosen by name, pydantic's place begins with the section.
    key, leaf, known = ".".join(place), place[-1], keys_of(task)
    if dots := leaf.count("."):
        return f"unknown key {key!r}; keys are nested here: {leaf.replace('.', ': {')}: ...{'}' * dots}"
    chosen = values.get("method")
    chosen = str(chosen.get("name") if isinstance(chosen, dict) else chosen)
    parts = [part for part in chosen.split("+") if part in METHODS] if place[0] == "method" else []
    if parts[1:] and (part := next((part for part in parts if leaf in METHODS[part].model_fields), None)):
        return f"unknown key {key!r}; did you mean 'method.{part}.{leaf}'?"
    if key in known and len(place) > 1:
        others = [kind.model_fields["name"].default for _, kind in places_of(key, task) if "name" in kind.model_fields]
        return f"{key}: belongs to another {place[0]}: {', '.join(map(str, others))}"
    method = place[-2] if len(place) > 2 else chosen
    full = ".".join(values_path) if (values_path := _deepest(values, place)) else key
    if same := next((name for name in known if _letters(name) == _letters(full)), None):
        return f"unknown key {full!r}; did you mean {same!r}?"
    if foreign := [name for name in theirs(full, own_name(method, METHODS) or "") if name in known]:
        return f"unknown key {full!r}; here it is {foreign[0]!r}"
    section = key.rpartition(".")[0]
    if len(place) > 2 and place[-2] in METHODS:  # a part of a composed method
        known = [*known, *(f"{section}.{name}" for name in METHODS[place[-2]].model_fields)]
    name = (values.get(section) or {}).get("name") if isinstance(values.get(section), dict) else None
    if section in TABLES and isinstance(name, str) and of_file(name):
        known += [f"{section}.{leaf}" for leaf in TABLES[section][name].model_fields]
    siblings = {name.rpartition(".")[2]: name for name in known if name.rpartition(".")[0] == section}
    near = [siblings[name] for name in difflib.get_close_matches(leaf.lower(), siblings, n=1, cutoff=0.6)]
    meant = [*(name for name in known if name.partition(".")[2] == leaf), *near]
    meant += [leaf] * (leaf in known)
    return f"unknown key {key!r}" + (f"; did you mean {meant[0]!r}?" if meant else "")


def _letters(key: str) -> str:
    """Of `train.lr`, `TRAIN.LR`, `train_lr` and `+train.lr` the same."""
    return re.sub("[^a-z0-9]", "", key.lower())


def _deepest(values: Mapping[str, Any], place: list[str]) -> list[str]:
    """The way from an unknown section to its first key: `SOLVER` as `SOLVER.LR`."""
    path, value = list(place), values
    for part in place:
        value = value.get(part, {}) if isinstance(value, Mapping) else {}
    while isinstance(value, Mapping) and value:
        name = next(iter(value))
        path, value = [*path, str(name)], value[name]
    return path


def _short(value: str | float) -> str:
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
    return below[-1] if below else origins.get(key.rpartition(".")[0])
