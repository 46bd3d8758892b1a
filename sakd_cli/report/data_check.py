"""What `sakd data check` found, as tables"""

from collections import Counter
from typing import Any

from sakd_cli.report.render.format import whole, word
from sakd_cli.report.render.sheet import Column, Sheet


def data_tables(document: dict[str, Any]) -> list[Sheet]:
    """The parts of a data set, then everything that is wrong with it."""
    columns = [Column("Part", text=True), *map(Column, ("Images", "Classes", "Least", "Most"))]
    rows = [
        [word(part["folder"]), *(whole(part[key]) for key in ("images", "classes", "least", "most"))]
        for part in document["parts"]
    ]
    findings = document["findings"]
    note = f"{whole(document['read'])} images read; least, most: images of a class."
    sheets = [Sheet(f"Data set {word(document['dataset'])}", columns, rows, [note])] if rows else []
    if not findings:
        return [*sheets, Sheet("Findings", [Column("", text=True)], [["nothing is wrong"]])]
    kinds = Counter(finding["kind"] for finding in findings)
    told = [Column("Kind", text=True), Column("Where", text=True), Column("What", text=True)]
    cells = [[word(finding["kind"]), word(finding["path"]), word(finding["text"])] for finding in findings]
    return [*sheets, Sheet("Findings", told, cells, [" · ".join(f"{name} {kinds[name]}" for name in sorted(kinds))])]
