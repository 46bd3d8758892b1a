"""`sakd report`: everything about one run in one HTML file"""

from pathlib import Path
from typing import Annotated

import typer

from sakd_cli.cli.console import ConsoleReporter, emit, show
from sakd_cli.cli.options import Values, with_options
from sakd_cli.errors import UsageError
from sakd_cli.rundir import RunDir

RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="Run directory.")]


@with_options("report")
def report(options: Values, json: bool, quiet: bool, page: Path | None, run: RunArgument) -> None:
    """Write a whole run as one self-contained HTML file, and its plots as PNG files beside it.

    Examples:

        sakd report runs/20261121-120000-distill-...

        sakd report runs/20261121-120000-distill-... --out result.html
    """
    from sakd_cli.report.render import html, plots
    from sakd_cli.report.runs.page import run_page, save_pictures

    where = RunDir(run)
    path = page or run / "report.html"
    if path.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"--out {path}: the name of an HTML file ends in .html")
    drawn = plots.available(ConsoleReporter(quiet=quiet).warn)
    text, pictures, sections = run_page(where, drawn=drawn)
    html.write(text, path)
    written = [path, *save_pictures(pictures, path)]
    if json:
        emit({"schema": "sakd.report/1", "run": str(run), "written": [str(p) for p in written], "sections": sections})
        return
    for each in written:
        show(f"written: {each}")
