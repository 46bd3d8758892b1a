"""What is wrong with a data set: everything at once, where a run would end at the first fault. Of folders, no torch."""

import hashlib
import multiprocessing
import os
import signal
import sys
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from typing import Any, NamedTuple, TypeVar

from PIL.Image import Image

from sakd_cli.config.datasets import DataConfig, FilesConfig, ImageFolderConfig
from sakd_cli.data.decode import STRIP, Picture, Reading, Unreadable, read
from sakd_cli.data.pictures import Finding, SplitContents, legible
from sakd_cli.data.published import reading_of, scan
from sakd_cli.documents.table import DataCheck, DataFinding, DataPart
from sakd_cli.errors import DataError

Result = TypeVar("Result")
MIN_FILES = 200  # below this, decoding in this process is faster
CHUNK = 32  # files that a process gets at a time
ROWS = 2**22  # pixels that are hashed at a time


class Looks(NamedTuple):
    """What a picture is like.

    digest  of its pixels as they are read, and of its size: equal pictures have equal ones, whatever their files
    turned  stored otherwise than upright; frames: has several, of which the first is taken
    strip   width and height where one is so much larger that most of the picture is never seen
    greys   least and greatest value, where the range that is set is not filled, or left
    """

    digest: bytes
    turned: bool
    frames: bool
    strip: tuple[int, int] | None
    greys: tuple[float, float] | None


def _looks(picture: Picture, reading: Reading) -> Looks:
    digest = _digest(picture.rgb())
    strip = picture.size if max(picture.size) > STRIP * min(picture.size) else None
    odd = None
    if picture.greys is not None:
        low, high = picture.greys
        black, white = reading.gray_range or (low, high)
        if low < black or high > white or high - black < (white - black) / 2:
            odd = low, high
    return Looks(digest, picture.turned, picture.frames, strip, odd)


def _digest(rgb: Image) -> bytes:
    content = hashlib.blake2b(repr(rgb.size).encode(), digest_size=16)
    rows = max(1, ROWS // rgb.width)
    for top in range(0, rgb.height, rows):
        content.update(rgb.crop((0, top, rgb.width, min(rgb.height, top + rows))).tobytes())
    return content.digest()


def _decoded(picture: Picture) -> None:
    picture.rgb()


def find_unreadable(paths: Sequence[str], reading: Reading) -> Iterator[Unreadable | None]:
    """Per file, in order, what is wrong with it once decoded; None: nothing. DataError where a decoder crashes."""
    return of_each(partial(read, reading=reading, use=_decoded), paths)


def _ignore_interrupts() -> None:
    """Ctrl-C goes to all processes of the group; only the main one handles it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def of_each(function: Callable[[str], Result], paths: Sequence[str]) -> Iterator[Result]:
    """What a function makes of each file, in order. Raises DataError where a decoder crashes."""
    number = min(16, os.cpu_count() or 1)
    if len(paths) < MIN_FILES or number < 2:
        yield from map(function, paths)
        return
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads: the children touch none
            with ProcessPoolExecutor(number, context, initializer=_ignore_interrupts) as pool:
                yield from pool.map(function, paths, chunksize=CHUNK)
    except (BrokenProcessPool, OSError) as error:
        raise DataError(f"a process that decodes pictures ended or never began: memory, a picture? ({error})") from None


class Place(NamedTuple):
    """Where a picture is."""

    part: str
    label: str
    path: str


def check(config: DataConfig, begin: Callable[[int], None], advance: Callable[[int], None]) -> DataCheck:
    """Nothing is downloaded.

    begin, advance  called with the number of files to decode, and after each file with the number done
    Raises DataError where there is no folder.
    """
    config = config.model_copy(update={"download": False})
    found = scan(config) if isinstance(config, FilesConfig) else None
    if found is None or not isinstance(config, FilesConfig):
        return _loaded(config)
    findings, notes = list(found.findings), list(found.notes)
    named = [(part, name) for part in found.parts for name in part.files]
    odd = [(part, name) for part, name in named if not name.isprintable() or name != name.strip()]
    unseen = "has spaces or signs that are not seen"
    notes += [Finding("name", legible(part.folder), f"the class {name!a} {unseen}") for part, name in odd]
    places = [
        Place(str(part.folder), label, path)
        for part in found.parts
        for label, paths in part.files.items()
        for path in paths
    ]
    begin(len(places))
    seen: dict[bytes, list[Place]] = defaultdict(list)
    looks: list[tuple[Place, Looks]] = []
    reading = reading_of(config)
    look = partial(read, reading=reading, use=partial(_looks, reading=reading))
    every = of_each(look, [place.path for place in places])
    for number, (place, one) in enumerate(zip(places, every, strict=True), start=1):
        if isinstance(one, Unreadable):
            findings.append(Finding("unreadable", legible(one.path), one.reason))
        else:
            seen[one.digest].append(place)
            looks.append((place, one))
        advance(number)
    notes += _oddities(found.parts, looks, config)
    (findings if isinstance(config, ImageFolderConfig) else notes).extend(_duplicates(seen))
    sizes = {legible(part.folder): list(map(len, part.files.values())) for part in found.parts}
    return _document(config, len(found.classes), sizes, findings, notes).model_copy(update={"read": len(looks)})


def _oddities(parts: list[SplitContents], looks: list[tuple[Place, Looks]], config: FilesConfig) -> Iterator[Finding]:
    turned = "turned upright" if config.orientation else "left so (data.orientation)"
    counted = {
        "turned": ("are photographs stored turned", turned, [place.part for place, one in looks if one.turned]),
        "frames": ("have several frames or pages", "the first is taken", [p.part for p, one in looks if one.frames]),
    }
    for kind, (what, then, where) in counted.items():
        for folder in (str(part.folder) for part in parts):
            if count := where.count(folder):
                yield Finding(kind, folder, f"{count} of its pictures {what}: {then}")
    for place, one in looks:
        if one.strip is not None:
            yield Finding("strip", place.path, "has {}x{} pixels: only its middle is seen".format(*one.strip))
        if one.greys is not None and config.gray_range is not None:
            held, set_to = ("{:g} to {:g}".format(*range) for range in (one.greys, config.gray_range))
            yield Finding("range", place.path, f"holds greys from {held}, where data.gray_range is {set_to}")


def _duplicates(seen: Mapping[bytes, list[Place]]) -> Iterator[Finding]:
    """Pictures that are in more than one part, or in more than one class."""
    for places in seen.values():
        first = places[0]
        if others := [place for place in places if place[:2] != first[:2]]:
            more = f" and {len(others) - 1} more" if len(others) > 1 else ""
            yield Finding("duplicate", legible(first.path), f"is the same picture as {legible(others[0].path)}{more}")


def _loaded(config: DataConfig) -> DataCheck:
    """A data set that is not made of pictures: its own loader is its check."""
    from sakd_cli.data import table

    try:
        data = table.load(config)
    except DataError as error:
        return _document(config, 0, {}, [Finding("missing", str(config.root or ""), error.message)], [])
    count = len(data.classes)
    sizes, seen = {}, defaultdict[bytes, list[Place]](list)
    for name, split in {"train": data.train, "test": data.test}.items():
        sizes[name] = split.labels.bincount(minlength=count).tolist()
        for place, (image, label) in enumerate(zip(split.pixels.numpy(), split.labels.tolist(), strict=True)):
            seen[image.tobytes()].append(Place(name, data.classes[label], f"{name}[{place}]"))
    return _document(config, count, sizes, [], list(_duplicates(seen)))


def _document(
    config: DataConfig, classes: int, sizes: Mapping[str, list[int]], findings: list[Finding], notes: list[Finding]
) -> DataCheck:
    """`sizes`: images of each class, by the folder or the name of a part."""
    parts = [
        DataPart(folder=name, images=sum(n), classes=len(n), min=min(n, default=0), max=max(n, default=0))
        for name, n in sizes.items()
    ]
    told: list[Any] = [[DataFinding(**one._asdict()) for one in some] for some in (findings, notes)]
    return DataCheck(
        dataset=config.name,
        root=None if config.root is None else str(config.root),
        classes=classes,
        parts=parts,
        read=sum(part.images for part in parts),
        findings=told[0],
        notes=told[1],
    )
