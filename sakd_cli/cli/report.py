"""`sakd report`: everything about one run in one HTML file"""

from pathlib import Path

from sakd_cli import api
from sakd_cli.cli.console import ConsoleReporter, emit, show
from sakd_cli.cli.options import RunOrNewest, Values, with_options


@with_options("report")
def report(options: Values, json: bool, quiet: bool, page: Path | None, run: RunOrNewest = None) -> None:
    """Write a whole run as one self-contained HTML file, and its plots as PNG files beside it.

    Examples:

        sakd report

        sakd report runs/20261121-120000-distill-... --out result.html
    """
    written = api.report(run, page, runs_dir=options["runs_dir"], reporter=ConsoleReporter(quiet=quiet))
    emit(written) if json else show(*(f"written: {name}" for name in written.written))
