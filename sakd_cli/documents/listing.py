"""The documents of `sakd list`, `sakd config show` and `sakd show` with `--json`"""

from typing import Any, Literal

from sakd_cli.documents.base import Document, Number, Part


class Listed(Part):
    """One thing to choose: what it is, or family and learning rate of a network; package: of a plug-in."""

    name: str
    about: str | None = None
    family: str | None = None
    lr: float | None = None
    package: str | None = None


class Listing(Document):
    """`sakd list KIND --json`."""

    schema_: Literal["sakd.list/1"] = "sakd.list/1"
    kind: str
    rows: list[Listed]


class RunEntry(Part):
    """A run; top1: percent of the test images after the last epoch; settings: by `runs show`, null otherwise."""

    run: str
    state: Literal["finished", "in progress", "stopped", "damaged"]
    task: str | None = None
    network: str | None = None
    teacher: str | None = None
    method: str | None = None
    router: str | None = None
    dataset: str | None = None
    seed: int | None = None
    epochs: int | None = None
    top1: Number = None
    changed: str
    settings: dict[str, Any] | None = None

    def __fspath__(self) -> str:
        """Its directory: an entry stands wherever a run does."""
        return self.run


class RunEntries(Document):
    """`sakd runs --json`: the runs of a folder; removed: those that `runs rm` has removed."""

    schema_: Literal["sakd.runs/1"] = "sakd.runs/1"
    rows: list[RunEntry]
    removed: list[str]


class ShownKey(Part):
    """A key of a config: its value, and with --origin or --describe who set it and what it means."""

    key: str
    value: Any
    origin: str
    description: str | None = None


class ShownConfig(Document):
    """`sakd config show --json`; keys: with --origin or --describe, null otherwise."""

    schema_: Literal["sakd.config/1"] = "sakd.config/1"
    task: str
    config: dict[str, Any]
    effective: dict[str, Any]
    keys: list[ShownKey] | None = None


class ShownMethod(Document):
    """`sakd show method NAME --json`; spots: what it matches, defaults: of its settings."""

    schema_: Literal["sakd.method/1"] = "sakd.method/1"
    name: str
    about: str
    description: str
    spots: str
    defaults: dict[str, Any]


class KeyMeaning(Part):
    """What a key means in one place; of: the method, router or task that has it; source: what that is."""

    of: str
    type: str
    default: str
    description: str
    source: str


class ShownMeaning(Document):
    """`sakd show key KEY --json`."""

    schema_: Literal["sakd.key/1"] = "sakd.key/1"
    key: str
    rows: list[KeyMeaning]
