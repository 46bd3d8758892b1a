"""Every key of a run's settings, edited between stop and resume: refused with both values, or on the guide's list."""

from typing import Any

import pytest

from sakd_cli.config.identity import EXTENDED, FREE, HELD, PINNED, differences
from sakd_cli.config.methods import METHODS
from sakd_cli.config.resolve import ConfigSource, flat, nested, resolve
from sakd_cli.config.routers import ROUTERS
from sakd_cli.config.training import TASKS
from sakd_cli.errors import CheckpointError
from sakd_cli.runs.resume import fingerprint, require_fingerprint

LISTED = FREE | HELD  # guide `run-directory`: where and how it works, and places whose content digests hold


def configs() -> dict[str, Any]:
    """A run of every task; distillations by every method and every router."""
    own = {f"method {name}": {"method.name": name} for name in METHODS}
    own |= {f"router {name}": {"router.name": name} for name in ROUTERS}
    found = {
        name: resolve(
            "distill", [ConfigSource(name, nested({"teacher.source": "resnet20", "student": "resnet8"} | one))]
        )
        for name, one in own.items()
    }
    found["pretrain"] = resolve("pretrain", [ConfigSource("", {"model": "resnet8"})])
    return {name: one.config for name, one in found.items()}


def edited(value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    return f"{value}x" if isinstance(value, str) else [*value, 1] if isinstance(value, list) else 1


@pytest.mark.parametrize("name", configs())
def test_every_key_is_refused_with_both_values_or_listed(name: str) -> None:
    config = configs()[name]
    saved = fingerprint(config)
    settings = saved["settings"]
    assert settings == flat(config.model_dump(mode="json")), "all keys of the schema are in the fingerprint"
    for key, value in settings.items():
        now = {"settings": settings | {key: edited(value)}}
        if key in LISTED:
            require_fingerprint("last", saved, 1, now, [])
            continue
        with pytest.raises(CheckpointError, match=f"{key} was .* and is"):
            require_fingerprint("last", saved, 1, now, [])


def test_what_a_run_fills_in_may_be_open_and_may_not_be_another() -> None:
    for key in PINNED - HELD:
        assert not differences({key: "a"}, {key: None})
        assert differences({key: "a"}, {key: "b"})
    assert not EXTENDED & LISTED, "epochs and milestones change where a run is extended, and nowhere else"
    assert set(TASKS) >= {"distill", "pretrain"}
