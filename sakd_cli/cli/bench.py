"""`sakd bench`: what a step costs, beside plain distillation and the published step."""

import contextlib
import sys

from sakd_cli.cli.console import ConsoleReporter, emit, show
from sakd_cli.cli.options import Values, with_options
from sakd_cli.config.resolve import BENCHED, ConfigSource, config_sources, nested, resolve
from sakd_cli.errors import UsageError


@with_options("bench")
def bench(options: Values, json: bool, quiet: bool) -> None:
    """Time a training step: student alone, plain distillation, the method with and without routing, as published.

    Examples:

        sakd bench --teacher wrn40_2 --student wrn16_2 --method fitnet

        sakd bench --scaling batch --json > result.json
    """
    sources = [ConfigSource("the bench's default", nested(BENCHED)), *config_sources(options)]
    config = resolve("distill", sources).config
    if config.teacher.others:
        raise UsageError("bench: times one teacher, as was published")
    if len(config.method.parts) > 1:
        raise UsageError(f"bench: times one method, as it was published; {config.method.name} is several")
    from sakd_cli.bench.scaling import ordered

    with contextlib.redirect_stdout(sys.stderr):  # a peer may print
        found = ordered(config, options, ConsoleReporter(quiet=quiet).say)
    if json:
        emit(found)
        return
    from sakd_cli.report.bench import bench_tables

    show(*bench_tables(found))
