"""`sakd bench`: what a step costs, beside plain distillation and the published step."""

import contextlib
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from sakd_cli.cli.console import ConsoleReporter, emit, show
from sakd_cli.cli.options import Values, with_options
from sakd_cli.config.resolve import ConfigSource, config_sources, nested, resolve

DEFAULTS = {"teacher.source": "resnet56", "student": "resnet20"}
Count = Annotated[int, typer.Option(min=1, help="Times that every step is timed.", rich_help_panel="Run")]
Axis = Annotated[
    str | None,
    typer.Option(
        metavar="AXIS",
        help="Also along one axis: batch, side, spots, images, bank, depth, runs.",
        rich_help_panel="Run",
    ),
]
Earlier = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", help="Hold it against an earlier --json of this machine.", rich_help_panel="Comparison"
    ),
]
Peer = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Time a local checkout's step beside ours: runs its code.",
        rich_help_panel="Comparison",
    ),
]
Entry = Annotated[
    str,
    typer.Option(
        metavar="MODULE:FUNCTION", help="What makes the peer's step (see README).", rich_help_panel="Comparison"
    ),
]


@with_options("bench")
def bench(
    options: Values,
    json: bool,
    quiet: bool,
    rounds: Count = 7,
    scaling: Axis = None,
    compare: Earlier = None,
    peer: Peer = None,
    peer_entry: Entry = "sakd_peer:step",
) -> None:
    """Time a training step: student alone, plain distillation, the method with and without routing, as published.

    Examples:

        sakd bench --teacher wrn40_2 --student wrn16_2 --method fitnet

        sakd bench --scaling batch --json > result.json
    """
    words = resolve("distill", [ConfigSource("the bench's default", nested(DEFAULTS)), *config_sources(options)]).config
    talk = ConsoleReporter(quiet=quiet)
    with contextlib.redirect_stdout(sys.stderr):  # a peer may print
        found = _found(words, talk, rounds, scaling, compare, (peer, peer_entry))
    if json:
        emit(found)
        return
    from sakd_cli.report.bench import bench_tables

    show(*bench_tables(found))


def _found(
    words: Any,
    talk: ConsoleReporter,
    rounds: int,
    axis: str | None,
    compare: Path | None,
    peer: tuple[Path | None, str],
) -> dict[str, Any]:
    from sakd_cli.bench import measure
    from sakd_cli.bench.compare import comparison, earlier, must_be_alike
    from sakd_cli.bench.peer import load_peer_step
    from sakd_cli.bench.scaling import points_of, scaled
    from sakd_cli.bench.steps import Setup

    setup, how = Setup(words), measure.Rounds(rounds)
    # All that may be refused is, before minutes go into it.
    points = points_of(axis, setup) if axis else []
    before = earlier(compare, measure.SCHEMA) if compare else None
    with measure.one_thread():
        if before is not None:
            must_be_alike(before, measure.machine(setup), measure.described(setup, how))
        path, entry = peer
        peers = [load_peer_step(path, entry, setup)] if path else []
        found = measure.measured(setup, how, peers, talk.say)
        found["scaling"] = scaled(str(axis), points, how, talk.say) if points else None
    if before is not None:
        found["compared"] = comparison(before, found)
    return found
