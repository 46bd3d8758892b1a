"""Whether we became slower since an earlier result. No torch."""

import json
from pathlib import Path
from typing import Any

from sakd_cli.errors import UsageError

SLOWER = 0.85  # of the earlier ratio: below it in two results in a row is a regression
MACHINE = ("cpu", "cpu_flags", "cores", "device", "chip", "threads", "torch", "mode")
COUNTED = ("gflop", "synchronisations", "saved_bytes")


def earlier(path: Path, schema: str) -> dict[str, Any]:
    """A result from a file. Raises UsageError where it is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"--compare {path}: {error.strerror}") from None
    except ValueError:
        raise UsageError(f"--compare {path}: is not JSON") from None
    if not isinstance(found, dict) or found.get("schema") != schema or not _has_lines(found):
        raise UsageError(f"--compare {path}: is no result of `sakd bench --json` ({schema})")
    return found


def must_be_alike(before: dict[str, Any], environment: dict[str, Any], setup: dict[str, Any]) -> None:
    """Raise UsageError where an earlier result is of another machine or of another setup."""
    for what, then, now, keys in (
        ("machine or mode", before.get("environment"), environment, MACHINE),
        ("setup", before.get("setup"), setup, tuple(setup)),
    ):
        different = [key for key in keys if not isinstance(then, dict) or then.get(key) != now.get(key)]
        if different:
            raise UsageError(f"--compare: another {what} (differs in {', '.join(different)})")


def comparison(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """Ratios and counters then and now; the results `must_be_alike`.

    A ratio is slow where it is 15 % below what was recorded; `base` is what it is held against, and stays the same
    while it is slow. It has regressed where it was slow in the earlier result already. A counter has where it rose.
    """
    already = {line["name"]: line for line in (before.get("compared") or {"ratios": []})["ratios"]}
    old = {line["above"]: line["median"] for line in before["ratios"]}
    ratios = []
    for line in now["ratios"]:
        name = line["above"]
        if name not in old:
            continue
        was_slow = bool(already.get(name, {}).get("slow"))
        base = already[name]["base"] if was_slow else old[name]
        slow = line["median"] < SLOWER * base
        ratios.append({"name": name, "base": base, "now": line["median"], "slow": slow, "regressed": slow and was_slow})
    counters = _risen(before["steps"], now["steps"])
    return {"ratios": ratios, "risen": counters, "regressed": bool(counters) or any(r["regressed"] for r in ratios)}


def _risen(before: list[dict[str, Any]], now: list[dict[str, Any]]) -> list[dict[str, Any]]:
    old = {line["name"]: line for line in before}
    return [
        {"name": line["name"], "counter": key, "before": old[line["name"]][key], "now": line[key]}
        for line in now
        if line["name"] in old
        for key in COUNTED
        if line[key] is not None and old[line["name"]][key] is not None and line[key] > old[line["name"]][key]
    ]


def _has_lines(found: dict[str, Any]) -> bool:
    """Whether it holds what is compared."""
    try:
        comparison(found, found)
    except (KeyError, TypeError, AttributeError):
        return False
    return True
