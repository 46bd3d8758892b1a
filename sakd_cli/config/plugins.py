"""Rows of our tables that others bring: packages, by entry points, and files, as `my.py:Name`; loaded when used.

    [project.entry-points."sakd.methods"]       name = "package.config:Config"  a MethodConfig of that name, no torch
    [project.entry-points."sakd.distillers"]    name = "package.loss:ENTRY"     its row of `distillers/table.py`
    [project.entry-points."sakd.networks"]      name = "package.net:build"      build(name, classes) -> StagedModel
    [project.entry-points."sakd.routers"]       name = "package.module:Class"   a Router
    [project.entry-points."sakd.datasets"]      name = "package.module:load"    load(**settings) -> Dataset

`sakd.methods` may also name a Distiller class, which needs no row then: what a file may name, an entry point may.

A row that cannot be used spoils no other: UsageError, naming the package, where it is asked for.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import cache
from importlib.metadata import EntryPoint, EntryPoints, distributions
from typing import Any, NamedTuple, TypeVar

from sakd_cli.config import code
from sakd_cli.config.base import of_file
from sakd_cli.errors import SakdError, UsageError, first_line

Row = TypeVar("Row")
METHODS, DISTILLERS, NETWORKS = "sakd.methods", "sakd.distillers", "sakd.networks"
ROUTERS, DATASETS = "sakd.routers", "sakd.datasets"
NAME = r"[A-Za-z]\w*"  # of the names of networks others are made, with hyphens


class Plugged(NamedTuple):
    """One entry point, and the package that it is of."""

    entry: EntryPoint
    package: str

    def load(self) -> Any:
        """What it names. Raises UsageError, whatever is wrong with the package."""
        try:
            with code.contained():
                if self.entry.pattern.match(self.entry.value) is None:
                    raise ValueError(f"{self.entry.value} is no `module:name`")
                return self.entry.load()
        except BaseException as error:  # foreign code: anything may happen, and none of it is ours
            if isinstance(error, KeyboardInterrupt) or type(error).__module__.startswith("sakd_cli."):
                raise
            reason = f"{type(error).__name__}: {first_line(error)}"
            raise UsageError(f"plug-in {self.package}: {self.entry.name!r} cannot be loaded ({reason})") from None


@cache
def plugged(group: str) -> dict[str, tuple[Plugged, ...]]:
    """All entry points of a group by name; more than one where packages want the same name."""
    found: dict[str, tuple[Plugged, ...]] = {}
    for package in distributions():
        name = "a package whose METADATA cannot be read"
        try:
            entries = package.entry_points.select(group=group)
            if entries:  # a name takes ten times as long to read
                name = package.name
        except Exception:  # the list cannot be read: one that cannot be loaded stands for it
            with suppress(Exception):
                name = package.name
            entries = EntryPoints([EntryPoint(name, "its METADATA or entry_points.txt", group)])
        for entry in entries:
            others = found.get(entry.name, ())
            if name not in [one.package for one in others]:  # it may be there twice; the first counts
                found[entry.name] = (*others, Plugged(entry, name))
    return found


class Table(Mapping[str, Row]):
    """Our own rows, and those of plug-ins.

    kind    what is in it, for messages
    group   of the entry points; a second one, behind a blank, for what stands in the first nowhere
    check   makes a row of what an entry point or a file names, or raises ValueError; KeyError: it is none of these
    folder  where our rows are, for messages
    compose  makes the row `a+b` of the names and rows of several; None: there are no such rows
    """

    def __init__(
        self,
        kind: str,
        own: Mapping[str, Row],
        group: str,
        check: Callable[[str, Any], Row],
        compose: Callable[[Mapping[str, Row]], Row] | None = None,
        folder: str = "",
    ) -> None:
        self.kind, self.own, self.groups, self.folder = kind, own, group.split(), folder
        self.check, self.compose = check, compose
        self._loaded: dict[str, tuple[Any, Row]] = {}

    def _plugged(self, name: str) -> tuple[Plugged, ...]:
        return next((found for group in self.groups if (found := plugged(group).get(name))), ())

    def _composed(self, name: str, compose: Callable[[Mapping[str, Row]], Row]) -> Row:
        parts = name.split("+")
        if len({*parts}) < len(parts):
            raise UsageError(f"{self.kind} {name!r}: names one twice")
        rows = {part: self[part] for part in parts}
        known = self._loaded.get(name)
        if known is None or known[0] != [*map(id, rows.values())]:
            self._loaded[name] = known = [*map(id, rows.values())], compose(rows)
        return known[1]

    def __getitem__(self, name: str) -> Row:
        if self.compose is not None and "+" in name and all(part in self for part in name.split("+")):
            return self._composed(name, self.compose)
        if of_file(name):
            code.require_trust(name)
            return self._row(name, code.load(name), name)
        if not (others := self._plugged(name)):
            return self.own[name]
        packages = [*(["sakd"] if name in self.own else []), *(one.package for one in others)]
        if len(packages) > 1:
            raise UsageError(f"{self.kind} {name!r}: wanted by {' and by '.join(packages)}", "uninstall one of them")
        if name not in self._loaded:
            if re.fullmatch(NAME, name) is None:
                raise UsageError(f"plug-in {packages[0]}: {name!r} is no name for a {self.kind}")
            return self._row(name, others[0].load(), f"plug-in {packages[0]}: {self.kind} {name!r}")
        return self._loaded[name][1]

    def _row(self, name: str, found: Any, who: str) -> Row:
        known = self._loaded.get(name)
        if known is None or known[0] is not found:  # a file may have changed
            try:
                self._loaded[name] = known = found, self.check(name, found)
            except (SakdError, KeyError):
                raise
            except Exception as error:
                line = code.line_of(found, "__init__") if of_file(name) else ""
                raise UsageError(f"{line}: {who} {error}" if line else f"{who} {error}") from None
        return known[1]

    def __iter__(self) -> Iterator[str]:
        return iter([*self.own, *(name for name in plugged(self.groups[0]) if name not in self.own)])

    def __len__(self) -> int:
        return len(list(iter(self)))

    def row(self, name: str) -> Row:
        """As `[name]`, but UsageError where there is none."""
        try:
            return self[name]
        except KeyError:
            if any(name in plugged(group) for group in (METHODS, ROUTERS, DATASETS)):
                text = f"{self.kind} {name!r}: no package has an entry point {self.groups[0]!r} for it"
                raise UsageError(text) from None
            text = f"{self.kind} {name!r} has settings but no row in sakd_cli/{self.folder}/table.py"
            raise UsageError(text, code.GUIDE) from None

    def installed(self, name: str) -> Row | None:
        """The row of that name that is ours or a package's; None for others, and no file is executed."""
        return None if of_file(name) else self.get(name)

    def package(self, name: str) -> str:
        if of_file(name):
            return name.rpartition(":")[0]
        return "sakd" if name in self.own else self._plugged(name)[0].package


def usable(table: Mapping[str, Row], complain: Callable[[str], None] | None = None) -> Iterator[tuple[str, Row]]:
    """All rows that can be loaded, each when it is asked for; what is wrong with the others is reported."""
    for name in table:
        try:
            yield name, table[name]
        except UsageError as error:
            if complain is not None:
                complain(error.message)
