"""Runs in the same folder that a run can be compared with: its controls and other seeds, and what they say of it"""

from sakd_cli.config.identity import identity
from sakd_cli.config.resolve import flat
from sakd_cli.config.routers import PLAIN
from sakd_cli.errors import UsageError
from sakd_cli.report.runs.compare import compare
from sakd_cli.rundir import RunDir
from sakd_cli.runindex import all_settings

FREE = ("router.", "seed", "method.balance")  # by which a control, or another seed, differs


def beside(run: RunDir) -> list[RunDir]:
    """The run, and the finished ones of its folder that differ from it in router, balance or seed alone.

    Of those without distillation the method does not matter.
    """

    def alike(settings: dict[str, object]) -> str:
        own = flat(settings)
        free = (*FREE, "method.") if own.get("router.name") == PLAIN else FREE
        return identity(own, without={key for key in {*own, *known} if key.startswith(free)})

    known = flat(run.config)
    plainly = identity(known, without={key for key in known if key.startswith((*FREE, "method."))})
    wanted, found = {alike(run.config), plainly}, [run]
    for path, settings in all_settings(run.path.absolute().parent).items():
        other = RunDir(path.parent)
        if settings and path.parent != run.path.absolute() and alike(settings) in wanted and other.finished:
            found.append(other)
    return found


def helped(run: RunDir) -> list[str]:
    """What the runs beside a run say of it, in sentences; none where they answer nothing."""
    if len(found := beside(run)) == 1:
        return []
    try:
        compared = compare(found)
    except UsageError:  # one of the others is damaged
        return []
    own = compared.groups[compared.runs[0].group].label
    return [one.text for one in compared.answers if one.ours == own or one.question == "help"]
