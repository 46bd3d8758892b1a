"""What a teacher's card claims of its accuracy, held against what is measured here. No torch."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from sakd_cli.errors import UsageError
from sakd_cli.files import folder_of, read_about

GAP = 0.2  # percentage points of top-1
PUBLISHED_ON = 10_000  # test images of CIFAR, on which teachers of `RELEASES` were scored


class Claim(NamedTuple):
    """How a teacher scored: top-1 in percent on so many test images of a data set; None where a card does not say."""

    dataset: str | None
    images: int | None
    top1: float | None


def read_claim(path: Path, sha256: str) -> Claim | None:
    """What the card beside a weights file says; None where there is none. `path`: the file or its folder.

    Raises UsageError where the card is damaged, or is of other weights than these, whose SHA-256 is given.
    """
    card = folder_of(path) / "config.json"
    if (path.is_file() and path.name != "model.safetensors") or not card.is_file():
        return None
    try:
        about = read_about(card.parent)
        known: str = about["sha256"]
        values: tuple[tuple[Any, str], ...] = ((str, "dataset"), (int, "images"), (float, "top1"))
        claim = Claim(*(None if about.get(key) is None else kind(about[key]) for kind, key in values))
        if claim.top1 is None and (about.get("imported") or {}).get("published_top1") is not None:
            claim = Claim(claim.dataset, PUBLISHED_ON, float(about["imported"]["published_top1"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UsageError(f"{card}: the teacher's card is damaged") from None
    if known != sha256:
        raise UsageError(
            f"{card}: is the card of other weights (SHA-256 {str(known)[:12]}, the file's is {sha256[:12]})",
            hint="take the whole folder from where it came, or remove the card",
        )
    return claim


def warn_of_chance(top1: float, images: int, classes: int, tell: Callable[[str], None], whose: str = "") -> None:
    """Say so where a top-1 in percent on so many images cannot be told from chance, within 3 standard errors."""
    share = 1 / classes
    if images and top1 / 100 <= share + 3 * (share * (1 - share) / images) ** 0.5:
        tell(
            f"{whose}top-1 {top1:.2f} % on {images} test images is chance for {classes} classes: another order of "
            "classes (import-weights --classes), other preprocessing, or untrained weights"
        )


def compare_with_card(path: Path, claim: Claim | None, measured: Claim, *, allowed: bool) -> str | None:
    """Hold what was measured against the card. What is worth saying of it; None where they agree.

    They agree within 0.2 points, or one image where there are fewer than 500. Raises UsageError where they do not,
    unless that is allowed.
    """
    if claim is None:
        return f"teacher: no card beside {path}; its accuracy was compared with nothing"
    if claim.top1 is None or measured.top1 is None:
        return f"teacher: the card of {path} names no accuracy to compare with"
    if claim[:2] != measured[:2]:
        theirs, ours = (f"{settings.images} test images of {settings.dataset}" for settings in (claim, measured))
        return f"teacher: not compared with its card, which is of {theirs}; here are {ours}"
    gap = abs(claim.top1 - measured.top1)
    if gap <= max(GAP, 100 / (measured.images or 1)) + 1e-9:
        return None
    text = f"top-1 {measured.top1:.2f} % on {measured.images} test images, its card says {claim.top1:.2f} %"
    if allowed:
        return f"teacher: {text}; taken as it is"
    raise UsageError(f"{path}: {text}", "other weights or other images than then; --allow-teacher-mismatch takes it")
