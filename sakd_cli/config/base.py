"""The base of every config class, and how one word chooses one of several classes."""

from collections.abc import Mapping
from typing import Any, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from sakd_cli.errors import unknown


class Config(BaseModel):
    """Frozen and closed: an unknown key is an error, a NaN is no number, a bool is no number, nor are 100 digits."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True)

    @field_validator("*", mode="before")
    @classmethod
    def _plain(cls, value: Any, info: ValidationInfo) -> Any:
        """YAML's `yes` and `on` are easily meant as something else; pydantic alone would read them as 1."""
        annotation = cls.model_fields[info.field_name or ""].annotation
        if isinstance(value, bool) and bool not in (annotation, *get_args(annotation)):
            raise PydanticCustomError("no_bool", "is true or false where another value belongs")
        if isinstance(value, int) and abs(value) >= 2**63:
            raise PydanticCustomError("too_large", "is a number of more than 63 bits")
        if isinstance(value, str) and "\0" in value:
            raise PydanticCustomError("no_text", "holds a character that no name may have")
        return value


def chosen_by_name(kind: str, table: Mapping[str, type[Config]], default: str) -> BeforeValidator:
    """Turn `fitnet` or `{name: fitnet, weight: 2}` into an object of the class that `table` names."""

    def choose(value: Any) -> Any:
        if isinstance(value, Config):
            return value
        words = {"name": value} if isinstance(value, str) else value
        if not isinstance(words, dict) or not isinstance(words.get("name", default), str):
            raise PydanticCustomError("no_name", "needs a name, one of: {known}", {"known": ", ".join(sorted(table))})
        words = {"name": default} | words
        if words["name"] not in table:
            raise PydanticCustomError("unknown_name", "{text}", {"text": unknown(kind, words["name"], table)})
        return table[words["name"]].model_validate(words)

    return BeforeValidator(choose)


def by_name(base: type[Config]) -> dict[str, type[Any]]:
    """All classes below `base` that have a name of their own, keyed by it."""
    table: dict[str, type[Any]] = {}
    for kind in base.__subclasses__():
        name = kind.model_fields["name"].default
        table |= {name: kind} if isinstance(name, str) else by_name(kind)
    return table


def summary(kind: type[Config]) -> str:
    """First line of a config class's docstring: what `sakd list` prints; nothing where Python left docstrings out."""
    return (kind.__doc__ or "").strip().partition("\n")[0]
