"""`sakd bench`: what a step costs, beside plain distillation and the published step."""

import contextlib
import sys
from collections.abc import Callable
from typing import Any

from sakd_cli.cli.console import ConsoleReporter, emit, show
from sakd_cli.cli.options import Values, with_options
from sakd_cli.config.resolve import ConfigSource, config_sources, nested, resolve
from sakd_cli.documents.bench import Bench
from sakd_cli.errors import UsageError

DEFAULTS = {"teacher.source": "resnet56", "student": "resnet20"}


@with_options("bench")
def bench(options: Values, json: bool, quiet: bool) -> None:
    """Time a training step: student alone, plain distillation, the method with and without routing, as published.

    Examples:

        sakd bench --teacher wrn40_2 --student wrn16_2 --method fitnet

        sakd bench --scaling batch --json > result.json
    """
    sources = [ConfigSource("the bench's default", nested(DEFAULTS)), *config_sources(options)]
    config = resolve("distill", sources).config
    if config.teacher.others:
        raise UsageError("bench: times one teacher, as was published")
    if len(config.method.parts) > 1:
        raise UsageError(f"bench: times one method, as it was published; {config.method.name} is several")
    with contextlib.redirect_stdout(sys.stderr):  # a peer may print
        found = _measured(config, options, ConsoleReporter(quiet=quiet).say)
    if json:
        emit(found)
        return
    from sakd_cli.report.bench import bench_tables

    show(*bench_tables(found))


def _measured(config: Any, options: Values, say: Callable[[str], None]) -> Bench:
    from sakd_cli.bench import measure
    from sakd_cli.bench.scaling import points_of, scaled
    from sakd_cli.bench.steps import Setup, load_peer_step

    setup, how, axis = Setup(config), measure.Rounds(options["rounds"]), options["scaling"]
    # Everything is checked before minutes are spent.
    points = points_of(axis, setup) if axis else []
    before = measure.earlier(options["compare"]) if options["compare"] else None
    with measure.one_thread():
        if before is not None:
            measure.must_be_alike(before, measure.machine(setup), measure.described(setup, how))
        peers = [load_peer_step(options["peer"], options["peer_entry"], setup)] if options["peer"] else []
        found = measure.measured(setup, how, peers, say)
        axes = scaled(axis, points, how, say) if points else None
    change = None if before is None else measure.comparison(before, found)
    return found.model_copy(update={"scaling": axes, "comparison": change})
