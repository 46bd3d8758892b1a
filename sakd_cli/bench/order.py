"""A benchmark as it is asked for: what is timed, along which axis, beside which earlier result"""

from collections.abc import Callable, Mapping
from typing import Any

from sakd_cli.bench import measure
from sakd_cli.bench.scaling import points_of, scaled
from sakd_cli.bench.steps import Setup, load_peer_step
from sakd_cli.documents.bench import Bench


def ordered(config: Any, options: Mapping[str, Any], say: Callable[[str], None]) -> Bench:
    """Time the steps of a distillation's settings with the options of `sakd bench`."""
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
