"""One's own code in a file, `my.py:Name`: who lets it run, how it is loaded, which settings it has. No torch.

A file is executed once for each content that it has, from the bytes that its SHA-256 is of. Whatever is wrong with it
is a UsageError that names file and line.
"""

import contextlib
import copy
import hashlib
import inspect
import os
import sys
import traceback
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any, TypeVar

from pydantic import create_model
from pydantic.errors import PydanticUserError

from sakd_cli.config.base import OBJECTS, Config, in_place, of_file
from sakd_cli.errors import SakdError, UsageError, first_line, is_out_of_memory, one_line, unknown, unreadable
from sakd_cli.files import read_bytes, resolved

GUIDE = "sakd guide extending"
PYTHON = "python:"  # begins the name of an object that has no file
TRUST = "SAKD_FACTORIES"  # environment: names, with commas between them, of what a file may ask for
MOST = 2**24  # bytes of a file
OURS = ("sakd_cli", "torch", "builtins", "abc")  # whose constructors have no settings
Kind = TypeVar("Kind", bound=Config)
_trusted: set[str] = set()  # in this process
_named: dict[str, tuple[Any, Any]] = {}  # objects of a program by their names, and what they stand for
named_runs: set[Path] = set()  # runs that were named here: the files of their settings lie above them
_modules: dict[tuple[Path, str], ModuleType] = {}


def functions(name: str) -> list[str]:
    """What of a name is code of the user's own; the name of a network may be made of several."""
    of_files = [in_place(part) for part in name.split("+") if of_file(part)]
    # `hf-hub:owner/name` is a place on the Hugging Face hub, no code.
    return of_files or [part for part in name.split("-") if ":" in part and "/" not in part]


def trust(*names: str | None) -> None:
    """Let runs and weights files ask for the code in these names: the user has named it, or made the run."""
    _trusted.update(part for name in names if name for part in functions(name))


def trust_no_more() -> None:
    """Forget all that was named: the next command may be about other files."""
    _trusted.clear()
    named_runs.clear()


def untrusted(name: str) -> list[str]:
    """The user's own code in a name that nobody has named here."""
    named = {*_trusted, *OBJECTS, *map(in_place, os.environ.get(TRUST, "").split(","))}
    return [part for part in functions(name) if part not in named]


def require_trust(name: str) -> None:
    """Raise UsageError where a name would run code that the user has not named."""
    if found := untrusted(name):
        hint = f"where you trust it: {TRUST}={found[0]} sakd ..."
        raise UsageError(f"{found[0]} would run code that you have not named", hint)


def load(name: str) -> Any:
    """What `my.py:Name` means; the caller has seen to the trust."""
    if name in OBJECTS:
        return OBJECTS[name]
    path, _, entry = name.rpartition(":")
    if (found := getattr(_module(path), entry, None)) is None:
        raise UsageError(f"{path}: {unknown('name', entry, contents(path))}", GUIDE)
    return found


def contents(path: str) -> dict[str, Any]:
    """What a file defines."""
    module = _module(path)
    return {name: one for name, one in vars(module).items() if getattr(one, "__module__", "") == module.__name__}


def _read(path: str) -> tuple[bytes, str]:
    try:
        content = read_bytes(Path(path), MOST)
    except OSError as error:
        where = "" if os.path.isabs(path) else f" in {os.getcwd()}"
        there = next((above for run in named_runs for above in run.resolve().parents if (above / path).is_file()), None)
        hint = f"run it from {there}, where it lies" if there is not None else None
        raise UsageError(f"{path}: {unreadable(error)}{where}", hint) from None
    except ValueError as error:
        raise UsageError(f"{path}: {error}") from None
    return content, hashlib.sha256(content).hexdigest()


def _module(path: str) -> ModuleType:
    content, digest = _read(path)
    place = resolved(path)
    if (place, digest) in _modules:
        return _modules[place, digest]
    module = ModuleType(f"{place.stem}_{digest[:8]}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module
    sys.path.insert(0, str(place.parent))
    try:
        with as_usage_errors(path), contained():
            exec(compile(content, path, "exec"), module.__dict__)
    except BaseException:
        del sys.modules[module.__name__]
        raise
    finally:
        sys.path.remove(str(place.parent))
    _modules[place, digest] = module
    return module


def _torch_defaults() -> tuple[str, str, bool]:
    """Type and device of what torch makes where nothing is said, and whether it makes gradients."""
    if (torch := sys.modules.get("torch")) is None:
        return "torch.float32", "cpu", True
    return str(torch.get_default_dtype()), str(torch.get_default_device()), torch.is_grad_enabled()


@contextlib.contextmanager
def contained() -> Iterator[None]:
    """For own code while it is loaded or tried: what it prints goes to stderr, and it changes no folder or warnings.

    Raises ValueError, and puts them back, where it changes torch's defaults: it may count upon them.
    """
    before, stdout, depth = _torch_defaults(), os.dup(1), sys.getrecursionlimit()
    os.dup2(2, 1)
    streams = contextlib.redirect_stdout(sys.stderr), contextlib.redirect_stderr(sys.stderr)
    try:
        with streams[0], streams[1], contextlib.chdir(os.getcwd()), warnings.catch_warnings():
            yield
    finally:
        os.dup2(stdout, 1)
        os.close(stdout)
        sys.setrecursionlimit(max(depth, sys.getrecursionlimit()))
        if changed := _torch_defaults() != before:
            torch = sys.modules["torch"]
            torch.set_default_dtype(getattr(torch, before[0].removeprefix("torch.")))
            torch.set_default_device(None if before[1] == "cpu" else before[1])
            torch.set_grad_enabled(before[2])
    if changed:
        raise ValueError("sets torch's default type or device or switches gradients off, for the whole process")


def place_of(error: BaseException) -> str | None:
    """File and line in one's own code where an error arose; None where it did not."""
    files = {str(module.__file__) for module in _modules.values()}
    codes = {code for whose, _ in _named.values() for code in _codes(whose)}
    frames = [(frame.f_code, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    found = [(code.co_filename, line) for code, line in frames if code.co_filename in files or code in codes]
    return f"{found[-1][0]}, line {found[-1][1]}" if found else None


def _codes(whose: Any) -> list[CodeType]:
    """What a program's own class, object or function runs; nothing of ours."""
    made_of = getattr(whose, "__mro__", type(whose).__mro__)
    kinds = [kind for kind in made_of if kind.__module__.partition(".")[0] not in OURS]
    methods = [one for kind in kinds for one in vars(kind).values()] if not inspect.isfunction(whose) else [whose]
    made = [one for one in map(inspect.unwrap, methods) if hasattr(one, "__code__")]
    # A router of one's own has our `forward` among its methods.
    return [one.__code__ for one in made if str(one.__module__).partition(".")[0] not in OURS]


@contextlib.contextmanager
def as_usage_errors(where: str | None = None) -> Iterator[None]:
    """Whatever own code raises becomes a UsageError with file and line.

    where  the file that is being executed, or what it is said of where no line of own code is known
    """
    try:
        yield
    except SakdError:
        raise
    except SyntaxError as error:
        raise UsageError(f"{error.filename}, line {error.lineno}: {error.msg}", GUIDE) from None
    except (Exception, SystemExit) as error:
        lines = [line for file, line, *_ in traceback.extract_tb(error.__traceback__) if file == where]
        place = f"{where}, line {lines[-1]}" if lines else place_of(error) or where
        if is_out_of_memory(error) or place is None or (isinstance(error, SystemExit) and where is None):
            raise
        raise UsageError(f"{place}: {type(error).__name__}: {first_line(Exception(error))}", GUIDE) from error


def line_of(found: Any, *methods: str) -> str:
    """File and line of own code, of the first of these methods that it has; empty for code of ours."""
    kind = found if inspect.isclass(found) or inspect.isfunction(found) else type(found)
    if str(getattr(kind, "__module__", "")).partition(".")[0] in OURS:
        return ""
    own = [getattr(kind, name) for name in methods if name in vars(kind)]
    code = getattr(inspect.unwrap(own[0]) if own else kind, "__code__", None)
    try:
        return f"{inspect.getsourcefile(kind)}, line {code.co_firstlineno if code else inspect.getsourcelines(kind)[1]}"
    except (OSError, TypeError):
        return ""


def _parameters(found: Any, given: Iterable[str]) -> dict[str, inspect.Parameter]:
    """What own code takes by name; a constructor of ours takes only what is given."""
    maker = next((kind for kind in getattr(found, "__mro__", ()) if "__init__" in vars(kind)), found)
    try:
        taken = inspect.signature(found, eval_str=True).parameters
    except (NameError, TypeError, ValueError) as error:
        raise ValueError(f"has a signature that cannot be read ({first_line(error)})") from None
    ours = maker.__module__.partition(".")[0] in OURS
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {n: p for n, p in taken.items() if p.kind in named and (n in given or not ours)}


def settings_class(name: str, found: Any, base: type[Kind], given: Iterable[str]) -> type[Kind]:
    """The settings of own code: the class that it carries as `settings`, or its arguments with their defaults.

    base   what all settings of the kind are; given: names of arguments that are no settings
    Raises ValueError where there is something that nobody would give.
    """
    declared, fields = getattr(found, "settings", None), dict[str, Any]()
    if declared is not None and not (isinstance(declared, type) and issubclass(declared, base)):
        raise ValueError(f"carries `settings` that are no {base.__name__}")
    if inspect.isabstract(found):
        raise ValueError(f"has no method {' and no '.join(sorted(found.__abstractmethods__))}")
    for key, one in _parameters(found, given).items() if declared is None else ():
        if key in given:
            continue
        if one.default is inspect.Parameter.empty or key == "name" or key.startswith(("_", "model_")):
            told = ", ".join(given)
            raise ValueError(f"takes {key!r}, which is neither of {told}, nor a setting with a default and a free name")
        known, said = base.model_fields.get(key), one.annotation is not inspect.Parameter.empty
        plain = one.annotation if said else type(one.default) if one.default is not None else Any
        fields[key] = (known.rebuild_annotation() if known is not None else plain, one.default)
    about: Any = {"__doc__": getattr(found, "__doc__", None) or "", "__module__": __name__}
    try:
        kind: type[Kind] = create_model(
            getattr(found, "__name__", "Own"), __base__=declared or base, name=(str, name), **fields, **about
        )
        kind.model_rebuild()
        kind()
    except (PydanticUserError, TypeError, ValueError) as error:
        raise ValueError(f"has settings that are none ({one_line(error, 120)})") from None
    return kind


def construct(found: Any, config: Config, given: Mapping[str, Any]) -> Any:
    """What own code makes of what is given and of its settings. UsageError, naming file and line, where it fails."""
    known = type(config).model_fields
    taken = {key: given[key] if key in given else getattr(config, key, None) for key in _parameters(found, given)}
    with as_usage_errors(getattr(sys.modules.get(found.__module__), "__file__", None)), contained():
        one = found(**{key: value for key, value in taken.items() if key in given or key in known})
    if {"Router", "Distiller"} & ancestors(found) and "_parameters" not in vars(one):
        text = f"{found.__name__}.__init__ must begin with super().__init__(spots)"
        raise UsageError(f"{line_of(found, '__init__')}: {text}", GUIDE)
    if any("Lazy" in kind for layer in getattr(one, "modules", tuple)() for kind in ancestors(type(layer))):
        text = f"{found.__name__} has layers of unknown size: give it, as spots[0].student_shape[0], not nn.Lazy..."
        raise UsageError(f"{line_of(found, '__init__')}: {text}", GUIDE)
    return one


def ancestors(found: object) -> set[str]:
    """Names of the classes that a class is made of: what it is a kind of, without torch."""
    return {kind.__name__ for kind in found.__mro__} if isinstance(found, type) else set()


def own_names(values: Iterable[Any]) -> list[str]:
    """The names of own code in settings: texts, and lists of them."""
    texts = [text for value in values for text in (value if isinstance(value, list | tuple) else [value])]
    return [part for text in texts if isinstance(text, str) for part in text.split("+") if of_file(part)]


def require_files(values: Iterable[Any]) -> None:
    """Raise UsageError where settings name what another process cannot find: an object of this one."""
    for name in own_names(values):
        if name.startswith(PYTHON):
            text = f"{name.removeprefix(PYTHON)} is known to this process alone, and every run has one of its own"
            raise UsageError(text, "write it into a file, import it from there, and give that")


def name_of(given: Any) -> str:
    """The name in settings of an object of a program: by its file where it has one, so that others may find it there.

    A class, a function, or an object, which stands for a function that returns a copy of it.
    """
    kind = given if callable(given) and hasattr(given, "__qualname__") else type(given)
    if kind is not given and (wrong := {"Router", "Distiller"} & ancestors(kind)):
        key = "router" if "Router" in wrong else "method"
        text = f"{key}: give the class {kind.__name__}, not an object of it"
        raise UsageError(text, f"its settings go by settings={{'{key}.NAME': VALUE}}")
    made, name = (given, kind.__name__) if kind is given else (lambda **_: copy.deepcopy(given), kind.__name__.lower())
    place = None
    with contextlib.suppress(TypeError, OSError):  # typed into an interpreter
        place = inspect.getsourcefile(kind) if kind is given and kind.__qualname__ == kind.__name__ else None
    if place is not None and place.endswith(".py") and os.path.isfile(place):
        name = in_place(f"{place}:{name}")
    else:
        known = [key for key, (whose, _) in _named.items() if whose is given]
        number = sum(key.startswith(f"{PYTHON}{name}") for key in _named)
        name = known[0] if known else f"{PYTHON}{name}{number or ''}"
    _named[name] = given, made
    OBJECTS[name] = made
    return name


def is_object(name: str) -> bool:
    """Whether a name is that of an object which is copied, as a trained network, and not of a class or a function."""
    return name in _named and _named[name][0] is not _named[name][1]


def hashes(values: Iterable[Any], known: Iterable[str]) -> tuple[str, ...] | None:
    """`SHA-256  my.py` of every file that these settings name, or the line that is `known`; None: they name none."""
    paths = {name.rpartition(":")[0] for name in own_names(values) if not name.startswith(PYTHON)}
    lines = {line.partition("  ")[2]: line for line in known}
    return tuple(lines.get(path) or f"{_read(path)[1]}  {path}" for path in sorted(paths)) or None


def changed(known: Iterable[str]) -> list[str]:
    """A line for every file that is no longer what its SHA-256 in the settings says."""
    notes = []
    for digest, _, path in (line.partition("  ") for line in known):
        if (now := _read(path)[1]) != digest:
            notes.append(f"{path}: has changed since this run began (SHA-256 {digest[:12]}, now {now[:12]})")
    return notes
