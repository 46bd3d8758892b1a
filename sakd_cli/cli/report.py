"""`sakd report`: everything about one run on one page, from its directory"""

from pathlib import Path
from typing import Annotated

import typer

from sakd_cli.cli.console import ConsoleReporter, emit, show
from sakd_cli.cli.options import Values, with_options
from sakd_cli.errors import UsageError
from sakd_cli.rundir import RunDir

RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="Run directory.")]
Out = Annotated[
    Path | None,
    typer.Option(metavar="FILE.html", help="Where to write the page (RUN/report.html).", rich_help_panel="Output"),
]


@with_options("report")
def report(options: Values, json: bool, quiet: bool, run: RunArgument, out: Out = None) -> None:
    """Write the whole of a run as one web page that needs nothing else, and its charts as PNG beside it.

    Examples:

        sakd report runs/20261121-120000-distill-...

        sakd report runs/20261121-120000-distill-... --out result.html
    """
    from sakd_cli.report.render import html, plots
    from sakd_cli.report.runs.page import run_page, save_pictures

    where, talk = RunDir(run), ConsoleReporter(quiet=quiet)
    path = out or run / "report.html"
    if path.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"--out {path}: a page's name ends in .html")
    drawn = plots.available(talk.warn)
    page, pictures, sections = run_page(where, drawn=drawn)
    html.write(page, path)
    written = [path, *save_pictures(pictures, path)]
    if json:
        emit({"schema": "sakd.report/1", "run": str(run), "written": [str(p) for p in written], "sections": sections})
        return
    for each in written:
        show(f"written: {each}")
