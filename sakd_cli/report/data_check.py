"""What `sakd data check` found, as tables"""

from collections import Counter

from sakd_cli.documents.table import DataCheck
from sakd_cli.report.render.format import named, whole
from sakd_cli.report.render.sheet import Sheet, columns_of, table


def data_tables(document: DataCheck) -> list[Sheet]:
    """The parts of a data set, then everything that is wrong with it or worth knowing."""
    columns = columns_of(named, {"Part": "folder"})
    columns |= columns_of(whole, {"Images": "images", "Classes": "classes", "Min": "min", "Max": "max"})
    note = f"{whole(document.read)} images read; min, max: images of a class."
    parts = [table(f"Data set {named(document.dataset)}", document.parts, columns, [note])] if document.parts else []
    columns = columns_of(named, {"Kind": "kind", "Where": "path", "What": "text"})
    found = []
    for title, rows in (("Findings", document.findings), ("Notes", document.notes)):
        if rows:
            kinds = sorted(Counter(one.kind for one in rows).items())
            note = " · ".join(f"{kind} {count}" for kind, count in kinds)
            found.append(table(title, rows, columns, [note], text=3))
        elif title == "Findings":
            found.append(Sheet("Findings", ("",), [["nothing is wrong"]]))
    return [*parts, *found]
