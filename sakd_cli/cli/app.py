"""The command `sakd`: its subcommands, and how errors are reported. Torch is imported inside the commands only."""

import errno
import itertools
import os
import re
import signal
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from functools import cache, partial
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup, TyperOption

from sakd_cli import __version__
from sakd_cli.cli import guide, process, results, show, sweep, train, watch
from sakd_cli.cli.console import complain
from sakd_cli.cli.instead import SEVERAL, instead
from sakd_cli.config.code import GUIDE, place_of, trust_no_more
from sakd_cli.config.training import PROCEDURES
from sakd_cli.errors import (
    CheckpointError,
    DataError,
    DiskError,
    MemoryLimitError,
    NonFiniteError,
    SakdError,
    Stopped,
    UsageError,
    is_out_of_memory,
    not_deterministic,
)
from sakd_cli.report.render.format import printable
from sakd_cli.torchrun import tells

EPILOG = (
    "Precedence of settings: option > environment (SAKD_EPOCHS ...) > --config file > --preset > default. "
    "Exit codes: `sakd guide exit-codes`."
)


class Narrow:
    """A command whose help has no panels in fewer than 80 columns, where they cut the names of options."""

    rich_markup_mode: Any

    def format_help(self, ctx: Any, formatter: Any) -> None:
        if formatter.width < 78:  # of 80 columns
            self.rich_markup_mode = None
        super().format_help(ctx, formatter)  # type: ignore[misc]


class Group(Narrow, TyperGroup):
    """A command that has commands."""


app = typer.Typer(
    cls=Group,
    name="sakd",
    help="Distill image classifiers adaptively: per sample and step, decide where the student learns, and see it.",
    epilog=EPILOG,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
NO_ROOM = ("annot allocate memory", "failed to map segment", "bad_alloc")  # to load a library
INTERRUPTED, BROKEN_PIPE, TERMINATED = 130, 141, 143
group = partial(typer.Typer, cls=Group, no_args_is_help=True, rich_markup_mode="markdown")
config_app = group(help="Show the settings of a run and where they come from.")
data_app = group(help="Check data sets.")
show_app = group(help="Explain a method, a router, a settings key or a JSON schema.")


def _hide_type_of_flags() -> None:
    """A flag has no value, hence no type in the help; typer 0.29 would show `<bool>` behind it."""
    original: Any = getattr(TyperOption, "display_type_rich", None)
    if original is not None:
        setattr(TyperOption, "display_type_rich", lambda own, ctx: "" if own.is_flag else original(own, ctx))  # noqa: B010


_hide_type_of_flags()


class OnceEach(Narrow, TyperCommand):
    """A command that refuses an option with one value which is given several times; the parser would take the last."""

    def make_parser(self, ctx: Any) -> Any:
        parser = super().make_parser(ctx)
        parse = parser.parse_args

        def parse_args(args: list[str]) -> Any:
            found = parse(args=args)
            counts = Counter(option for option in found[2] if isinstance(option, TyperOption))
            for option, count in counts.items():
                name = option.opts[0]
                if count > 1 and not (option.multiple or option.is_flag or option.count):
                    raise UsageError(f"{name}: is given {count} times, and takes one value", SEVERAL.get(name))
            return found

        parser.parse_args = parse_args  # type: ignore[method-assign]
        return parser


def _version(requested: bool) -> None:
    if requested:
        typer.echo(f"sakd {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    return


OTHERS = {task: row.command for task, row in PROCEDURES.items() if task not in ("pretrain", "distill")}
COMMANDS: dict[str, dict[str, Callable[..., None]]] = {
    "Train": {
        "pretrain-teacher": train.pretrain_teacher,
        "distill": train.distill,
        **{name: train.command_of(task) for task, name in OTHERS.items()},
        "sweep": sweep.sweep,
        "import-weights": results.import_weights,
        "export": results.export,
    },
    "Evaluate": {
        "eval": results.evaluate,
        "predict": results.predict,
        "compare": results.compare,
        "runs": results.runs,
        "watch": watch.watch,
        "report": results.report,
        "inspect-spots": results.inspect_spots,
        "bench": results.bench,
    },
    "Reference": {"list": show.listing, "guide": guide.guide},
}
for panel, commands in COMMANDS.items():
    for name, function in commands.items():
        app.command(name, rich_help_panel=panel, cls=OnceEach)(function)
for name in ("method", "router", "key", "schema"):
    show_app.command(name, cls=OnceEach)(getattr(show, f"show_{name}"))
config_app.command("show", cls=OnceEach)(show.show_config)
data_app.command("check", cls=OnceEach)(results.check_data)
app.add_typer(data_app, name="data", rich_help_panel="Evaluate")
app.add_typer(show_app, name="show", rich_help_panel="Reference")
app.add_typer(config_app, name="config", rich_help_panel="Reference")


@cache
def _command() -> Any:
    """All commands as their parser has them; made once, however many are run."""
    return typer.main.get_command(app)


def run(arguments: list[str]) -> int:
    """Run one command line and return its exit code; errors of the user's cost one line."""
    try:
        code = int(_command()(_resume_alone(arguments), prog_name="sakd", standalone_mode=False) or 0)
        print(end="", flush=True)
        if code == INTERRUPTED:  # typer handles Ctrl-C itself and prints nothing
            complain("interrupted")
        return code
    except SakdError as error:
        # Of a number that is not finite each process names its own images.
        what = str(error.exit_code) if isinstance(error, NonFiniteError) else error.message
        if tells(what, common=isinstance(error, UsageError | DataError | CheckpointError)):
            complain(error.message, error.hint)
        return error.exit_code
    except (BrokenPipeError, SystemExit) as error:  # rich answers a broken pipe with SystemExit
        return UsageError.exit_code if _complained_of_own_code(error) else _broken_pipe()
    except OSError as error:  # whatever the floors below have no message of their own for
        where = "if it is a library's: TMPDIR, TORCHINDUCTOR_CACHE_DIR and MPLCONFIGDIR say where these write"
        own = error.errno in (errno.ENAMETOOLONG, errno.ENOSPC)
        complain(f"{error.filename or 'file system'}: {error.strerror or error}", None if own else where)
        return UsageError.exit_code if error.errno == errno.ENAMETOOLONG else DiskError.exit_code
    except Stopped as stopped:
        how = "interrupted" if stopped.exit_code == INTERRUPTED else "terminated"
        if tells(how, common=False):
            complain(f"{how}; {stopped.saved}", stopped.hint)
        return stopped.exit_code
    except process.Terminated:
        if tells("terminated", common=False):
            complain("terminated")
        return TERMINATED
    except Exception as error:
        if hasattr(error, "format_message") and hasattr(error, "exit_code"):  # the parser's own errors
            if error.format_message():  # it is empty where the help was shown instead
                complain(_of_parser(error), hint=instead(error, arguments))
            return int(error.exit_code)
        # torch's, which must not be imported here; on the CPU it raises a plain RuntimeError.
        if "DataLoader worker" in str(error):  # killed while the main process was elsewhere
            complain("a process that reads images was killed, probably for lack of memory", "--set data.workers=1")
            return MemoryLimitError.exit_code
        if is_out_of_memory(error) or (isinstance(error, ImportError) and any(sign in str(error) for sign in NO_ROOM)):
            complain("out of memory", "a smaller --batch-size or less data (data.limit; of shapes data.train)")
            return MemoryLimitError.exit_code
        if (refused := not_deterministic(error)) is not None:
            complain(refused.message, refused.hint)
            return refused.exit_code
        if _complained_of_own_code(error):
            return UsageError.exit_code
        frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__) if frame.f_code.co_name == "<module>"]
        if frames and not (name := frames[-1].f_globals["__name__"]).startswith("sakd_cli"):
            told = f"{name.partition('.')[0]} cannot be imported: {type(error).__name__}: {error}"
            complain(told, "mend its installation, or the environment variable that it reads")
            return UsageError.exit_code
        for line in traceback.format_exc().splitlines():
            print(printable(line), file=sys.stderr)
        complain(f"internal error: {type(error).__name__}: {error}", hint="please report it with the lines above")
        return 1
    finally:
        trust_no_more()


def _complained_of_own_code(error: BaseException) -> bool:
    """Whether somebody's own code raised it, which is then said with file and line."""
    if place := place_of(error) or _place_in_method(error):
        complain(f"{place}: {type(error).__name__}: {error}", GUIDE)
    return place is not None


def _place_in_method(error: BaseException) -> str | None:
    """Class, file and line of the distiller or router whose own code raised the error; None where it is no such code.

    Known by the names of the base classes, which must not be imported here.
    """
    owner, place = type(None), None
    for frame, line in traceback.walk_tb(error.__traceback__):
        kind = type(frame.f_locals.get("self"))
        if {"Distiller", "Router", "Warmup"} & {base.__name__ for base in kind.__mro__}:
            owner = kind
        if frame.f_globals.get("__name__") == owner.__module__:
            place = f"{owner.__name__} ({os.path.basename(frame.f_code.co_filename)}, line {line})"
    return place


def _broken_pipe() -> int:
    """A broken pipe (`sakd list models | head -1`) is no error: exit without a message."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return BROKEN_PIPE


def _resume_alone(arguments: list[str]) -> list[str]:
    """`--resume` without a value means `--resume auto`; the parser knows no option whose value may be left out."""
    pairs = itertools.pairwise([*arguments, "-"])
    return [s for a, b in pairs for s in ([a, "auto"] if a == "--resume" and b.startswith("-") else [a])]


def _of_parser(error: Any) -> str:
    """What the parser says; of an argument that is missing also what it is."""
    said: str = error.format_message().replace("Value error, ", "").replace("Input should be", "must be")
    said = re.split(", unable to parse| \\(Possible options| Did you mean", said)[0]  # what is meant stands in the hint
    what = getattr(getattr(error, "param", None), "help", None)
    return f"{said[:-1]}: {what}" if what and re.fullmatch(r"Missing \S+ '\S+'\.", said) else said


def main() -> None:
    """Entry point of the console script."""
    process.prepare()
    try:
        code = run(sys.argv[1:]) if process.somewhere() else UsageError.exit_code
    except MemoryError:  # even to say it as all else is said
        os.write(2, b"error: out of memory\n")
        os._exit(MemoryLimitError.exit_code)
    try:
        sys.stdout.flush()
    except (OSError, ValueError):  # it is told already; at its end Python would say it again, with another code
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    for number in (signal.SIGINT, signal.SIGTERM):  # a second one ends what Python still does, without a traceback
        signal.signal(number, signal.SIG_DFL)
    if code in (INTERRUPTED, TERMINATED) and sys.platform != "win32":
        process.leave(code)
    sys.exit(code)
