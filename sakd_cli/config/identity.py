"""Which settings make two runs the same: for a resume (`first_difference`), a sweep and a comparison (`identity`)."""

import json
from collections.abc import Collection, Mapping
from typing import Any

# May change between two parts of one run: where and how it works, not what it computes.
FREE = {"device", "runs_dir", "log", "log_every", "save_every", "data.workers"}
FREE |= {"teacher.pretrain", "teacher.cache", "teacher.allow_mismatch"}
# Filled in by a run when it begins (`build.pin_inputs`).
PINNED = {"teacher.weights", "teacher.sha256", "router.run", "method.weights_sha256"}
# A teacher is known by its SHA-256, wherever it lies and however it is named.
LOCATIONS = FREE | {"teacher.weights", "teacher.source", "teacher.epochs"}


def identity(settings: Mapping[str, Any], *, without: Collection[str]) -> str:
    """What two runs with these flat settings share if they compute the same, apart from the keys `without`."""
    ignored = LOCATIONS.union(without)
    return json.dumps({key: settings[key] for key in sorted(settings) if key not in ignored}, default=str)


def first_difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str | None:
    """The first key by which `new` is not a continuation of `old`; what a run fills in for itself may be open."""
    for key in [*new, *(key for key in old if key not in new)]:
        if key in FREE or (key in PINNED and new.get(key) is None):
            continue
        if old.get(key) != new.get(key):
            return key
    return None
