"""`sakd compare` and `sakd report`: runs against each other, and the whole of one run, from their directories"""

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from sakd_cli.cli import options as o
from sakd_cli.cli.console import ConsoleReporter, emit, show
from sakd_cli.errors import UsageError
from sakd_cli.rundir import RunDir

Runs = Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run directories.")]
Csv = Annotated[
    bool, typer.Option("--csv", help="Every epoch and the final figures as CSV on stdout.", rich_help_panel="Output")
]


Plot = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Curves as .png or .svg (the extra plots).", rich_help_panel="Output"),
]
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="Run directory.")]
Out = Annotated[
    Path | None,
    typer.Option(metavar="FILE.html", help="Where to write the page (RUN/report.html).", rich_help_panel="Output"),
]


def compare(runs: Runs, plot: Plot = None, csv: Csv = False, json: o.Json = False) -> None:
    """Compare runs: words that differ, curves, final figures, seeds, and whether a difference is more than noise.

    Examples:

        sakd compare runs/A runs/B runs/C

        sakd compare runs/A runs/B --plot curves.png --csv > curves.csv
    """
    if csv and json:
        raise UsageError("--csv and --json are two documents; choose one")
    if plot:
        from sakd_cli.report.render import plots

        plots.checked(plot)
    compared([RunDir(run) for run in runs], json=json, csv=csv, plot=plot)


def report(run: RunArgument, out: Out = None, json: o.Json = False, quiet: o.Quiet = False) -> None:
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


def compared(runs: Iterable[RunDir], *, json: bool, csv: bool = False, plot: Path | None = None) -> None:
    """Print how these runs stand against each other."""
    from sakd_cli.report.runs.compare import compare as judged
    from sakd_cli.report.runs.compare_tables import comparison_csv, comparison_tables

    document = judged(runs)
    if plot:
        from sakd_cli.report.render import plots
        from sakd_cli.report.runs.curves import curve_figure

        plots.write(curve_figure(document), plot)
    if json:
        emit(document)
    elif csv:
        sys.stdout.write(comparison_csv(document))
    else:
        show(*comparison_tables(document))
