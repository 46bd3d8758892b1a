"""What is wrong with a data set: everything at once, where a run would end at the first fault. Of folders, no torch."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

from sakd_cli.config.datasets import DataConfig, FilesConfig, ImageFolderConfig
from sakd_cli.data.decode import Unreadable
from sakd_cli.data.examine import Looks, look_at, of_each
from sakd_cli.data.pictures import Finding, FolderContents, SplitContents, shown
from sakd_cli.data.published import reading_of, scan
from sakd_cli.documents.table import DataCheck, DataFinding, DataPart
from sakd_cli.errors import DataError


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
    findings, notes = list(found.findings), [*found.notes, *_odd_names(found)]
    places = [
        Place(str(part.folder), label, path)
        for part in found.parts
        for label, paths in part.files.items()
        for path in paths
    ]
    begin(len(places))
    seen: dict[bytes, list[Place]] = defaultdict(list)
    looks: list[tuple[Place, Looks]] = []
    every = of_each(partial(look_at, reading=reading_of(config)), [place.path for place in places])
    for number, (place, one) in enumerate(zip(places, every, strict=True), start=1):
        if isinstance(one, Unreadable):
            findings.append(Finding("unreadable", shown(one.path), one.reason))
        else:
            seen[one.digest].append(place)
            looks.append((place, one))
        advance(number)
    notes += _oddities(found.parts, looks, config)
    (findings if isinstance(config, ImageFolderConfig) else notes).extend(_duplicates(seen))
    sizes = {shown(part.folder): list(map(len, part.files.values())) for part in found.parts}
    return _document(config, len(found.classes), sizes, findings, notes)


def _odd_names(found: FolderContents) -> Iterator[Finding]:
    """Classes whose names have characters that are not seen."""
    for part in found.parts:
        for name in part.files:
            if name.isprintable() and name == name.strip():
                continue
            text = f"the class {name!a} has spaces or signs that are not seen"
            yield Finding("name", shown(part.folder), text)


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
        others = [place for place in places if place[:2] != first[:2]]
        if others:
            more = f" and {len(others) - 1} more" if len(others) > 1 else ""
            yield Finding("duplicate", shown(first.path), f"is the same picture as {shown(others[0].path)}{more}")


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
