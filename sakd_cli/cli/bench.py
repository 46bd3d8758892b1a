"""`sakd bench`: what a step costs, beside plain distillation and the published step."""

import contextlib
import sys

from sakd_cli import api
from sakd_cli.cli.console import ConsoleReporter, emit, show
from sakd_cli.cli.options import Values, with_options
from sakd_cli.report.bench import bench_tables


@with_options("bench")
def bench(options: Values, json: bool, quiet: bool) -> None:
    """Time a training step: student alone, plain distillation, the method with and without routing, as published.

    Networks have random weights, so --teacher is the name of an architecture here.

    Examples:

        sakd bench --teacher wrn40_2 --student wrn16_2 --method fitnet

        sakd bench --scaling batch --json > result.json
    """
    with contextlib.redirect_stdout(sys.stderr):  # a peer may print
        found = api.bench(reporter=ConsoleReporter(quiet=quiet), **options)
    emit(found) if json else show(*bench_tables(found))
