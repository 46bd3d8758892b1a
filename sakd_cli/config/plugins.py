"""Rows that installed packages add to our tables, by entry points; loaded when they are used.

    [project.entry-points."sakd.methods"]       name = "package.config:Config"  a MethodConfig of that name, no torch
    [project.entry-points."sakd.distillers"]    name = "package.loss:ENTRY"     its row of `distillers/table.py`
    [project.entry-points."sakd.networks"]      name = "package.net:build"      build(name, classes) -> StagedModel

A row that cannot be used spoils no other: UsageError, naming the package, where it is asked for.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any, NamedTuple, TypeVar

from sakd_cli.errors import UsageError, no_row

Row = TypeVar("Row")
METHODS, DISTILLERS, NETWORKS = "sakd.methods", "sakd.distillers", "sakd.networks"
NAME = r"[A-Za-z]\w*"  # of the names of networks others are made, with hyphens


class Plugged(NamedTuple):
    """One entry point, and the package that it is of."""

    entry: EntryPoint
    package: str

    def load(self) -> Any:
        """What it names. Raises UsageError, whatever is wrong with the package."""
        try:
            return self.entry.load()
        except Exception as error:  # foreign code: anything may happen, and none of it is ours
            reason = f"{type(error).__name__}: {error}".partition("\n")[0][:90]
            raise UsageError(f"plug-in {self.package}: {self.entry.name!r} cannot be loaded ({reason})") from None


@cache
def plugged(group: str) -> dict[str, tuple[Plugged, ...]]:
    """All entry points of a group by name; more than one where packages want the same name."""
    found: dict[str, tuple[Plugged, ...]] = {}
    for entry in entry_points(group=group):
        one = Plugged(entry, entry.dist.name if entry.dist is not None else "of no package")
        if one not in found.get(entry.name, ()):
            found[entry.name] = (*found.get(entry.name, ()), one)
    return found


class Table(Mapping[str, Row]):
    """Our own rows, and those of plug-ins.

    kind   what is in it, for messages; check: makes a row of what an entry point names, or raises ValueError
    compose  makes the row `a+b` of the names and rows of several; None: there are no such rows
    """

    def __init__(
        self,
        kind: str,
        own: Mapping[str, Row],
        group: str,
        check: Callable[[str, Any], Row],
        compose: Callable[[Mapping[str, Row]], Row] | None = None,
    ) -> None:
        self.kind, self.own, self.group, self.check, self.compose = kind, own, group, check, compose
        self._loaded: dict[str, Row] = {}

    def __getitem__(self, name: str) -> Row:
        if self.compose is not None and "+" in name:
            if name not in self._loaded:
                parts = name.split("+")
                if len({*parts}) < len(parts):
                    raise UsageError(f"{self.kind} {name!r}: names one twice")
                self._loaded[name] = self.compose({part: self[part] for part in parts})
            return self._loaded[name]
        others = plugged(self.group).get(name, ())
        if not others:
            return self.own[name]
        packages = [*(["sakd"] if name in self.own else []), *(one.package for one in others)]
        if len(packages) > 1:
            raise UsageError(
                f"{self.kind} {name!r}: wanted by {' and by '.join(packages)}", hint="uninstall one of them"
            )
        if name not in self._loaded:
            if re.fullmatch(NAME, name) is None:
                raise UsageError(f"plug-in {packages[0]}: {name!r} is no name for a {self.kind}")
            try:
                self._loaded[name] = self.check(name, others[0].load())
            except (ValueError, TypeError) as error:
                raise UsageError(f"plug-in {packages[0]}: {self.kind} {name!r} {error}") from None
        return self._loaded[name]

    def __iter__(self) -> Iterator[str]:
        return iter([*self.own, *(name for name in plugged(self.group) if name not in self.own)])

    def __len__(self) -> int:
        return len(list(iter(self)))

    def row(self, name: str) -> Row:
        """As `[name]`, but UsageError where there is none."""
        try:
            return self[name]
        except KeyError:
            if name not in plugged(METHODS):
                raise no_row(self.kind, name, "distillers") from None
            raise UsageError(f"{self.kind} {name!r}: no package has an entry point {self.group!r} for it") from None

    def package(self, name: str) -> str:
        """Who brought a row."""
        return "sakd" if name in self.own else plugged(self.group)[name][0].package


def usable(table: Mapping[str, Row], complain: Callable[[str], None] | None = None) -> dict[str, Row]:
    """All rows that can be loaded; what is wrong with the others is reported."""
    rows = {}
    for name in table:
        try:
            rows[name] = table[name]
        except UsageError as error:
            if complain is not None:
                complain(error.message)
    return rows
