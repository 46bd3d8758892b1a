"""What is wrong with a data set: everything at once, where a run would end at the first fault"""

from collections.abc import Callable, Mapping
from typing import Any

from sakd_cli.config.datasets import DataConfig, FilesConfig
from sakd_cli.data import imagefolder, table
from sakd_cli.data.decode import find_unreadable
from sakd_cli.documents.table import DataCheck, DataFinding, DataPart
from sakd_cli.errors import DataError


def check(config: DataConfig, begin: Callable[[int], None], advance: Callable[[int], None]) -> DataCheck:
    """Nothing is downloaded.

    begin, advance  called with the number of files to decode, and after each file with the number done
    Raises DataError where there is no folder.
    """
    if config.name not in table.FOLDERS or not isinstance(config, FilesConfig):
        return _loaded(config)
    found = table.FOLDERS[config.name](config)
    splits = [split for split in (found.train, found.test) if split is not None]
    paths = [path for split in splits for files in split.files.values() for path in files]
    begin(len(paths))
    findings = [DataFinding(**one._asdict()) for one in found.findings]
    for number, fault in enumerate(find_unreadable(paths, imagefolder.reading_of(config)), start=1):
        if fault is not None:
            findings.append(DataFinding(kind="unreadable", path=fault.path, text=fault.reason))
        advance(number)
    return _document(config, len(found.classes), {s.folder: list(map(len, s.files.values())) for s in splits}, findings)


def _loaded(config: DataConfig) -> DataCheck:
    """A data set that is not made of pictures: its own loader is its check."""
    try:
        data = table.load(config.model_copy(update={"download": False}))
    except DataError as error:
        finding = DataFinding(kind="missing", path=str(config.root or ""), text=error.message)
        return _document(config, 0, {}, [finding])
    count = len(data.classes)
    splits = {"train": data.train, "test": data.test}
    sizes = {name: split.labels.bincount(minlength=count).tolist() for name, split in splits.items()}
    return _document(config, count, sizes, [])


def _document(
    config: DataConfig, classes: int, sizes: Mapping[Any, list[int]], findings: list[DataFinding]
) -> DataCheck:
    """`sizes`: images of each class, by the folder or the name of a part."""
    parts = [
        DataPart(folder=str(name), images=sum(n), classes=len(n), min=min(n, default=0), max=max(n, default=0))
        for name, n in sizes.items()
    ]
    root = None if config.root is None else str(config.root)
    read = sum(part.images for part in parts)
    return DataCheck(dataset=config.name, root=root, classes=classes, parts=parts, read=read, findings=findings)
