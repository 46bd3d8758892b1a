"""Documents of given values, with the least that is valid in all other fields."""

from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from sakd_cli.documents.base import Part

Kind = TypeVar("Kind", bound=Part)
LEAST: dict[Any, Any] = {str: "", int: 0, float: 0.0, bool: False, list: [], dict: {}}


def sample(kind: type[Kind], values: dict[str, Any] | None = None, **more: Any) -> Kind:
    """An object of `kind`; nested parts may be given as dicts that lack fields, too."""
    given = (values or {}) | more
    names = {name.removesuffix("_"): field for name, field in kind.model_fields.items()}
    assert given.keys() <= names.keys(), given.keys() - names.keys()
    fields = {key: _value(field.annotation, given[key]) for key, field in names.items() if key in given}
    absent = {key: field for key, field in names.items() if key not in given and field.is_required()}
    return kind.model_validate({key: _least(field.annotation) for key, field in absent.items()} | fields)


def _kinds(annotation: Any) -> list[Any]:
    return list(get_args(annotation)) if get_origin(annotation) in (Union, UnionType) else [annotation]


def _least(annotation: Any) -> Any:
    first = _kinds(annotation)
    if NoneType in first:
        return None
    origin = get_origin(first[0]) or first[0]
    if origin is Literal:
        return get_args(first[0])[0]
    return sample(origin) if origin not in LEAST else LEAST[origin]


def _value(annotation: Any, value: Any) -> Any:
    for kind in _kinds(annotation):
        if get_origin(kind) is list and isinstance(value, list):
            return [_value(get_args(kind)[0], one) for one in value]
        if isinstance(kind, type) and issubclass(kind, Part) and isinstance(value, dict):
            return sample(kind, value)
    return value
