"""Which images a run has: every file by name, class, size and SHA-256; images in memory by one sum for each part."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from sakd_cli.config.datasets import DataConfig, FilesConfig
from sakd_cli.data.dataset import Split
from sakd_cli.data.files import Files
from sakd_cli.errors import DataError, UsageError, unreadable
from sakd_cli.files import parse_json, read_bytes, sha256
from sakd_cli.rundir import IMAGES
from sakd_cli.torchrun import cpu_count

FORMAT = "sakd.images/1"
MOST = 2**30  # bytes of such a file: some ten million images
LARGE = 20e9  # bytes of all pictures from which on their content is not read for it
SHOWN = 3  # differences that an error names


class Image(NamedTuple):
    """One picture; sha256 is empty where only sizes were taken. Of images in memory, one stands for all of a part."""

    file: str
    label: int
    bytes: int
    sha256: str

    @property
    def content(self) -> str:
        return self.sha256 or f"{self.file}:{self.bytes}"


KINDS = (str, int, int, str)  # of its values


class Fingerprint(NamedTuple):
    """The classes and, for each part (train, val, calibration, test), its images in their order."""

    classes: tuple[str, ...]
    parts: Mapping[str, tuple[Image, ...]]

    @property
    def text(self) -> str:
        """As it is kept: JSON, an image a line."""
        parts = ",\n".join(
            f"{json.dumps(name)}: [\n" + ",\n".join(json.dumps(image) for image in images) + "\n]"
            for name, images in self.parts.items()
        )
        return f'{{"format": "{FORMAT}",\n"classes": {json.dumps(self.classes)},\n"parts": {{\n{parts}\n}}}}\n'

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()

    @property
    def mode(self) -> str:
        """How it was taken: `content` or `sizes`."""
        return "content" if any(image.sha256 for images in self.parts.values() for image in images) else "sizes"

    def sum(self, part: str) -> str:
        """SHA-256 of what the images of a part are known by, whatever their order and names."""
        return hashlib.sha256("\n".join(sorted(self.contents(part))).encode()).hexdigest()

    def contents(self, *parts: str) -> set[str]:
        """What the images of these parts are known by, wherever they lie and however they are named."""
        return {image.content for part in parts for image in self.parts.get(part, ())}


def content_hashes(paths: Sequence[str]) -> tuple[str, ...]:
    """SHA-256 of every file, several at a time. Raises DataError naming one that cannot be read."""
    with ThreadPoolExecutor(min(32, 2 * cpu_count())) as pool:
        return tuple(pool.map(_content_hash, paths))


def _content_hash(path: str) -> str:
    try:
        return sha256(Path(path))
    except OSError as error:
        raise DataError(f"{path}: {unreadable(error)}", "sakd data check DIR") from None


def mode_of(config: DataConfig, then: Fingerprint | None) -> str:
    """How the fingerprint is to be taken (`of_images`): as `then`, which it is compared with, was; else as is set."""
    return then.mode if then else config.fingerprint if isinstance(config, FilesConfig) else "auto"


def of_images(classes: tuple[str, ...], parts: Mapping[str, Split], mode: str = "auto") -> Fingerprint:
    """The fingerprint of images as they lie there now. DataError where a file cannot be read.

    mode  content: SHA-256 of every file; sizes: none; auto: content up to `LARGE` bytes of all files
    """
    found: dict[str, tuple[Image, ...]] = {}
    for name, split in parts.items():
        labels = split.labels.tolist()
        if not isinstance(split.images, Files):
            content = hashlib.sha256(split.images.cpu().contiguous().numpy().data)
            content.update(split.labels.cpu().numpy().data)
            found[name] = (Image("", len(labels), split.images.nbytes, content.hexdigest()),)
            continue
        paths = split.images.paths
        sizes = [os.path.getsize(path) if os.path.exists(path) else 0 for path in paths]
        read = mode == "content" or (mode == "auto" and sum(sizes) <= LARGE)
        sums = content_hashes(paths) if read else ("",) * len(paths)
        found[name] = tuple(map(Image, split.images.names, labels, sizes, sums))
    return Fingerprint(classes, found)


def read(folder: Path) -> Fingerprint | None:
    """The fingerprint that a run keeps in its directory; None where there is none. UsageError where it is damaged."""
    path = folder / IMAGES
    if not path.exists():
        return None
    try:
        content: Any = parse_json(read_bytes(path, MOST))
        if content["format"] != FORMAT:
            raise ValueError
        parts = {str(name): tuple(Image(*row) for row in rows) for name, rows in content["parts"].items()}
        values: list[tuple[Any, type]] = [(name, str) for name in content["classes"]]
        values += [one for images in parts.values() for image in images for one in zip(image, KINDS, strict=True)]
        if not all(isinstance(value, kind) for value, kind in values):
            raise ValueError
        return Fingerprint(tuple(content["classes"]), parts)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UsageError(f"{path}: damaged") from None


def changed_images(then: Fingerprint, now: Fingerprint) -> list[str]:
    """All by which the images are not those of `then`: classes, then images missing, new, changed, in another order."""
    if then.classes != now.classes:
        return [f"the classes were {', '.join(then.classes[:9])} and are {', '.join(now.classes[:9])}"]
    found = []
    for part in {**then.parts, **now.parts}:
        old, new = then.parts.get(part, ()), now.parts.get(part, ())
        before, after = ({image.file: image for image in images} for images in (old, new))
        found += [f"{file or part}: missing" for file in before if file not in after]
        found += [f"{file or part}: new" for file in after if file not in before]
        changed = [file for file in before if file in after and before[file][1:] != after[file][1:]]
        found += [f"{file or part}: another content" for file in changed]
        if not found and old != new:
            found.append(f"{part}: another order")
    return found


def lost(then: Fingerprint, now: Fingerprint, part: str) -> list[str]:
    """Images of a part that are no longer among its images; one that has another name is not lost."""
    there, names = now.contents(part), {image.file for image in now.parts.get(part, ())}
    gone = [image.file for image in then.parts.get(part, ()) if image.content not in there]
    return [f"{file or part}: {'another content' if file in names else 'missing'}" for file in gone]


def require_none(found: Sequence[str], where: str, hint: str) -> None:
    """Raise DataError, naming the first of these differences, where there are any."""
    if found:
        more = f" (and {len(found) - SHOWN} more)" if len(found) > SHOWN else ""
        raise DataError(f"{where}: not the images that the run began with: {'; '.join(found[:SHOWN])}{more}", hint)
