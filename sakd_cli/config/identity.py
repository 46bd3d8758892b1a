"""Which settings make two runs the same: for a resume (`differences`), a sweep and a comparison (`identity`)."""

import json
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from sakd_cli.config.methods import METHODS
from sakd_cli.config.routers import PLAIN, ROUTERS

# May change between two parts of one run: where and how it works, not what it computes.
FREE = {"device", "runs_dir", "log", "log_every", "save_every", "data.workers"}
FREE |= {"teacher.pretrain", "teacher.cache", "teacher.allow_mismatch"}
# Filled in by a run when it begins (`build.pin_inputs`).
PINNED = {"teacher.weights", "teacher.sha256", "router.run", "router.run_sha256", "method.weights_sha256", "code"}
PINNED |= {"teacher.other_weights", "teacher.other_sha256"}
# What may have moved between two parts of one run: the teacher, which its SHA-256 holds to what it was, and the images,
# which the run's `images.json` does.
MOVED = {"teacher.source", "teacher.weights", "teacher.others", "teacher.other_weights", "data.root"}
# And of which only the places on the disk may be others, since digests hold what lies there.
HELD = MOVED | {"teacher.logits", "data.unlabeled", "data.manifest", "method.weights", "router.run"}
# The length of a run, which `--resume RUN --epochs N` extends.
EXTENDED = {"train.epochs", "train.milestones"}
# A teacher is known by its SHA-256, wherever it lies and however it is named.
LOCATIONS = FREE | MOVED - {"data.root"} | {"teacher.epochs"}


def is_plain(settings: Mapping[str, Any]) -> bool:
    """Whether a run with these flat settings trains its student to the bit as if there were neither teacher nor method.

    Not where the method or the residual students train beside the losses.
    """
    method = METHODS.installed(str(settings.get("method.name")))
    own = settings.get("residual.students") or settings.get("init_from_branches")
    return settings.get("router.name") == PLAIN and not own and method is not None and not method.trains_student


def idle(settings: Mapping[str, Any]) -> set[str]:
    """The keys of these flat settings that change no result."""
    router = ROUTERS.installed(str(settings.get("router.name")))
    keys = set[str]() if router is None else {*router.idle}
    if is_plain(settings):
        keys |= {key for key in settings if key.startswith(("method.", "teacher.", "stage_map"))} - {"method.ce_weight"}
    return keys


def identity(settings: Mapping[str, Any], *, without: Collection[str]) -> str:
    """What two runs with these flat settings share if they compute the same, apart from the keys `without`."""
    ignored = LOCATIONS.union(without, idle(settings))
    counted = {key: settings[key] for key in sorted(settings) if key not in ignored and settings[key] is not None}
    return json.dumps(counted, default=str)


class Difference(NamedTuple):
    """A setting that is another one now than it was."""

    key: str
    old: Any
    new: Any

    def __str__(self) -> str:
        was, now = (json.dumps(value, default=str) for value in (self.old, self.new))
        return f"{self.key} was {was[:40]} and is {now[:40]}"


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Difference]:
    """All by which `new` is not a continuation of `old`; what a run fills in for itself may be open."""
    keys = [key for key in [*new, *(key for key in old if key not in new)] if key not in FREE]
    keys = [key for key in keys if not (key in PINNED and new.get(key) is None)]
    return [Difference(key, old.get(key), new.get(key)) for key in keys if old.get(key) != new.get(key)]


def listed(found: list[Difference]) -> str:
    return "; ".join(map(str, found))
