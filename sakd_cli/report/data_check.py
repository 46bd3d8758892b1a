"""What `sakd data check` found, as tables"""

from collections import Counter

from sakd_cli.documents.table import DataCheck
from sakd_cli.report.render.format import whole, word
from sakd_cli.report.render.sheet import Sheet, table


def data_tables(document: DataCheck) -> list[Sheet]:
    """The parts of a data set, then everything that is wrong with it."""
    columns = {
        "Part": lambda part: word(part.folder),
        "Images": lambda part: whole(part.images),
        "Classes": lambda part: whole(part.classes),
        "Min": lambda part: whole(part.min),
        "Max": lambda part: whole(part.max),
    }
    note = f"{whole(document.read)} images read; min, max: images of a class."
    parts = [table(f"Data set {word(document.dataset)}", document.parts, columns, [note])] if document.parts else []
    if not document.findings:
        return [*parts, Sheet("Findings", ("",), [["nothing is wrong"]])]
    rows = [[word(one.kind), word(one.path), word(one.text)] for one in document.findings]
    kinds = sorted(Counter(one.kind for one in document.findings).items())
    note = " · ".join(f"{kind} {count}" for kind, count in kinds)
    return [*parts, Sheet("Findings", ("Kind", "Where", "What"), rows, [note], text=3)]
