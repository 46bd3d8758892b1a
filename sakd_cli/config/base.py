"""The base of every config class, and how a name chooses one of several classes."""

import ast
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from inspect import cleandoc, getsource
from itertools import pairwise
from pathlib import Path
from textwrap import dedent
from types import NoneType
from typing import Annotated, Any, get_args, get_origin

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError
from yaml import YAMLError

from sakd_cli.errors import UsageError, unknown
from sakd_cli.files import parse_yaml

OBJECTS: dict[str, Any] = {}  # of a program that calls `sakd_cli.api`, by the names that they have in settings
LARGEST = 3.4e38  # of float32
EFFECTIVE = "effective"  # section of a written config that says what open settings came to; it is not read


class Config(BaseModel):
    """Frozen and closed: an unknown key is an error, a NaN is no number, a bool is no number, nor are 100 digits."""

    # A key's description is the docstring below it (`description`). Schemas are built when they are first needed.
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True, defer_build=True)

    @field_validator("*", mode="before")
    @classmethod
    def _plain(cls, value: Any, info: ValidationInfo) -> Any:
        """YAML's `yes` and `on` are easily meant as something else; a list may be written `1,2`, `[1, 2]` and `(1, 2)`.

        Where a key may be null, Python's None means that too; but for names and paths.
        """
        annotation = cls.model_fields[info.field_name or ""].annotation
        if isinstance(value, bool) and bool not in (annotation, *get_args(annotation)):
            raise PydanticCustomError("no_bool", "is true or false where another value belongs")
        if not isinstance(value, str):
            return _not_too_large(value)
        if "\0" in value:
            raise PydanticCustomError("no_text", "holds a character that no name may have")
        kinds = {get_args(kind)[0] if get_origin(kind) is Annotated else kind for kind in get_args(annotation)}
        if value in ("None", "none", "null") and NoneType in kinds and not kinds & {str, Path}:
            return None
        return _as_list(f"[{value[1:-1]}]" if re.fullmatch(r"\(.*,.*\)", value) else value, annotation)

    @field_validator("*", mode="after")
    @classmethod
    def _fits(cls, value: Any) -> Any:
        return _not_too_large(value)


def _not_too_large(value: Any) -> Any:
    if isinstance(value, int) and abs(value) >= 2**63:
        raise PydanticCustomError("too_large", "is a number of more than 63 bits")
    if isinstance(value, float) and LARGEST < abs(value) < math.inf:
        raise PydanticCustomError("too_large", "is a number beyond 3.4e38, the largest of 32 bits")
    return value


def _as_list(text: str, annotation: Any) -> Any:
    """A text as the list that it stands for, where the key takes a list."""
    kinds = [annotation] if get_origin(annotation) is tuple else [k for k in get_args(annotation) if k is not NoneType]
    lists = [kind for kind in kinds if tuple in (get_origin(kind), get_origin(getattr(kind, "__origin__", None)))]
    if not lists or (len(lists) < len(kinds) and "," not in text and not text.startswith("[")):
        return text
    try:
        return parse_yaml(text) if text.startswith("[") else [part.strip() for part in text.split(",")]
    except (YAMLError, ValueError):
        return text


def of_file(name: str) -> bool:
    """Whether a name means something in a file of one's own, `my.py:Name`, or an object of a program."""
    return name in OBJECTS or re.fullmatch(r"[^:\0,+]+\.py:[A-Za-z_]\w*", name) is not None


def in_place(name: str) -> str:
    """One name for one file, however it is spelled: from the current folder where it lies in that, else absolute."""
    path, _, entry = name.rpartition(":")
    if name in OBJECTS or not of_file(name):
        return name
    relative = os.path.relpath(path)
    return f"{os.path.abspath(path) if relative.startswith(os.pardir) else relative}:{entry}"


def own_name(name: str, table: Iterable[str]) -> str | None:
    """The name in the table that `name` spells, in any case and with `-` or `_`; None where there is none.

    Where rows of a table can be composed, each part of `a+b` is such a name. What is in a file is itself.
    """
    names = list(table)
    if name in names or of_file(name):
        return in_place(name)
    if "+" in name and getattr(table, "compose", None) is not None:
        parts = [own_name(part, names) for part in name.split("+")]
        return None if None in parts else "+".join(filter(None, parts))
    return next((known for known in names if _squashed(known) == _squashed(name)), None)


def own_row(name: str, table: Iterable[str]) -> str | None:
    """The same, or the row for all names of a library, such as `torchvision/NAME`."""
    of_library = f"{name.partition('/')[0]}/NAME"
    return own_name(name, table) or (of_library if "/" in name and of_library in table else None)


def written(value: Any) -> str:
    """The value of a setting as a settings file has it: null, true, [1, 2]; a text as it is."""
    return value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)


def choose(kind: str, name: str, table: Iterable[str], hint: str | None = None) -> str:
    """The name in the table that `name` spells. Raises UsageError with the nearest name."""
    if (own := own_name(name, table)) is None:
        raise UsageError(unknown(kind, name, table), hint)
    return own


def once(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same values. Raises UsageError where one is there twice."""
    if (twice := next((one for k, one in enumerate(values) if one in values[:k]), None)) is not None:
        raise UsageError(f"{':'.join(twice) if isinstance(twice, tuple) else twice} is there twice")
    return values


def read_by(read: Callable[[Any], Any]) -> AfterValidator:
    """Read the value of a key with a function whose UsageError becomes pydantic's error."""

    def validate(value: Any) -> Any:
        try:
            return read(value)
        except UsageError as error:
            raise PydanticCustomError("unknown_name", "{text}", {"text": error.message}) from None

    return AfterValidator(validate)


def must(hold: Callable[[Any], bool], text: str) -> AfterValidator:
    """Refuse what a key must not be."""

    def validate(value: Any) -> Any:
        if not hold(value):
            raise ValueError(text)
        return value

    return AfterValidator(validate)


def _squashed(name: str) -> str:
    return re.sub(r"[-_ ]", "", name).lower()


def chosen_by_name(kind: str, table: Mapping[str, type[Config]], default: str) -> BeforeValidator:
    """Turn `fitnet` or `{name: fitnet, weight: 2}` into an object of the class that `table` names."""

    def choose(value: Any) -> Any:
        if isinstance(value, Config):
            return value
        settings = {"name": value} if isinstance(value, str) else value
        if not isinstance(settings, dict) or not isinstance(settings.get("name", default), str):
            raise PydanticCustomError("no_name", "needs a name, one of: {known}", {"known": ", ".join(sorted(table))})
        settings = {"name": default} | settings
        if (name := own_row(settings["name"], table)) is None:
            text = unknown(kind, settings["name"], table)
            if kind == "data set" and Path(settings["name"]).is_dir():
                text = f"{settings['name']!r} is a folder: --dataset imagefolder --data-root {settings['name']}"
            raise PydanticCustomError("unknown_name", "{text}", {"text": text})
        return table[name].model_validate(settings if name.endswith("/NAME") else settings | {"name": name})

    return BeforeValidator(choose)


def by_name(base: type[Config]) -> dict[str, type[Any]]:
    """All classes below `base` that have a name of their own, keyed by it."""
    table: dict[str, type[Any]] = {}
    for kind in base.__subclasses__():
        name = kind.model_fields["name"].default
        table |= {name: kind} if isinstance(name, str) else by_name(kind)
    return table


def description(kind: type[BaseModel], key: str) -> str:
    """What a key means: its own description, or that of the class in which it was first described."""
    found = (_docstrings(base).get(key) for base in kind.__mro__ if issubclass(base, Config))
    return next((text for text in found if text), "")


@cache
def _docstrings(kind: type[Config]) -> dict[str, str]:
    """The docstrings below the fields of a class, from its source: pydantic's own way reads it at every start."""
    try:
        (definition,) = ast.parse(dedent(getsource(kind))).body
    except (OSError, TypeError):  # a class that was made without a file
        return {}
    return {
        field.target.id: cleandoc(text.value.value)
        for field, text in pairwise(getattr(definition, "body", []))
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant) and isinstance(text.value.value, str)
    }


def summary(kind: type[Config]) -> str:
    """First line of a config class's docstring: what `sakd list` prints; nothing where Python left docstrings out."""
    return (kind.__doc__ or "").strip().partition("\n")[0]
